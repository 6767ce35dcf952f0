"""Snapshots: the names of a live store, copied into the file of a new one.

They are written by a process of its own, ``python -m torchshm._snapshot``: whoever joins a pool stays its member, and a process is a
member of sixteen at most. That process copies texts and blocks as they are and knows no values, so nothing is unpickled. It is told
what to do by its arguments and says how far it is on its standard output; when the one who asked is gone, it ends at the next line.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchshm import _C, _values
from torchshm._exchange._place import written_beside
from torchshm._size import nanoseconds
from torchshm.errors import PoolFullError, StaleHandleError, StoreUnavailableError, TorchshmError

if TYPE_CHECKING:
    from torchshm._store import Store

_ATTEMPTS = 100  # at a name that changes while it is copied
_SLACK = 16 << 20  # bytes; what little there may be for what is saved meanwhile
_TABLES = 2 << 30  # bytes; more than a file has before its values, almost all of them holes
_SAID_EVERY = 0.05  # s
_NAMED = 10  # names in a message


class _SourceFullError(PoolFullError):
    """A value on disk could not be brought back: a larger snapshot would not help."""


class _DamagedError(TorchshmError):
    """A value of the store can't be read."""


Tell = Callable[[str, int, int, int], None]
"""As torchshm._exchange.Tell."""


def snapshot(
    store: Store,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    skip_damaged: bool = False,
    tell: Tell | None = None,
    limit: int | None = None,
) -> list[str]:
    """Write the file; returns the keys in it. :meth:`Store.snapshot` says more. `limit`: bytes that it may take, for tests."""
    target = Path(os.path.abspath(path))
    with written_beside(target, overwrite) as made:
        size = limit or _size(store)  # a guess
        # Address space only: holes take no room, but count where the length of files is limited.
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        room = (
            store._core.limit
            if most == resource.RLIM_INFINITY
            else min(store._core.limit, (most - _TABLES) // 3)
        )
        limit = limit or max(size, room)
        while True:
            try:
                keys, damaged = _copy_apart(store.name, made, limit, tell)
                break
            except _SourceFullError as error:
                raise PoolFullError(
                    f"a value could not be brought back from disk to be copied: {error}"
                ) from None
            except PoolFullError:
                with contextlib.suppress(FileNotFoundError):
                    size = max(size, made.stat().st_blocks * 512)
                made.unlink(missing_ok=True)
                disk = os.statvfs(made.parent)
                free = disk.f_bavail * disk.f_frsize
                if free < size:
                    raise PoolFullError(
                        f"no room for a snapshot of {store.name} at {target}: it takes up to {size} bytes, and the file system has "
                        f"{free} free"
                    ) from None
                size *= 2  # much was saved meanwhile
                limit = max(limit, size)
        if damaged and not skip_damaged:
            raise TorchshmError(
                f"{_said(damaged)}. Nothing was written: skip_damaged=True (--skip-damaged) writes the rest"
            )
    if damaged:
        warnings.warn(f"{_said(damaged)}: not in {target}", RuntimeWarning, stacklevel=3)
    return keys


def _said(damaged: dict[str, str]) -> str:
    """The names that can't be read, in a line."""
    named = ", ".join(map(repr, list(damaged)[:_NAMED]))
    more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    names = "1 name" if len(damaged) == 1 else f"{len(damaged)} names"
    return f"{names} can't be read: {named}{more} ({next(iter(damaged.values()))})"


def _size(store: Store) -> int:
    """A bit more than what the names of a store hold now."""
    size = _SLACK
    for key in store:
        with contextlib.suppress(KeyError):
            size += store.info(key)["bytes"] + (1 << 12)
    return size + size // 8


def _copy_apart(name: str, made: Path, limit: int, tell: Tell | None) -> tuple[list[str], dict[str, str]]:
    paths = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory(prefix="torchshm-") as aside, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", __name__, name, str(made), str(limit), aside]
        with subprocess.Popen(
            command,
            cwd="/",
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child:
            try:
                said = _follow(child, tell)
            except BaseException:
                child.kill()
                raise
        if said is None or child.returncode != 0:
            errors.seek(0)
            raise TorchshmError(
                f"the process that writes a snapshot of {name} has ended with the status {child.returncode}: {errors.read()}"
            )
        return said


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (PoolFullError, _SourceFullError, StoreUnavailableError, TorchshmError, OSError, MemoryError)
}


def _follow(child: subprocess.Popen[str], tell: Tell | None) -> tuple[list[str], dict[str, str]] | None:
    """The keys, and those that can't be read and why, when it has said them; its errors are raised here."""
    found: tuple[list[str], dict[str, str]] | None = None
    assert child.stdout is not None
    for line in child.stdout:
        said = json.loads(line)
        if "error" in said:
            raise _KINDS.get(said["error"], TorchshmError)(said["text"])
        if "keys" in said:
            found = said["keys"], said["damaged"]
        elif tell is not None:
            tell(said["key"], said["bytes"], said["done"], said["of"])
    return found


# ---- in the process of its own


def main(name: str, made: str, limit: int, aside: str) -> None:
    """Connect to a store, and copy it into a new one of the same name."""

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    try:
        source = _C.Store.connect(name, 2 * 10**9)
        os.environ["XDG_RUNTIME_DIR"] = aside  # nobody is to find the new one
        target = _C.Store.start(name, limit, policy=-1, file=made)
        try:
            keys, damaged = _copy(source, target, say)
            taken = target.info()["committed_bytes"]
        finally:
            target.stop()
        _settle(source, made, taken, 2 * limit)
        say(keys=keys, damaged=damaged)
    except (TorchshmError, OSError, MemoryError) as error:
        say(error=type(error).__name__, text=str(error))
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # if nobody else does it any more


def _settle(source: _C.Store, made: str, taken: int, most: int) -> None:
    """Give a finished file the settings of its store. Before, names without a ttl would have got the store's.

    Its limit too, but where more than that was copied, from disk.
    """
    figures = source.info()
    ttl, patience = nanoseconds(figures["ttl"] or 0), nanoseconds(source.patience)
    limit = min(max(source.limit, taken), most)
    _C.Store.start(source.name, limit, ttl, policy=figures["policy"], patience=patience, file=made).stop()


def _copy(source: _C.Store, target: _C.Store, say: Callable[..., None]) -> tuple[list[str], dict[str, str]]:
    copies: dict[tuple[int, int], _C.BlockRef] = {}  # what several names share is copied once
    names = source.keys("")
    policies: dict[str, int] = {}
    damaged: dict[str, str] = {}
    said = 0.0
    for i, key in enumerate(names):
        if time.monotonic() > said + _SAID_EVERY:
            said = time.monotonic()
            with contextlib.suppress(KeyError):
                say(key=key, bytes=source.find(key)["bytes"], done=i, of=len(names))
        try:
            policies[key] = _copy_name(source, target, key, copies)
        except KeyError:
            pass  # removed meanwhile
        except _DamagedError as error:
            damaged[key] = str(error)
    # Only now: a copy that may be dropped would make room for the next one.
    for key, policy in policies.items():
        if policy != _values.KEEP:
            target.set_policy(key, policy)
    return list(policies), damaged


def _copy_name(
    source: _C.Store, target: _C.Store, key: str, copies: dict[tuple[int, int], _C.BlockRef]
) -> int:
    """Copy a name, kept; gives the policy that it should have."""
    for attempt in range(_ATTEMPTS):
        try:
            found, raw = _whole(source, key)
            left = found["expires_in"]
            if left is not None and left <= 0:
                raise KeyError(key)
            ttl = 0 if left is None else max(1, int(left * 1e9))
            if isinstance(raw, np.ndarray):
                # Its text says where it lies: that is made anew.
                if not target.save_array(key, raw, False, ttl, False, _values.KEEP, 0):
                    raise _DamagedError(f"the entry of {key!r} is damaged")
                return int(found["policy"])
            text, blocks = raw[:2]
            # Held, all of them, before the first is copied.
            wholes = {block: _opened(source, block) for block in blocks if block not in copies}
            for block, whole in wholes.items():
                copies[block] = _copied(target, whole)
            refs = [copies[block] for block in blocks]
        except StaleHandleError as error:  # removed or replaced after it was found
            if attempt + 1 == _ATTEMPTS:
                raise _DamagedError(str(error)) from None
            continue
        target.save(key, text, refs, False, ttl, False, _values.KEEP)
        return int(found["policy"])
    raise AssertionError


def _whole(source: _C.Store, key: str) -> tuple[dict[str, Any], Any]:
    """What is said of a name, and its value: of one and the same save.

    Raises
    ------
    StaleHandleError
        When it was removed or replaced in between.
    """
    with _reading():
        before = source.find(key)
        raw = source.load(key, _values.MODES["r"])
        found = source.find(key)
    if (found["cell"], found["life"]) != (before["cell"], before["life"]):
        raise StaleHandleError(f"{key!r} is replaced faster than it can be copied")
    return found, raw


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Tell what is wrong with the store from what is wrong with its copy."""
    try:
        yield
    except PoolFullError as error:
        raise _SourceFullError(*error.args) from None
    except (StaleHandleError, StoreUnavailableError, KeyError):
        raise
    except (TorchshmError, ValueError, OSError) as error:
        raise _DamagedError(str(error)) from None


def _opened(source: _C.Store, block: tuple[int, int]) -> np.ndarray:
    with _reading():
        return source.open(*block, _values.MODES["r"])


def _copied(target: _C.Store, whole: np.ndarray) -> _C.BlockRef:
    made = target.blank(whole.size)
    _C.copy_into(made, 0, whole.__array_interface__["data"][0], whole.size)
    return made.base  # type: ignore[return-value]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
