"""A module's weights.

Quantity: time to load a state dict of 1 GB (252 tensors, float32, a transformer's) into a module.
Unit: seconds. Making the module is not counted: on the meta device where the loaded tensors take
the place of its own, in memory that was written to where they are copied.
Opponents: torch.load + load_state_dict, from the page cache; torch.load(mmap=True) +
load_state_dict(assign=True).
After the clock every page of the weights is read, and the private memory that the process has got
(Anonymous of /proc/self/smaps_rollup) is counted.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least, at_most
from benchmarks.memory import rollup
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio, rounded
from benchmarks.units import MIB

NAME = "store_module"
WIDTH, LAYERS = 1024, 21  # 1.06 GB
QUICK_WIDTH, QUICK_LAYERS = 256, 12
KEY = "weights"
OVER_LOAD, PRIVATE_MOST = 50, 10

ARMS = {
    "torchshm": Arm("torchshm", "Store.load_module into a module on the meta device"),
    "torchshm_state": Arm("torchshm, state dict", "Store.load + load_state_dict(assign=True)"),
    "torch_mmap": Arm("torch.load, mmap", "torch.load(mmap=True) + load_state_dict(assign=True)"),
    "torch_load": Arm("torch.load", "torch.load from the page cache + load_state_dict"),
}


def make_module(width: int, layers: int, device: str) -> Any:
    """A transformer's layers: 12 tensors each."""
    import torch

    with torch.device(device):
        return torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width) for _ in range(layers)
        )


class ModuleHost:
    """Makes the weights, and has them in a file and in a store that it serves."""

    def __init__(self, width: int, layers: int, path: str) -> None:
        import torch

        import torchshm

        self._store = torchshm.start(f"bench-{os.getpid()}", limit="4GiB")
        torch.manual_seed(0)
        state = make_module(width, layers, "cpu").state_dict()
        torch.save(state, path)
        self._store.save(KEY, state)
        self._held = self._store.load(KEY)  # mapped here too: what others map of it is shared
        for tensor in self._held.values():
            tensor.sum()
        Path(path).read_bytes()

    def address(self) -> str:
        return self._store.name

    def close(self) -> None:
        self._store.close()


class ModuleLoading:
    """Loads them into a fresh module."""

    def __init__(self, arm: str, width: int, layers: int, path: str, address: str) -> None:
        import torch

        self._torch, self._arm, self._path = torch, arm, path
        self._shape = width, layers
        torch.set_num_threads(1)
        if arm.startswith("torchshm"):
            import torchshm

            self._store = torchshm.connect(address)

    def check(self) -> None:
        """Compares what is loaded with what the file has."""
        module = self._module()
        self._load(module)
        loaded, expected = module.state_dict(), self._torch.load(self._path, mmap=True)
        if list(loaded) != list(expected) or not all(
            self._torch.equal(loaded[name], expected[name]) for name in expected
        ):
            raise AssertionError("the weights were loaded damaged")

    def run(self) -> tuple[float, int, int]:
        """Seconds, and bytes of Anonymous and of Private_Dirty that the loaded module has added."""
        before = rollup()
        module = self._module()
        begin = time.perf_counter()
        self._load(module)
        seconds = time.perf_counter() - begin
        for tensor in module.state_dict().values():
            tensor.sum()  # reads all
        after = rollup()
        return seconds, *(max(0, after[name] - before[name]) for name in ("Anonymous", "Private_Dirty"))

    def _module(self) -> Any:
        return make_module(*self._shape, "cpu" if self._arm == "torch_load" else "meta")

    def _load(self, module: Any) -> None:
        if self._arm == "torchshm":
            self._store.load_module(KEY, module)
        elif self._arm == "torchshm_state":
            module.load_state_dict(self._store.load(KEY), assign=True)
        elif self._arm == "torch_mmap":
            module.load_state_dict(self._torch.load(self._path, mmap=True), assign=True)
        else:
            module.load_state_dict(self._torch.load(self._path))


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm in turn."""
    width, layers = (QUICK_WIDTH, QUICK_LAYERS) if quick else (WIDTH, LAYERS)
    rounds = 5 if quick else 15
    result = Result(NAME, "time to load a state dict into a module", "s", ARMS, quick=quick)
    meter.expect(1 + rounds)
    meter.doing("making the weights")
    with tempfile.TemporaryDirectory(prefix="torchshm-bench-") as folder, Arms(result) as arms:
        path = f"{folder}/weights.pt"
        arms.start("host", ("torch", "torchshm"), ModuleHost, width, layers, path)
        address = arms.call("host", "address", timeout=600.0) if "host" in arms else None
        if address is not None:
            result.facts["file_megabytes"] = round(Path(path).stat().st_size / 1e6)
            for arm in ARMS:
                arms.start(arm, (), ModuleLoading, arm, width, layers, path, address)
                arms.call(arm, "check", timeout=600.0)
            for arm in ARMS:
                if arm in arms:
                    arms.call(arm, "run")  # warms up
        meter.step()
        meter.doing("loading in turn")
        calls = {arm: ("run",) for arm in ARMS if arm in arms}
        answers = arms.rounds(calls, rounds, after_round=meter.step)
    seconds = {arm: [each[0] for each in values] for arm, values in answers.items()}
    private: dict[str, Sample] = {}
    for arm, values in answers.items():
        private[arm] = Sample.of([each[1] / MIB for each in values])
        also = {
            "anonymous_mib": private[arm].median,
            "private_dirty_mib": rounded(Sample.of([each[2] / MIB for each in values]).median),
        }
        result.add(arm, seconds[arm], also)

    def compare(above: str, below: str) -> Sample | None:
        return ratio(seconds[above], seconds[below]) if above in seconds and below in seconds else None

    result.figures = [
        at_least(
            "torch.load + load_state_dict / torchshm", OVER_LOAD, "x", compare("torch_load", "torchshm")
        ),
        at_least("torch.load(mmap=True) + assign / torchshm", 1, "x", compare("torch_mmap", "torchshm")),
        at_most(
            "private memory of a loaded module whose weights were read",
            PRIVATE_MOST,
            "MiB",
            private.get("torchshm"),
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "a module's weights from the store, against torch.load", measure)
