"""Files of other libraries: what goes out comes back, what comes in is equal, and nothing is left half done."""

import os
import signal
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scripts import PATIENCE, passes

import torchshm
from torchshm import _check, _exchange
from torchshm._exchange._place import written_beside

ZARR_3 = int(zarr.__version__.split(".")[0]) >= 3
FORMATS = ["safetensors", "npz", "zarr", "zarr.zip"]
pytestmark = [
    pytest.mark.apart,
    pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning" if ZARR_3 else "default"),
]

many = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
COMPLEX = hnp.complex_number_dtypes(endianness="?", sizes=(64, 128))
TEXTS = st.one_of(
    hnp.byte_string_dtypes(min_len=1, max_len=9), hnp.unicode_string_dtypes(min_len=1, max_len=9)
)
TIMES = st.one_of(hnp.datetime64_dtypes(endianness="="), hnp.timedelta64_dtypes(endianness="="))
LONG = st.sampled_from([np.dtype(np.longdouble), np.dtype(np.clongdouble)])
KEYS = st.lists(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0\\/"), min_size=1, max_size=12
    ).filter(
        lambda part: part not in (".", "..", "zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
    ),
    min_size=1,
    max_size=3,
).map("/".join)


def arrays(dtypes):
    made = dtypes.flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=5))
    )
    ways = [
        lambda x: x,
        lambda x: x.T,
        lambda x: x[::-2] if x.ndim else x,
        lambda x: np.broadcast_to(x, (2, *x.shape)),
    ]
    return st.tuples(made, st.sampled_from(ways)).map(lambda both: both[1](both[0]))


def native(x):
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def bits(x):
    if x.dtype.type in (np.longdouble, np.clongdouble):  # padding bytes are nobody's
        return repr(x.tolist())
    return x.tobytes()


def assert_equal(got, wanted, exact=True):
    if not exact:
        got, wanted = native(got), native(wanted)
    assert type(got) is np.ndarray and got.dtype == wanted.dtype and got.shape == wanted.shape
    assert bits(got) == bits(wanted)


def fresh(tmp_path, suffix):
    count = len(list(tmp_path.iterdir()))
    return tmp_path / f"{count}.{suffix}"


def around(store, path, values):
    """Export these values, and import them under another prefix."""
    for key in list(store):
        del store[key]
    for key, value in values.items():
        store[f"out/{key}"] = value
    assert sorted(store.export_to(path, prefix="out/")) == sorted(f"out/{key}" for key in values)
    assert sorted(store.import_from(path, prefix="in/")) == sorted(f"in/{key}" for key in values)
    return {key: store[f"in/{key}"] for key in values}


# ---- there and back


@many
@given(
    st.dictionaries(
        KEYS,
        arrays(st.one_of(NUMBERS, COMPLEX, TEXTS, TIMES, LONG, hnp.array_dtypes(max_size=3))),
        max_size=3,
        min_size=1,
    )
)
def test_npz_brings_back_every_dtype_and_layout(store, tmp_path, values):
    for key, got in around(store, fresh(tmp_path, "npz"), values).items():
        assert_equal(got, values[key])


@many
@given(arrays(st.one_of(NUMBERS, COMPLEX, TEXTS, TIMES, LONG, hnp.array_dtypes(max_size=3))))
def test_npy_brings_back_every_dtype_and_layout(store, tmp_path, x):
    path = fresh(tmp_path, "npy")
    store["x"] = x
    assert store.export_to(path, "x") == ["x"]
    assert_equal(np.load(path), x)
    assert store.import_from(path, overwrite=True) == [path.stem]
    assert_equal(store[path.stem], x)
    store.import_from(path, key="as this", overwrite=True)
    assert_equal(store["as this"], x)


@many
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
            lambda key: key != "__metadata__"
        ),
        arrays(st.one_of(NUMBERS, hnp.complex_number_dtypes(endianness="?", sizes=(64,)))),
        min_size=1,
        max_size=3,
    )
)
def test_safetensors_brings_back_what_it_knows_in_the_byte_order_of_the_machine(store, tmp_path, values):
    for key, got in around(store, fresh(tmp_path, "safetensors"), values).items():
        assert_equal(got, values[key], exact=False)


@pytest.mark.parametrize("suffix", ["zarr", "zarr.zip"])
@many
@given(
    values=st.dictionaries(KEYS, arrays(st.one_of(NUMBERS, COMPLEX, TEXTS, TIMES)), min_size=1, max_size=3)
)
def test_zarr_brings_back_what_it_knows_in_the_byte_order_of_the_machine(store, tmp_path, suffix, values):
    if any(one != other and f"{other}/".startswith(f"{one}/") for one in values for other in values):
        return  # tested below
    for key, got in around(store, fresh(tmp_path, suffix), values).items():
        assert_equal(got, values[key], exact=False)


TENSORS = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "bfloat16",
]
EIGHTS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("name", [*TENSORS, *EIGHTS])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5)])
def test_tensors_stay_tensors_in_safetensors(store, tmp_path, name, shape):
    bytes_ = torch.randint(
        0, 2 if name == "bool" else 256, (*shape, getattr(torch, name).itemsize), dtype=torch.uint8
    )
    tensor = (
        bytes_.view(getattr(torch, name)).reshape(shape).mT
        if len(shape) > 1
        else bytes_.view(getattr(torch, name))[..., 0]
    )
    path = tmp_path / "x.safetensors"
    store["x"] = tensor
    store.export_to(path)
    by_library = safetensors.torch.load_file(path)["x"]
    store.import_from(path, prefix="again ")
    for got in (by_library, store["again x"]):
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert (
            got.contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
        )


def test_an_array_of_ml_dtypes_is_a_tensor_in_safetensors(store, tmp_path):
    import ml_dtypes

    store["x"] = np.arange(6).astype(ml_dtypes.bfloat16)
    store.export_to(tmp_path / "x.safetensors")
    assert safetensors.torch.load_file(tmp_path / "x.safetensors")["x"].equal(torch.arange(6).bfloat16())
    store.import_from(tmp_path / "x.safetensors", overwrite=True)
    assert store["x"].dtype == ml_dtypes.bfloat16 and (store["x"] == np.arange(6)).all()
    for suffix in ("npy", "npz", "zarr"):
        with pytest.raises(TypeError, match="'x' has the dtype bfloat16"):
            store.export_to(tmp_path / f"x.{suffix}")


# ---- what the libraries make themselves, and what they read


def test_files_that_the_libraries_have_made(store, tmp_path):
    x, y = np.arange(12.0).reshape(3, 4), np.array([True, False])
    np.save(tmp_path / "f.npy", np.asfortranarray(x))
    np.savez_compressed(tmp_path / "f.npz", x=x, **{"a/y": y})
    safetensors.numpy.save_file({"x": x, "y": y}, tmp_path / "f.safetensors")
    safetensors.torch.save_file(
        {"w": torch.ones(3).bfloat16(), "x": torch.from_numpy(x)},
        tmp_path / "t.safetensors",
        {"format": "pt", "by": "me"},
    )
    for version in (2, 3) if ZARR_3 else (2,):
        group = zarr.open_group(
            str(tmp_path / f"f{version}.zarr"),
            mode="w",
            **{"zarr_format" if ZARR_3 else "zarr_version": version},
        )
        made = (group.create_array if ZARR_3 else group.create_dataset)(
            "deep/er/x", shape=x.shape, dtype=">f8", chunks=(2, 3)
        )
        made[...] = x
        assert store.import_from(tmp_path / f"f{version}.zarr", prefix=f"z{version}/") == [
            f"z{version}/deep/er/x"
        ]
        assert_equal(store[f"z{version}/deep/er/x"], x, exact=False)
    zarr.save(str(tmp_path / "one.zarr"), x)
    assert store.import_from(tmp_path / "one.zarr") == ["one"]
    assert_equal(store["one"], x)

    assert store.import_from(tmp_path / "f.npy") == ["f"] and store["f"].flags.f_contiguous
    assert_equal(store["f"], x)
    assert store.import_from(tmp_path / "f.npz", prefix="n ") == ["n x", "n a/y"]
    assert_equal(store["n a/y"], y)
    assert store.import_from(tmp_path / "f.safetensors", prefix="s ", framework="pt") == ["s x", "s y"]
    assert store["s x"].equal(torch.from_numpy(x)) and store["s y"].dtype == torch.bool
    saved = store.import_from(tmp_path / "t.safetensors", prefix="t.")
    assert sorted(saved) == ["t.__metadata__", "t.w", "t.x"]
    assert store["t.__metadata__"] == {"by": "me"} and type(store["t.x"]) is torch.Tensor
    store.import_from(tmp_path / "t.safetensors", prefix="u.", framework="np")
    assert_equal(store["u.x"], x)
    store.export_to(tmp_path / "back.safetensors", prefix="t.")
    with safetensors.safe_open(tmp_path / "back.safetensors", "pt") as file:
        assert file.metadata() == {"by": "me"} and sorted(file.keys()) == ["w", "x"]


def test_the_libraries_read_what_is_exported(store, tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    store["g/x"], store["g/y"] = x.T, torch.arange(3)
    for suffix in FORMATS:
        assert store.export_to(tmp_path / f"e.{suffix}", prefix="g/") == ["g/x", "g/y"]
    with np.load(tmp_path / "e.npz") as file:
        assert sorted(file) == ["x", "y"] and (file["x"] == x.T).all()
    got = safetensors.numpy.load_file(tmp_path / "e.safetensors")
    assert (got["x"] == x.T).all() and (got["y"] == [0, 1, 2]).all()
    assert (zarr.open(str(tmp_path / "e.zarr"), mode="r")["x"][...] == x.T).all()
    archive = zarr.storage.ZipStore(str(tmp_path / "e.zarr.zip"), mode="r")
    assert (zarr.open(archive, mode="r")["y"][...] == [0, 1, 2]).all()
    archive.close()
    store.export_to(tmp_path / "whole.zarr", format="zarr")
    assert (zarr.open(str(tmp_path / "whole.zarr"), mode="r")["g/x"][...] == x.T).all()


def test_a_state_dict_is_a_file_and_becomes_a_module_again(store, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    store["net"] = net.state_dict()
    store.export_to(tmp_path / "net.safetensors", "net")
    saved = safetensors.torch.load_file(tmp_path / "net.safetensors")
    assert sorted(saved) == sorted(net.state_dict())
    store.import_from(tmp_path / "net.safetensors", key="again")
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    store.load_module("again", other)
    assert all(
        a.equal(b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_values_are_named_by_their_path(store, tmp_path):
    ones = np.ones(2)
    store["k"] = {"a": ones, "b": [ones, (ones, {"c": np.float32(3)})]}
    store["o"] = OrderedDict(d=ones)
    store.export_to(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as file:
        assert sorted(file) == ["k.a", "k.b.0", "k.b.1.0", "k.b.1.1.c", "o.d"]
    store.export_to(tmp_path / "k.zarr", "k")
    assert sorted(store.import_from(tmp_path / "k.zarr", prefix="z/")) == [
        "z/a",
        "z/b/0",
        "z/b/1/0",
        "z/b/1/1/c",
    ]


# ---- what is not possible says so, and leaves nothing


@pytest.mark.parametrize("suffix", [*FORMATS, "npy"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("text", "'v' is of type str"),
        ({"a": 1.0}, "is of type float"),
        ({1: np.ones(2)}, "dict with the key 1"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        ({1, 2}, "'v' can't be exported: .*allow_pickle"),
    ],
)
def test_a_value_that_a_file_can_not_hold(store, tmp_path, suffix, value, says):
    store["v"] = value
    with pytest.raises(TypeError, match=says) as raised:
        store.export_to(tmp_path / f"v.{suffix}")
    assert "store.snapshot(path)" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("safetensors", "c16"),
        ("safetensors", "U3"),
        ("safetensors", "M8[s]"),
        ("safetensors", "i4,f8"),
        *([("zarr", "g"), ("zarr.zip", "G")] if ZARR_3 else []),
    ],
)
def test_a_dtype_that_a_file_can_not_hold(store, tmp_path, suffix, dtype):
    store["v"] = np.zeros(3, dtype)
    with pytest.raises(TypeError, match=r"'v' has the dtype .* export it to \.npz"):
        store.export_to(tmp_path / f"v.{suffix}")
    assert list(tmp_path.iterdir()) == []


BAD_KEYS = ["..", "../out", "a/../../out", "/tmp/out", "a//b", "a/", ".", "a\0b", "a\\b", "x" * 300]


@pytest.mark.parametrize("suffix", ["npz", "zarr", "zarr.zip"])
@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_leads_out_is_refused(store, tmp_path, suffix, key):
    store[key] = np.ones(3)
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(ValueError, match="can't be a name in this file"):
        store.export_to(home / f"v.{suffix}")
    assert list(home.iterdir()) == [] and list(tmp_path.iterdir()) == [home]
    store.export_to(home / "v.safetensors")
    store.import_from(home / "v.safetensors", prefix="in ")
    assert f"in {key}" in store


@pytest.mark.parametrize("key", ["zarr.json", "a/.zarray", ".zattrs"])
def test_a_key_that_is_zarr_s_own_is_refused(store, tmp_path, key):
    store[key] = np.ones(3)
    with pytest.raises(ValueError, match="can't be a name in this file"):
        store.export_to(tmp_path / "v.zarr")


def test_names_that_exclude_one_another(store, tmp_path):
    store["a"], store["a/b"] = np.ones(2), np.ones(3)
    with pytest.raises(ValueError, match="'a' and 'a/b' would be"):
        store.export_to(tmp_path / "v.zarr")
    with pytest.raises(ValueError, match="'a/b' and 'a' would be"):
        store.export_to(tmp_path / "v.zarr", ["a/b", "a"])
    del store["a/b"]
    store["a"], store["a.b"] = {"b": np.ones(2)}, np.ones(2)
    with pytest.raises(ValueError, match=r"both have an array that the file would name 'a\.b'"):
        store.export_to(tmp_path / "v.npz")


def test_wrong_arguments_say_what_is_right(store, tmp_path):
    store["x"], store["y"] = np.ones(2), np.ones(2)
    with pytest.raises(ValueError, match=r"suffix of 'x.tif' is none of \.safetensors.*give format="):
        store.export_to(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"format is one of"):
        store.export_to(tmp_path / "x.tif", format="tif")
    with pytest.raises(ValueError, match=r"'y' is a second one: export to \.npz"):
        store.export_to(tmp_path / "x.npy")
    with pytest.raises(KeyError, match="z"):
        store.export_to(tmp_path / "x.npz", ["x", "z"])
    with pytest.raises(KeyError, match="nothing to export"):
        store.export_to(tmp_path / "x.npz", prefix="z")
    with pytest.raises(ValueError, match="does not begin with"):
        store.export_to(tmp_path / "x.npz", ["x"], prefix="z")
    with pytest.raises(ValueError, match="framework is"):
        store.import_from(tmp_path / "x.npz", framework="tf")
    with pytest.raises(ValueError, match="exclude one another"):
        store.import_from(tmp_path / "x.npz", key="k", prefix="p")
    for suffix in (*FORMATS, "npy"):
        with pytest.raises(FileNotFoundError):
            store.import_from(tmp_path / f"none.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_without_a_library_its_name_is_told(store, tmp_path):
    store["x"] = np.ones(2)
    passes(
        f"""
        import sys
        for name in ("safetensors", "zarr"):
            sys.modules[name] = None
        import numpy as np
        import torchshm
        assert "torch" not in sys.modules
        store = torchshm.connect({store.name!r})
        for suffix, package in (("safetensors", "safetensors"), ("zarr", "zarr"), ("zarr.zip", "zarr")):
            for way in (store.export_to, store.import_from):
                try:
                    way("x." + suffix)
                except ImportError as error:
                    assert f"pip install {{package}}" in str(error), error
                else:
                    raise AssertionError(suffix)
        store.export_to("x.npz")
        assert store.import_from("x.npz", prefix="new ") == ["new x"]
        assert "torch" not in sys.modules
        """,
        tmp_path,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.py", "x.npz"]


# ---- whole or not at all


@pytest.mark.parametrize("suffix", [*FORMATS, "npy"])
def test_what_is_at_the_path_stays_unless_it_is_to_go(store, tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    store["x"] = np.ones(3)
    store.export_to(path, "x")
    store["x"] = np.zeros(3)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        store.export_to(path, "x")
    store.import_from(path, key="before")
    got = store["before"]
    assert (got if suffix == "npy" else got["x"]).all()
    store.export_to(path, "x", overwrite=True)
    store.import_from(path, key="after")
    got = store["after"]
    assert not (got if suffix == "npy" else got["x"]).any()
    store["x"] = "text"
    with pytest.raises(TypeError):
        store.export_to(path, "x", overwrite=True)
    store.import_from(path, key="still")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", [True, False])
def test_what_comes_to_the_path_meanwhile_is_not_replaced(tmp_path, kind):
    path = tmp_path / "x"

    def write(at):
        (at / "x" if kind else at).parent.mkdir(exist_ok=True)
        (at / "x" if kind else at).write_text(at.name)

    with pytest.raises(FileExistsError), written_beside(path, False) as made:  # noqa: PT012
        write(made)
        write(path)
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    assert (path / "x" if kind else path).read_text() == "x"


EXPORTER = """
import sys
import torchshm
from torchshm import _check, _exchange

store = torchshm.connect(sys.argv[1])

def tell(name, size, done, of):
    if done == 3:
        print("half", flush=True)
        sys.stdin.read()

_exchange.export(store, sys.argv[2], prefix="big", overwrite=True, tell=tell)
"""
IMPORTER = EXPORTER.replace(
    'export(store, sys.argv[2], prefix="big"', 'import_(store, sys.argv[2], prefix="in "'
)


def killed_midway(source, store, path):
    process = subprocess.Popen(
        [sys.executable, "-c", source, store.name, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_export_that_is_killed_leaves_the_old_file(store, tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    for i in range(6):
        store[f"big{i}"] = np.full(100_000, i)
    store.export_to(path, "big0")
    killed_midway(EXPORTER, store, path)
    assert store.import_from(path, prefix="old ") == ["old big0"]
    assert len(list(tmp_path.iterdir())) == 2
    store.export_to(path, overwrite=True, prefix="big")  # takes away what the killed one has left
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert len(store.import_from(path, prefix="new ")) == 6


def test_what_another_writer_is_at_is_left_to_it(tmp_path):
    path = tmp_path / "x"
    with written_beside(path, False) as one:
        with written_beside(path, False) as other:
            other.write_text("other")
        one.write_text("one")
        path.unlink()
    assert path.read_text() == "one"


@pytest.mark.parametrize("suffix", FORMATS)
def test_names_of_an_import_that_is_killed_are_whole(store, tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    for i in range(6):
        store[f"big{i}"] = np.full(100_000, i)
    store.export_to(path, prefix="big")
    killed_midway(IMPORTER, store, path)
    found = store.keys("in ")
    assert len(found) == 3
    for key in found:
        assert (store[key] == int(key[-1])).all() and store[key].shape == (100_000,)
    assert len(store.import_from(path, prefix="in ", overwrite=True)) == 6
    assert _check.check_store(store.name).sound


def damaged(path, suffix):
    """Take away what a last array has."""
    if suffix == "zarr":
        chunk = max(
            p for p in (path / "b").rglob("*") if p.is_file() and p.name not in ("zarr.json", ".zarray")
        )
        chunk.write_bytes(b"\0\1")
    elif suffix == "npz":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("c.npy", b"\x93NUMPY")
    else:
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            last = max(
                name
                for name in archive.namelist()
                if name.startswith("b/") and not name.endswith(("json", ".zarray"))
            )
            archive.writestr(last, b"\0\1")


@pytest.mark.parametrize("suffix", ["npz", "zarr", "zarr.zip"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_import_that_fails_midway_takes_back_what_it_has_saved(store, tmp_path, suffix, overwrite):
    path = tmp_path / f"v.{suffix}"
    store["a"], store["b"] = np.ones(2000), np.ones(2000)
    store.export_to(path)
    damaged(path, suffix)
    told = []
    with pytest.raises((ValueError, RuntimeError)):
        _exchange.import_(store, path, prefix="in ", overwrite=overwrite, tell=lambda *x: told.append(x))
    assert len(told) >= 2 and store.keys("in ") == []


def test_damaged_files_are_errors_that_name_them(store, tmp_path):
    for suffix in ("safetensors", "npz", "npy", "zarr.zip"):
        path = tmp_path / f"v.{suffix}"
        path.write_bytes(b"no such file" * 9)
        with pytest.raises(ValueError, match=f"v.{suffix}") as raised:
            store.import_from(path)
        assert not isinstance(raised.value, UnicodeError)
    (tmp_path / "v.zarr").mkdir()
    with pytest.raises(ValueError, match="no zarr hierarchy"):
        store.import_from(tmp_path / "v.zarr")
    store["x"] = np.ones(10_000)
    for suffix in ("safetensors", "npz", "npy"):
        whole = tmp_path / f"x.{suffix}"
        store.export_to(whole, "x")
        os.truncate(whole, whole.stat().st_size - 9)
        with pytest.raises(ValueError, match=r"can't be read|damaged"):
            store.import_from(whole, prefix="in ")
    assert store.keys("in ") == []


def test_no_pickle_is_read(store, tmp_path):
    np.savez(tmp_path / "v.npz", a=np.ones(3), o=np.array([{}], object))
    with pytest.raises(ValueError, match=r"'o\.npy' in .* can\'t be read: Object arrays cannot be loaded"):
        store.import_from(tmp_path / "v.npz")
    assert "a" not in store


def test_taken_names_are_told_before_anything_is_saved(store, tmp_path):
    store["a"], store["b"] = np.ones(3), np.ones(3)
    store.export_to(tmp_path / "v.npz")
    del store["a"]
    with pytest.raises(torchshm.KeyExistsError, match="b is a name"):
        store.import_from(tmp_path / "v.npz")
    assert store.keys() == ["b"]
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr(".npy", b"")
    with pytest.raises(ValueError, match="no key: give a prefix"):
        store.import_from(tmp_path / "w.npz")


# ---- copies


@pytest.mark.parametrize("suffix", [*FORMATS, "npy"])
@pytest.mark.parametrize("framework", ["np", "pt"])
def test_what_is_read_is_in_the_store_already_when_it_is_named(store, tmp_path, suffix, framework):
    path = tmp_path / f"v.{suffix}"
    store["x"] = np.arange(1 << 20)
    store.export_to(path)
    with _exchange._FORMATS[suffix].read(path, framework) as (items, _), store.storage():
        assert [(item.name in ("x", "v"), item.nbytes >= 8 << 20) for item in items] == [(True, True)]
        value = items[0].read()
    assert torchshm.is_shared(value) and type(value) is (torch.Tensor if framework == "pt" else np.ndarray)
    before = store.info()["blocks"]
    store["y"] = value
    assert store.info()["blocks"] == before


@pytest.mark.parametrize("aside", [False, True])
def test_safetensors_need_not_be_held_all_at_a_time(tmp_path, aside):
    half, x = torch.arange(8).bfloat16().reshape(2, 4), np.arange(100_000)
    arrays = {
        "e": x[:0],
        "b": np.array([True, False]),
        "s": half.mT,
        "h": half,
        "x": x,
        "r": x[::-3],
        "0": np.array(3.0),
    }
    _exchange._safetensors.write(tmp_path / "made", iter(arrays.items()), aside)
    assert (tmp_path / "aside").exists()  # copies always go there
    got = safetensors.torch.load_file(tmp_path / "made")
    assert sorted(got) == sorted(arrays) and got["s"].equal(half.mT) and got["h"].equal(half)
    for name in "ebxr0":
        assert_equal(got[name].numpy(), np.asarray(arrays[name]))


def test_a_name_that_goes_meanwhile_is_left_out(store, tmp_path):
    for key in "abc":
        store[key] = np.ones(3)

    def tell(name, size, done, of):
        store.remove(name) if name == "b" else None

    assert _exchange.export(store, tmp_path / "v.npz", tell=tell) == ["a", "c"]
    with np.load(tmp_path / "v.npz") as file:
        assert sorted(file) == ["a", "c"]
