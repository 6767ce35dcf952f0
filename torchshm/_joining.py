"""Becoming a member of a store, and what is said where that can't be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torchshm import _C
from torchshm._arguments import nanoseconds_of
from torchshm.errors import StoreUnavailableError, TorchshmError

_TOO_MANY = "this process is a member of too many pools"  # csrc/pool/members.h


def unavailable(name: str, error: StoreUnavailableError) -> str:
    """Say that there is no such store, and how there will be one."""
    return f"no store named {name}: {error}. Start one with torchshm.start({name!r}) or `torchshm serve --name {name}`, as the same user"


def join(name: str, timeout: float) -> _C.Store:
    try:
        with counting_pools():
            return _C.Store.connect(name, nanoseconds_of(timeout))
    except StoreUnavailableError as error:
        raise StoreUnavailableError(unavailable(name, error)) from None


@contextlib.contextmanager
def counting_pools() -> Iterator[None]:
    """Where a process can join no further pool, say how many there may be, and what else can be done."""
    try:
        yield
    except TorchshmError as error:
        if str(error) == _TOO_MANY:
            error.args = (
                "this process is a member of 16 pools, which is the most; close() does not leave one until the process ends: use a child "
                "process",
            )
        raise
