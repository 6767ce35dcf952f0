"""What to say when a store has no room: who has it, and what would make some."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from typing import Any

from torchshm import _C
from torchshm._size import format_size
from torchshm.errors import PoolFullError, TorchshmError

# What csrc/pool/member.cc advises, who does not know what a store holds.
_ADVICE = re.compile(
    r"\. Drop arrays that are no longer needed, [^.]*start the store with a larger limit=[^.]*"
)
_NEVER = re.compile(r"no room for \d+ bytes: larger than the (pool's limit|address space)")
_WANTED = re.compile(r"no room for (\d+) bytes")
_MOST = 1000  # names that are looked at, for an error. Arbitrary
_LARGEST = 3
_BLOCK = slice(1, 21)  # of the text of an array: which block, of which life
_DROP, _PIN = 1, 3


def too_much(core: _C.Store, keys: Iterable[str], *, surely: bool = True) -> PoolFullError | None:
    """The error for values that can't be in memory at the same time, which loading them would find out by waiting.

    Where it has to be sure, arrays alone are counted: of what else there is some kinds are copied, and their blocks let go of.
    What is in memory and no array by itself is not counted: names may share its blocks.
    """
    several, needed, blocks = set(keys), 0, set()
    for key in several:
        try:
            found = core.find(key)
        except (KeyError, TorchshmError):  # load() meets it again, and says it
            continue
        array = found["text"][:1] == b"A"
        if not array and (surely or found["where"] == "memory"):
            continue
        if found["where"] == "memory":
            block = found["text"][_BLOCK]
            if block in blocks:
                continue
            blocks.add(block)
        needed += found["bytes"]
    limit = core.limit
    if len(several) < 2 or needed <= limit:
        return None
    return PoolFullError(
        f"these {len(several)} values need {format_size(needed)} together, and the store's limit is {format_size(limit)}: load fewer "
        "at a time"
    )


def _wanted(text: str) -> int:
    found = _WANTED.search(text)
    return int(found[1]) if found else 0


def never(error: PoolFullError) -> bool:
    """Whether a block was asked for that is larger than all that there can be: there is nothing to wait for."""
    return _NEVER.search(str(error)) is not None


def explain(core: _C.Store, error: PoolFullError, key: str | None = None) -> None:
    """Put advice for this store, as it is now, into an error that has advice for any. `key`: of what was to be loaded."""
    text = str(error)
    found = _ADVICE.search(text)
    if found is None:
        return
    what, trouble = text[: found.start()], text[found.end() :]
    with contextlib.suppress(TorchshmError):
        more = _advice(core, core.info(), _wanted(what), bool(trouble))
        begin = "" if key is None else f"{key!r} can't come back from disk: "
        error.args = (f"{begin}{what}{trouble}. {more}",)


def _advice(core: _C.Store, info: dict[str, Any], wanted: int, trouble: bool) -> str:
    limit, spill = info["limit_bytes"], info["spill_directory"]
    larger = "start the store with a larger limit="
    if core.file is not None:
        larger = "start the store again, with its file= and a larger limit="
    elif not spill and info["policy"] != _DROP:
        larger += ", or with spill="
    if wanted > limit:
        return f"That alone is more than the limit, {format_size(limit)}: {larger.removesuffix(', or with spill=')}"
    said = []
    mine = sum(each["held_bytes"] for each in info["processes"] if each["pid"] == os.getpid())
    if mine > 0:
        said.append(
            f"This process itself holds {format_size(mine)} of it: what it has loaded, received or made and still refers to; let go "
            "of some of that first"
        )
    names = _names_in_memory(core, info)
    pinned = [nbytes for _, nbytes, policy in names if policy == _PIN]
    if pinned:
        said.append(
            f"{len(pinned)} name{'' if len(pinned) == 1 else 's'} of {format_size(sum(pinned))} can't go, by the policy 'pin': "
            "store.set_policy(key, 'keep') lets them"
        )
    if trouble:
        said.append(f"Make room on that disk{_free(spill)}, or remove names: what is on it goes with them")
    elif names and not spill and info["policy"] != _DROP:
        largest = ", ".join(f"{key[:100]!r} ({format_size(nbytes)})" for key, nbytes, _ in names[:_LARGEST])
        said.append(f"Removing names makes room; the largest: {largest}")
    said.append(f"Or {larger}" if said else larger.capitalize())
    return ". ".join(said)


def _names_in_memory(core: _C.Store, info: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Name, bytes and policy, the largest first; none where there are too many to look at."""
    rows: list[tuple[str, int, int]] = []
    if info["names"] > _MOST:
        return rows
    for key in core.keys(""):
        with contextlib.suppress(KeyError, TorchshmError):  # removed meanwhile
            found = core.find(key)
            if found["where"] == "memory":
                rows.append((key, found["bytes"], found["policy"]))
    return sorted(rows, key=lambda row: -row[1])


def _free(directory: str) -> str:
    try:
        disk = os.statvfs(directory)
    except OSError:  # of another mount namespace
        return ""
    return f", which has {format_size(disk.f_bavail * disk.f_frsize)} free,"
