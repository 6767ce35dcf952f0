"""Drafts: files that are written under hidden names, and get their own when all of them are there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path


class Drafts:
    """Files and folders of one result, in a folder. As a context it removes those that have got no name when it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._token = os.urandom(6).hex()

    def __enter__(self) -> Drafts:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self.folder.glob(f".*.{self._token}.*"):
            _remove(path)

    def name(self, what: str) -> Path:
        """A hidden name, a new one each time, also in other processes; nothing reads files of its ending."""
        return self.folder / f".{what}.{self._token}.{os.urandom(6).hex()}.part"

    def publish(self, made: Sequence[tuple[Path, Path]], old: Sequence[Path] = ()) -> None:
        """Give each draft its name, in the place of old files: all of them, or, where that fails, none."""
        aside = [(self.name(path.name), path) for path in old]
        try:
            for hidden, path in aside:
                os.rename(path, hidden)
            for draft, path in made:
                os.rename(draft, path)
        except BaseException:
            for draft, path in made:
                if not draft.exists():
                    _remove(path)
            for hidden, path in aside:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(hidden, path)
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
