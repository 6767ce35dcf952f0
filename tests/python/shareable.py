"""Objects of the libraries that people hold data in: how each is made, compared, and which of its memory belongs in the pool."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse
import xarray as xr

N = 50_000


@dataclasses.dataclass
class Case:
    make: Callable[[], Any]
    memory: Callable[[Any], list[Any]]  # arrays and Arrow buffers that belong in the pool
    equal: Callable[[Any, Any], Any] = lambda got, wanted: got.equals(wanted)


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def words(n: int = N) -> list[str]:
    return [f"word {i % 997}" for i in range(n)]


def buffers(x: Any) -> list[Any]:
    """Of an Arrow array or of all chunks and columns."""
    if isinstance(x, pa.Buffer):
        return [x]
    if isinstance(x, pa.Array):
        return [buffer for buffer in x.buffers() if buffer is not None and buffer.size]
    if isinstance(x, pa.ChunkedArray):
        return [buffer for chunk in x.chunks for buffer in buffers(chunk)]
    return [buffer for column in x.columns for buffer in buffers(column)]


# ---- pandas and xarray


def mixed_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "a": rng().random(N),
            "b": rng().random(N),
            "i": rng().integers(0, 99, N),
            "flag": rng().random(N) > 0.5,
            "when": pd.date_range("2000", periods=N, freq="s", tz="Europe/Berlin"),
            "kind": pd.Categorical(words()),
            "nullable": pd.array([None, *range(N - 1)], dtype="Int64"),
            "text": pd.array(words(), dtype="str"),
            "arrow": pd.array(rng().random(N), dtype=pd.ArrowDtype(pa.float64())),
            "period": pd.period_range("2000", periods=N, freq="s"),
        },
        index=pd.Index(rng().random(N), name="at"),
    )


def frame_memory(x: pd.DataFrame) -> list[Any]:
    return [
        x["a"].to_numpy(),
        x["b"].to_numpy(),
        x["i"].to_numpy(),
        x["flag"].to_numpy(),
        x["when"].array._ndarray,
        x["kind"].array.codes,
        x["nullable"].array._data,
        x["nullable"].array._mask,
        *buffers(x["text"].array._pa_array),
        *buffers(x["arrow"].array._pa_array),
        x["period"].array._ndarray,
        x.index.to_numpy(),
    ]


def frames_equal(got: pd.DataFrame, wanted: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(got, wanted)
    return got.attrs == wanted.attrs


def dataset() -> xr.Dataset:
    x = xr.Dataset(
        {
            "temperature": (("time", "x"), rng().random((N // 10, 10)), {"units": "K"}),
            "count": ("time", rng().integers(0, 9, N // 10)),
        },
        {"time": pd.date_range("2000", periods=N // 10, freq="h"), "x": np.arange(10) * 0.5},
        {"title": "a field", "table": np.arange(9000.0)},
    )
    x["temperature"].encoding = {"zlib": True, "dtype": "float32", "_FillValue": -1.0}
    return x


def datasets_identical(got: Any, wanted: Any) -> bool:
    xr.testing.assert_identical(got, wanted)
    encodings = [[v.encoding for v in each.variables.values()] for each in (got, wanted)]
    return encodings[0] == encodings[1] and list(got.indexes) == list(wanted.indexes)


def stacked() -> xr.Dataset:
    pairs = pd.MultiIndex.from_product([range(100), words(N // 100)], names=["p", "q"])
    return xr.Dataset({"a": ("x", rng().random(N))}, xr.Coordinates.from_pandas_multiindex(pairs, "x"))


def stacked_memory(x: xr.Dataset) -> list[Any]:
    return [x["a"].values, *x.indexes["x"].codes]


def climate_calendar() -> xr.DataArray:
    times = xr.date_range("2000", periods=360, freq="D", calendar="360_day", use_cftime=True)
    return xr.DataArray(rng().random((360, 100)), {"time": times}, ("time", "x"))


# ---- Arrow


def table() -> pa.Table:
    texts = pa.array([None, *words(N - 1)])
    return pa.table(
        {
            "f": rng().random(N),
            "text": texts,
            "kind": texts.dictionary_encode(),
            "list": pa.array([[i, i + 1] for i in range(N)]),
            "struct": pa.array([{"a": i, "b": str(i)} for i in range(N)]),
            "flag": pa.array([True, None, False, True] * (N // 4)),
            "view": texts.cast(pa.string_view()),
        },
        metadata={"source": "here"},
    )


def chunked() -> pa.ChunkedArray:
    return pa.chunked_array([rng().random(N), rng().random(N // 2)])


def arrow_equal(got: Any, wanted: Any) -> bool:
    same = got.equals(wanted)
    if isinstance(got, pa.Table):
        same = same and got.schema.equals(wanted.schema, check_metadata=True)
    return same


# ---- the rest


@dataclasses.dataclass
class Sample:
    fields: dict[str, Any]
    name: str


class Slotted:
    __slots__ = ("data", "name")

    def __init__(self, data: np.ndarray, name: str) -> None:
        self.data, self.name = data, name


class OutOfBand:
    """Bytes that pickle by PEP 574 and by nothing else."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OutOfBand, (pickle.PickleBuffer(self.data) if protocol >= 5 else bytes(self.data),)


def nested() -> dict[str, Any]:
    return {
        "a": [rng().random(N), (rng().random(N), "x")],
        7: Sample({"s": Slotted(rng().random(N), "n")}, "m"),
    }


def nested_memory(x: Any) -> list[Any]:
    return [x["a"][0], x["a"][1][0], x[7].fields["s"].data]


def nested_equal(got: Any, wanted: Any) -> bool:
    pairs = zip(nested_memory(got), nested_memory(wanted), strict=True)
    return all(np.array_equal(g, w) for g, w in pairs) and got["a"][1][1] == "x" and got[7].name == "m"


def sparse_equal(got: Any, wanted: Any) -> bool:
    return type(got) is type(wanted) and got.shape == wanted.shape and (got != wanted).nnz == 0


CASES = {
    "pandas frame": Case(mixed_frame, frame_memory, frames_equal),
    "pandas series": Case(
        lambda: pd.Series(rng().random(N), name="s"),
        lambda x: [
            x.to_numpy(),
        ],
    ),
    "pandas index": Case(lambda: pd.Index(rng().random(N)), lambda x: [x.to_numpy()]),
    "pandas text index": Case(lambda: pd.Index(words()), lambda x: buffers(x.array._pa_array)),
    "pandas multi-index": Case(
        lambda: pd.MultiIndex.from_product([range(100), range(N // 100)]), lambda x: list(x.codes)
    ),
    "pandas text in chunks": Case(
        lambda: pd.concat([pd.Series(words(), dtype="str")] * 2, ignore_index=True),
        lambda x: buffers(x.array._pa_array),
    ),
    "xarray dataset": Case(
        dataset,
        lambda x: [x["temperature"].values, x["count"].values, x.attrs["table"], x.indexes["time"].values],
        datasets_identical,
    ),
    "xarray array": Case(
        lambda: dataset()["temperature"], lambda x: [x.values], lambda got, wanted: got.identical(wanted)
    ),
    "xarray multi-index": Case(stacked, stacked_memory, datasets_identical),
    "xarray climate calendar": Case(
        climate_calendar, lambda x: [x.values], lambda got, wanted: got.identical(wanted)
    ),
    "Arrow array": Case(lambda: pa.array([None, *rng().random(N)]), buffers, arrow_equal),
    "Arrow chunked array": Case(chunked, buffers, arrow_equal),
    "Arrow table": Case(table, buffers, arrow_equal),
    "Arrow batch": Case(lambda: table().combine_chunks().to_batches()[0], buffers, arrow_equal),
    "Arrow buffer": Case(lambda: pa.py_buffer(rng().random(N).tobytes()), buffers, arrow_equal),
    "scipy csr": Case(
        lambda: scipy.sparse.random(3000, 3000, 0.01, "csr", rng=rng()),
        lambda x: [x.data, x.indices, x.indptr],
        sparse_equal,
    ),
    "scipy coo": Case(
        lambda: scipy.sparse.coo_array(scipy.sparse.random(3000, 3000, 0.01, "coo", rng=rng())),
        lambda x: [x.data, *x.coords],
        sparse_equal,
    ),
    "nested": Case(nested, nested_memory, nested_equal),
    "out of band": Case(
        lambda: OutOfBand(bytes(range(256)) * 200),
        lambda x: [x.data],
        lambda got, wanted: bytes(got.data) == wanted.data,
    ),
}

try:
    import polars as pl
except ImportError:
    pass
else:

    def _polars_frame() -> Any:
        return pl.DataFrame(
            {
                "f": rng().random(N),
                "text": [None, *words(N - 1)],
                "list": [[i, i + 1] for i in range(N)],
                "when": pl.datetime_range(
                    pl.datetime(2000, 1, 1),
                    pl.datetime(2010, 1, 1),
                    f"{3652 * 86400 // (N - 1)}s",
                    eager=True,
                )[:N],
                "flag": [True, None] * (N // 2),
                "struct": [{"a": i, "b": "x" * 20} for i in range(N)],
                "rising": pl.Series(range(N)).set_sorted(),
            }
        )

    def _polars_memory(x: Any) -> list[Any]:
        newest = pl.CompatLevel.newest()
        series = [x] if isinstance(x, pl.Series) else x.get_columns()
        return [b for s in series for c in s.get_chunks() for b in buffers(c.to_arrow(compat_level=newest))]

    def _polars_equal(got: Any, wanted: Any) -> bool:
        same = got.equals(wanted, null_equal=True)
        if isinstance(got, pl.DataFrame):
            return same and got.schema == wanted.schema and got.flags == wanted.flags
        return same and (got.name, got.dtype, got.flags) == (wanted.name, wanted.dtype, wanted.flags)

    CASES["polars frame"] = Case(_polars_frame, _polars_memory, _polars_equal)
    CASES["polars series"] = Case(lambda: pl.Series("s", rng().random(N)), _polars_memory, _polars_equal)
    CASES["polars chunks"] = Case(
        lambda: pl.concat([pl.Series("s", words())] * 2, rechunk=False), _polars_memory, _polars_equal
    )

try:
    import awkward as ak
except ImportError:
    pass
else:
    CASES["awkward"] = Case(
        lambda: ak.Array({"x": ak.unflatten(rng().random(N), 10), "y": np.arange(N // 10)}),
        lambda x: list(ak.to_buffers(x)[2].values()),
        lambda got, wanted: ak.array_equal(got, wanted) and got.type == wanted.type,
    )

try:
    import datasets
except ImportError:
    pass
else:
    CASES["Hugging Face dataset"] = Case(
        lambda: datasets.Dataset.from_dict({"i": list(range(N)), "text": words()}),
        lambda x: buffers(x.data.table),
        lambda got, wanted: got.features == wanted.features and got.data.table.equals(wanted.data.table),
    )
