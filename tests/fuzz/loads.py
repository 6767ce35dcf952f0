"""Forged messages through ``torchshm.loads``, ``pickle.loads`` and the rebuilding of arrays.

usage: loads.py [libFuzzer's options]. With atheris installed it is guided by the coverage of the Python sources; without it the choices
are random, and of the options -runs, -max_total_time and -seed count. Prints ``stat::number_of_executed_units``, as libFuzzer does.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None:
    with atheris.instrument_imports(include=["torchshm"]):
        import torchshm  # noqa: F401

from messages import T, Target

CHECK_EVERY = 4096


class FromBytes:
    """The fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        self.provider = atheris.FuzzedDataProvider(data)

    def integer(self, low: int, high: int) -> int:
        return self.provider.ConsumeIntInRange(low, high)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.provider.ConsumeIntInRange(0, len(options) - 1)]

    def bytes(self, most: int) -> bytes:
        return self.provider.ConsumeBytes(self.provider.ConsumeIntInRange(0, most))


class FromSeed:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def pick(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def bytes(self, most: int) -> bytes:
        length = self.random.randint(0, most)
        if self.random.random() < 0.5:
            return self.random.randbytes(length)
        sparse = bytearray(length)
        for _ in range(min(length, 3)):
            sparse[self.random.randrange(length)] = self.random.randrange(256)
        return bytes(sparse)


target: Any = None


def one(choices: Any) -> None:
    target.one(choices)
    target.done += 1
    if target.done % CHECK_EVERY == 0:
        target.check()


def option(name: str, otherwise: int) -> int:
    given = [a.partition("=")[2] for a in sys.argv if a.startswith(f"-{name}=")]
    return int(given[-1]) if given else otherwise


def main() -> None:
    global target
    target = Target()
    if atheris is None:
        seed = option("seed", 1)
        end = time.monotonic() + option("max_total_time", 10**9)
        for n in range(option("runs", 10**12 if any("max_total" in a for a in sys.argv) else 100_000)):
            one(FromSeed(seed * 1_000_003 + n))
            if time.monotonic() > end:
                break
        target.check()
        assert target.opened > target.done // 100, "nearly everything was refused: the forgeries are no good"
        print(f"stat::number_of_executed_units: {target.done}")
        return
    atheris.Setup([*sys.argv, "-print_final_stats=1"], lambda data: one(FromBytes(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
