"""Files and directories that appear at their path whole, or not at all.

They are written into a directory of their own beside the path, synced, and renamed. That directory is locked as long as its writer
lives, so the next one that comes to this path can tell what a killed writer has left, and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNCS = 16  # at a time. Arbitrary


@contextlib.contextmanager
def written_beside(path: Path, overwrite: bool, *, own_mode: bool = False) -> Iterator[Path]:
    """Yield where to write; at the end of the block it is at `path`, after an error it is gone.

    A file gets the permissions that the process gives to files, or with `own_mode` keeps those that the block gave it.

    Raises
    ------
    FileExistsError
        When there is something at `path`, before the block or at its end, and `overwrite` is not set.
    FileNotFoundError, NotADirectoryError, PermissionError
        When nothing can be made in the directory of `path`, which it names.
    """
    if not overwrite and os.path.lexists(path):
        _refuse(path)
    _sweep(path)
    try:
        home = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent))
    except OSError as error:  # it names what nobody has asked for
        raise OSError(error.errno, error.strerror, str(path.parent)) from None
    lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made = home / "made"
        yield made
        if made.is_file() and not own_mode:
            made.chmod(0o666 & ~_umask())  # some libraries make theirs for this user alone
        _sync(made)
        _rename(made, path, overwrite)
        with contextlib.suppress(OSError):  # it stands; some file systems can't sync a directory
            _sync_one(path.parent)
    finally:
        shutil.rmtree(home, ignore_errors=True)
        os.close(lock)


def _umask() -> int:
    """Of this process; os.umask() could tell it by changing it only, for all threads."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))


def _refuse(path: Path) -> None:
    raise FileExistsError(
        errno.EEXIST, "it exists already; write to another path, or with overwrite=True", str(path)
    )


def _sweep(path: Path) -> None:
    """Remove what writers to this path have left that were killed."""
    for left in path.parent.glob(f".{_literal(path.name[:100])}.*.part"):
        with contextlib.suppress(OSError):
            fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(fd)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_one(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(made: Path) -> None:
    if not made.is_dir():
        _sync_one(made)
        return
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(made) for name in (*names, "")]
    with ThreadPoolExecutor(_SYNCS) as threads:  # the file system writes its journal for many at once
        list(threads.map(_sync_one, paths))


def _rename(made: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        if made.is_dir():
            try:
                os.rename(made, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                _refuse(path)
            return
        try:
            os.link(made, path)  # unlike a rename it replaces nothing
        except FileExistsError:
            _refuse(path)
        except OSError:  # a file system without links
            if os.path.lexists(path):
                _refuse(path)
            os.rename(made, path)
        return
    if (made.is_dir() or path.is_dir()) and os.path.lexists(path):
        if _exchange(made, path):
            return  # the old one goes with the directory that the new one was made in
        os.rename(path, made.parent / "old")
    os.rename(made, path)


def _exchange(a: Path, b: Path) -> bool:
    """Let two paths change places at once; False where the system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
