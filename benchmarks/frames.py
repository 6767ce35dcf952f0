"""A table of mixed columns: a pandas frame that goes whole through a DataLoader worker."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.fields import SampleLoader

ROWS = 1_000_000
COLUMNS = 24


def make_frame(rows: int) -> Any:
    """`rows` x 24: ten float64, four int64, two bool, two datetimes, two categories, two nullable integers, two of text."""
    import pandas as pd

    rng = np.random.default_rng(0)
    words = np.array([f"word {i}" for i in range(1000)], dtype=object)
    columns: dict[str, Any] = {f"float{i}": rng.random(rows) for i in range(10)}
    columns |= {f"int{i}": rng.integers(0, 1 << 40, rows) for i in range(4)}
    columns |= {f"bool{i}": rng.random(rows) < 0.5 for i in range(2)}
    columns |= {
        f"time{i}": pd.date_range("2024", periods=rows, freq="s", tz="UTC" if i else None) for i in range(2)
    }
    columns |= {
        f"category{i}": pd.Categorical.from_codes(rng.integers(0, 1000, rows), words) for i in range(2)
    }
    columns |= {f"nullable{i}": pd.array(rng.integers(0, 99, rows), dtype="Int64") for i in range(2)}
    columns |= {f"text{i}": pd.array(words[rng.integers(0, 1000, rows)], dtype="str") for i in range(2)}
    frame = pd.DataFrame(columns)
    if frame.shape[1] != COLUMNS:
        raise AssertionError(f"{frame.shape[1]} columns")
    return frame


class FrameLoader(SampleLoader):
    """Of a frame of so many rows."""

    def __init__(self, variant: str, rows: int) -> None:
        super().__init__(variant, make_frame(rows))
