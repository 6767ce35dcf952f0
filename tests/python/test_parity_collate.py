"""torchshm.data.collate gives what default_collate gives, in the main process and in a worker."""

from __future__ import annotations

import collections
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from parity import outcome
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.collate import collate as stock_collate
from torch.utils.data._utils.collate import default_collate_fn_map

import torchshm
from torchshm.data import collate

pytestmark = [
    pytest.mark.usefixtures("registered"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor"),
    pytest.mark.filterwarnings("ignore:Sparse CSR"),
    pytest.mark.filterwarnings("ignore:the matrix subclass"),
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized"),
]


class Point(NamedTuple):
    x: object
    y: object


class Attributed(dict):
    """A mapping that is more than its items."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.colour = "red"


class Frozen(collections.abc.Mapping):
    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Stubborn(Frozen):
    """Can't be made of a mapping."""

    def __init__(self, items=None, *, secret=None):
        if secret is None:
            raise TypeError("no")
        super().__init__(secret)


class Numbers(list):
    pass


class Row(collections.abc.Sequence):
    """A sequence that is no list."""

    def __init__(self, items):
        self._items = list(items)

    def __getitem__(self, index):
        return self._items[index]

    def __len__(self):
        return len(self._items)


class Subclass(torch.Tensor):
    pass


def t(*shape, dtype=torch.float32):
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(dtype)


def a(*shape, dtype="f4"):
    return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)


def readonly(x):
    x.flags.writeable = False
    return x


TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
NUMPY_DTYPES = [
    *("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "g", "F", "D", "G"),
    *(">f4", ">i8", "S3", "U3", "M8[s]", "m8[s]", "V4", "O"),
]

CASES = {
    "tensors": lambda: [t(3, 4), t(3, 4) + 1],
    "large tensors": lambda: [t(300, 40), t(300, 40) + 1],
    "tensors of no dimension": lambda: [torch.tensor(1.5), torch.tensor(2.5)],
    "empty tensors": lambda: [torch.empty(0, 3), torch.empty(0, 3)],
    "one tensor": lambda: [t(1000)],
    "a tuple of tensors": lambda: (t(1000), t(1000)),
    "transposed tensors": lambda: [t(40, 50).t(), t(40, 50).t()],
    "channels last": lambda: [t(2, 3, 8, 8).to(memory_format=torch.channels_last)] * 2,
    "parts of a tensor": lambda: list(t(8, 500)),
    "expanded tensors": lambda: [t(1).expand(2000)] * 2,
    "mixed dtypes of tensors": lambda: [t(2000), t(2000, dtype=torch.float64)],
    "mixed dtypes of tensors, integer first": lambda: [t(2000, dtype=torch.int32), t(2000)],
    "mixed shapes of tensors": lambda: [t(3), t(4)],
    "mixed shapes of large tensors": lambda: [t(3000), t(4000)],
    "mixed dimensions of tensors": lambda: [t(3), t(3, 1)],
    "tensors that require grad": lambda: [t(2000).requires_grad_(), t(2000).requires_grad_()],
    "one tensor that requires grad": lambda: [t(2000), t(2000).requires_grad_()],
    "parameters": lambda: [torch.nn.Parameter(t(2000)), torch.nn.Parameter(t(2000))],
    "parameters without grad": lambda: [torch.nn.Parameter(t(2000), requires_grad=False)] * 2,
    "a subclass of Tensor": lambda: [t(2000).as_subclass(Subclass), t(2000).as_subclass(Subclass)],
    "conj tensors": lambda: [torch.complex(t(2000), t(2000)).conj()] * 2,
    "neg tensors": lambda: [torch.complex(t(2000), t(2000)).conj().imag] * 2,
    "sparse tensors": lambda: [torch.eye(3).to_sparse()] * 2,
    "csr tensors": lambda: [torch.eye(3).to_sparse_csr()] * 2,
    "nested tensors": lambda: [torch.nested.nested_tensor([t(3), t(2)])] * 2,
    "meta tensors": lambda: [torch.empty(3, device="meta")] * 2,
    "quantised tensors": lambda: [torch.quantize_per_tensor(t(2000), 0.1, 3, torch.quint8)] * 2,
    "a tensor and an array": lambda: [t(2000), a(2000)],
    "an array and a tensor": lambda: [a(2000), t(2000)],
    "arrays": lambda: [a(3, 4), a(3, 4) + 1],
    "large arrays": lambda: [a(300, 40), a(300, 40) + 1],
    "arrays of no dimension": lambda: [a(), a()],
    "empty arrays": lambda: [a(0, 3), a(0, 3)],
    "fortran arrays": lambda: [np.asfortranarray(a(40, 50))] * 2,
    "strided arrays": lambda: [a(40, 50)[::2, 1:]] * 2,
    "reversed arrays": lambda: [a(2000)[::-1]] * 2,
    "broadcast arrays": lambda: [np.broadcast_to(a(1), (2000,))] * 2,
    "read-only arrays": lambda: [readonly(a(2000))] * 2,
    "mixed shapes of arrays": lambda: [a(2000), a(3000)],
    "mixed dtypes of arrays": lambda: [a(2000), a(2000, dtype="f8")],
    "mixed byte orders": lambda: [a(2000), a(2000, dtype=">f4")],
    "masked arrays": lambda: [np.ma.masked_equal(a(2000), 3)] * 2,
    "matrices": lambda: [np.matrix(a(40, 50))] * 2,
    "structs": lambda: [np.zeros(3, [("x", "f4"), ("y", "i4")])] * 2,
    "an array and a number": lambda: [a(3), 5.0],
    "scalars": lambda: [np.float32(1), np.float32(2)],
    "integer scalars": lambda: [np.int16(1), np.int16(2)],
    "mixed scalars": lambda: [np.int16(1), np.float64(2)],
    "bool scalars": lambda: [np.bool_(True), np.bool_(False)],
    "complex scalars": lambda: [np.complex64(1j), np.complex64(2)],
    "longdouble scalars": lambda: [np.longdouble(1)] * 2,
    "datetime scalars": lambda: [np.datetime64("2020-01-01")] * 2,
    "string scalars": lambda: [np.str_("a"), np.str_("b")],
    "bytes scalars": lambda: [np.bytes_(b"a"), np.bytes_(b"b")],
    "ints": lambda: [1, 2, 3],
    "large ints": lambda: [2**40, 1],
    "too large ints": lambda: [2**70, 1],
    "floats": lambda: [1.0, float("nan")],
    "bools": lambda: [True, False],
    "ints and floats": lambda: [1, 2.5],
    "floats and ints": lambda: [2.5, 1],
    "floats and strings": lambda: [2.5, "a"],
    "complexes": lambda: [1j, 2j],
    "strings": lambda: ["a", "b"],
    "bytes": lambda: [b"a", b"b"],
    "bytearrays": lambda: [bytearray(b"ab"), bytearray(b"cd")],
    "None": lambda: [None, None],
    "objects": lambda: [object, object],
    "sets": lambda: [{1}, {2}],
    "dicts": lambda: [{"x": a(2000), "y": 1}, {"x": a(2000), "y": 2}],
    "dicts of other keys": lambda: [{"x": 1}, {"y": 1}],
    "dicts with more keys later": lambda: [{"x": 1}, {"x": 2, "y": 1}],
    "ordered dicts": lambda: [collections.OrderedDict(b=1, a=t(3))] * 2,
    "default dicts": lambda: [collections.defaultdict(list, x=1.0)] * 2,
    "dicts with attributes": lambda: [Attributed(x=1), Attributed(x=2)],
    "frozen mappings": lambda: [Frozen({"x": 1}), Frozen({"x": 2})],
    "mappings that can't be made": lambda: [Stubborn(secret={"x": 1}), Stubborn(secret={"x": 2})],
    "mapping proxies": lambda: [types.MappingProxyType({"x": 1})] * 2,
    "chain maps": lambda: [collections.ChainMap({"x": 1}, {"y": 2.0})] * 2,
    "namedtuples": lambda: [Point(t(3), 1), Point(t(3), 2)],
    "namedtuples of arrays": lambda: [Point(a(2000), "a"), Point(a(2000), "b")],
    "tuples": lambda: [(t(3), 1), (t(3), 2)],
    "lists": lambda: [[t(3), 1], [t(3), 2]],
    "lists of numbers": lambda: [[1, 2], [3, 4]],
    "lists of different lengths": lambda: [[1, 2], [3]],
    "tuples of different lengths": lambda: [(1, 2), (3,)],
    "empty lists": lambda: [[], []],
    "lists of a class": lambda: [Numbers([1, 2]), Numbers([3, 4])],
    "deques": lambda: [collections.deque([1, 2]), collections.deque([3, 4])],
    "ranges": lambda: [range(3), range(3)],
    "sequences of a class": lambda: [Row([1, 2]), Row([3, 4])],
    "nested containers": lambda: [{"a": [(t(2), {"b": Point(a(2), [1])})]} for _ in range(3)],
    "an empty batch": list,
    "a batch that is an array": lambda: a(3, 4),
    "a batch that is a tensor": lambda: t(3, 4),
    "a generator": lambda: (x for x in [1]),
}
CASES |= {f"tensors of {d}": lambda d=d: [t(8, 200, dtype=d)] * 3 for d in TORCH_DTYPES}
CASES |= {
    f"arrays of {d}": lambda d=d: [a(8, 200, dtype=d) if d[0] != "V" else np.zeros(8, d)] * 3
    for d in NUMPY_DTYPES
}

MAPS = {
    "torch's own": lambda: dict(default_collate_fn_map),
    "nothing": dict,
    "ints only": lambda: {int: lambda batch, *, collate_fn_map: ("ints", sum(batch))},
    "a tensor's": lambda: {
        **default_collate_fn_map,
        torch.Tensor: lambda batch, *, collate_fn_map: list(batch),
    },
    "a base class": lambda: {(np.ndarray, str): lambda batch, *, collate_fn_map: len(batch)},
    "one that goes on": lambda: {
        **default_collate_fn_map,
        dict: lambda batch, *, collate_fn_map: stock_collate(
            [list(x.values()) for x in batch], collate_fn_map=collate_fn_map
        ),
    },
}


def both(name):
    """The outcomes with samples of each one's own."""
    make = CASES[name]
    samples, others = (make(), make()) if name != "None" else ([None] * 2, [None] * 2)
    return outcome(default_collate, samples), outcome(collate, others)


class Collated(Dataset):
    def __len__(self):
        return len(CASES)

    def __getitem__(self, index):
        return [repr(made) for made in both(list(CASES)[index])]  # not all types can be pickled


@pytest.fixture(scope="module")
def in_a_worker():
    """What a worker of a DataLoader makes of all cases."""
    torchshm.register()
    loader = DataLoader(
        Collated(), batch_size=None, num_workers=1, collate_fn=tuple, multiprocessing_context="fork"
    )
    return dict(zip(CASES, loader, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_in_the_main_process(name):
    stock, ours = both(name)
    assert ours == stock


@pytest.mark.parametrize("name", CASES)
def test_in_a_worker(in_a_worker, name):
    stock, ours = in_a_worker[name]
    assert ours == stock


@pytest.mark.parametrize("case", ["tensors", "arrays", "ints", "dicts", "strings", "namedtuples"])
@pytest.mark.parametrize("name", MAPS)
def test_with_a_map_of_functions(name, case):
    functions = MAPS[name]()
    stock = outcome(lambda: stock_collate(CASES[case](), collate_fn_map=functions))
    assert outcome(lambda: collate(CASES[case](), collate_fn_map=functions)) == stock


def test_what_a_program_adds_to_the_default_map_is_used():
    default_collate_fn_map[set] = lambda batch, *, collate_fn_map=None: sorted(set().union(*batch))
    try:
        assert collate([{1}, {2}]) == default_collate([{1}, {2}]) == [1, 2]
    finally:
        del default_collate_fn_map[set]
