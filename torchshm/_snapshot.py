"""Snapshots: the names of a live store, copied into the file of a new one.

They are written by a process of its own, ``python -m torchshm._snapshot``: whoever joins a pool stays its member, and a process is a
member of sixteen at most. That process copies texts and blocks as they are and knows no values, so nothing is unpickled. It is told
what to do by its arguments and says how far it is on its standard output; when the one who asked is gone, it ends at the next line.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchshm import _C, _values
from torchshm._exchange._place import written_beside
from torchshm.errors import PoolFullError, StaleHandleError, StoreUnavailableError, TorchshmError

if TYPE_CHECKING:
    from torchshm._store import Store

_ATTEMPTS = 100  # at a name that changes while it is copied
_SLACK = 16 << 20  # bytes; what little there may be for what is saved meanwhile
_SAID_EVERY = 0.05  # s


class _SourceFullError(PoolFullError):
    """A value on disk could not be brought back: a larger snapshot would not help."""


Tell = Callable[[str, int, int, int], None]
"""As torchshm._exchange.Tell."""


def snapshot(
    store: Store,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    tell: Tell | None = None,
    limit: int | None = None,
) -> list[str]:
    """Write the file; returns the keys in it. :meth:`Store.snapshot` says more. `limit` is a guess at its size, in bytes."""
    target = Path(os.path.abspath(path))
    with written_beside(target, overwrite) as made:
        limit = limit or _size(store)
        while True:
            try:
                keys = _copy_apart(store.name, made, limit, tell)
                break
            except _SourceFullError as error:
                raise PoolFullError(
                    f"a value could not be brought back from disk to be copied: {error}"
                ) from None
            except PoolFullError:
                made.unlink(missing_ok=True)
                disk = os.statvfs(made.parent)
                free = disk.f_bavail * disk.f_frsize
                if free < limit:
                    raise PoolFullError(
                        f"no room for a snapshot of {store.name} at {target}: it takes up to {limit} bytes, and the file system has "
                        f"{free} free"
                    ) from None
                limit *= 2  # much was saved meanwhile
        made.chmod(0o666 & ~_umask())
    return keys


def _size(store: Store) -> int:
    """A bit more than what the names of a store hold now."""
    size = _SLACK
    for key in store:
        with contextlib.suppress(KeyError):
            size += store.info(key)["bytes"] + (1 << 12)
    return size + size // 8


def _umask() -> int:
    """Of this process; os.umask() could tell it by changing it only, for all threads."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))


def _copy_apart(name: str, made: Path, limit: int, tell: Tell | None) -> list[str]:
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
                keys = _follow(child, tell)
            except BaseException:
                child.kill()
                raise
        if keys is None or child.returncode != 0:
            errors.seek(0)
            raise TorchshmError(
                f"the process that writes a snapshot of {name} has ended with the status {child.returncode}: {errors.read()}"
            )
        return keys


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (PoolFullError, _SourceFullError, StoreUnavailableError, TorchshmError, OSError, MemoryError)
}


def _follow(child: subprocess.Popen[str], tell: Tell | None) -> list[str] | None:
    """The keys, when it has said them; its errors are raised here."""
    keys: list[str] | None = None
    assert child.stdout is not None
    for line in child.stdout:
        said = json.loads(line)
        if "error" in said:
            raise _KINDS.get(said["error"], TorchshmError)(said["text"])
        if "keys" in said:
            keys = said["keys"]
        elif tell is not None:
            tell(said["key"], said["bytes"], said["done"], said["of"])
    return keys


# ---- in the process of its own


def main(name: str, made: str, limit: int, aside: str) -> None:
    """Connect to a store, and copy it into a new one of the same name."""

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    try:
        source = _C.Store.connect(name, 2 * 10**9)
        os.environ["XDG_RUNTIME_DIR"] = aside  # nobody is to find the new one
        target = _C.Store.start(name, limit, file=made)
        try:
            keys = _copy(source, target, say)
        finally:
            target.stop()
        say(keys=keys)
    except (TorchshmError, OSError, MemoryError) as error:
        say(error=type(error).__name__, text=str(error))
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # if nobody else does it any more


def _copy(source: _C.Store, target: _C.Store, say: Callable[..., None]) -> list[str]:
    copies: dict[tuple[int, int], _C.BlockRef] = {}  # what several names share is copied once
    names, keys = source.keys(""), []
    said = 0.0
    for i, key in enumerate(names):
        if time.monotonic() > said + _SAID_EVERY:
            said = time.monotonic()
            with contextlib.suppress(KeyError):
                say(key=key, bytes=source.find(key)["bytes"], done=i, of=len(names))
        with contextlib.suppress(KeyError):  # removed meanwhile
            _copy_name(source, target, key, copies)
            keys.append(key)
    return keys


def _copy_name(
    source: _C.Store, target: _C.Store, key: str, copies: dict[tuple[int, int], _C.BlockRef]
) -> None:
    for attempt in range(_ATTEMPTS):
        found = source.find(key)
        left = found["expires_in"]
        if left is not None and left <= 0:
            raise KeyError(key)
        ttl = 0 if left is None else max(1, int(left * 1e9))
        try:
            try:
                raw = source.load(key, _values.MODES["r"])
            except PoolFullError as error:
                raise _SourceFullError(*error.args) from None
            if isinstance(raw, np.ndarray):
                # Its text says where it lies: that is made anew.
                if not target.save_array(key, raw, False, ttl, False, found["policy"], 0):
                    raise TorchshmError(f"the entry of {key!r} is damaged")
                return
            text, blocks = raw[:2]
            refs = [_copied(source, target, block, copies) for block in blocks]
        except StaleHandleError:  # removed or replaced after it was found
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        target.save(key, text, refs, False, ttl, False, found["policy"])
        return


def _copied(
    source: _C.Store,
    target: _C.Store,
    block: tuple[int, int],
    copies: dict[tuple[int, int], _C.BlockRef],
) -> _C.BlockRef:
    if block not in copies:
        whole = source.open(*block, _values.MODES["r"])
        made = target.blank(whole.size)
        _C.copy_into(made, 0, whole.__array_interface__["data"][0], whole.size)
        copies[block] = made.base  # type: ignore[assignment]
    return copies[block]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
