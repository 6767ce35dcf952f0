"""The page of results says what the programs found, and what was not run."""

from __future__ import annotations

import json
import sys

import campaign
import pytest

PROGRAM = """
import json, sys
path = sys.argv[sys.argv.index("--json") + 1]
violations = ["block 7 is gone"] if "--bad" in sys.argv else []
seconds = float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else 2.0
seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else None
result = {"name": sys.argv[1], "seed": seed, "full": "--full" in sys.argv, "seconds": seconds, "violations": violations}
open(path, "w").write(json.dumps({**result, "figures": {"kills": 1000, "longest ms": seed or 0}}))
sys.exit(1 if violations else 0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs campaigns made for the test; gives the page, what had no result, and whether all is well."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(campaign, "OUT", tmp_path)
    monkeypatch.setattr(campaign, "ROOT", tmp_path)
    monkeypatch.setattr(campaign, "KEPT", tmp_path / "results")

    def run(*chosen, full=True):
        monkeypatch.setattr(campaign, "CAMPAIGNS", list(chosen))
        errors = campaign.run_all(list(chosen), full, 1.0, 5, lambda text: None)
        return campaign.report(full, errors), errors, campaign.tell(full, errors)

    def entry(name, *arguments, **options):
        command = [sys.executable, str(program), name, *arguments]
        return campaign.Campaign(name, f"what {name} shows", command, [*command, "--full"], **options)

    run.entry = entry
    return run


def test_figures_of_several_runs_are_summed_up(run):
    page, errors, well = run(run.entry("soak", budget=True, seeds=3))
    assert not errors and well
    assert "| soak | what soak shows | 3 | 5, 6, 7 | 60 s | 0 | unknown |" in page
    assert "| kills | 3,000 |" in page
    assert "| longest ms | 7 |" in page
    assert "Not run" not in page


def test_what_one_finds_does_not_keep_the_next_from_running(run):
    page, errors, well = run(run.entry("points", "--bad"), run.entry("step"))
    assert not errors and not well
    assert "| points | what points shows | 1 | none | 2 s | 1 | unknown |" in page
    assert "Violation: block 7 is gone" in page
    assert "| step | what step shows | 1 | none | 2 s | 0 | unknown |" in page


def test_program_that_is_missing_is_an_error(run, tmp_path):
    missing = campaign.Campaign("model", "nothing", None, [str(tmp_path / "model"), "--full"])
    page, errors, well = run(missing, run.entry("step"))
    assert errors["model"] == ["there is no model"] and not well
    assert "## Not run\n\n- model: there is no model" in page
    assert "| step |" in page


def test_program_that_dies_without_a_result_is_an_error(run):
    dead = campaign.Campaign(
        "model", "nothing", None, [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    )
    page, errors, well = run(dead)
    assert "exit status 1" in errors["model"][0] and "no such thing" in page and not well


def test_short_results_are_no_full_ones(run, tmp_path):
    run(run.entry("step"), full=False)
    assert json.loads((tmp_path / "step.json").read_text())["full"] is False
    assert campaign.results(run.entry("step"), full=True) == []
    assert "| step |" not in campaign.report(True, {})


def test_results_stay_until_their_campaign_runs_again(run, tmp_path):
    run(run.entry("soak", budget=True, seeds=3), run.entry("soak_python"))
    (tmp_path / "soak-full-5.json").unlink()  # build/ may go
    page, _, _ = run(run.entry("soak", budget=True, seeds=1), run.entry("step"))
    assert "| soak | what soak shows | 1 | 5 | 60 s | 0 | unknown |" in page
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "soak-full.json",
        "soak_python-full.json",
        "step-full.json",
    }


def test_a_run_that_gives_nothing_takes_nothing_away(run, tmp_path):
    run(run.entry("step"))
    dead = campaign.Campaign("step", "nothing", None, [sys.executable, "-c", "import sys; sys.exit('gone')"])
    page, errors, _ = run(dead)
    assert "step" in errors and "| step | nothing | 1 |" in page
