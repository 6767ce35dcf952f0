"""Whatever is saved comes back equal, of its type, and what shared memory before shares it after."""

import array
import collections
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from same import assert_same

import torchshm
from torchshm import _values


def there_and_back(store, value, **how):
    store.save("value", value, overwrite=True)
    return store.load("value", **how)


many = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(min_len=1),
    hnp.array_dtypes(max_size=3),
)
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=6)))


@many
@given(ARRAYS, st.integers(0, 3))
def test_arrays_of_every_dtype_and_layout(store, x, way):
    if way == 1:
        x = x.T
    elif way == 2 and x.ndim:
        x = x[::-2]
    elif way == 3:
        x = np.broadcast_to(x, (2, *x.shape))
    for value in (x, [x]):
        back = there_and_back(store, value)
        back = back[0] if type(back) is list else back
        assert type(back) is np.ndarray and back.dtype == x.dtype and back.shape == x.shape
        assert back.tobytes() == x.tobytes()
        if x.size and x.itemsize:
            assert not back.flags.writeable


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.binary(max_size=3000),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.one_of(st.text(), st.integers(), st.booleans()), inner, max_size=4)
    ),
    max_leaves=12,
)


@many
@given(TREES)
def test_nested_plain_values(store, x):
    back = there_and_back(store, x)
    assert back == x and repr(back) == repr(x)
    assert store.info("value")["kind"] == "values"


def test_odd_numbers_and_types(store):
    back = there_and_back(
        store, [math.nan, math.inf, -0.0, 10**6000, np.float32(2.5), np.datetime64("2026-01-01")]
    )
    assert (
        math.isnan(back[0])
        and back[1] == math.inf
        and math.copysign(1, back[2]) == -1
        and back[3] == 10**6000
    )
    assert type(back[4]) is np.float32 and back[4] == 2.5
    assert back[5] == np.datetime64("2026-01-01") and type(back[5]) is np.datetime64


def test_structured_and_foreign_dtypes_are_never_pickled(store):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    inner = np.dtype([("a", "<i2"), ("b", ">f8", (2, 3))], align=True)
    spread = np.dtype({"names": ["x", "y"], "formats": ["u1", inner], "offsets": [3, 16], "itemsize": 90})
    for x in (
        np.zeros(5, inner),
        np.ones(3, spread),
        np.rec.array([(1, 2.0)], dtype=[("p", int), ("q", float)]),
        np.arange(5).astype(ml_dtypes.bfloat16),
        np.matrix([[1, 2], [3, 4]]),
    ):
        back = there_and_back(store, x)
        assert store.info("value")["kind"] in ("values", "array")
        assert type(back) is type(x) and back.dtype == x.dtype and back.tobytes() == x.tobytes()


TENSORS = {
    "bfloat16": lambda: torch.arange(100, dtype=torch.bfloat16).reshape(10, 10),
    "float8": lambda: torch.arange(16, dtype=torch.float32).to(torch.float8_e4m3fn),
    "complex": lambda: torch.complex(torch.ones(4), torch.arange(4.0)),
    "conjugate": lambda: torch.complex(torch.ones(4), torch.arange(4.0)).conj(),
    "negative": lambda: torch.ones(1, dtype=torch.cfloat).mul(1j).conj().imag,
    "bool": lambda: torch.tensor([True, False]),
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.arange(3.0).expand(5, 3),
    "every second": lambda: torch.arange(1000.0)[::2],
    "empty": lambda: torch.empty(0, 3),
    "scalar": lambda: torch.tensor(5),
    "grad": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2, 2)),
    "frozen parameter": lambda: torch.nn.Parameter(torch.ones(2, 2), requires_grad=False),
}


def content(x):
    return bytes(x.detach().resolve_conj().clone(memory_format=torch.contiguous_format).untyped_storage())


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(store, name):
    x = TENSORS[name]()
    back = there_and_back(store, x)
    assert store.info("value")["kind"] == "values"
    assert type(back) is type(x) and back.dtype == x.dtype and back.requires_grad == x.requires_grad
    assert back.shape == x.shape
    assert content(back) == content(x)
    if name in ("permuted", "channels_last", "expanded"):
        assert back.stride() == x.stride()
    if x.numel():
        assert torchshm.is_shared(back)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors(store, layout):
    dense = torch.zeros(8, 8)
    dense[1, 2], dense[5, 6] = 3, 4
    made = {
        "coo": dense.to_sparse_coo,
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
        "bsr": lambda: dense.to_sparse_bsr((2, 2)),
        "bsc": lambda: dense.to_sparse_bsc((2, 2)),
    }[layout]()
    back = there_and_back(store, made)
    assert back.layout == made.layout and torch.equal(back.to_dense(), dense)
    values = back._values() if layout == "coo" else back.values()
    assert torchshm.is_shared(values)
    twice = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,))
    assert not there_and_back(store, twice).is_coalesced()


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors(store):
    x = torch.arange(12.0).reshape(3, 4)
    per_tensor = torch.quantize_per_tensor(x, 0.1, 10, torch.qint8)
    per_channel = torch.quantize_per_channel(
        x, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.quint8
    )
    for q in (per_tensor, per_channel):
        back = there_and_back(store, [q])[0]
        assert back.qscheme() == q.qscheme() and back.dtype == q.dtype
        assert torch.equal(back.int_repr(), q.int_repr()) and torch.equal(back.dequantize(), q.dequantize())


def test_tensors_that_can_not_lie_in_memory_say_what_to_do(store):
    with pytest.raises(TypeError, match=r"cpu\(\)"):
        store.save("value", torch.empty(3, device="meta"))
    assert "value" not in store


def test_buffers_and_dlpack(store):
    class Exporter:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **how):
            return self.x.__dlpack__(**how)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    big = bytes(range(256)) * 1000
    value = [big, bytearray(big), memoryview(big), array.array("d", [1, 2, 3]), Exporter(np.arange(5))]
    back = there_and_back(store, value)
    assert type(back[0]) is bytes and back[0] == big
    assert type(back[1]) is bytearray and back[1] == big
    assert type(back[2]) is memoryview and back[2] == big and back[2].readonly
    assert torchshm.is_shared(back[2])
    assert back[3].tolist() == [1, 2, 3] and back[3].format == "d"
    assert type(back[4]) is np.ndarray and back[4].tolist() == [0, 1, 2, 3, 4]


def test_what_shared_memory_shares_it_and_is_stored_once(store):
    base = np.arange(100_000.0)
    weights = torch.arange(100_000.0)
    value = {
        "all": base,
        "part": base[10:20],
        "left": base[::2],
        "tensor": torch.from_numpy(base),
        "flat": weights,
        "head": weights[:10],
        "tail": weights[-10:],
        "twice": weights,
    }
    back = there_and_back(store, value, mode="r+")
    assert store.info("value")["bytes"] < 2 * 800_000 * 1.1
    for name in value:
        assert_same(np.asarray(back[name]), np.asarray(value[name]))
    back["all"][12] = -1
    assert back["part"][2] == -1 and back["left"][6] == -1 and back["tensor"][12] == -1
    assert back["twice"] is back["flat"]
    assert back["tail"].untyped_storage().data_ptr() == back["head"].untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_one_storage_share_it_in_whatever_order_they_come(store, dtype):
    whole = torch.arange(12).to(dtype)
    saved = [whole[:4], whole, whole.view(3, 4).t(), whole[5:].expand(2, 7)]
    for order in (saved, saved[::-1]):
        store.save("views", order, overwrite=True)
        back = store.load("views")
        for loaded, was in zip(back, order, strict=True):
            assert torch.equal(loaded, was)
            assert (loaded.stride(), loaded.storage_offset()) == (was.stride(), was.storage_offset())
            assert loaded.untyped_storage().data_ptr() == back[0].untyped_storage().data_ptr()
            assert loaded.untyped_storage().nbytes() == whole.untyped_storage().nbytes()


def test_a_view_of_much_is_stored_as_little(store):
    there_and_back(store, [np.zeros((1000, 1000))[:, 3], torch.zeros(1000, 1000)[:, 3]])
    assert store.info("value")["bytes"] < 50_000


def test_a_state_dict_loads_without_pickle(store):
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.BatchNorm1d(10))
    back = there_and_back(store, model.state_dict())
    assert type(back) is collections.OrderedDict and back._metadata == model.state_dict()._metadata
    other = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.BatchNorm1d(10))
    other.load_state_dict(back, assign=True)
    assert torchshm.is_shared(other[0].weight)


@dataclasses.dataclass
class Sample:
    name: str
    x: np.ndarray
    t: torch.Tensor
    self: object = None


def test_objects_need_allow_pickle(store):
    pd = pytest.importorskip("pandas")
    sample = Sample("s", np.arange(10_000), torch.ones(5))
    sample.self = sample
    store["sample"] = sample
    assert store.info("sample")["kind"] == "object"
    with pytest.raises(ValueError, match="allow_pickle=True"):
        store["sample"]
    back = store.load("sample", allow_pickle=True)
    assert back.self is back and torchshm.is_shared(back.x) and torchshm.is_shared(back.t)
    back.x[0] = 7  # this process's own
    assert store.load("sample", allow_pickle=True, mode="r").x.flags.writeable is False
    frame = pd.DataFrame({"a": np.arange(1000.0), "b": ["x"] * 1000})
    pd.testing.assert_frame_equal(there_and_back(store, frame, allow_pickle=True), frame)
    masked = np.ma.masked_array(np.arange(5), [0, 1, 0, 0, 0])
    assert_same(there_and_back(store, masked, allow_pickle=True), masked)
    objects = np.array([1, "two", None], object)
    assert there_and_back(store, objects, allow_pickle=True).tolist() == [1, "two", None]


def test_a_value_that_can_not_be_pickled_leaves_nothing(store):
    before = store.info()["live_bytes"]
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"pickle|local"):
        store.save("value", [np.ones(100_000), lambda: None])
    assert "value" not in store
    assert store.info()["live_bytes"] == before


def forged(store, tree):
    """Save an honest value, then the same blocks under another text."""
    core = store._core
    blank = core.blank(4096)
    blank[:] = 0
    core.save("forged", b"J" + json.dumps(tree).encode(), [blank.base], True, 0, False, -1)


ARRAY = {"k": "array", "dtype": "<f8", "shape": [4], "strides": [8], "r": 0, "o": 0}
TENSOR = {
    "k": "tensor",
    "dtype": "float32",
    "size": [4],
    "stride": [1],
    "r": 0,
    "o": 0,
    "grad": False,
    "param": False,
}


def tree(leaf, regions=((0, 0, 4096),)):
    return {"regions": [list(r) for r in regions], "leaves": [leaf], "value": {"x": 0}}


FORGED = {
    "region beyond its block": tree(ARRAY, [(0, 0, 1 << 40)]),
    "region before its block": tree(ARRAY, [(0, -8, 64)]),
    "unknown block": tree(ARRAY, [(7, 0, 64)]),
    "array beyond its region": tree({**ARRAY, "shape": [600]}),
    "array before its region": tree({**ARRAY, "strides": [-8]}),
    "huge strides": tree({**ARRAY, "strides": [1 << 62]}),
    "objects": tree({**ARRAY, "dtype": "|O"}),
    "objects in fields": tree(
        {
            **ARRAY,
            "dtype": {
                "names": ["a"],
                "formats": ["O"],
                "offsets": [0],
                "titles": [None],
                "itemsize": 8,
                "align": False,
                "record": False,
            },
        }
    ),
    "no memory": tree({**ARRAY, "r": None}),
    "tensor beyond its region": tree({**TENSOR, "size": [2000]}),
    "negative strides": tree({**TENSOR, "stride": [-1]}),
    "tensor without memory": tree({**TENSOR, "r": None}),
    "no dtype of torch": tree({**TENSOR, "dtype": "load"}),
    "its own part": tree(
        {
            "k": "sparse",
            "layout": "sparse_coo",
            "size": [3],
            "parts": [0, 0],
            "coalesced": True,
            "grad": False,
            "param": False,
        }
    ),
    "no leaves": {"regions": [], "leaves": [], "value": {"x": 0}},
    "not a tree": [1, 2],
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_text_is_an_error(store, what):
    forged(store, FORGED[what])
    with pytest.raises(torchshm.TorchshmError, match="damaged"):
        store["forged"]


def test_sparse_indices_that_lead_out_are_an_error(store):
    parts = [{**TENSOR, "dtype": "int64", "size": [1, 4], "stride": [4, 1], "o": 0}, {**TENSOR, "o": 2048}]
    whole = {
        "k": "sparse",
        "layout": "sparse_coo",
        "size": [3],
        "parts": [0, 1],
        "coalesced": True,
        "grad": False,
        "param": False,
    }
    core = store._core
    blank = core.blank(4096)
    blank[:] = 0
    blank.view(np.int64)[:4] = [0, 1, 2, 1 << 40]
    text = json.dumps({"regions": [[0, 0, 4096]], "leaves": [*parts, whole], "value": {"x": 2}}).encode()
    core.save("forged", b"J" + text, [blank.base], True, 0, False, -1)
    with pytest.raises(torchshm.TorchshmError, match="damaged"):
        store["forged"]


def test_dtypes_survive_their_description():
    for dtype in ("f4", ">c16", "S3", "U7", "M8[ns]", "m8[3D]", "V5", [("a", "i1"), ("b", "(2,)f4")]):
        wanted = np.dtype(dtype)
        assert _values.node_to_dtype(_values.dtype_to_node(wanted)) == wanted
    with pytest.raises(TypeError):
        _values.dtype_to_node(np.dtype("O"))


def test_a_large_pickle_lies_in_the_store_beside_its_text(store):
    value = {f"text {i}" * 7 for i in range(20_000)}, np.arange(100_000), {b"x" * (70 << 20)}
    store["big"] = value
    assert len(store._core.find("big")["text"]) < 4096
    with pytest.raises(ValueError, match="allow_pickle=True"):
        store["big"]
    texts, array, blob = store.load("big", allow_pickle=True)
    assert texts == value[0] and (array == value[1]).all() and blob == value[2]
    text, refs = _values.describe(store._core, value)
    store._core.save("bad", text.replace(b'"pickle":', b'"pickle":9'), refs, True, 0, False, -1)
    with pytest.raises(torchshm.TorchshmError, match="damaged"):
        store.load("bad", allow_pickle=True)


def test_too_many_plain_values_say_what_to_do(store):
    with pytest.raises(ValueError, match=r"too many plain values for one name.*in parts"):
        store["text"] = "x" * (65 << 20)
    assert "text" not in store
