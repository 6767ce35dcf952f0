"""Datasets for torch's DataLoader, torchdata's StatefulDataLoader and torchdata.nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.utils.data

from torchshm.data.blocks._dataset import drawn_seed
from torchshm.data.blocks._functions import handed_batches

if TYPE_CHECKING:
    from torchshm.data.blocks._dataset import Dataset


class IterableDataset(torch.utils.data.IterableDataset[Any]):
    """Batches, or rows, of a :class:`Dataset`; from :meth:`Dataset.to_dataset`.

    In a DataLoader with workers each of them gets a part of the rows of one execution, which the first of them starts. Each iteration is
    an epoch, and another order where the plan shuffles; with workers it follows torch's seed (``torch.manual_seed``),
    unless `set_epoch` says which one is next.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int | None,
        batch_format: str | None,
        drop_last: bool,
        epoch: int = 0,
    ) -> None:
        self._dataset, self._batch_size, self._batch_format = dataset, batch_size, batch_format
        self._drop_last, self._epoch = drop_last, epoch
        given = dataset._options.get("seed")
        # Drawn here where none was given, so that a state tells how to make the same rows again.
        self._seed = drawn_seed() if given is None else given
        self._token = os.urandom(3).hex()  # of this dataset, also in other processes
        self._iterations = 0
        self._begun = self._chosen = False

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that epoch."""
        self._epoch, self._chosen = epoch, True

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epoch
        info = torch.utils.data.get_worker_info()
        if info is not None and not self._chosen:
            # Workers that are started anew have all counted nothing: their DataLoader's seed is another one each time.
            epoch += (info.seed - info.id) & 0xFFFFFFFFFFFF
        self._epoch += 1
        return _Iterator(self, epoch)

    def _values(self, epoch: int, seed: int) -> Iterator[Any]:
        if self._begun and (once := self._dataset._once()):
            raise ValueError(once)
        self._begun = True
        info = torch.utils.data.get_worker_info()
        if info is None:
            return self._dataset._blocks(epoch=epoch, batch_format=self._batch_format, seed=seed)
        self._iterations += 1
        # The same in all workers of this DataLoader, and in no others.
        name = f"blocks-loader-{self._token}-{os.getppid()}-{(info.seed - info.id) & 0xFFFFFFFFFFFF:x}"
        return self._dataset._shared_blocks(
            name, f"i{self._iterations}.", epoch, info.id, info.num_workers, self._batch_format, seed
        )


class _Iterator:
    """Goes on from where its state was taken: what came before is made again, and passed over."""

    def __init__(self, dataset: IterableDataset, epoch: int) -> None:
        self._dataset, self._epoch, self._seed = dataset, epoch, dataset._seed
        self._done = self._skip = 0
        self._items: Iterator[Any] | None = None

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        if self._items is None:
            self._items = self._run()
        item = next(self._items)
        self._done += 1
        return item

    def _run(self) -> Iterator[Any]:
        dataset, size = self._dataset, self._dataset._batch_size
        batches = handed_batches(
            dataset._values(self._epoch, self._seed),
            size or 1,
            dataset._batch_format,
            dataset._drop_last,
            self._skip,
        )
        for batch in batches:
            yield batch if size is not None else {name: column[0] for name, column in batch.items()}

    def state_dict(self) -> dict[str, int]:
        """Where this iteration is."""
        return {"seed": self._seed, "epoch": self._epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there; epochs that follow have the same seed."""
        self._epoch, self._seed = state["epoch"], state["seed"]
        self._done = self._skip = state["batches"]
        self._dataset._seed = self._seed
        self._dataset.set_epoch(self._epoch + 1)
        self._items = None
