"""Epochs that a program leaves early: what their workers had made, sent or begun comes back, and is used again before the pool grows."""

from __future__ import annotations

import pytest
from scripts import passes

LEAVE = """
import gc
import os
import sys
import warnings

import numpy as np
import torch
import torchshm
import torchshm.data

WORKERS, TIMES, EPOCHS = 4, 3, 3
BATCH = 4 << 20


class Numbers:
    def __len__(self):
        return 400

    def __getitem__(self, index):
        return np.full(BATCH // 4, index % 251, "u1")


def figures():
    gc.collect()
    now = torchshm.stats()
    return now["live_bytes"], now["blocks"], now["tickets"], now["leases"], len(os.listdir("/proc/self/fd"))


def main():
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    torchshm.register()
    loader = torchshm.data.DataLoader(
        Numbers(), batch_size=4, num_workers=WORKERS, persistent_workers=sys.argv[1] == "persistent"
    )
    for _ in loader:
        break
    del _
    begun = loader._iterator is not None
    before = figures() if not begun else None
    for time in range(TIMES):
        for epoch in range(EPOCHS):
            for n, batch in enumerate(loader):
                assert (batch[3] == 4 * n + 3).all()
                if n == 1 + epoch % 2:
                    break
            del batch
    # All that can be under way at once: what was asked for, what the consumer has, and a chunk or two of small blocks for each worker.
    most = (2 * WORKERS + 2) * BATCH + 2 * (WORKERS + 1) * (2 << 20)
    if not begun:
        assert figures() == before, (figures(), before)
    assert torchshm.stats()["committed_bytes"] <= most, torchshm.stats()
    loader._iterator = None
    gc.collect()
    assert figures()[:3] == (0, 0, 0), figures()
    print("ok")


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("workers", ["fresh", "persistent"])
def test_what_epochs_left_early_had_comes_back(tmp_path, workers):
    assert passes(LEAVE, tmp_path, workers) == "ok\n"
