"""Builds the wheel: setuptools for the Python package, CMake for torchshm._C.

scikit-build-core's setuptools plugin runs the CMake build and takes what it installs into the package; name,
version and dependencies stand in pyproject.toml. Both of these build everything that is needed:

    pip install .
    pip install -e .      # the module lands beside the sources, in torchshm/

The plugin configures from scratch on every run. After an edit `make build` is faster: it builds the module
incrementally in build/release and copies it beside the sources. `make setup` sets TORCHSHM_SKIP_CMAKE=1, so
that the plugin does not build it a second time.
"""

import os

from setuptools import setup

if os.environ.get("TORCHSHM_SKIP_CMAKE") == "1":
    setup()
else:
    setup(cmake_source_dir=".")
