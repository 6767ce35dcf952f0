"""Dataset: a lazy plan over blocks, and what can be done with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from torchshm._size import parse_limit, parse_size
from torchshm.data.blocks import _plan, _writers
from torchshm.data.blocks._formats import format_of, handed_out, mode_for
from torchshm.data.blocks._functions import check_batch_size, handed_batches
from torchshm.data.blocks._home import home
from torchshm.data.blocks._job import BLOCK, Job
from torchshm.data.blocks._progress import shown
from torchshm.data.blocks._report import describe_plan, describe_run
from torchshm.data.blocks._run import Consumer, Run
from torchshm.data.blocks._sources import Source, only_once
from torchshm.data.blocks._split import Shard

BatchFormat = Literal["numpy", "torch", "arrow", "pandas", "xarray"]
_FORMATS = get_args(BatchFormat)


class Dataset:
    """Rows that are prepared when they are asked for, block by block, by worker processes, in bounded memory.

    Made by :func:`from_arrays`, :func:`read_parquet` and the like. Its methods return a new one and do nothing yet: `iter_batches`,
    `count` and their like run the plan, each time anew.
    """

    def __init__(self, last: _plan.Node, options: dict[str, Any] | None = None) -> None:
        self._last, self._options = last, dict(options or {})
        self._statistics: dict[str, Any] | None = None

    @classmethod
    def _of(cls, source: Source) -> Dataset:
        return cls(_plan.Read(None, source))

    def _then(self, node: _plan.Node) -> Dataset:
        return Dataset(node, self._options)

    def __repr__(self) -> str:
        return (
            f"<torchshm.data.blocks.Dataset: {' -> '.join(stage.label for stage in _plan.lower(self._last))}>"
        )

    # ---- the plan

    def options(
        self,
        *,
        memory: int | str | None = None,
        num_workers: int | None = None,
        block_size: int | str | None = None,
        spill: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        max_retries: int | None = None,
        start_method: str | None = None,
        progress: bool | None = None,
    ) -> Dataset:
        """Say with how much the plan is run.

        Parameters
        ----------
        memory : int or str, optional
            Most memory of the execution: its blocks, and what its workers have beside them. Bytes, as in ``"4GiB"``, or a share of what
            the machine or its cgroup allows. Default: ``"25%"``. Blocks that do not fit go to disk.
        num_workers : int, optional
            Processes that run functions and read files. Default: one for each core that this process may use.
        block_size : int or str, optional
            Bytes of a block, about. Default: ``"128MiB"``, less where the memory is little.
        spill : path, optional
            Directory, on a disk, for what does not fit into memory. Default: that of temporary files.
        seed : int, optional
            Of all that is random, also of ``numpy.random``, ``random`` and torch in the functions. The same seed, data and block size
            give the same rows in the same order, with any number of workers. Default: another one each time.
        max_retries : int, optional
            How often a task is begun again whose worker was killed. Default: 3.
        start_method : {"fork", "spawn"}, optional
            How the executing processes come to be. Default: multiprocessing's.
        progress : bool, optional
            Show on stderr how far each stage is; rich draws it. Where stderr is no terminal the last state is written at the end.
            Default: only on a terminal, and if the environment's ``TORCHSHM_PROGRESS`` is 1.
        """
        given = {
            "memory": None if memory is None else parse_limit(memory),
            "num_workers": num_workers,
            "block_size": None if block_size is None else parse_size(block_size),
            "spill": None if spill is None else os.fspath(spill),
            "seed": seed,
            "max_retries": max_retries,
            "start_method": start_method,
            "progress": progress,
        }
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers is 1 or more, not {num_workers}")
        return Dataset(
            self._last, {**self._options, **{name: each for name, each in given.items() if each is not None}}
        )

    def map_batches(
        self,
        fn: Callable[..., Any],
        *,
        batch_size: int | None = None,
        batch_format: BatchFormat | None = "numpy",
        fn_args: Sequence[Any] = (),
        fn_kwargs: dict[str, Any] | None = None,
        zero_copy_batch: bool = False,
    ) -> Dataset:
        """Replace batches by what a function returns for them.

        Parameters
        ----------
        fn : callable
            Called with a batch: a dict of arrays whose first dimension is that of the rows, or as `batch_format` says. Returns such a dict
            or a table, of as many rows as it likes.
        batch_size : int, optional
            Rows of a batch. Default: as many as stay in a core's cache from one function to the next, about 1 MiB; for tables those of a
            block.
        batch_format : {"numpy", "torch", "arrow", "pandas", "xarray", None}
            None: as the block is.
        fn_args, fn_kwargs : optional
            Further arguments of `fn`.
        zero_copy_batch : bool
            Whether the arrays may be read-only views of the block. Else they may be written to, and nobody else sees it.
        """
        return self._apply("map_batches", fn, batch_size, batch_format, fn_args, fn_kwargs, zero_copy_batch)

    def filter(
        self,
        fn: Callable[..., Any],
        *,
        batch_size: int | None = None,
        batch_format: BatchFormat | None = "numpy",
        fn_args: Sequence[Any] = (),
        fn_kwargs: dict[str, Any] | None = None,
    ) -> Dataset:
        """Keep the rows of which a function says so: called with a batch, it returns one bool for each row."""
        return self._apply("filter", fn, batch_size, batch_format, fn_args, fn_kwargs, True)

    def flat_map(
        self, fn: Callable[..., Any], *, fn_args: Sequence[Any] = (), fn_kwargs: dict[str, Any] | None = None
    ) -> Dataset:
        """Replace each row, a dict, by the rows that a function returns for it: any number of dicts."""
        return self._apply("flat_map", fn, None, "numpy", fn_args, fn_kwargs, False)

    def _apply(
        self,
        kind: str,
        fn: Callable[..., Any],
        batch_size: int | None,
        batch_format: str | None,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None,
        zero_copy: bool,
    ) -> Dataset:
        if not callable(fn):
            raise TypeError(f"{kind} takes a function, not {type(fn).__name__}")
        check_batch_size(batch_size)
        _check_format(batch_format)
        step = _plan.Step(kind, fn, batch_size, batch_format, tuple(args), dict(kwargs or {}), zero_copy)
        return self._then(_plan.Apply(self._last, step))

    def shuffle(self, seed: int | None = None, *, window: int | str | None = None) -> Dataset:
        """Put the rows into a random order.

        Parameters
        ----------
        seed : int, optional
            Of this order. Default: that of the execution.
        window : int or str, optional
            Bytes: rows change places within so much. Each window is read, shuffled and gone before the next but one comes, so nothing
            is written to disk. Default: that of :meth:`window`, else all rows, of which those that do not fit into memory go to disk
            once.
        """
        return self._then(_plan.Shuffle(self._last, seed, None if window is None else parse_size(window)))

    def window(self, size: int | str) -> Dataset:
        """Let what follows work on so many bytes at a time where it would need all rows."""
        return self._then(_plan.Window(self._last, parse_size(size)))

    def repartition(self, num_blocks: int | None = None, *, rows_per_block: int | None = None) -> Dataset:
        """Cut the rows into blocks anew, in their order: so many blocks in all, or so many rows in each but the last."""
        if (num_blocks is None) == (rows_per_block is None):
            raise TypeError("repartition() takes num_blocks or rows_per_block=")
        if (num_blocks or rows_per_block or 0) < 1:
            raise ValueError("repartition() takes a number of 1 or more")
        return self._then(_plan.Repartition(self._last, rows_per_block, num_blocks))

    def repeat(self, times: int | None = None) -> Dataset:
        """Go through all of it so many times, or without end. What is random is drawn anew each time."""
        if times is not None and times < 1:
            raise ValueError(f"repeat() takes a number of 1 or more, or None, not {times}")
        return self._then(_plan.Repeat(self._last, times))

    def zip(self, other: Dataset) -> Dataset:
        """Put the columns of another dataset of as many rows beside these; a name that is taken gets a number."""
        return self._then(_plan.Zip(self._last, other._last))

    # ---- running it

    def _once(self) -> str:
        """Why there is no second epoch; nothing where there is one."""
        return "; ".join(only_once(source) for source in _once_sources(_plan.lower(self._last)))

    def _job(self, workers: int | None = None, seed: int | None = None) -> Job:
        options, stages = self._options, _plan.lower(self._last)
        seed = options.get("seed") if seed is None else seed
        return Job(
            stages=stages,
            memory=options.get("memory") or parse_limit("25%"),
            workers=workers or options.get("num_workers") or len(os.sched_getaffinity(0)),
            seed=drawn_seed() if seed is None else seed,
            block_size=options.get("block_size", BLOCK),
            epochs=_epochs(stages),
            retries=options.get("max_retries", 3),
        )

    def _run(
        self,
        shards: int = 1,
        equal: bool = True,
        epoch: int = 0,
        workers: int | None = None,
        name: str | None = None,
        prefix: str | None = None,
        seed: int | None = None,
    ) -> Run:
        job = self._job(workers, seed)
        _check_once(job)
        job.epoch, job.shards, job.equal = epoch, shards, equal
        place = home(self._options.get("spill"), job.memory, name)
        job.store, job.directory = place.store.name, place.directory
        if prefix is not None:  # a loader asks for its next epoch when it has all of the last one
            for before in list(place.shares):
                place.leave(before)
        job.prefix = place.enter(job.limit, prefix)
        try:
            return Run(job, place, self._options.get("start_method"))
        except BaseException:
            place.leave(job.prefix)
            raise

    def _blocks(
        self,
        workers: int | None = None,
        epoch: int = 0,
        batch_format: str | None = None,
        seed: int | None = None,
    ) -> Generator[Any, None, None]:
        run = self._run(workers=workers, epoch=epoch, seed=seed)
        with contextlib.closing(run), shown(self._options.get("progress"), run.job) as tell:
            consumer = Consumer(run.job.store, run.job.prefix, 0, epoch, run, mode=mode_for(batch_format))
            try:
                for value, begin, end in consumer:
                    yield format_of(value).slice(value, begin, end)
            finally:
                self._statistics = consumer.look()
                tell(self._statistics)

    def _shared_blocks(
        self, name: str, prefix: str, epoch: int, shard: int, shards: int, batch_format: str | None, seed: int
    ) -> Iterator[Any]:
        """A part of the blocks of an execution that the process with the first part runs."""
        run = self._run(shards, False, epoch, name=name, prefix=prefix, seed=seed) if shard == 0 else None
        consumer = Consumer(name, prefix, shard, epoch, run, mode=mode_for(batch_format))
        complete = False
        try:
            for value, begin, end in consumer:
                yield format_of(value).slice(value, begin, end)
            complete = True
        finally:
            consumer.leave()
            if run is not None:
                if complete:
                    run.finish()
                else:
                    run.close()

    def iter_blocks(self, *, batch_format: BatchFormat | None = None) -> Iterator[Any]:
        """Run the plan; yields each block as it is, or as `batch_format` says. Arrays are read-only, tensors copy-on-write."""
        for value in self._blocks(batch_format=batch_format):
            yield handed_out(value, batch_format)

    def iter_batches(
        self,
        batch_size: int | None = 256,
        *,
        num_workers: int | None = None,
        batch_format: BatchFormat | None = "numpy",
        drop_last: bool = False,
    ) -> Iterator[Any]:
        """Run the plan; yields batches of `batch_size` rows.

        Parameters
        ----------
        batch_size : int, optional
            Rows; None: those of a block. The last batch may have fewer.
        num_workers : int, optional
            As in :meth:`options`.
        batch_format : {"numpy", "torch", "arrow", "pandas", "xarray", None}
            None: as the block is.
        drop_last : bool
            Leave out the last batch when it has fewer rows.

        Yields
        ------
        dict or table
            Arrays lie in shared memory, read-only, and tensors copy-on-write. It is used again when the last of them has gone: a loop that
            keeps all batches keeps all blocks.
        """
        check_batch_size(batch_size)
        values = self._blocks(num_workers, batch_format=batch_format)
        yield from handed_batches(values, batch_size, batch_format, drop_last)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Run the plan; yields each row as a dict."""
        from torchshm.data.blocks._functions import rows_of

        for value in self._blocks():
            yield from rows_of(value)

    def take(self, count: int = 20) -> list[dict[str, Any]]:
        """The first rows, as dicts."""
        found: list[dict[str, Any]] = []
        if count < 1:
            return found
        for row in self.iter_rows():
            found.append(row)
            if len(found) == count:
                break
        return found

    def count(self) -> int:
        """The number of rows."""
        return sum(format_of(value).rows(value) for value in self._blocks())

    def split(self, ranks: int, *, equal: bool = True) -> list[Shard]:
        """Run the plan once for several consumers, such as the ranks of a training on this machine.

        Parameters
        ----------
        ranks : int
        equal : bool
            Every shard gets as many rows: a part of each block, whose rest of fewer than `ranks` rows is left out. Else blocks go
            to the shards in turn.

        Returns
        -------
        list of Shard
            They can be sent to other processes. The execution begins now, and is this process's child.
        """
        if ranks < 1:
            raise ValueError(f"split() takes a number of 1 or more, not {ranks}")
        run = self._run(ranks, equal)
        once = self._once()
        return [Shard((run.job.store, run.job.prefix), rank, ranks, run, once) for rank in range(ranks)]

    def to_dataset(
        self,
        batch_size: int | None = None,
        *,
        batch_format: BatchFormat | None = "torch",
        drop_last: bool = False,
    ) -> Any:
        """A :class:`torch.utils.data.IterableDataset` for DataLoader and for torchdata's StatefulDataLoader.

        Parameters
        ----------
        batch_size : int, optional
            Yield batches of so many rows; give the DataLoader ``batch_size=None`` then. Default: single rows, as dicts.
        batch_format, drop_last : optional
            As in :meth:`iter_batches`.

        Notes
        -----
        Workers of a DataLoader get the blocks of one execution in turn; they only hand them on, so one or two are enough, and the plan's
        own ``num_workers`` do the work. Its state is the seed, the epoch and the batches that were yielded: to go on from there, what
        comes before is made again and passed over. Where no seed is given, one is drawn here.

        Raises
        ------
        ValueError
            For tables without a `batch_size`: single rows are dicts.
        """
        from torchshm.data.blocks._torch import IterableDataset

        check_batch_size(batch_size)
        _check_rows(batch_size, batch_format)
        return IterableDataset(self, batch_size, batch_format, drop_last)

    def to_node(
        self,
        batch_size: int | None = None,
        *,
        batch_format: BatchFormat | None = "torch",
        drop_last: bool = False,
    ) -> Any:
        """A :class:`torchdata.nodes.BaseNode`, for torchdata's Loader, Prefetcher and the like; of torchdata 0.10 or newer.

        Parameters
        ----------
        batch_size, batch_format, drop_last : optional
            As in :meth:`to_dataset`.

        Notes
        -----
        Each reset is the next epoch, of the seed that was given or, once, drawn. Its state is that of :meth:`to_dataset`.

        Raises
        ------
        ImportError
            Where torchdata has no nodes.
        """
        try:
            from torchshm.data.blocks._node import Node
        except ImportError as error:
            raise ImportError(
                f"to_node() needs torchdata.nodes: pip install 'torchdata>=0.10' ({error})"
            ) from error

        return Node(self.to_dataset(batch_size, batch_format=batch_format, drop_last=drop_last))

    # ---- files

    def write_parquet(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
    ) -> list[str]:
        """Run the plan; its workers write each block as a file of a folder.

        Parameters
        ----------
        folder : path
            It is made where there is none.
        overwrite : bool
            Whether files ``part-*.parquet`` of before are replaced, when the new ones are complete.
        **options
            Those of :func:`pyarrow.parquet.write_table`.

        Returns
        -------
        list of str
            The paths of ``part-00000.parquet`` and so on, in the order of the rows. Nothing has such a name before all is written.

        Raises
        ------
        FileExistsError
            When Parquet files are in the folder already.
        """
        _writers.need_arrow()
        drafts = _writers.parquet_drafts(folder, overwrite)
        step = _plan.Step(
            "map_batches", _writers.PartWriter(drafts, options), batch_format="arrow", zero_copy=True
        )
        whole = _plan.Repartition(self._last, None, None)  # each block as it is
        with drafts, contextlib.closing(self._then(_plan.Apply(whole, step))._blocks()) as written:
            return _writers.publish_parts(drafts, written, overwrite)

    def write_npy(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, str]:
        """Run the plan; write each column as an array, ``<column>.npy`` in a folder. Only a block at a time is in memory.

        Parameters
        ----------
        folder : path
            It is made where there is none.
        overwrite : bool
            Whether files of these names are replaced, when the new ones are complete.

        Returns
        -------
        dict of str to str
            The path of each column, for ``np.load(path, mmap_mode="r")``; none where there are no rows.

        Raises
        ------
        FileExistsError
            When .npy files are in the folder already.
        TypeError
            For columns of objects.
        ValueError
            When a column's dtype or shape is not the same in all blocks, or its name can't be a file's.
        """
        return _writers.write_npy(lambda: self._blocks(batch_format="numpy"), folder, overwrite)

    def write_zarr(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, rows_per_chunk: int | None = None
    ) -> None:
        """Run the plan; write a Zarr group with an array for each column, or with the variables of xarray datasets.

        Parameters
        ----------
        path : path
            Of the group. Nothing is there before all is written.
        overwrite : bool
            Whether a Zarr group that is there is replaced, when the new one is complete.
        rows_per_chunk : int, optional
            Default: the rows of the first block.

        Raises
        ------
        FileExistsError
            When something is there already, with `overwrite` also when it is no Zarr group.
        TypeError
            For columns of objects.
        ValueError
            When a column's dtype or shape is not the same in all blocks, or its name can't be a file's.
        """
        check_batch_size(rows_per_chunk, "rows_per_chunk")
        _writers.write_zarr(self._blocks, path, overwrite, rows_per_chunk)

    # ---- seen

    def explain(self) -> str:
        """Describe the plan: its stages, with the functions that are fused; after a run also what each has done and cost."""
        text = describe_plan(self._job())
        return text if self._statistics is None else f"{text}\n\n{describe_run(self._statistics)}"


def _epochs(stages: list[_plan.Stage]) -> dict[int, int | None]:
    """How often each source is read."""
    times: dict[int, int | None] = {}

    def visit(index: int, count: int | None) -> None:
        stage = stages[index]
        if stage.kind == "repeat":
            count = None if count is None or stage.times is None else count * stage.times
        if not stage.inputs:
            times[index] = count
        for before in stage.inputs:
            visit(before, count)

    visit(len(stages) - 1, 1)
    return times


def _check_format(name: str | None) -> None:
    if name not in (*_FORMATS, None):
        raise ValueError(f"batch_format is one of {', '.join(map(repr, _FORMATS))} and None, not {name!r}")


def _check_rows(batch_size: int | None, batch_format: str | None) -> None:
    _check_format(batch_format)
    if batch_size is None and batch_format not in ("numpy", "torch"):
        raise ValueError(
            f"single rows are dicts, of numpy or torch: give a batch_size for batch_format={batch_format!r}"
        )


def drawn_seed() -> int:
    """One that nobody gave."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def _once_sources(stages: list[_plan.Stage]) -> list[Source]:
    return [stage.source for stage in stages if stage.source is not None and stage.source.once]


def _check_once(job: Job) -> None:
    """Raise ValueError where a source would be gone through again that can't be."""
    seen: list[Source] = []
    for index, stage in enumerate(job.stages):
        source = stage.source
        if source is None or not source.once:
            continue
        if job.epochs[index] != 1 or any(source is each for each in seen):
            raise ValueError(only_once(source))
        seen.append(source)
