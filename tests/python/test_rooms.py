"""The rooms of csrc include one way only, and what is compiled matches what is declared."""

import inspect
import re
from pathlib import Path

import pytest
import torch  # noqa: F401

import torchshm
from torchshm import _C, _tensors

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["base", "os", "pool", "store", "service", "api", "daemon", "python", "torch", "cuda"]
# Rooms side by side: neither sees the other.
APART = {("torch", "python"), ("cuda", "python"), ("python", "api"), ("python", "daemon")}


def sources():
    return [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cc"} and p.parent.name in ORDER]


def test_rooms_include_downwards_only():
    found = sources()
    assert {"base", "os", "pool", "store", "service", "api", "daemon", "python", "torch"} <= {
        path.parent.name for path in found
    }
    for path in found:
        room = path.parent.name
        for included in re.findall(r'#include "(\w+)/', path.read_text()):
            if included not in ORDER:
                continue
            assert ORDER.index(included) <= ORDER.index(room), f"{path} includes upwards, from {included}"
            assert (room, included) not in APART, f"{path} includes {included}"


def test_what_others_wrote_is_included_by_os_and_store_in_sources_alone():
    for path in sources():
        if '#include "third_party/' in path.read_text():
            assert path.parent.name in {"os", "store"} and path.suffix == ".cc", path


def test_only_os_talks_to_the_kernel():
    for path in sources():
        if path.parent.name != "os":
            assert not re.search(r"#include <(sys|linux)/", path.read_text()), path


def test_the_core_knows_neither_python_nor_torch():
    for path in sources():
        if path.parent.name in {"base", "os", "pool", "store", "service", "api", "daemon"}:
            assert not re.search(r"#include [<\"](Python|pybind11|numpy|torch/|ATen)", path.read_text()), path


def test_what_is_installed_includes_nothing_of_the_rooms():
    headers = list((ROOT / "csrc" / "include" / "torchshm").glob("*.h"))
    assert {path.name for path in headers} == {"store.h", "torch.h"}
    for path in [*headers, ROOT / "csrc" / "daemon" / "torchshmd.cc"]:
        included = re.findall(r'#include "(.*)"', path.read_text())
        assert set(included) <= {"torchshm/store.h"}, path
    assert not re.search(r"#include <(ATen|torch|c10)", (headers[0].parent / "store.h").read_text())


@pytest.mark.parametrize("module", [_C, _tensors.compiled()], ids=lambda module: module.__name__)
def test_stub_declares_exactly_what_is_compiled(module):
    text = (ROOT / (module.__name__.replace(".", "/") + ".pyi")).read_text()
    declared = set(re.findall(r"^(?:def |class )?(\w+)[:(]", text, re.MULTILINE))
    compiled = {name for name in dir(module) if not name.startswith("__")}
    assert declared == compiled


def test_every_public_name_is_documented():
    for name in torchshm.__all__:
        assert inspect.getdoc(getattr(torchshm, name)), name
