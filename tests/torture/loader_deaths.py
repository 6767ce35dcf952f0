"""Workers of a running DataLoader are killed at random moments: it ends as stock PyTorch's does, and all memory comes back.

The same with torchshm's DataLoader, with PyTorch's own after ``register()``, and without torchshm, so that what PyTorch itself does stands
beside it. The second has the standard library's queues and event, and hangs where those do: a worker that is killed while it holds
their semaphore keeps it. Such a hang is counted, with where it is. Each death is one DataLoader in a process that runs
many of them, one after the other; a supervisor watches that process, and takes no sign for a minute as a hang.

    python tests/torture/loader_deaths.py --deaths 1000 --seed 1 --json build/torture/loader_deaths.json
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import random
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from result_file import ResultFile

PATIENCE = 60.0  # seconds; PyTorch itself looks every 5 seconds whether its workers live
SHAPES = [(3, 8, 8), (3, 40, 50), (2, 5, 16, 32), (4, 128, 128)]
STOCK = "stock"
KINDS = {
    "torchshm.data": ["data", "data, pooled"],
    "register()": ["arrays", "tensors"],
    STOCK: ["arrays"],
}
# The innermost frames of a thread that waits for a semaphore of the standard library.
STANDARD = re.compile(r"Current thread [^\n]*\n  File \"[^\n]*/multiprocessing/(synchronize|queues)\.py\"")
ERROR = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (exited unexpectedly|is killed by signal)")


class Fields:
    """Samples that say by themselves what is in them."""

    def __init__(self, shape: tuple[int, ...], length: int) -> None:
        self.shape, self.length = shape, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "field": np.full(self.shape, index, "f4"),
            "mask": np.full(self.shape[1:], index % 2 == 0),
            "index": index,
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def check(batch: dict[str, Any]) -> None:
    for n, index in enumerate(batch["index"]):
        assert (batch["field"][n] == np.float32(index)).all(), index
        assert (batch["mask"][n] == (index % 2 == 0)).all(), index


def kind_of_loader(chance: random.Random, side: str) -> tuple[str, Any, dict[str, Any]]:
    """What it is called, the class, and arguments of its own."""
    from torch.utils.data import DataLoader

    kind = chance.choice(KINDS[side])
    if kind in ("arrays", "tensors"):
        return kind, DataLoader, {"collate_fn": collate} if kind == "arrays" else {}
    import torchshm.data

    return kind, torchshm.data.DataLoader, {"pooled": True} if kind == "data, pooled" else {}


def death(chance: random.Random, spawned: float, side: str) -> tuple[str, str]:
    """Run one DataLoader until one of its workers is killed. Returns how it was made, and how it ended."""
    kind, loader_class, own = kind_of_loader(random.Random(chance.random()), side)
    method = "spawn" if chance.random() < spawned else "fork"
    persistent = chance.random() < 0.5
    shape, workers = chance.choice(SHAPES), 1 if method == "spawn" else chance.randrange(1, 4)
    # The end of an epoch is a moment like any other only where the workers outlive it.
    data = Fields(shape, chance.choice([12, 1 << 40]) if persistent else 1 << 40)
    loader = loader_class(
        data,
        batch_size=chance.choice([1, 4]),
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context=method,
        prefetch_factor=chance.choice([1, 2, 6]),
        **own,
    )
    way = f"{kind}, {method}{', persistent' if persistent else ''}"
    kept: list[dict[str, Any]] = []
    killer = None
    try:
        iterator = iter(loader)
        victim = chance.choice(iterator._workers).pid
        delay = chance.choice([0, 0.001, 0.01, 0.1]) * chance.random() + (
            chance.random() * 3 if method == "spawn" else 0
        )
        # Nobody waits for the worker before it has died; so its pid is its own until then.
        killer = threading.Timer(delay, os.kill, (victim, signal.SIGKILL))
        killer.start()
        while True:
            for batch in iterator:
                check(batch)
                kept = [*kept[-3:], batch]
                if chance.random() < 0.02:
                    time.sleep(0.01)
            iterator = iter(loader)
    except RuntimeError as error:
        ended = "RuntimeError" if ERROR.search(str(error)) else f"RuntimeError: {error}"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        # The error comes out of a signal handler, wherever the program is.
        while killer is not None and killer.is_alive():
            with contextlib.suppress(RuntimeError):
                killer.join()
    for batch in kept:
        check(batch)
    return way, ended


def remains() -> str:
    """What has not come back to the pool. Tickets of messages that the dead have sent and nobody has received are asked back first."""
    import torchshm
    from torchshm import _C

    gc.collect()
    limit = torchshm.stats()["limit_bytes"]
    _C.set_ticket_age(0)
    _C.set_limit(4 << 20)
    try:
        with contextlib.suppress(torchshm.PoolFullError):  # where something has not come back
            torchshm.empty(4 << 20, "u1")
    finally:
        _C.set_limit(limit)
        _C.set_ticket_age(300)
    for _ in range(100):  # the thread that gives memory back may be at work on a chunk
        torchshm.trim(0)
        figures = torchshm.stats()
        found = {name: figures[name] for name in ("leases", "blocks", "tickets", "committed_bytes")}
        if found == {"leases": 1, "blocks": 0, "tickets": 0, "committed_bytes": 0}:
            report = _C.check(*_C.fds(), True)
            return str(report["violations"]) if report["violations"] else ""
        time.sleep(0.05)
    return str(found)


def run_many(seed: int, deaths: int, side: str, spawned: float) -> None:
    """In a process of its own: a line for each death."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if side != STOCK:
        import torchshm

        torchshm.register(limit="256MiB")
    import torch

    torch.set_num_threads(1)
    for n in range(deaths):
        chance = random.Random(f"{seed} {n}")
        began = time.monotonic()
        try:
            way, ended = death(chance, spawned, side)
        except RuntimeError as error:  # the handler's, a moment late
            way, ended = "late", "RuntimeError" if ERROR.search(str(error)) else f"RuntimeError: {error}"
        gc.collect()
        took = time.monotonic() - began
        left = remains() if side != STOCK else ""
        descriptors = len(os.listdir("/proc/self/fd"))
        print(
            json.dumps(
                {"way": way, "ended": ended, "seconds": took, "left": left, "descriptors": descriptors}
            ),
            flush=True,
        )


class Side:
    """Deaths with one of KINDS."""

    def __init__(self, seed: int, deaths: int, name: str, spawned: float) -> None:
        self.seed, self.wanted, self.name, self.spawned = seed, deaths, name, spawned
        self.deaths = self.hangs = self.standard = self.well = self.batches = self.descriptors = 0
        self.longest = 0.0
        self.ways: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        while self.deaths < self.wanted:
            self.batches += 1
            self.run_one_process(min(200, self.wanted - self.deaths))

    def run_one_process(self, deaths: int) -> None:
        arguments = ["--seed", str(self.seed * 1000 + self.batches), "--deaths", str(deaths)]
        arguments += ["--spawned", str(self.spawned), "--side", self.name]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                bufsize=0,  # what has been written and what is read here are the same for select()
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            assert process.stdout is not None
            selector = selectors.DefaultSelector()
            selector.register(process.stdout, selectors.EVENT_READ)
            first = 0
            while True:
                if not selector.select(PATIENCE):
                    self.deaths += 1
                    self.hangs += 1
                    process.send_signal(signal.SIGUSR1)
                    time.sleep(1)
                    errors.seek(0)
                    said = errors.read()
                    if self.name == "register()" and STANDARD.search(said):
                        self.standard += 1
                    else:
                        self.wrong.append(f"{self.name}: a hang. {children(process.pid)} {said[-3000:]}")
                    break
                line = process.stdout.readline()
                if not line:
                    break
                first = self.count(json.loads(line), first)
            done = process.poll() is not None or selector.select(0) != []
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            if done and code not in (0, -signal.SIGKILL):
                errors.seek(0)
                self.deaths += 1
                self.wrong.append(f"{self.name}: the process ended with {code}: {errors.read()[-2000:]}")

    def count(self, death: dict[str, Any], first: int) -> int:
        self.deaths += 1
        self.ways[death["way"]] += 1
        self.longest = max(self.longest, death["seconds"])
        self.well += death["ended"] == "RuntimeError"
        if death["ended"] != "RuntimeError":
            self.wrong.append(f"{self.name}, {death['way']}: {death['ended']}")
        if death["left"]:
            self.wrong.append(f"{self.name}, {death['way']}: not back: {death['left']}")
        first = first or death["descriptors"]
        self.descriptors = max(self.descriptors, death["descriptors"] - first)
        return first

    def figures(self) -> dict[str, Any]:
        figures = {"deaths": self.deaths, "RuntimeError as PyTorch's": self.well, "hangs": self.hangs}
        figures |= {"hangs in the standard library's event": self.standard} if self.standard else {}
        figures |= {
            "longest s": round(self.longest, 1),
            "descriptors more than after the first": self.descriptors,
        }
        return {f"{self.name}: {name}": value for name, value in {**figures, **self.ways}.items()}


def children(pid: int) -> str:
    """Who is left of a process that hangs, and where each one waits in the kernel."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = (path / "stat").read_text()
            if path.name.isdigit() and int(stat.rsplit(")", 1)[1].split()[3]) == pid:
                found.append(
                    f"pid {path.name} {stat.rsplit(')', 1)[1].split()[0]} {(path / 'wchan').read_text()}"
                )
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deaths", type=int, default=20)
    parser.add_argument("--register-deaths", type=int, default=-1, help="as many by default")
    parser.add_argument("--stock-deaths", type=int, default=-1, help="of the comparison; as many by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--spawned", type=float, default=0.05, help="share of loaders whose workers are spawned"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true", help="said in the result")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        run_many(chosen.seed, chosen.deaths, chosen.side, chosen.spawned)
        return
    began = time.monotonic()
    wanted = {"torchshm.data": -1, "register()": chosen.register_deaths, STOCK: chosen.stock_deaths}
    sides = {
        name: Side(chosen.seed, chosen.deaths if deaths < 0 else deaths, name, chosen.spawned)
        for name, deaths in wanted.items()
    }
    figures: dict[str, Any] = {}
    for side in sides.values():
        side.run()
        figures |= side.figures()
    for name, value in figures.items():
        print(f"{name}: {value}")
    stock = sides.pop(STOCK)
    ours = [wrong for side in sides.values() for wrong in side.wrong]
    for wrong in ours:
        print("WRONG:", wrong)
    for wrong in stock.wrong:
        print("without torchshm:", wrong)
    if chosen.json:
        figures |= {f"stock, {n}": wrong.split("\n")[0][:120] for n, wrong in enumerate(stock.wrong)}
        took = time.monotonic() - began
        ResultFile("loader_deaths", chosen.seed, chosen.full, took, figures, ours).write(chosen.json)
    sys.exit(1 if ours else 0)


if __name__ == "__main__":
    main()
