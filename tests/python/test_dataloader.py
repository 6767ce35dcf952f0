"""PyTorch's DataLoader delivers what it always delivers, its numpy batches through the pool."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from scripts import passes
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

METHODS = ["fork", "spawn", "forkserver"]


class Fields(Dataset):
    """Samples as a training program has them: a field, a label, some metadata."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return {
            "field": rng.standard_normal((3, 40, 50), "f4"),
            "mask": rng.integers(0, 2, (40, 50)).astype(bool),
            "label": index % 7,
            "time": np.datetime64("2020-01-01") + np.arange(index, index + 300),
            "name": f"sample {index}",
        }


class Stream(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        for index in range(worker.id, 20, worker.num_workers):
            yield np.full((50, 60), float(index))


class Broken(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise LookupError("no such sample")
        if index == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full(5000, float(index))


class Large(Dataset):
    """Holds its data, which spawned workers receive with their arguments."""

    def __init__(self):
        self.data = np.random.default_rng(1).standard_normal((50, 4000))
        self.shared = torchshm.share(self.data * 2)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return np.stack([self.data[index], self.shared[index]])


def collated(samples):
    """A batch of numpy arrays."""
    return {
        "field": np.stack([sample["field"] for sample in samples]),
        "mask": np.stack([sample["mask"] for sample in samples]),
        "label": np.array([sample["label"] for sample in samples]),
        "time": np.stack([sample["time"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
    }


def collated_in_the_pool(samples):
    with torchshm.pooled():
        return collated(samples)


def as_tensors(samples):
    return {"field": torch.from_numpy(np.stack([sample["field"] for sample in samples]))}


def assert_equal(got, wanted):
    assert type(got) is type(wanted)
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key in wanted:
            assert_equal(got[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for mine, theirs in zip(got, wanted, strict=True):
            assert_equal(mine, theirs)
    elif isinstance(wanted, np.ndarray):
        assert (got.dtype, got.shape, got.strides) == (wanted.dtype, wanted.shape, wanted.strides)
        assert got.flags.writeable == wanted.flags.writeable
        np.testing.assert_array_equal(got, wanted)
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted)
    else:
        assert got == wanted


def stock(*arguments, **options):
    torchshm.unregister()
    try:
        return list(DataLoader(*arguments, **options))
    finally:
        torchshm.register()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("collate", [collated, collated_in_the_pool])
def test_batches_are_stocks_batches_and_lie_in_the_pool(method, collate):
    wanted = stock(Fields(), batch_size=8, collate_fn=collated)
    batches = list(
        DataLoader(Fields(), batch_size=8, collate_fn=collate, num_workers=1, multiprocessing_context=method)
    )
    assert_equal(batches, wanted)
    for batch in batches:
        assert torchshm.is_shared(batch["field"])
        assert torchshm.is_shared(batch["mask"])
        assert torchshm.is_shared(batch["time"])


@pytest.mark.parametrize(
    "options",
    [
        {"collate_fn": collated, "batch_size": 5, "shuffle": False, "drop_last": True, "prefetch_factor": 4},
        {"collate_fn": collated, "batch_size": 7, "persistent_workers": True},
        {"collate_fn": as_tensors, "batch_size": 7},
        {"collate_fn": collated, "batch_sampler": [[3, 1], [39, 0, 2]]},
        {"collate_fn": collated, "batch_size": 8, "timeout": 60, "in_order": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_options_of_the_loader_work_as_ever(options):
    alone = {
        key: value
        for key, value in options.items()
        if key in ("collate_fn", "batch_size", "batch_sampler", "drop_last")
    }
    wanted = stock(Fields(), **alone)
    loader = DataLoader(Fields(), num_workers=2, **options)
    for _ in range(2):
        batches = list(loader)
        if "in_order" in options and "field" in wanted[0]:
            batches.sort(key=lambda batch: batch["name"][0].split()[1].zfill(2))
        assert_equal(batches, wanted)


def test_default_collate_gives_stocks_tensors():
    class Numeric(Fields):
        def __getitem__(self, index):
            return {key: value for key, value in super().__getitem__(index).items() if key != "time"}

    wanted = stock(Numeric(), batch_size=8)
    assert_equal(list(DataLoader(Numeric(), batch_size=8, num_workers=2)), wanted)


def test_streams_of_several_workers():
    batches = list(DataLoader(Stream(), batch_size=None, num_workers=2, collate_fn=np.asarray))
    assert all(map(torchshm.is_shared, batches))
    assert sorted(batch[0, 0] for batch in batches) == list(range(20))
    assert all((batch == batch[0, 0]).all() for batch in batches)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataset_with_arrays_reaches_its_workers(method):
    dataset = Large()
    loader = DataLoader(
        dataset, batch_size=10, collate_fn=np.stack, num_workers=1, multiprocessing_context=method
    )
    for n, batch in enumerate(loader):
        np.testing.assert_array_equal(batch[:, 0], dataset.data[10 * n : 10 * n + 10])
        np.testing.assert_array_equal(batch[:, 1], dataset.data[10 * n : 10 * n + 10] * 2)


def test_batches_that_are_kept_stay_as_they_arrived():
    wanted = stock(Fields(), batch_size=2, collate_fn=collated)
    kept = []
    for batch in DataLoader(Fields(), batch_size=2, collate_fn=collated, num_workers=2):
        if len(kept) % 3 == 2:
            batch["field"] += 1  # the program's own, to be written to
            batch["field"] -= 1
        kept.append(batch)
    for batch, other in zip(kept, wanted, strict=True):
        np.testing.assert_allclose(batch["field"], other["field"], atol=1e-6)
        assert_equal(batch["mask"], other["mask"])


def test_tensors_over_batches_live_as_long_as_they_are_used():
    tensors = []
    for batch in DataLoader(Fields(), batch_size=4, collate_fn=collated, num_workers=2):
        tensors.append(torch.from_numpy(batch["field"])[1:].transpose(1, 2))
        del batch
    wanted = stock(Fields(), batch_size=4, collate_fn=collated)
    for tensor, other in zip(tensors, wanted, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), other["field"][1:].swapaxes(1, 2))


def test_exception_in_a_worker_arrives_as_ever():
    loader = DataLoader(Broken(), batch_size=None, collate_fn=np.asarray, num_workers=1, sampler=[1, 5, 2])
    with pytest.raises(LookupError, match="no such sample"):
        list(loader)


def test_worker_that_is_killed_is_said_so_and_its_batches_stay():
    before = torchshm.stats()["leases"]
    kept = []
    loader = DataLoader(
        Broken(), batch_size=None, collate_fn=np.asarray, num_workers=1, sampler=[1, 2, 3, 6, 4]
    )
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        kept.extend(loader)  # extends as far as it gets
    assert [batch[0] for batch in kept] == [1, 2, 3][: len(kept)]
    assert all((batch == batch[0]).all() for batch in kept)
    assert torchshm.stats()["leases"] == before
    again = list(DataLoader(Broken(), batch_size=None, collate_fn=np.asarray, num_workers=1, sampler=[7, 0]))
    assert [batch[0] for batch in again] == [7, 0]


def test_everything_is_given_back_when_the_loader_is_gone():
    before = torchshm.stats()
    assert sum(1 for _ in DataLoader(Fields(), batch_size=8, collate_fn=collated, num_workers=2)) == 5
    after = torchshm.stats()
    assert (after["blocks"], after["leases"]) == (before["blocks"], before["leases"])


BREAKS = """
import gc
import sys
import warnings

import numpy as np
import torch
import torchshm
from torch.utils.data import DataLoader

warnings.simplefilter("error", RuntimeWarning)


class Numbers:
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return np.full(12_000, float(index))


def main():
    torchshm.register()
    limit = torchshm.stats()["limit_bytes"]
    persistent = sys.argv[1] == "persistent"
    loader = DataLoader(Numbers(), batch_size=2, collate_fn=np.stack, num_workers=1, persistent_workers=persistent)
    most = 0
    for n in range(int(sys.argv[2])):
        for m, batch in enumerate(loader):
            assert (batch[0] == 2 * m).all() and (batch[1] == 2 * m + 1).all()
            if m == n % 3:
                break
        most = max(most, torchshm.stats()["committed_bytes"]) if n % 20 == 0 else most
    assert torchshm.is_shared(batch)
    del loader, batch
    gc.collect()
    figures = torchshm.stats()
    assert most <= limit and figures["committed_bytes"] <= limit, figures
    assert figures["leases"] == 1, figures
    assert sum(process["fallbacks"] for process in figures["processes"]) == 0, figures
    whole = torchshm.empty(limit - (8 << 20), "u1")  # nothing that was lost is lost for good
    print("ok")


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("workers", "breaks"), [("persistent", 1000), ("fresh", 150)])
def test_early_breaks_keep_memory_bounded(tmp_path, workers, breaks):
    assert passes(BREAKS, tmp_path, workers, str(breaks), TORCHSHM_LIMIT="24MiB") == "ok\n"


def test_fork_after_spawned_workers_and_the_other_way_round():
    for method in ["spawn", "fork", "forkserver", "fork"]:
        loader = DataLoader(
            Stream(), batch_size=None, num_workers=1, collate_fn=np.asarray, multiprocessing_context=method
        )
        values = [batch[0, 0] for batch in loader]
        assert values == list(range(20))
