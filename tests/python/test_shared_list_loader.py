"""DataLoader workers read a SharedList from one copy."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader as Stock
from torch.utils.data import Dataset

import torchshm.data
from torchshm.data import SharedList

ITEMS = 200_000


def sample(i: int) -> dict:
    return {
        "id": i,
        "caption": f"picture number {i}",
        "box": [i / 2, 1.0, 2.0, float(i)],
        "tags": ["a", str(i)],
    }


class Ids(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        assert item["caption"] == f"picture number {item['id']}"
        return item["id"]


@pytest.mark.parametrize("make", [Stock, torchshm.data.DataLoader], ids=["stock", "torchshm"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_every_item_arrives(make, method):
    items = SharedList(sample(i) for i in range(5000))
    loader = make(
        Ids(items[::2]),
        batch_size=100,
        shuffle=True,
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    for _ in range(2):
        assert sorted(torch.cat(list(loader)).tolist()) == list(range(0, 5000, 2))


def _pss() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _pass(items, pipe):
    """Read all items in a random order between two looks at the memory of this process, taken while the others wait."""
    order = list(range(len(items)))
    random.Random(os.getpid()).shuffle(order)
    for i in order[:1000]:
        items[i]
    pipe.send(_pss())
    pipe.recv()
    for i in order:
        items[i]
    pipe.send(_pss())
    pipe.recv()


def growth(items) -> int:
    """Bytes by which three forked readers and their parent grow."""
    context = multiprocessing.get_context("fork")
    readers = []
    for _ in range(3):
        ours, theirs = context.Pipe()
        child = context.Process(target=_pass, args=(items, theirs))
        child.start()
        readers.append((child, ours))
    looks = []
    for _ in range(2):
        looks.append(sum(pipe.recv() for _, pipe in readers) + _pss())
        for _, pipe in readers:
            pipe.send(None)
    for child, _ in readers:
        child.join()
    return looks[1] - looks[0]


def test_reading_it_copies_no_pages_in_forked_readers():
    plain = [sample(i) for i in range(ITEMS)]
    of_plain = growth(plain)
    items = SharedList(plain).seal()
    del plain
    of_shared = growth(items)
    assert items.nbytes > 20e6
    # Three copies of the objects' pages, against none.
    assert of_plain > 2 * items.nbytes and of_shared < items.nbytes / 4, (of_plain, of_shared, items.nbytes)
