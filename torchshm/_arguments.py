"""What users say of a store and its values, checked, and as the core takes it."""

from __future__ import annotations

import os

from torchshm._size import FOREVER, parse_seconds

POLICIES = ("keep", "drop", "spill", "pin")  # csrc/store/layout.h has the same order


def nanoseconds_of(timeout: float) -> int:
    seconds = parse_seconds(timeout, "timeout")
    return FOREVER if seconds < 0 else min(int(seconds * 1e9), FOREVER)


def ttl_of(seconds: float | None) -> int:
    if seconds is None:
        return 0
    number = parse_seconds(seconds, "ttl")
    if number <= 0:
        raise ValueError(f"ttl is a number of seconds above 0, not {seconds}")
    return max(1, int(number * 1e9))


def policy_of(policy: str | None) -> int:
    if policy is None:
        return -1
    if policy not in POLICIES:
        raise ValueError(f"policy is one of {', '.join(map(repr, POLICIES))}, not {policy!r}")
    return POLICIES.index(policy)


def patience_of(timeout: float | None) -> int:
    return -1 if timeout is None else nanoseconds_of(timeout)


def whole_path(path: str | os.PathLike[str], what: str, meant: str) -> str:
    """From the root; `what` is the parameter that it was given as, and what it is `meant` to be."""
    given = os.fsdecode(path)
    if not given:
        raise ValueError(f"{what} is {meant}, or None, not {given!r}: is a variable not set?")
    return os.path.abspath(os.path.expanduser(given))
