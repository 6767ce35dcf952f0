"""The user's functions: rows in batches for them, and what they return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from torchshm.data.blocks._formats import checked, convert, format_of, handed_out, with_rows_of
from torchshm.data.blocks._plan import Step
from torchshm.data.blocks._rows import stack, unmasked

CACHED = 1 << 20
"""Bytes of a batch where the user gives no size: what stays in a core's cache from one function to the next."""


def check_batch_size(size: int | None, name: str = "batch_size") -> None:
    """Raise ValueError for what is none."""
    if size is not None and size < 1:
        raise ValueError(f"{name} is 1 or more, or None, not {size}")


def batches(values: Iterator[Any], size: int | None, cached: bool) -> Iterator[Any]:
    """The rows in batches of `size`; None: as they come, or in pieces that fit into a core's cache."""
    if size is None:
        for value in values:
            found = format_of(value)
            rows = found.rows(value)
            if rows == 0:
                continue
            step = rows
            if cached and found.name == "numpy":
                step = max(1, int(CACHED * rows / max(found.nbytes(value), 1)))
            if step >= rows:
                yield value
            else:
                for begin in range(0, rows, step):
                    yield found.slice(value, begin, min(begin + step, rows))
        return
    kept: list[Any] = []  # fewer than `size` rows
    count = 0
    for value in values:
        found = format_of(value)
        rows, begin = found.rows(value), 0
        while count + rows - begin >= size:
            part = found.slice(value, begin, begin + size - count)
            begin += size - count
            yield found.concat([*kept, part]) if kept else part
            kept, count = [], 0
        if begin < rows:
            kept.append(found.slice(value, begin, rows))
            count += rows - begin
    if kept:
        yield format_of(kept[0]).concat(kept) if len(kept) > 1 else kept[0]


def handed_batches(
    values: Iterator[Any], size: int | None, name: str | None, drop_last: bool = False, skip: int = 0
) -> Iterator[Any]:
    """Batches for a consumer, in the format of that name, but for so many first ones."""
    for batch in batches(values, size, cached=False):
        if drop_last and size is not None and format_of(batch).rows(batch) < size:
            return
        if skip:
            skip -= 1
            continue
        yield handed_out(batch, name)


def _writable(value: Any) -> Any:
    """The batch in memory of its own: what a function writes to it is nobody else's."""
    if format_of(value).name != "numpy":
        return value  # pickled objects come copy-on-write
    return {name: array.copy() for name, array in value.items()}


def apply(step: Step, values: Iterator[Any], first: bool) -> Iterator[Any]:
    """What the function makes of the values; `first`: they lie in a block, or in the source's memory."""
    whole = step.batch_format not in ("numpy", "torch")
    for batch in batches(values, step.batch_size, not whole):
        mine = step.zero_copy or step.kind == "filter"
        given = convert(batch if mine or not first else _writable(batch), step.batch_format)
        if not mine and isinstance(given, dict) and step.batch_format != "torch":
            given = {name: array if array.flags.writeable else array.copy() for name, array in given.items()}
        if step.kind == "map_batches":
            made = checked(_untorched(step.fn(given, *step.args, **step.kwargs)), f"{step.label} returned")
            yield with_rows_of(made, given)
        elif step.kind == "filter":
            yield _filtered(step, batch, step.fn(given, *step.args, **step.kwargs))
        else:
            rows = [new for row in rows_of(given) for new in step.fn(row, *step.args, **step.kwargs)]
            if rows:
                yield stack(rows)


def _untorched(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: each.numpy(force=True)
            if hasattr(each, "numpy") and hasattr(each, "requires_grad")
            else each
            for name, each in value.items()
        }
    return value


def _filtered(step: Step, batch: Any, chosen: Any) -> Any:
    found = format_of(batch)
    mask = unmasked(chosen, f"what {step.label} returned")
    if mask.dtype != np.bool_ or mask.shape != (found.rows(batch),):
        raise ValueError(
            f"{step.label} returned {mask.dtype} of shape {mask.shape} for a batch of {found.rows(batch)} rows: "
            "return one bool for each row"
        )
    return batch if mask.all() else found.take(batch, np.flatnonzero(mask))


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Each row as a dict."""
    columns = format_of(batch).to_numpy(batch)
    for number in range(format_of(batch).rows(batch)):
        yield {name: array[number] for name, array in columns.items()}
