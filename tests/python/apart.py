"""Modules of tests that run in a process of their own: they join more pools than the sixteen that one process may have.

A module says so by ``pytestmark = pytest.mark.apart``. Its tests run when the first of them is due, all at once, and each has its own
outcome here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

_HERE = "TORCHSHM_TESTS_APART"
_PATIENCE = 600  # s, for all tests of a module


@dataclass
class _Module:
    output: str
    cases: dict[str, ElementTree.Element] = field(default_factory=dict)


_modules: dict[Path, _Module] = {}


def _run(path: Path) -> _Module:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        try:
            done = subprocess.run(
                [*command, str(path)],
                env={**os.environ, _HERE: "1"},
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired as late:
            return _Module(f"no end after {_PATIENCE} s\n{late.output}")
        module = _Module(done.stdout + done.stderr)
        if results.exists():
            for case in ElementTree.parse(results).iter("testcase"):
                module.cases[case.get("name", "")] = case
        return module


def _repeat(item: pytest.Item) -> None:
    """Raise what the test raised."""
    path = item.path
    if path not in _modules:
        _modules[path] = _run(path)
    case = _modules[path].cases.get(item.name)
    if case is None:
        pytest.fail(f"it was not run\n{_modules[path].output}", pytrace=False)
    for outcome in case:
        if outcome.tag == "skipped":
            pytest.skip(outcome.get("message", ""))
        if outcome.tag in ("failure", "error"):
            pytest.fail(f"{outcome.get('message')}\n{outcome.text}", pytrace=False)


def _is_apart(item: pytest.Item) -> bool:
    return item.get_closest_marker("apart") is not None and os.environ.get(_HERE) != "1"


def allow_time(items: list[pytest.Item]) -> None:
    """Whichever of a module's tests comes first waits for all of them; there, each has the usual time."""
    for item in items:
        if _is_apart(item):
            item.add_marker(pytest.mark.timeout(_PATIENCE + 30), append=False)


def run_apart(item: pytest.Item, next_item: pytest.Item | None) -> bool:
    """Whether the test has been dealt with."""
    if not _is_apart(item):
        return False
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    call = pytest.CallInfo.from_call(lambda: _repeat(item), "call")
    item.ihook.pytest_runtest_logreport(report=pytest.TestReport.from_item_and_call(item, call))
    # Fixtures of modules before that have ended: nobody else comes to it.
    end = pytest.CallInfo.from_call(lambda: item.session._setupstate.teardown_exact(next_item), "teardown")
    item.ihook.pytest_runtest_logreport(report=pytest.TestReport.from_item_and_call(item, end))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
