"""Parquet files as a source: row groups in tasks of about a block's size in memory, whatever they take in the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchshm.data.blocks._sources import OpenFile, Source

_OFFSET = 4  # bytes of a row in a column of strings or lists, beside the values
_SOME = 1024  # rows of a file that are looked at for their size
_LARGE = 1.5  # blocks: what is more than that is read in pieces


@dataclass(frozen=True)
class _RowGroups:
    """Of one file, what a task reads; in pieces where that is much more than a block."""

    path: str
    groups: tuple[int, ...]
    rows: int
    nbytes: int  # about, in memory


class ParquetSource(Source):
    """Row groups of Parquet files, as Arrow tables."""

    label = "read_parquet"

    def __init__(
        self,
        paths: Sequence[str],
        columns: Sequence[str] | None,
        target: int = 0,
        tasks: Sequence[_RowGroups] = (),
    ) -> None:
        self._paths, self._columns, self._target, self._tasks = list(paths), columns, target, list(tasks)
        self._open = OpenFile()

    def _file(self, path: str) -> Any:
        return self._open.get(path, _opened)

    def plan(self, target: int) -> Source:
        tasks: list[_RowGroups] = []
        for path in self._paths:
            file = self._file(path)
            groups: list[int] = []
            rows = size = 0
            for group, (count, found) in enumerate(_row_groups(file, self._columns)):
                if groups and size + found > target:
                    tasks.append(_RowGroups(path, tuple(groups), rows, size))
                    groups, rows, size = [], 0, 0
                groups.append(group)
                rows += count
                size += found
            if groups:
                tasks.append(_RowGroups(path, tuple(groups), rows, size))
        self._open.close()
        return ParquetSource(self._paths, self._columns, target, tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def read(self, task: int) -> Iterator[Any]:
        import pyarrow as pa

        what = self._tasks[task]
        file, groups = self._file(what.path), list(what.groups)
        per_row = self._per_row(file, what)
        if what.rows * per_row <= _LARGE * self._target:
            yield file.read_row_groups(groups, columns=self._columns, use_threads=False)
            return
        rows = max(1, int(self._target / per_row))
        for batch in file.iter_batches(rows, groups, self._columns, use_threads=False):
            yield pa.Table.from_batches([batch])

    def _per_row(self, file: Any, what: _RowGroups) -> float:
        """Bytes in memory: strings that are written once in the file, and many times in memory, are looked at."""
        import pyarrow as pa

        types = [field.type for field in file.schema_arrow]
        if any(map(pa.types.is_dictionary, types)):
            return 0.0  # each piece would have the whole dictionary
        if not any(map(_has_no_width, types)):
            return what.nbytes / max(what.rows, 1)
        some = next(file.iter_batches(_SOME, list(what.groups), self._columns, use_threads=False), None)
        return some.nbytes / some.num_rows if some is not None and some.num_rows else 0.0

    def nbytes(self, task: int) -> int | None:
        return self._tasks[task].nbytes


def _opened(path: str) -> Any:
    import pyarrow.parquet as pq

    try:
        # Mapped, its bytes are not copied before they are decoded.
        return pq.ParquetFile(path, memory_map=True)
    except OSError:  # a file system without maps, or no file
        return pq.ParquetFile(path)


def _has_no_width(kind: Any) -> bool:
    try:
        return not kind.bit_width
    except ValueError:
        return True


def _row_groups(file: Any, columns: Sequence[str] | None) -> Iterator[tuple[int, int]]:
    """Rows of each row group, and about how many bytes they are in memory: numbers take all of theirs, whatever they take in the file."""
    chosen = None if columns is None else set(columns)
    fixed = {
        field.name: field.type.bit_width / 8 for field in file.schema_arrow if not _has_no_width(field.type)
    }
    per_row, encoded = 0.0, []
    for index in range(len(file.schema.names)):
        path = file.schema.column(index).path
        names = path.split(".")
        if chosen is not None and not any(
            ".".join(names[:depth]) in chosen for depth in range(1, len(names) + 1)
        ):
            continue
        if path in fixed:
            per_row += fixed[path]
        else:
            per_row += _OFFSET
            encoded.append(index)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        values = sum(group.column(index).total_uncompressed_size for index in encoded)
        yield group.num_rows, int(group.num_rows * per_row) + values
