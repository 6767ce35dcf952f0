"""Samples as dicts: the flights out of New York in 2013, row by row, as often as asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_AT_ONCE = 10_000


def rows(count: int) -> Iterator[dict[str, Any]]:
    """`count` new dicts of 20 numbers and short texts each."""
    from torchshm.demo import flights

    table = flights.read().drop(columns="time_hour")
    made = 0
    while made < count:
        begin = made % len(table)
        part = table.iloc[begin : begin + min(_AT_ONCE, count - made)]
        for row in part.to_dict("records"):
            row["id"] = made
            row["text"] = f"flight {row['carrier']} {row['flight']} number {made}"
            made += 1
            yield row
