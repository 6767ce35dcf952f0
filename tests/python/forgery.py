"""Handles as an attacker who is a member of the pool could make them: with the pool's secret, and so with a valid sum."""

from __future__ import annotations

import os
import struct

from torchshm import _C

MAGIC = 0x4D48535F48435254
SECRET_AT = 24  # in csrc/pool/layout.h's Header
FIXED = 64  # bytes of csrc/pool/array_wire.cc's Fixed, the sum in the last eight
ORDER_C, ORDER_FORTRAN, ORDER_STRIDED = 0, 1, 2
_MASK = (1 << 64) - 1


def secret() -> int:
    """Of this process's pool, from its control file."""
    magic, _, _, value = struct.unpack("<QQQQ", os.pread(_C.fds()[1], 32, 0))
    assert magic == MAGIC
    return value


def checksum(wire: bytes, key: int) -> int:
    total = key ^ len(wire)
    for at in range(0, len(wire) - 7, 8):
        if at == FIXED - 8:
            continue
        total = ((total ^ int.from_bytes(wire[at : at + 8], "little")) + 0x9E3779B97F4A7C15) & _MASK
        total = ((total ^ total >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        total = ((total ^ total >> 27) * 0x94D049BB133111EB) & _MASK
        total ^= total >> 31
    return total


def signed(wire: bytes, key: int) -> bytes:
    """The wire with the sum that makes it believed. Too short ones stay as they are."""
    if len(wire) < FIXED:
        return bytes(wire)
    return wire[: FIXED - 8] + checksum(wire, key).to_bytes(8, "little") + wire[FIXED:]


def with_extent(wire: bytes, order: int, shape: list[int], strides: list[int], offset: int | None) -> bytes:
    """The same handle with another idea of what is to be seen of the block. Not signed."""
    forged = bytearray(wire[:FIXED])
    forged[34] = forged[34] & 0b1100_1111 | order << 4
    forged[35] = len(shape)
    if offset is not None:
        forged[48:56] = (offset & _MASK).to_bytes(8, "little")
    for number in shape + (strides if order == ORDER_STRIDED else []):
        forged += (number & _MASK).to_bytes(8, "little")
    return bytes(forged)
