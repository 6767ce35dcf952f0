"""A short soak of the store."""

from __future__ import annotations

from short_form import figures_of


def test_names_outlive_their_savers_and_the_service(tmp_path):
    figures = figures_of("store_soak.py", tmp_path, "--seconds", "10", "--producers", "50")
    assert figures["SIGKILLs of services"] > 0 and figures["SIGKILLs of clients"] > 0
    assert figures["loads of what they saved"] == figures["producers gone right after their save"] == 50
