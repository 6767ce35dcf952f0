"""What is installed here: an arm whose package is missing is left out, and the result says so."""

from __future__ import annotations

import importlib
import importlib.util

PEERS = ("ray", "vineyard")
"""What `make bench` installs apart from the other packages."""


def missing(package: str) -> str | None:
    """Why `package` cannot be used, or None where it can.

    Only torchshm is really imported: it is cheap, and a tree that is not built has the package
    without its extension module. torch and Ray cost seconds, so looking them up has to do.
    """
    if package == "torchshm":
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"torchshm cannot be imported: {error}"
        return None
    if importlib.util.find_spec(package):
        return None
    where = "; `make bench` runs with it, in .venv-peers" if package in PEERS else ""
    return f"{package} is not installed{where}"
