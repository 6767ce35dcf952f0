"""share_dataset() moves what is large in a Dataset into the pool, and the Dataset works as before."""

from __future__ import annotations

import collections
import dataclasses
import gc
import logging
import mmap
import multiprocessing
import threading
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import torchshm
from torchshm.data import SharedDict, SharedList, share_dataset

SAMPLES = [{"id": i, "text": f"{i} " * 20} for i in range(3000)]


class Record:
    """An object of the program's own."""

    def __init__(self, i):
        self.i = i


class Pictures(Dataset):
    def __init__(self):
        self.samples = list(SAMPLES)
        self.by_name = {f"name {i}": sample for i, sample in enumerate(SAMPLES)}
        self.names = tuple(f"a rather long name {i}" for i in range(20_000))
        self.array = np.arange(200_000.0)
        self.tensor = torch.arange(200_000)
        self.frame = pd.DataFrame({"a": np.arange(100_000.0), "b": np.arange(100_000)})
        self.small = [1, 2, 3]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]["id"]


def test_large_attributes_are_replaced_in_place():
    dataset = Pictures()
    small, frame = dataset.small, dataset.frame
    assert share_dataset(dataset) is dataset
    assert type(dataset.samples) is SharedList and dataset.samples == SAMPLES
    assert type(dataset.by_name) is SharedDict and dict(dataset.by_name.items())["name 7"] == SAMPLES[7]
    assert type(dataset.names) is SharedList and dataset.names[777] == "a rather long name 777"
    assert torchshm.is_shared(dataset.array) and dataset.array[-1] == 199_999
    assert torchshm.is_shared(dataset.tensor) and dataset.tensor[-1] == 199_999
    assert torchshm.is_shared(dataset.frame["a"].to_numpy())
    pd.testing.assert_frame_equal(dataset.frame, frame)
    assert dataset.small is small and dataset[5] == 5
    assert len(torchshm.dumps(dataset)) < 10_000


def test_what_is_below_min_bytes_stays():
    dataset = share_dataset(Pictures(), min_bytes="1GiB")
    assert type(dataset.samples) is list and type(dataset.by_name) is dict
    assert not torchshm.is_shared(dataset.array)
    assert type(share_dataset(dataset, min_bytes=1 << 18).samples) is SharedList


def test_datasets_in_datasets_are_walked():
    inner = Pictures()
    tensors = TensorDataset(torch.arange(500_000), torch.arange(500_000) * 2)
    outer = share_dataset(ConcatDataset([Subset(inner, range(100)), tensors, Subset(inner, [5])]))
    assert type(inner.samples) is SharedList and outer.datasets[2].dataset is inner
    assert type(tensors.tensors) is tuple and all(map(torchshm.is_shared, tensors.tensors))
    assert outer[7] == 7 and outer[100 + 3] == (3, 6) and outer[-1] == 5


def test_containers_and_objects_of_the_program_are_walked():
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        array: np.ndarray

    class Slotted:
        __slots__ = ("array",)

    slotted = Slotted()
    slotted.array = np.zeros(300_000)
    holder = Record(
        {"frozen": Frozen(np.zeros(300_000)), "deep": [([slotted],)], "splits": {"train": list(SAMPLES)}}
    )
    share_dataset(holder)
    assert torchshm.is_shared(holder.i["frozen"].array) and torchshm.is_shared(slotted.array)
    assert holder.i["deep"][0][0][0] is slotted and type(holder.i["splits"]) is dict
    assert holder.i["splits"]["train"] == SAMPLES and type(holder.i["splits"]["train"]) is SharedList


def test_one_object_stays_one_object():
    samples, array = list(SAMPLES), np.zeros(300_000)
    pair = (array, 1)
    holder = Record([samples, {"again": samples}, array, pair, [pair]])
    holder.also = samples
    share_dataset(holder)
    first, second, shared, moved, others = holder.i
    assert first is second["again"] is holder.also and type(first) is SharedList
    assert torchshm.is_shared(shared) and moved == (shared, 1) and moved[0] is shared and others[0] is moved


def test_cycles_end():
    one, two = Pictures(), Record(None)
    one.other, two.i = two, [one, two]
    two.self = two
    loop = [1]
    loop.append(loop)
    two.loop = loop
    share_dataset(two)
    assert type(one.samples) is SharedList and two.loop[1] is two.loop and one.other is two


def test_what_is_replaced_is_let_go_of():
    dataset = Record(np.zeros(300_000))
    gone = weakref.ref(dataset.i)
    share_dataset(dataset)
    gc.collect()
    assert gone() is None


class Listed(list):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: Listed(SAMPLES),
        lambda: collections.OrderedDict((i, SAMPLES) for i in range(1000)),
        lambda: [Record(i) for i in range(50_000)],
        lambda: {None: SAMPLES[0], **dict.fromkeys(range(50000), "text" * 10)},
        lambda: np.array(["text"] * 500_000, dtype=object),
        lambda: torch.nn.Linear(1000, 1000),
        lambda: torch.nn.Parameter(torch.zeros(500_000)),
        lambda: SharedList(SAMPLES).seal(),
        lambda: torchshm.share(np.zeros(300_000)),
        lambda: threading.Lock(),
        lambda: logging.getLogger("torchshm"),
        lambda: SAMPLES.__len__,
    ],
)
def test_what_is_odd_stays(make):
    value = make()
    holder = Record(value)
    share_dataset(holder)
    assert holder.i is value


def test_memory_maps_stay(tmp_path):
    mapped = np.memmap(tmp_path / "file", np.float64, "w+", shape=300_000)
    holder = Record([mapped, np.asarray(mapped)[10:], np.ndarray.view(mapped, np.ndarray)])
    before = list(holder.i)
    share_dataset(holder)
    assert all(a is b for a, b in zip(holder.i, before, strict=True))


def test_it_tells_what_it_did(caplog):
    dataset = Pictures()
    dataset.tensor = dataset.frame = None
    with caplog.at_level(logging.INFO, "torchshm"):
        share_dataset(dataset)
    assert any(
        "Pictures.samples: a list of 3,000" in text and "is now a SharedList" in text
        for text in caplog.messages
    )
    assert any("Pictures.array" in text for text in caplog.messages)


def test_what_is_shared_or_mapped_stays(tmp_path):
    path = tmp_path / "file"
    np.zeros(300_000).tofile(path)
    torch.save(torch.zeros(300_000), tmp_path / "saved")
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    holder = Record(
        [
            np.frombuffer(multiprocessing.RawArray("d", 300_000)),
            np.frombuffer(mapped),
            torch.from_numpy(np.memmap(path, np.float64, "r+")),
            torch.from_file(str(path), shared=True, size=300_000, dtype=torch.float64),
            torch.load(tmp_path / "saved", mmap=True),
            torch.zeros(300_000).share_memory_(),
        ]
    )
    before = list(holder.i)
    holder.own = np.frombuffer(bytearray(3_000_000), np.uint8)
    share_dataset(holder)
    assert [a is b for a, b in zip(holder.i, before, strict=True)] == [True] * len(before)
    assert torchshm.is_shared(holder.own)


class Usage:
    def memory_usage(self, unit):
        return unit


class Unloaded:
    @property
    def nbytes(self):
        raise RuntimeError("not loaded yet")


class Forwards:
    __slots__ = ("missing",)

    def __getattr__(self, name):
        return {}[name]


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.zeros(300_000), torch.ones(5)]),
        Usage,
        Unloaded,
        Forwards,
    ],
)
def test_what_raises_when_it_is_looked_at_stops_nothing(make):
    holder = Record(make())
    value, holder.array = holder.i, np.zeros(300_000)
    share_dataset(holder)
    assert holder.i is value and torchshm.is_shared(holder.array)


def test_a_long_chain_of_objects_is_walked():
    chain = Record(np.zeros(300_000))
    last = chain
    for _ in range(3000):
        chain = Record(chain)
    share_dataset(chain)
    assert torchshm.is_shared(last.i)


def test_a_tuple_in_two_tuples_stays_one():
    pair = (np.zeros(300_000), 1)
    holder = Record(((pair,), (pair, 2)))
    share_dataset(holder)
    (first,), (second, _) = holder.i
    assert first is second and torchshm.is_shared(first[0])


def test_what_items_have_in_common_is_not_multiplied(registered):
    array = np.zeros(100_000)
    holder = Record([{"id": i, "array": array[:]} for i in range(400)])
    holder.same = [{"id": i, "array": array} for i in range(400)]
    holder.windows = [array[i : i + 50_000] for i in range(400)]
    holder.rows = [array[i * 250 : i * 250 + 250] for i in range(400)]
    share_dataset(holder, min_bytes="400kB")
    assert type(holder.i) is type(holder.same) is type(holder.windows) is list
    assert type(holder.rows) is SharedList
    assert holder.same[0]["array"] is holder.same[399]["array"] and torchshm.is_shared(
        holder.same[0]["array"]
    )
