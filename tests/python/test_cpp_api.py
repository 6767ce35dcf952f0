"""The installed C++ package: programs outside of the build tree share a store with Python, and torchshmd serves one."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from peer import Peer
from scripts import PATIENCE

import torchshm
from torchshm import _C

ROOT = Path(__file__).resolve().parents[2]

# `make test-python` has built the library before; without that the first test here does.
pytestmark = pytest.mark.timeout(900)


def build(*arguments, **options):
    done = subprocess.run(["nice", *arguments], capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def build_tree(folder):
    """Where the module under test was built, or a tree of its own."""
    for tree in [*Path(_C.__file__).parents, ROOT / "build" / "release"]:
        if (tree / "CMakeCache.txt").exists() and (tree / "csrc" / "api").is_dir():
            return tree
    build("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DTORCHSHM_BUILD_PYTHON=OFF")
    return folder


@pytest.fixture(scope="session")
def prefix(tmp_path_factory):
    """What `cmake --install` puts somewhere."""
    folder = tmp_path_factory.mktemp("cpp")
    tree = build_tree(folder / "build")
    build("cmake", "--build", tree, "--target", "torchshm_store", "torchshmd", "--parallel", "2")
    build("cmake", "--install", tree, "--component", "cpp", "--prefix", folder / "prefix")
    return folder / "prefix"


@pytest.fixture(scope="session")
def programs(prefix):
    """Two projects that know nothing but the prefix, and torch's."""
    places = f"{prefix};{torch.utils.cmake_prefix_path}"
    built = prefix.parent / "programs"
    for source in ("tests/cpp/consumer", "docs/examples/cpp_store"):
        tree = built / Path(source).name
        build(
            "cmake",
            *("-S", ROOT / source, "-B", tree, "-G", "Ninja"),
            f"-DCMAKE_PREFIX_PATH={places}",
            f"-DCMAKE_CXX_COMPILER_LAUNCHER={shutil.which('ccache') or ''}",
        )
        build("cmake", "--build", tree, "--parallel", "2")
    return built


class Program:
    """A C++ process that obeys commands, one line each."""

    def __init__(self, path):
        self.process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="surrogatepass"
        )

    def __call__(self, *command):
        print(*command, file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        assert ready, f"no answer to {command}"
        answer = self.process.stdout.readline()
        assert answer, f"it ended at {command}: {self.process.wait(PATIENCE)}"
        return answer.rstrip("\n").strip()

    def close(self):
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self.process.stdout.close()


@pytest.fixture
def start_program(programs):
    with contextlib.ExitStack() as stack:

        def start(name):
            program = Program(programs / "consumer" / name)
            stack.callback(program.close)
            return program

        yield start


@pytest.fixture
def cpp(start_program, store):
    program = start_program("consumer")
    assert program("connect", store.name) == store.name
    return program


@pytest.fixture
def libtorch(start_program, store):
    program = start_program("tensors")
    assert program("connect", store.name) == store.name
    return program


def hexed(x):
    return np.ascontiguousarray(x).tobytes().hex() or "-"


def numbers(values):
    return ",".join(map(str, values)) or "-"


def told(x, writeable="r"):
    """What the C++ program says about an array."""
    return f"{x.dtype.name} {numbers(x.shape)} {numbers(x.strides)} {writeable} array {hexed(x)}"


NUMERIC = (
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64 complex128"
)


# ---- saved in C++, loaded in Python


def test_arrays_saved_in_cpp_are_arrays_in_python(store, cpp):
    assert cpp("save_dtypes") == "done"
    for name in [*NUMERIC.split(), "longdouble"]:
        loaded = store.load(name)
        assert loaded.dtype == np.dtype(name) and not loaded.flags.writeable
        if name != "float16":
            np.testing.assert_array_equal(loaded, np.arange(6).reshape(2, 3).astype(name))
        assert store.info(name)["kind"] == "array"
    np.testing.assert_array_equal(store.load("longlong"), np.arange(6).reshape(2, 3))
    half = np.array([0x3F80, 0x4000], np.uint16)
    np.testing.assert_array_equal(store.load("float16"), half.view(np.float16))
    np.testing.assert_array_equal(store.load("bfloat16"), half.view(ml_dtypes.bfloat16))


def test_layouts_saved_in_cpp_keep_their_values_and_no_gaps(store, cpp):
    assert cpp("save_layouts") == "done"
    n = np.arange(24, dtype=np.int32)
    expected = {
        "c": n.reshape(4, 6),
        "fortran": n.reshape(4, 6).T,
        "gaps": n.reshape(4, 6)[:, ::2],
        "backwards": n[::-1],
        "broadcast": np.full((3, 2), 5, np.int32),
        "scalar": np.int32(7),
        "empty": np.empty((0, 5), np.int32),
        "vector": n,
        "const": np.array([1.5, 2.5]),
    }
    for key, value in expected.items():
        loaded = store.load(key)
        assert type(loaded) is np.ndarray and loaded.dtype == value.dtype and loaded.shape == value.shape
        np.testing.assert_array_equal(loaded, value)
    assert store.load("fortran").flags.f_contiguous and store.load("gaps").flags.c_contiguous


def test_dlpack_goes_in_and_out(store, cpp):
    assert cpp("save_dlpack") == "done"
    np.testing.assert_array_equal(store["dlpack"], np.arange(1, 7, dtype=np.float32).reshape(2, 3).T)
    store["out"] = np.arange(1000.0)[::2]
    # Rank, size, stride, the first bytes; the memory goes with the tensor and not before.
    assert cpp("export_dlpack", "out", "c") == f"1 500 1 {hexed(np.zeros(1))} freed"
    store["out"] = np.arange(3.0)
    assert cpp("export_dlpack", "out", "r").startswith("! TypeError")


def test_a_blob_saved_in_cpp_is_a_memoryview_in_python(store, cpp):
    assert cpp("save_blob", "b", "hello") == "done"
    loaded = store.load("b")
    assert type(loaded) is memoryview and loaded == b"hello" and loaded.readonly
    assert cpp("blob", "b", "r") == f"{b'hello'.hex()} r"


# ---- saved in Python, loaded in C++


def test_arrays_saved_in_python_are_arrays_in_cpp(store, cpp):
    for name in NUMERIC.split():
        store[name] = np.arange(6).reshape(2, 3).astype(name)
        assert cpp("load", name, "r") == told(store[name])
        assert cpp("load", name, "c") == told(store[name], "w")
    store["long"] = np.arange(3, dtype=np.longlong)
    assert cpp("load", "long", "r") == told(np.arange(3))
    store["b"] = np.arange(4).astype(ml_dtypes.bfloat16)
    assert cpp("load", "b", "r") == told(store["b"])
    for key, value in {
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "scalar": np.array(1.5),
        "empty": np.empty((3, 0)),
        "packed": np.arange(12)[::-2],
    }.items():
        store[key] = value
        assert cpp("load", key, "r") == told(store[key])
    with store.storage():
        whole = np.arange(24.0).reshape(4, 6) + 0
    store["view"] = whole[1:, ::-2]
    assert cpp("load", "view", "r") == told(whole[1:, ::-2])


def test_tensors_saved_in_python_are_arrays_in_cpp(store, cpp):
    t = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).permute(2, 0, 1)
    store["t"] = t
    assert cpp("load", "t", "c") == f"float32 4,2,3 4,48,16 w tensor {hexed(t.numpy())}"
    store["p"] = torch.nn.Parameter(torch.ones(3))
    assert cpp("load", "p", "r") == f"float32 3 4 r tensor+grad {hexed(np.ones(3, np.float32))}"


def test_a_state_dict_saved_in_python_is_named_arrays_in_cpp(store, cpp, libtorch):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    store["model"] = module.state_dict()
    said = cpp("load_all", "model").split()
    assert said[:2] == ["0.weight=float32:2,3", "0.bias=float32:2"]
    assert [each.partition("=")[0] for each in said] == list(module.state_dict())
    sums = dict(each.split("=") for each in libtorch("load_all", "model").split())
    for name, tensor in module.state_dict().items():
        assert float(sums[name]) == pytest.approx(float(tensor.sum()), abs=1e-5)
    store["nest"] = {"a": [np.ones(2), 3], "b": (torch.ones(1), {"c": np.zeros(3, np.uint8), 5: b"x" * 2000})}
    assert cpp("load_all", "nest") == "a.0=float64:2 b.0=float32:1 b.1.c=uint8:3 b.1.5=uint8:2000"
    store["one"] = np.ones(3)
    assert cpp("load_all", "one") == "=float64:3"
    store["née \U0001f600"] = {"né\n\U0001f600": np.ones(1)}
    assert cpp("keys", "n").startswith("nest n")


def test_what_python_writes_beyond_json_does_not_hide_the_arrays_beside_it(store, cpp):
    store["x"] = {
        "loss": float("nan"),
        "best": [float("inf"), float("-inf"), 1e-320, 10**300],
        os.fsdecode(b"caf\xe9.npy"): np.ones(2),  # a lone surrogate
        "\ud83d": np.ones(3),
    }
    assert cpp("load_all", "x") == "caf\udce9.npy=float64:2 \ud83d=float64:3"


@pytest.mark.parametrize(
    "data", [b"", b"a", b"ab", b"abc", bytes(range(256)), b"long" * 1000], ids=lambda data: str(len(data))
)
def test_bytes_saved_in_python_are_blobs_in_cpp(store, cpp, data):
    for value in (data, bytearray(data), memoryview(data)):
        store["b"] = value
        assert cpp("blob", "b", "r").split()[0] == (data.hex() or "-")


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_a_blob_is_the_bytes_of_any_contiguous_array(store, cpp):
    days = np.array(["2024-01-01", "2025-01-01"], "M8[D]")
    flights = np.zeros(3, [("carrier", "S2"), ("delay", "<f4")])
    flights["delay"] = [1, 2, 3]
    for key, value in {
        "days": days,
        "flights": flights,
        "swapped": np.arange(3, dtype=">i4"),
        "text": np.array(["ab", "c"]),
    }.items():
        store[key] = value
        assert cpp("blob", key, "r") == f"{hexed(value)} r"
        assert cpp("load", key, "r").startswith(f"! TypeError: torchshm: '{key}' can't be had in this form")
    store["t"] = torch.arange(6).reshape(2, 3).T
    assert cpp("blob", "t", "r").startswith("! TypeError")
    store["q"] = torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.quint8)
    assert "quantised" in cpp("load", "q", "r")
    store["s"] = torch.eye(3).to_sparse()
    assert "sparse" in cpp("load", "s", "r")
    store["o"] = pytest.approx  # what only pickle knows
    assert "pickled" in cpp("load", "o", "r")
    store["d"] = {"a": np.ones(1)}
    assert "load_all" in cpp("load", "d", "r")


# ---- one memory


def test_a_write_is_seen_by_both_where_the_mode_says_so(store, cpp):
    store["x"] = np.arange(1000.0)
    view = store.load("x")
    cpp("hold", "x", "r+")
    cpp("set", "x", 3, 42)
    assert view[3] == 42
    store.load("x", mode="r+")[4] = 43
    assert cpp("get", "x", 4).startswith("43.0")
    cpp("hold", "x", "c")
    cpp("set", "x", 3, 1)
    assert cpp("get", "x", 3).startswith("1.0") and view[3] == 42
    cpp("hold", "x", "r")
    assert cpp("set", "x", 3, 1).startswith("! TypeError")


def test_what_lies_in_the_store_is_named_and_not_copied(store, cpp):
    assert cpp("make", "big", 1 << 20) == "0"
    view = store.load("big")
    cpp("set", "big", 5, 77)
    assert view[5] == 77
    store["p"] = np.arange(1 << 20)
    cpp("hold", "p", "r")
    assert cpp("alias", "p", "q") == "0"
    before = store.info()["live_bytes"]
    store["r"] = store.load("p")
    assert store.info()["live_bytes"] == before


def test_a_holder_keeps_its_memory_after_the_name_is_gone(store, cpp):
    store["x"] = np.arange(1 << 18, dtype=float)
    full = store.info()["live_bytes"]
    cpp("hold", "x", "r")
    del store["x"]
    assert store.info()["live_bytes"] == full and cpp("get", "x", 9).startswith("9.0")
    cpp("drop", "x")
    gc.collect()
    assert store.info()["live_bytes"] < full


# ---- working together


def test_a_lock_held_in_cpp_keeps_python_out(store, cpp):
    assert cpp("lock", "alone", 0, "x") == "held"
    with pytest.raises(TimeoutError):
        store.lock("x", shared=True, timeout=0).acquire()
    store.lock("y", timeout=0).acquire()
    store.lock(timeout=0).acquire()
    assert cpp("fork_locked", "x") == "0 held"
    with pytest.raises(TimeoutError):
        store.lock("x", timeout=0).acquire()
    assert cpp("unlock", "x") == "done"
    assert cpp("unlock", "x") == "! Error: torchshm: the lock is not held"
    with store.lock("x", timeout=0):
        pass
    assert cpp("lock", "shared", 0, "x") == "held"
    with store.lock("x", shared=True, timeout=0), pytest.raises(TimeoutError):
        store.lock("x", timeout=0).acquire()
    assert cpp("drop_lock", "x") == "done"
    with store.lock("x", timeout=0):
        pass
    assert cpp("lock", "alone", 0) == "held"  # the store's own
    with pytest.raises(TimeoutError):
        store.lock(timeout=0).acquire()
    cpp.process.kill()
    with store.lock(timeout=PATIENCE):
        pass


def test_a_lock_held_in_python_keeps_cpp_out(store, cpp):
    with store.lock("x"):
        said = cpp("lock", "shared", 0.05, "x")
        assert said == "! TimeoutError: torchshm: somebody else has held the lock of 'x' for 0.050000 s"
        print("lock", "alone", 60, "x", file=cpp.process.stdin, flush=True)
        assert not select.select([cpp.process.stdout], [], [], 0.2)[0]
    assert cpp.process.stdout.readline() == "held\n"
    with store.lock(shared=True):
        assert cpp("lock", "alone", 0).startswith(
            "! TimeoutError: torchshm: somebody else has held the lock of the"
        )
        assert cpp("lock", "shared", 0) == "held"


def never():
    raise AssertionError("made twice")


def test_what_cpp_is_making_python_waits_for(store, cpp):
    assert cpp("create", "slowly", 0, "x") == "making"
    with pytest.raises(TimeoutError):
        store.get_or_create("x", never, timeout=0.1)
    print(file=cpp.process.stdin, flush=True)
    np.testing.assert_array_equal(store.get_or_create("x", never), [1, 2])
    assert cpp.process.stdout.readline().strip() == told(store["x"]) + " made"
    assert cpp("create", "fail", 0, "x") == told(store["x"]) + " found"
    assert cpp("create", "fail", 0, "y") == "! other: out of ideas"
    assert cpp("create", "at_once", 0, "y") == told(store["x"]) + " made"


def test_what_python_is_making_cpp_waits_for(store, cpp):
    def make():
        assert cpp("create", "fail", 0.05, "x").startswith(
            "! TimeoutError: torchshm: another process has not"
        )
        print("create", "fail", 60, "x", file=cpp.process.stdin, flush=True)
        assert not select.select([cpp.process.stdout], [], [], 0.2)[0]
        return np.arange(5)

    made = store.get_or_create("x", make)
    assert cpp.process.stdout.readline().strip() == told(made) + " found"


def test_the_work_of_a_cpp_maker_that_dies_is_taken_over(store, cpp):
    assert cpp("create", "slowly", 0, "x") == "making"
    cpp.process.kill()
    np.testing.assert_array_equal(store.get_or_create("x", lambda: np.zeros(2), timeout=PATIENCE), [0, 0])


# ---- names


def test_a_forked_child_has_the_store_and_what_was_loaded(store, cpp):
    store["x"] = np.arange(1000.0)
    cpp("hold", "x", "r")
    del store["x"]
    assert cpp("fork", "x", "child") == "0"
    assert store["child"][3] == 3
    cpp("drop", "x")


def test_threads_use_one_store(store, cpp):
    store["x"] = np.arange(1000.0)
    assert cpp("threads", "x") == "2000"
    assert [store[f"thread{t}"] for t in range(4)] == [499, 1499, 2499, 3499]


def test_names_and_errors(store, cpp):
    assert cpp("load", "x", "r") == f"! KeyError: torchshm: the store {store.name} has no name 'x'"
    assert cpp("info", "x").startswith("! KeyError")
    assert cpp("wait", "x", 0.05).startswith("! TimeoutError: torchshm: nobody has saved 'x'")
    assert cpp("save_for", "x", 3600) == "done"
    assert cpp("save_for", "x", 3600).startswith("! KeyExistsError")
    assert cpp("info", "x") == f"array {store.info('x')['bytes']} {cpp.process.pid} 3599"
    assert 3590 < store.info("x")["expires_in"] <= 3600
    assert cpp("replace", "x") == "done" and store["x"] == 2
    assert cpp("info", "x").endswith("never")
    store["xy"] = np.ones(1)
    assert cpp("keys", "x") == "x xy" and cpp("contains", "xy") == "yes"
    assert cpp("remove", "xy") == "yes" and cpp("remove", "xy") == "no" and list(store) == ["x"]
    assert cpp("save_empty_key").startswith("! invalid_argument")
    assert cpp("save_wrong_strides").startswith("! invalid_argument")
    assert cpp("connect", "nowhere", 0).startswith(
        "! StoreUnavailableError: torchshm: no store named nowhere"
    )
    assert cpp("connect", "../x", 0).startswith("! invalid_argument")


def test_cpp_waits_for_what_python_saves(store, cpp):
    print("wait", "late", 60, file=cpp.process.stdin, flush=True)
    ready, _, _ = select.select([cpp.process.stdout], [], [], 0.2)
    assert not ready
    store["late"] = np.ones(2)
    assert cpp.process.stdout.readline().strip() == told(np.ones(2))


def test_a_damaged_entry_is_an_error_in_cpp(store, cpp):
    core = store._core
    store["x"] = np.ones(100)
    x = store["x"]
    block, _, _ = core.refer(x.__array_interface__["data"][0], x.nbytes)
    text = core.find("x")["text"]
    for at in (1, 9, 33, 41, 60, 65):
        damaged = bytearray(text)
        damaged[at] ^= 0x10
        core.save("y", bytes(damaged), [block], True, 0, False, -1)
        assert cpp("load", "y", "r").startswith("! Error: torchshm: the entry of 'y' is damaged"), at
    far = {"k": "array", "dtype": "<f8", "shape": [1 << 20], "strides": [8], "r": 0, "o": 0}
    for leaf in (
        far,
        far | {"shape": [2], "strides": [1 << 62]},
        far | {"shape": [2], "o": 1 << 62},
        far | {"shape": [2], "r": 1},
        far | {"shape": [-1]},
        far | {"shape": [1, 1]},
        far | {"shape": [0.5]},
    ):
        tree = {"regions": [[0, 0, 1 << 40]], "leaves": [leaf], "value": {"x": 0}}
        core.save("y", b"J" + json.dumps(tree).encode(), [block], True, 0, False, -1)
        assert cpp("load", "y", "r").startswith("! Error: torchshm: the entry of 'y' is damaged"), leaf
    for text in (b"J", b"J[", b"J" + b"[" * 1_000_000, b'J{"regions":[]', b'J{"a":"\\ud8', b"Jnull", b'J"\\'):
        core.save("y", text, [], True, 0, False, -1)
        assert cpp("load", "y", "r").startswith("! Error: torchshm: the entry of 'y' is damaged"), text[:20]


# ---- torch


def test_tensors_go_from_libtorch_to_python_and_back(store, libtorch):
    assert libtorch("save") == "done"
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    expected = {
        "plain": base,
        "permuted": base.permute(2, 0, 1),
        "sliced": base[:, :, ::2],
        "bfloat16": base.to(torch.bfloat16),
        "grad": base.clone().requires_grad_(),
        "complex": torch.complex(base, -base),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
    }
    for key, value in expected.items():
        loaded = store.load(key)
        assert type(loaded) is torch.Tensor and loaded.requires_grad == value.requires_grad
        assert loaded.dtype == value.dtype and torch.equal(loaded, value)
        store["back"] = loaded
        data = (
            value.detach().contiguous().view(torch.uint8)
            if value.dim()
            else value.reshape(1).view(torch.uint8)
        )
        said = libtorch("load", "back").split()
        assert said[1] == numbers(value.shape) and said[4] == (data.numpy().tobytes().hex() or "-")
        assert said[3] == ("grad" if value.requires_grad else "plain")
    assert store.load("permuted").stride() == (1, 12, 4)
    assert libtorch("save_sparse").startswith("! TypeError")
    store["array"] = np.arange(3.0)
    assert libtorch("load", "array").startswith("Double 3 1 plain")
    assert libtorch("hold", "array", "r").startswith("! TypeError")


def test_torch_s_own_dlpack_goes_in_and_out(store, libtorch):
    said = libtorch("into_dlpack", "t")
    value = np.arange(6).reshape(2, 3).T
    for key in ("t", "t_versioned"):
        np.testing.assert_array_equal(store[key], value)
    assert libtorch("from_dlpack", "t") == f"{said} | {said}"


def test_a_libtorch_tensor_is_the_memory_of_the_store(store, libtorch):
    store["x"] = torch.zeros(1000)
    shared = store.load("x", mode="r+")
    libtorch("hold", "x", "r+")
    libtorch("add", "x")
    assert shared.sum() == 1000
    libtorch("hold", "x", "c")
    libtorch("add", "x")
    assert shared.sum() == 1000 and "0000003f" not in libtorch("see", "x")
    assert libtorch("make", "made") == "0"
    made = store.load("made")
    libtorch("add", "made")
    assert made.sum() == 8000


# ---- the example of the documentation


def test_the_example_runs_as_it_says(store, programs):
    field = np.random.default_rng(0).normal(280, 5, (10, 25, 53)).astype(np.float32)
    store["t2m"] = field
    anomaly = programs / "cpp_store" / "anomaly"
    done = subprocess.run([anomaly, store.name, "t2m"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(store["t2m_anomaly"], field - field.mean(dtype=float), atol=1e-3)


# ---- serving


def test_a_cpp_program_serves_a_store_and_python_takes_it_over(start_program, runtime):
    program = start_program("consumer")
    assert program("start", "fromcpp") == "serving"
    assert program("start", "fromcpp").startswith("! KeyExistsError")
    with torchshm.connect("fromcpp") as store:
        store["x"] = np.arange(10)
        assert program("load", "x", "r") == told(np.arange(10))
        assert program("stop") == "not serving"
        assert program("load", "x", "r") == told(np.arange(10))
        with torchshm.start("fromcpp") as again:
            assert again._core.took_over and again["x"].sum() == 45


class Daemon:
    def __init__(self, prefix, *arguments):
        self.process = subprocess.Popen(
            [prefix / "bin" / "torchshmd", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self):
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=PATIENCE)[1]
        return line.strip()

    def end(self, signal_number):
        """The exit status, and what was said on stderr."""
        self.process.send_signal(signal_number)
        error = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, error


@pytest.fixture
def daemon(prefix, runtime):
    daemons = []

    def start(*arguments):
        daemons.append(Daemon(prefix, *arguments))
        return daemons[-1]

    yield start
    for each in daemons:
        each.process.kill()
        each.process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_daemon_serves_until_it_is_told_to_end(daemon, runtime, number):
    served = daemon("--name", "daemon", "--limit", "64MiB", "--ttl", "2h", "--mode", "0600")
    assert served.said() == f"Serving the store daemon as process {served.process.pid}."
    linked = subprocess.run(["ldd", served.process.args[0]], capture_output=True, text=True, timeout=PATIENCE)
    assert "libc.so" in linked.stdout and "python" not in linked.stdout and "torch" not in linked.stdout
    with torchshm.connect("daemon") as store:
        store["x"] = np.arange(10)
        info = store.info()
        assert (
            info["service_pid"] == served.process.pid
            and info["limit_bytes"] == 64 << 20
            and info["ttl"] == 7200
        )
        code, error = daemon("--name", "daemon").end(0)
        assert code == 1 and error.startswith("torchshmd: a store named daemon is being served already")
        assert served.end(number) == (0, "")
        assert not list((runtime / "torchshm").glob("daemon*"))
        assert store["x"].sum() == 45


def test_torchshm_stop_ends_the_daemon(daemon):
    served = daemon("--name", "stopped", "--json")
    assert json.loads(served.said()) == {"name": "stopped", "pid": served.process.pid, "took_over": False}
    assert _C.store_stop("stopped")["pid"] == served.process.pid
    served.process.communicate(timeout=PATIENCE)
    assert served.process.returncode == 0


def test_a_killed_daemon_s_store_is_taken_over_by_the_next(daemon):
    served = daemon("--name", "killed", "--limit", "64MiB")
    served.said()
    with torchshm.connect("killed") as store:
        store["x"] = np.arange(100_000)
        assert served.end(signal.SIGKILL)[0] == -signal.SIGKILL
        store["y"] = store["x"]
        again = daemon("--name", "killed", "--json")
        assert json.loads(again.said())["took_over"]
        with torchshm.connect("killed") as second:
            assert second["y"].sum() == 4999950000
        assert again.end(signal.SIGTERM) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "which store"),
        (["--name"], "takes a value"),
        (["--nmae", "x"], "no such option: --nmae"),
        (["--name", "x", "y"], "what is 'y'"),
        (["--name", "x", "--limit", "much"], "not a size: 'much'"),
        (["--name", "x", "--limit", "0"], "not a size"),
        (["--name", "x", "--limit", "8Qi"], "not a size"),
        (["--name", "x", "--limit", "0%"], "or 25%"),
        (["--name", "x", "--limit", "100.5%"], "or 25%"),
        (["--name", "x", "--ttl", "2y"], "not a time: '2y'"),
        (["--name", "x", "--ttl", "-1"], "not a time"),
        (["--name", "x", "--mode", "rw"], "not permissions: 'rw'"),
        (["--name", "x", "--mode", "7777"], "not permissions: '7777'"),
        (["--name", "x", "--group", "nobody of that name"], "no group named"),
    ],
)
def test_wrong_usage_of_the_daemon_says_what_is_right(prefix, runtime, arguments, why):
    done = subprocess.run(
        [prefix / "bin" / "torchshmd", *arguments], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2 and why in done.stderr and "Usage: torchshmd" in done.stderr
    serve = [sys.executable, "-m", "torchshm", "serve", *arguments]
    done = subprocess.run(serve, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr


def _info(name):
    return torchshm.connect(name).info()


def test_the_daemon_takes_a_share_and_the_pages_it_is_told(daemon):
    served = daemon(
        "--name", "paged", "--limit", "0.2%", "--hugepages", "never", "--prefault", "--numa", "local"
    )
    served.said()
    with Peer() as peer:  # one pool less here
        info = peer.call(_info, "paged")
    assert info["limit_bytes"] == int(torchshm._C.memory_allowed() * 0.002) and info["pages"] == "4KiB"
    assert info["warm_bytes"] == info["limit_bytes"] >> 21 << 21
    assert served.end(signal.SIGTERM) == (0, "")
    for option, value, why in (
        ("--hugepages", "1GiB", "chunks of 2 MiB"),
        ("--numa", "bind", "names no nodes"),
    ):
        refused = daemon("--name", "refused", option, value).process
        error = refused.communicate(timeout=PATIENCE)[1]
        assert refused.returncode == 1 and why in error, error


def test_the_package_has_the_version_of_the_wheel(prefix):
    text = (prefix / "lib" / "cmake" / "torchshm" / "torchshmConfigVersion.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{importlib.metadata.version("torchshm")}")' in text


def test_the_daemon_says_why_a_store_can_t_be_served(prefix, runtime):
    done = subprocess.run(
        [prefix / "bin" / "torchshmd", "--name", "a/b"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and done.stderr.startswith("torchshmd: a store's name has 1 to 63")
    assert os.listdir(prefix / "bin") == ["torchshmd"]
