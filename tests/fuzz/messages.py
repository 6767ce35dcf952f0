"""Messages of arrays and tensors, forged and damaged, and what may come of unpickling them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.lib.array_utils import byte_bounds

import torchshm
from torchshm import _C, _tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from forgery import ORDER_C, ORDER_FORTRAN, ORDER_STRIDED, secret, signed, with_extent

T = TypeVar("T")

INTERESTING = [0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63)]
DTYPES: list[Any] = [
    np.dtype("f8"),
    np.dtype("i2"),
    np.dtype(">f4"),
    np.dtype("U7"),
    np.dtype("S3"),
    np.dtype("V16"),
    np.dtype("M8[s]"),
    np.dtype([("a", "i4"), ("b", "f8", (2,))]),
    np.dtype(object),
    np.dtypes.StringDType(),
    None,
    "f8",
    7,
]
TYPES: list[Any] = [np.ndarray, np.matrix, np.recarray, np.memmap, np.ma.MaskedArray, int, 5, None]
# All that a forged message may raise; everything else is a finding.
ALLOWED = (torchshm.TorchshmError, TypeError, ValueError, pickle.UnpicklingError)


class Choices(Protocol):
    """Where the fuzzer's decisions come from."""

    def integer(self, low: int, high: int) -> int: ...
    def pick(self, options: Sequence[T]) -> T: ...
    def bytes(self, most: int) -> bytes: ...


class _Reduced:
    """Pickles as a call with these arguments."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


_torch = _tensors.compiled()


def _tensor(wire: Any, *arguments: Any) -> Any:
    return _torch.tensor(_torch.storage(wire), *arguments)


class Target:
    """A pool with arrays in it, their true messages, and one execution at a time."""

    def __init__(self) -> None:
        torchshm.register(min_bytes=0, limit="64M")
        large = torchshm.empty((300, 50))
        large[...] = 1
        shared = [
            torchshm.share(np.ones(50, "i2"), "r+"),
            large,
            large[::-3, 5:40:2],
            torchshm.share(np.ones((40, 30)), "r+").T,
            torchshm.share(np.ones(5000)),
            torchshm.share(np.ones(5000), "r"),
            torchshm.share(np.ones(100, DTYPES[7]), "r+"),
            torchshm.share(np.ones((30, 40)), "r+").view(np.matrix),
            torchshm.share(np.array(["text"] * 99), "r+"),
        ]
        self.originals = shared
        self.tensors = [torch.ones(n) for n in (10, 1000, 20_000)]
        self.storages = [_torch.reduce_storage(x.untyped_storage())[1][0] for x in self.tensors]
        self.secrets = [torchshm.share(np.full(size, -7.25)) for size in (10, 100, 5000, 100_000) * 2]
        self.arguments = [_C.reduce_ndarray(x)[1] for x in shared]
        torchshm.register(1 << 40)
        self.arguments.append(_C.reduce_ndarray(np.ones(60))[1])
        torchshm.register(0)
        for arguments in self.arguments:
            _C.array(*arguments)  # uses the tickets up; from here on a wire opens a block that is held
        for wire in self.storages:
            _torch.storage(wire)
        self.key = secret()
        self.blocks = torchshm.stats()["blocks"]
        self.opened = 0
        self.done = 0

    def one(self, choices: Choices) -> None:
        if choices.integer(0, 3) == 1:
            self._one_tensor(choices)
            return
        true = choices.pick(self.arguments)
        wire = self._wire(choices, true[0])
        arguments: tuple[Any, ...] = (wire, *true[1:])
        beside = choices.integer(0, 7)
        if beside == 1:
            arguments = (wire, choices.pick(DTYPES))
        elif beside == 2:
            arguments = (wire, choices.pick(DTYPES), choices.pick(TYPES))
        elif beside == 3:
            arguments = (choices.pick([None, "text", 5, bytearray(wire)]),)
        elif beside == 4:
            arguments = ()
        try:
            array = self._open(choices.integer(0, 3), _C.array, arguments)
        except ALLOWED:
            return
        self.opened += 1
        self._look_at(array)

    def _one_tensor(self, choices: Choices) -> None:
        wire = choices.pick(self.storages)
        if choices.integer(0, 3) == 1:
            wire = self._wire(choices, wire)
        ndim = choices.integer(0, 5)

        def number() -> int:
            return choices.pick(INTERESTING) if choices.integer(0, 3) == 1 else choices.integer(0, 40)

        size: Any = tuple(number() for _ in range(ndim))
        stride: Any = (
            None if choices.integer(0, 1) else tuple(number() for _ in range(choices.pick([ndim, ndim, 2])))
        )
        dtype = choices.pick([torch.float32, torch.bool, torch.complex128, torch.quint8, "f4", None])
        flags = choices.pick([0, 0, 1, 2, 3, -1, 2**40, 2**70])
        try:
            tensor = self._open(choices.integer(0, 3), _tensor, (wire, dtype, number(), size, stride, flags))
        except (*ALLOWED, RuntimeError, OverflowError):
            return
        self.opened += 1
        whole = tensor.untyped_storage()
        if tensor.numel():
            last = tensor.storage_offset() + sum(
                (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            assert (last + 1) * tensor.element_size() <= whole.nbytes(), (tensor.shape, tensor.stride())
        assert bytes(whole[:4]) and bytes(whole[-4:])

    def _wire(self, choices: Choices, true: bytes) -> bytes:
        wire = true
        how = choices.integer(0, 4)
        if how == 1:
            mask = choices.bytes(len(wire) + 16)
            changed = bytearray(wire) + bytes(max(0, len(mask) - len(wire)))
            for at, byte in enumerate(mask):
                changed[at] ^= byte
            wire = bytes(changed)
        elif how == 2:
            wire = choices.bytes(200)
        elif how == 3:
            wire = wire[: choices.integer(0, len(wire))] + choices.bytes(40)
        elif how == 4:
            ndim = choices.integer(0, 6)

            def number() -> int:
                kind = choices.integer(0, 3)
                if kind == 0:
                    return choices.pick(INTERESTING)
                return choices.integer(-(2**63), 2**63 - 1) if kind == 1 else choices.integer(-9000, 9000)

            order = choices.pick([ORDER_C, ORDER_FORTRAN, ORDER_STRIDED])
            shape, strides = [number() for _ in range(ndim)], [number() for _ in range(ndim)]
            wire = with_extent(wire, order, shape, strides, number() if choices.integer(0, 1) else None)
        if choices.integer(0, 1023) != 77:
            wire = true[: len(wire)][:8] + wire[8:]  # another pool is looked for in all of /proc
        return signed(wire, self.key) if choices.integer(0, 3) else wire

    def _open(self, way: int, function: Any, arguments: tuple[Any, ...]) -> Any:
        if way == 0:
            return function(*arguments)
        message = pickle.dumps([_Reduced(function, arguments)], protocol=2 + way)
        return (torchshm.loads if way == 1 else pickle.loads)(message)[0]

    def _look_at(self, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        if array.size and torchshm.is_shared(array):
            low, high = byte_bounds(array)
            base = array
            while isinstance(base, np.ndarray):
                base = base.base
            length = int(repr(base).split(", ")[1].split()[0])  # <torchshm block 512, 4096 bytes>
            assert high - low <= length, (array.shape, array.strides, length)
        if array.size:
            np.asarray(array).flat[:: max(1, array.size // 50)].tobytes()

    def check(self) -> None:
        for x in self.originals:
            if x.dtype.names is None and x.dtype.kind != "U":
                assert (np.asarray(x) == 1).all()
        assert all((x == 1).all() for x in self.tensors)
        assert all((x == -7.25).all() for x in self.secrets)
        assert torchshm.stats()["blocks"] == self.blocks
        report = _C.check(*_C.fds())
        assert report["violations"] == [], report["violations"]
