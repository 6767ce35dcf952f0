"""What a block may be: a dict of NumPy arrays, an Arrow table, a pandas DataFrame or an xarray Dataset; rows in all of them.

Whatever a format's library is, it is imported when such a value is met, or asked for.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchshm.data.blocks._rows import column, common_dtype, size_of, unmasked

Indices = npt.NDArray[np.integer[Any]]
_ROWS = "torchshm_rows"
"""The attribute of an xarray.Dataset that names the dimension of its rows; consumers do not see it."""


class Format(ABC):
    """What is to be done with blocks of one type; `slice` gives a view where the type has views."""

    name: str

    @abstractmethod
    def matches(self, value: Any) -> bool: ...

    @abstractmethod
    def rows(self, value: Any) -> int: ...

    @abstractmethod
    def nbytes(self, value: Any) -> int: ...

    @abstractmethod
    def slice(self, value: Any, begin: int, end: int) -> Any: ...

    @abstractmethod
    def take(self, value: Any, indices: Indices) -> Any: ...

    @abstractmethod
    def concat(self, values: Sequence[Any]) -> Any: ...

    @abstractmethod
    def to_numpy(self, value: Any) -> dict[str, npt.NDArray[Any]]: ...

    @abstractmethod
    def from_numpy(self, arrays: dict[str, npt.NDArray[Any]]) -> Any: ...

    def merge(self, values: Sequence[Any]) -> Any:
        """The columns of all, side by side; the rows are as many in each."""
        merged: dict[str, npt.NDArray[Any]] = {}
        for value in values:
            for name, array in self.to_numpy(value).items():
                merged[_free(name, merged)] = array
        return self.from_numpy(merged)


def _free(name: str, taken: Any) -> str:
    """The name, or with a number where it is taken, as Ray and pandas have it."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


class NumpyFormat(Format):
    """dict of str to arrays that have the same first dimension."""

    name = "numpy"

    def matches(self, value: Any) -> bool:
        return isinstance(value, dict)

    def rows(self, value: Any) -> int:
        return len(next(iter(value.values()))) if value else 0

    def nbytes(self, value: Any) -> int:
        return sum(
            array.nbytes + (size_of(array.reshape(-1)) if array.dtype.hasobject else 0)
            for array in value.values()
        )

    def slice(self, value: Any, begin: int, end: int) -> Any:
        return {name: array[begin:end] for name, array in value.items()}

    def take(self, value: Any, indices: Indices) -> Any:
        return {name: np.take(array, indices, axis=0) for name, array in value.items()}

    def concat(self, values: Sequence[Any]) -> Any:
        same_columns(values)
        columns = {name: [value[name] for value in values] for name in values[0]}
        return {
            name: np.concatenate(several, dtype=common_dtype(several), casting="unsafe")
            for name, several in columns.items()
        }

    def to_numpy(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        return dict(value)

    def from_numpy(self, arrays: dict[str, npt.NDArray[Any]]) -> Any:
        return arrays


def same_columns(values: Sequence[dict[str, npt.NDArray[Any]]]) -> None:
    """Raise ValueError where blocks that come together do not have the same columns."""
    for value in values:
        if value.keys() != values[0].keys():
            raise ValueError(f"blocks have different columns: {sorted(values[0])} and {sorted(value)}")


class ArrowFormat(Format):
    """pyarrow.Table."""

    name = "arrow"

    def matches(self, value: Any) -> bool:
        pa = sys.modules.get("pyarrow")
        return pa is not None and isinstance(value, pa.Table)

    def rows(self, value: Any) -> int:
        return int(value.num_rows)

    def nbytes(self, value: Any) -> int:
        return int(value.nbytes)

    def slice(self, value: Any, begin: int, end: int) -> Any:
        return value.slice(begin, end - begin)

    def take(self, value: Any, indices: Indices) -> Any:
        return value.take(indices)

    def concat(self, values: Sequence[Any]) -> Any:
        import pyarrow as pa

        return pa.concat_tables(values, promote_options="default").combine_chunks()

    def to_numpy(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        found = {}
        for name in value.column_names:
            chunks = value.column(name)
            several = _has_shape(chunks.type)
            array = _of_shape(chunks.combine_chunks()) if several else None
            found[name] = chunks.to_numpy() if array is None else array
        return found

    def from_numpy(self, arrays: dict[str, npt.NDArray[Any]]) -> Any:
        import pyarrow as pa

        return pa.table({name: _to_arrow(array) for name, array in arrays.items()})

    def merge(self, values: Sequence[Any]) -> Any:
        merged = values[0]
        for value in values[1:]:
            for name in value.column_names:
                merged = merged.append_column(_free(name, merged.column_names), value.column(name))
        return merged


def _to_arrow(array: npt.NDArray[Any]) -> Any:
    """A row with two dimensions or more is a tensor of fixed shape, one with a single one a list of fixed size."""
    import pyarrow as pa

    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.ndim <= 1:
        return pa.array(array)
    rows, *shape = array.shape
    flat = pa.array(array.reshape(-1))
    if 0 in shape:  # lists, whose number does not follow from that of their values
        kind, inner = flat.type, flat
        for number in reversed(range(len(shape))):
            kind = pa.list_(kind, shape[number])
            inner = pa.FixedSizeListArray.from_buffers(
                kind, rows * math.prod(shape[:number]), [None], children=[inner]
            )
        return inner
    lists = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    if len(shape) == 1:
        return lists
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.type, shape), lists)


def _has_shape(kind: Any) -> bool:
    """Whether all rows of that type have the same shape, of one dimension or more."""
    import pyarrow as pa

    return bool(pa.types.is_fixed_size_list(kind)) or isinstance(kind, pa.FixedShapeTensorType)


def _of_shape(array: Any) -> npt.NDArray[Any] | None:
    """Rows of the same shape as one array; None where one is null."""
    import pyarrow as pa

    if array.null_count:
        return None
    kind, rows = array.type, len(array)
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation not in (None, list(range(len(kind.shape)))):
            moved: npt.NDArray[Any] = array.to_numpy_ndarray()
            return moved
        shape, array = tuple(kind.shape), array.storage
        if array.null_count:
            return None
    else:
        shape = (kind.list_size,)
    flat = array.flatten()
    if flat.null_count:
        return None
    values = _of_shape(flat) if _has_shape(flat.type) else flat.to_numpy(zero_copy_only=False)
    return None if values is None else values.reshape(rows, *shape, *values.shape[1:])


class PandasFormat(Format):
    """pandas.DataFrame; its index is not kept."""

    name = "pandas"

    def matches(self, value: Any) -> bool:
        pd = sys.modules.get("pandas")
        return pd is not None and isinstance(value, pd.DataFrame)

    def rows(self, value: Any) -> int:
        return len(value)

    def nbytes(self, value: Any) -> int:
        return int(value.memory_usage(index=False, deep=True).sum())

    def slice(self, value: Any, begin: int, end: int) -> Any:
        return value.iloc[begin:end]

    def take(self, value: Any, indices: Indices) -> Any:
        return value.take(indices)

    def concat(self, values: Sequence[Any]) -> Any:
        import pandas as pd

        return pd.concat(values, ignore_index=True)

    def to_numpy(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        return {str(name): value[name].to_numpy() for name in value.columns}

    def from_numpy(self, arrays: dict[str, npt.NDArray[Any]]) -> Any:
        import pandas as pd

        return pd.DataFrame(
            {name: array if array.ndim == 1 else list(array) for name, array in arrays.items()}
        )


class XarrayFormat(Format):
    """xarray.Dataset; rows along the dimension that its attribute ``torchshm_rows`` names, else its first one."""

    name = "xarray"

    def matches(self, value: Any) -> bool:
        xr = sys.modules.get("xarray")
        return xr is not None and isinstance(value, xr.Dataset)

    def dim(self, value: Any) -> str:
        named = value.attrs.get(_ROWS)
        return named if named in value.sizes else str(next(iter(value.sizes)))

    def rows(self, value: Any) -> int:
        return int(value.sizes[self.dim(value)])

    def nbytes(self, value: Any) -> int:
        return int(value.nbytes)

    def slice(self, value: Any, begin: int, end: int) -> Any:
        return value.isel({self.dim(value): slice(begin, end)})

    def take(self, value: Any, indices: Indices) -> Any:
        return value.isel({self.dim(value): indices})

    def concat(self, values: Sequence[Any]) -> Any:
        import xarray as xr

        dim = self.dim(values[0])
        return xr.concat(
            values,
            dim,
            data_vars="minimal",
            coords="minimal",
            compat="override",
            join="override",
            combine_attrs="override",
        )

    def to_numpy(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        dim = self.dim(value)
        found = {}
        for name, variable in value.variables.items():
            if dim in variable.dims:
                others = [each for each in variable.dims if each != dim]
                found[str(name)] = variable.transpose(dim, *others).values
        return found

    def from_numpy(self, arrays: dict[str, npt.NDArray[Any]]) -> Any:
        import xarray as xr

        variables = {
            name: (("row", *(f"{name}_{i}" for i in range(1, array.ndim))), array)
            for name, array in arrays.items()
        }
        return xr.Dataset(variables, attrs={_ROWS: "row"})


def with_rows(dataset: Any, dim: str) -> Any:
    """The dataset, and in it along which dimension its rows lie."""
    return dataset.assign_attrs({_ROWS: dim})


def with_rows_of(value: Any, given: Any) -> Any:
    """What a function made of a batch; of datasets the rows lie along the same dimension, whatever the function did with the attributes.

    A dimension that it renamed is known by its place.
    """
    if not (FORMATS["xarray"].matches(value) and FORMATS["xarray"].matches(given)):
        return value
    if value.attrs.get(_ROWS) in value.sizes:
        return value
    before, after = list(given.sizes), list(value.sizes)
    dim = _XARRAY.dim(given)
    if dim not in after and len(before) == len(after):
        dim = after[before.index(dim)]
    return with_rows(value, dim) if dim in after else value


_XARRAY = XarrayFormat()
FORMATS: dict[str, Format] = {
    each.name: each for each in (NumpyFormat(), ArrowFormat(), PandasFormat(), _XARRAY)
}


def format_of(value: Any) -> Format:
    """The format that a value has.

    Raises
    ------
    TypeError
        For what is no block.
    """
    for each in FORMATS.values():
        if each.matches(value):
            return each
    raise TypeError(
        f"a block is a dict of arrays, a pyarrow.Table, a pandas.DataFrame or an xarray.Dataset, not {type(value).__name__}"
    )


def checked(value: Any, what: str) -> Any:
    """A value of the user's, its columns as arrays; `what` says where it is from: "f returned".

    Raises
    ------
    TypeError, ValueError
        For what is no block, and for columns of different lengths.
    """
    try:
        found = format_of(value)
    except TypeError as error:
        raise TypeError(f"{what} {type(value).__name__}: {error}") from None
    if found.name == "xarray" and not value.sizes:
        raise ValueError(f"{what} a Dataset without a dimension, and so without rows")
    if found.name != "numpy":
        return value
    arrays = {
        str(name): column(array)
        if isinstance(array, (list, tuple))
        else unmasked(array, f"{what} a column {name!r} that")
        for name, array in value.items()
    }
    lengths = {name: len(array) if array.ndim else None for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        raise ValueError(f"{what} columns that differ in their numbers of rows: {lengths}")
    return arrays


def convert(value: Any, name: str | None) -> Any:
    """The value in the format of that name; None: as it is."""
    found = format_of(value)
    if name is None or found.name == name:
        return value
    if name == "torch":
        import torch

        arrays = found.to_numpy(value).items()
        return {
            key: torch.as_tensor(array if array.flags.writeable else array.copy()) for key, array in arrays
        }
    if found.name == "arrow" and name == "pandas":
        return value.to_pandas()
    if found.name == "pandas" and name == "arrow":
        import pyarrow as pa

        return pa.Table.from_pandas(value, preserve_index=False)
    if name not in FORMATS:
        raise ValueError(f"batch_format is one of {', '.join([*FORMATS, 'torch'])} and None, not {name!r}")
    return FORMATS[name].from_numpy(found.to_numpy(value))


def handed_out(value: Any, name: str | None) -> Any:
    """The value for a consumer, in the format of that name, and without what it tells functions only."""
    found = convert(value, name)
    if FORMATS["xarray"].matches(found) and _ROWS in found.attrs:
        found = found.copy(deep=False)
        del found.attrs[_ROWS]
    return found


def mode_for(name: str | None) -> str | None:
    """How a block is loaded that becomes that format: a tensor has no read-only flag."""
    return "c" if name == "torch" else None
