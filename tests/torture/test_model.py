"""The protocols' state machines in their smallest configurations, whole and broken."""

from __future__ import annotations

import json

import model
import pytest
from short_form import figures_of


@pytest.mark.timeout(420)  # of a busy machine
def test_protocol_holds_in_every_reachable_state_and_no_precaution_is_idle(tmp_path):
    figures = figures_of("model.py", tmp_path, timeout=400)
    assert figures["states"] > 100_000
    assert figures["breakages noticed"] == 12


def test_violation_is_reported(monkeypatch, tmp_path):
    broken = model.Configuration("broken", {**model.PAIR, "LOOK_AGAIN": False}, short=True)
    idle = model.Breakage("nothing", "LOOK_AGAIN", {"NP": 1, "DEATHS": 1})
    monkeypatch.setattr(model, "CONFIGURATIONS", [broken])
    monkeypatch.setattr(model, "BREAKAGES", [idle])
    result = tmp_path / "model.json"
    with pytest.raises(model.typer.Exit) as ended:
        model.main(full=True, limit=60.0, memory=2.0, threads=1, only=None, trace=None, json_path=result)
    assert ended.value.exit_code == 1
    assert json.loads(result.read_text())["violations"] == [
        'broken: invariant "no reaper at a slot that is in use" failed',
        "not noticed: nothing",
    ]


def test_constant_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="0 constants LOOKS"):
        model.written(model.CATALOGUE, {"LOOKS": 1})
