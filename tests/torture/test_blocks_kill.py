"""Short forms of killing the workers of blocks, of stopping them, and of killing who iterates."""

from __future__ import annotations

from short_form import figures_of


def test_rows_are_the_same_when_workers_are_killed_and_nothing_is_left(tmp_path):
    figures = figures_of("blocks_kill.py", tmp_path, "--seconds", "10", "--seed", "1")
    assert figures["SIGKILLs of workers"] > 0 and figures["retries"] > 0 and figures["rows"] > 0


def test_workers_and_executors_that_are_stopped_for_a_while_go_on(tmp_path):
    figures = figures_of("blocks_kill.py", tmp_path, "--stop", "--seconds", "8", "--seed", "1")
    assert figures["SIGSTOPs"] > 0 and figures["rows"] > 0


def test_nothing_is_left_of_a_process_that_is_killed_while_it_iterates(tmp_path):
    figures = figures_of("blocks_kill.py", tmp_path, "--owner", "--seconds", "10", "--seed", "1")
    assert figures["SIGKILLs of owners"] > 0
