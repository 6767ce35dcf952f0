"""Twenty deaths of DataLoader workers."""

from __future__ import annotations

from short_form import figures_of


def test_loader_whose_worker_is_killed_ends_with_pytorchs_error_and_memory_comes_back(tmp_path):
    chosen = (
        "--seed",
        "1",
        "--deaths",
        "20",
        "--register-deaths",
        "8",
        "--stock-deaths",
        "0",
        "--spawned",
        "0.05",
    )
    figures = figures_of("loader_deaths.py", tmp_path, *chosen)
    assert figures["torchshm.data: deaths"] == figures["torchshm.data: RuntimeError as PyTorch's"] == 20
    assert figures["register(): deaths"] == 8
