"""A short soak of the Python layer."""

from __future__ import annotations

from short_form import figures_of


def test_soak_finds_every_byte_right_and_everything_comes_back(tmp_path):
    figures = figures_of("soak.py", tmp_path, "--seconds", "10", "--seed", "1", "--processes", "6")
    assert figures["kills"] > 0 and figures["checks"] > 0 and figures["returns"] > 0
