"""A short form of killing everything that uses a persistent store."""

from __future__ import annotations

from short_form import figures_of


def test_what_was_acknowledged_is_in_the_file(tmp_path):
    figures = figures_of("persist_kill.py", tmp_path, "--kills", "15")
    assert figures["SIGKILLs of everything"] == 15
    assert figures["acknowledged operations"] > 0
    assert figures["operations under way at a kill"] > 0
