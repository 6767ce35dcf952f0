"""What DataLoader does, feature by feature, with PyTorch alone and with torchshm."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import sys
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.utils.data as tud
import xarray as xr
from parity import outcome
from torch.utils.data import default_collate, get_worker_info

import torchshm
import torchshm.data

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:Length of IterableDataset"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
    pytest.mark.filterwarnings("ignore:.*not be sharded"),
    pytest.mark.filterwarnings("ignore:.*pytest.PytestUnhandledThreadExceptionWarning"),
]

SIZE = 3000  # of a sample: through the pool


class Made(tud.Dataset):
    """Samples by a function of the index."""

    def __init__(self, make, length=10):
        self.make, self.length = make, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.make(index)


class Stream(tud.IterableDataset):
    def __init__(self, length=11, sharded=True, make=None):
        self.length, self.sharded, self.make = length, sharded, make or array

    def __iter__(self):
        info = get_worker_info()
        step = (info.id, self.length, info.num_workers) if self.sharded and info else (0, self.length, 1)
        for index in range(*step):
            x = self.make(index)
            yield x


class StreamOfLength(Stream):
    def __len__(self):
        return self.length


class Batched(Made):
    def __getitems__(self, indices):
        return [array(i) * 2 for i in indices]


class Pair(NamedTuple):
    x: object
    y: object


class Odd(Exception):
    """Can't be made from a message alone."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


class Opaque:
    def __init__(self, x):
        self.x = x


def array(i):
    return np.full(SIZE, float(i))


def tensor(i):
    return torch.full((SIZE,), float(i))


def rich(i):
    return {"x": array(i), "y": i, "z": (tensor(i), f"sample {i}"), "p": Pair(np.float32(i), [i, float(i)])}


def seeds(i):
    return torch.rand(2), np.random.rand(2), random.random()  # noqa: NPY002 - the state that torch seeds


def identity(x):
    return x


def stacked(batch):
    return np.stack(batch)


def from_numpy(batch):
    return torch.from_numpy(np.stack(batch))


def broken_collate(batch):
    raise ValueError("these don't fit")


def views(batch):
    x = np.stack(batch)
    return x, x[0], x[:, ::2], x.T, np.broadcast_to(x[0, :1], (SIZE,))


def about_the_worker(i):
    info = get_worker_info()
    return info.id, info.num_workers, type(info.dataset).__name__, torch.get_num_threads()


def mark(worker_id):
    get_worker_info().dataset.make = functools.partial(marked, worker_id)


def marked(worker_id, i):
    return worker_id * 100 + i


def broken_init(worker_id):
    raise RuntimeError(f"worker {worker_id} has no licence")


def raising(error):
    def make(i):
        if i == 5:
            raise error
        return array(i)

    return make


def ending(end):
    def make(i):
        if i == 3:
            end()
        return i  # not a tensor: PyTorch needs the sender for that

    return make


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def slow(i):
    time.sleep(30 if i == 2 else 0)
    return i


class Buffer(tud.Dataset):
    """Fills the one buffer again for every sample."""

    def __init__(self, make, view=False):
        self.make, self.view, self.buffer = make, view, None

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.buffer is None:
            self.buffer = self.make(0)
        self.buffer[:] = index
        return self.buffer[: SIZE - 10] if self.view else self.buffer


class BufferAsTensor(Buffer):
    def __getitem__(self, index):
        return torch.from_numpy(super().__getitem__(index))


class BufferInAnObject(Buffer):
    def __getitem__(self, index):
        return {"a": [Opaque(super().__getitem__(index))]}


class Cached(tud.Dataset):
    """Keeps its samples."""

    def __init__(self, make, length=4):
        self.make, self.length, self.samples = make, length, {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.samples.setdefault(index, self.make(index))


class WrittenLater(Cached):
    """Writes to what it returned the last time."""

    def __getitem__(self, index):
        for x in self.samples.values():
            x[:] = -1
        self.samples = {}
        return super().__getitem__(index)


class Stateful(tud.Dataset):
    """A sample lies in something that no reference count of arrays tells of."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if not hasattr(self, "table"):
            self.table = pd.DataFrame({"x": np.full(SIZE, 0.0)})
            self.view = memoryview(np.full(SIZE, 0.0))
        kept = np.asarray(self.view)
        kept[:] = index
        return kept


def values(loader):
    return list(loader)


def epochs(loader, change=None):
    seen = []
    for _ in range(3):
        for batch in loader:
            seen.append(batch.clone() if isinstance(batch, torch.Tensor) else batch.copy())
            if change is not None:
                batch[...] = change
    return seen


def one_by_one(loader):
    """Looks at a batch when the next ones have been made too."""
    return list(loader)


def first(loader):
    for batch in loader:
        return batch
    return None


def run(Loader, dataset, consume=values, **options):
    options = {"num_workers": 1, "multiprocessing_context": "fork"} | options
    if options["num_workers"] == 0:
        del options["multiprocessing_context"]
    return consume(Loader(dataset, **options))


def case(*arguments, **options):
    return lambda Loader: run(Loader, *arguments, **options)


def unordered(loader):
    return sorted(float(batch[0]) for batch in loader)


def both_epochs(loader):
    return list(loader), list(loader)


def again(loader):
    return first(loader), first(loader), list(loader)


def death(loader):
    """Two places of torch's notice it, with messages of their own."""
    try:
        return list(loader)
    except RuntimeError as error:
        return str(error)[: len("DataLoader worker (pid")]


def children(loader):
    before = set(multiprocessing.active_children())
    list(loader)
    return len(set(multiprocessing.active_children()) - before)


def persistent_children(loader):
    before = set(multiprocessing.active_children())
    list(loader)
    there = len(set(multiprocessing.active_children()) - before)
    del loader
    return there


def facts(loader):
    names = "batch_size num_workers drop_last pin_memory timeout prefetch_factor persistent_workers in_order"
    return len(loader), [getattr(loader, name) for name in names.split()], type(loader.sampler).__name__


def set_batch_size(loader):
    loader.batch_size = 5


def seeded(Loader):
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(3)
    return run(Loader, Made(seeds), num_workers=2, generator=generator, shuffle=True, batch_size=2)


def seeded_globally(Loader):
    torch.manual_seed(7)
    return run(Loader, Made(seeds), num_workers=2, shuffle=True, batch_size=2), torch.rand(1)


def weighted(Loader):
    generator = torch.Generator().manual_seed(3)
    sampler = tud.WeightedRandomSampler([1, 2, 3, 4] * 2 + [1, 1], 12, generator=generator)
    return run(Loader, Made(array), sampler=sampler, batch_size=3)


def split(Loader):
    parts = tud.random_split(Made(array), [6, 4], torch.Generator().manual_seed(1))
    return [run(Loader, part, batch_size=3) for part in parts]


def pipe(Loader):
    from torch.utils.data.datapipes.iter import IterableWrapper

    made = IterableWrapper(range(12)).shuffle().sharding_filter().map(array).batch(2).map(stacked)
    torch.manual_seed(5)
    return run(Loader, made, batch_size=None, num_workers=2)


def map_pipe(Loader):
    from torch.utils.data.datapipes.map import SequenceWrapper

    return run(Loader, SequenceWrapper([array(i) for i in range(6)]).map(identity), batch_size=2)


def xarray_sample(i):
    return xr.Dataset({"t": (("y", "x"), np.full((60, 70), float(i)))}, {"x": np.arange(70), "when": i})


def pandas_sample(i):
    return pd.DataFrame({"a": np.full(SIZE, i), "b": [f"{i}"] * SIZE})


def object_sample(i):
    return Opaque({"x": array(i), "again": [tensor(i)]})


def shared_object(i):
    x = array(i)
    return x, x, [x]


CASES = {
    "samples of all kinds": case(Made(rich), batch_size=4),
    "without workers": case(Made(rich), batch_size=4, num_workers=0),
    "three workers": case(Made(rich), batch_size=2, num_workers=3),
    "more workers than batches": case(Made(array, 3), batch_size=2, num_workers=4),
    "tensors": case(Made(tensor), batch_size=4),
    "integers": case(Made(identity), batch_size=4),
    "an empty dataset": case(Made(array, 0), batch_size=None, sampler=[]),
    "an empty sampler": case(Made(array), sampler=[], batch_size=4),
    "drop_last": case(Made(array), batch_size=4, drop_last=True),
    "no batches": case(Made(rich), batch_size=None),
    "no batches, without workers": case(Made(rich), batch_size=None, num_workers=0),
    "no batches of arrays as they are": case(Made(array), batch_size=None, collate_fn=identity),
    "lists of samples": case(Made(rich), batch_size=3, collate_fn=identity),
    "collate to arrays": case(Made(array), batch_size=4, collate_fn=stacked),
    "collate to tensors over arrays": case(Made(array), batch_size=4, collate_fn=from_numpy),
    "collate given as torch's": case(Made(rich), batch_size=4, collate_fn=default_collate),
    "views in a batch": case(Made(array), batch_size=4, collate_fn=views),
    "one array twice in a batch": case(Made(shared_object), batch_size=None, collate_fn=identity),
    "a sampler": case(Made(array), sampler=[3, 1, 4, 1, 5], batch_size=2),
    "a batch sampler": case(Made(array), batch_sampler=[[3], [1, 4], [1, 5, 9]]),
    "a batch sampler of tensors": case(Made(array), batch_sampler=[torch.tensor([3, 4]), torch.tensor([1])]),
    "a weighted sampler": weighted,
    "seeds and a generator": seeded,
    "seeds": seeded_globally,
    "__getitems__": case(Batched(array), batch_size=4),
    "a stream": case(Stream(), batch_size=2, num_workers=2),
    "a stream, drop_last": case(Stream(), batch_size=2, num_workers=2, drop_last=True),
    "a stream that is not sharded": case(Stream(4, False), batch_size=2, num_workers=2),
    "a stream of single samples": case(Stream(5), batch_size=None, num_workers=2),
    "a stream of arrays as they are": case(Stream(5), batch_size=None, num_workers=2, collate_fn=identity),
    "a stream of tensors": case(Stream(5, make=tensor), batch_size=None),
    "a stream of a length": case(StreamOfLength(), batch_size=2),
    "an empty stream": case(Stream(0), batch_size=2, num_workers=2),
    "a stream, two epochs": case(Stream(), both_epochs, batch_size=2, num_workers=2, persistent_workers=True),
    "two epochs": case(Made(array), both_epochs, batch_size=4),
    "persistent workers": case(Made(rich), both_epochs, batch_size=4, num_workers=2, persistent_workers=True),
    "persistent workers left early": case(Made(array), again, batch_size=2, persistent_workers=True),
    "left early": case(Made(array), again, batch_size=2),
    "prefetch_factor": case(Made(array), batch_size=1, prefetch_factor=5, num_workers=2),
    "out of order": case(Made(array), unordered, batch_size=1, num_workers=2, in_order=False),
    "pin_memory": case(Made(rich), batch_size=4, pin_memory=True),
    "worker_init_fn": lambda Loader: run(
        Loader, Made(array), batch_size=4, num_workers=2, worker_init_fn=mark
    ),
    "worker_init_fn that raises": case(Made(array), batch_size=4, worker_init_fn=broken_init),
    "worker info": case(Made(about_the_worker), batch_size=None, collate_fn=identity, num_workers=2),
    "a context": case(Made(array), batch_size=4, multiprocessing_context=multiprocessing.get_context("fork")),
    "a context of torch": case(
        Made(array), batch_size=4, multiprocessing_context=torch.multiprocessing.get_context("fork")
    ),
    "the timeout is long enough": case(Made(array), batch_size=4, timeout=60),
    "the timeout is too short": case(Made(slow, 4), batch_size=1, timeout=2),
    "a dataset of tensors": lambda Loader: run(
        Loader, tud.TensorDataset(torch.arange(9000.0).reshape(9, 1000), torch.arange(9)), batch_size=2
    ),
    "a subset": lambda Loader: run(Loader, tud.Subset(Made(array), [1, 5, 3]), batch_size=2),
    "a split": split,
    "datasets in a row": lambda Loader: run(
        Loader, tud.ConcatDataset([Made(array, 3), Made(array, 4)]), batch_size=2
    ),
    "datasets side by side": lambda Loader: run(
        Loader, tud.StackDataset(a=Made(array, 4), b=Made(tensor, 4)), batch_size=2
    ),
    "streams in a row": lambda Loader: run(Loader, tud.ChainDataset([Stream(3), Stream(4)]), batch_size=2),
    "an IterDataPipe": pipe,
    "a MapDataPipe": map_pipe,
    "xarray": case(Made(xarray_sample), batch_size=3, collate_fn=identity),
    "pandas": case(Made(pandas_sample), batch_size=3, collate_fn=identity),
    "objects": case(Made(object_sample), batch_size=3, collate_fn=identity),
    # what goes wrong
    "an error": case(Made(raising(ValueError("no such sample"))), batch_size=2),
    "a KeyError": case(Made(raising(KeyError("x"))), batch_size=2),
    "an error of two arguments": case(Made(raising(Odd(1, 2))), batch_size=2),
    "a StopIteration": case(Made(raising(StopIteration())), batch_size=2),
    "an error without workers": case(Made(raising(ValueError("none"))), batch_size=2, num_workers=0),
    "an error in a stream": case(Stream(make=raising(LookupError("gone"))), batch_size=2),
    "an error in collate_fn": case(Made(array), batch_size=2, collate_fn=broken_collate),
    "samples that can't be collated": case(Made(lambda i: object()), batch_size=2),
    "samples of different shapes": case(Made(lambda i: np.zeros(SIZE + i)), batch_size=2),
    "tensors of different shapes": case(Made(lambda i: torch.zeros(SIZE + i)), batch_size=2),
    "tensors that require grad": case(Made(lambda i: tensor(i).requires_grad_()), batch_size=2),
    "a worker is killed": case(Made(ending(kill)), death, batch_size=None, collate_fn=int),
    "a worker exits": case(Made(ending(sys.exit)), death, batch_size=None, collate_fn=int),
    "an index that is none": case(Made(array), sampler=["x"], batch_size=1),
    # what is not accepted
    "num_workers=-1": case(Made(array), num_workers=-1),
    "timeout=-1": case(Made(array), timeout=-1),
    "prefetch_factor without workers": case(Made(array), num_workers=0, prefetch_factor=2),
    "prefetch_factor=-1": case(Made(array), prefetch_factor=-1),
    "persistent_workers without workers": case(Made(array), num_workers=0, persistent_workers=True),
    "a context that is none": case(Made(array), multiprocessing_context="thread"),
    "a context of another type": case(Made(array), multiprocessing_context=5),
    "batch_sampler and shuffle": case(Made(array), batch_sampler=[[1]], shuffle=True),
    "sampler and shuffle": case(Made(array), sampler=[1], shuffle=True),
    "batch_size=0": case(Made(array), batch_size=0),
    "batch_size=None and drop_last": case(Made(array), batch_size=None, drop_last=True),
    "a stream and a sampler": case(Stream(), sampler=[1]),
    "a stream and shuffle": case(Stream(), shuffle=True),
    "an argument that is none": case(Made(array), wormers=3),
    "attributes": case(Made(array), facts, batch_size=4),
    "attributes of a stream": case(StreamOfLength(), facts, batch_size=4),
    "a length that is none": case(Stream(), len, batch_size=4),
    "setting batch_size later": case(Made(array), set_batch_size, batch_size=4),
    # who sees what is written
    "an array that is filled again": case(
        Buffer(array), one_by_one, batch_size=None, collate_fn=identity, prefetch_factor=1
    ),
    "a part of an array that is filled again": case(
        Buffer(array, True), one_by_one, batch_size=None, collate_fn=identity, prefetch_factor=1
    ),
    "an array in an object that is filled again": case(
        BufferInAnObject(array), one_by_one, batch_size=None, collate_fn=identity, prefetch_factor=1
    ),
    "an array that is filled again, in batches": case(Buffer(array), one_by_one, batch_size=2),
    "a tensor that is filled again": case(Buffer(tensor), one_by_one, batch_size=None),
    "a tensor that is filled again, in batches": case(Buffer(tensor), one_by_one, batch_size=2),
    "a tensor over an array that is filled again": case(
        BufferAsTensor(array), one_by_one, batch_size=None, prefetch_factor=1
    ),
    "memory behind a memoryview": case(
        Stateful(), one_by_one, batch_size=None, collate_fn=identity, prefetch_factor=1
    ),
    "written to after it was sent": case(
        WrittenLater(array), one_by_one, batch_size=None, collate_fn=identity, prefetch_factor=1
    ),
    "cached arrays": case(
        Cached(array), epochs, batch_size=None, collate_fn=identity, persistent_workers=True
    ),
    "cached arrays that the consumer changes": case(
        Cached(array),
        functools.partial(epochs, change=-1),
        batch_size=None,
        collate_fn=identity,
        persistent_workers=True,
    ),
    "cached tensors that the consumer changes": case(
        Cached(tensor), functools.partial(epochs, change=-1), batch_size=None, persistent_workers=True
    ),
    "cached arrays in batches that the consumer changes": case(
        Cached(array), functools.partial(epochs, change=-1), batch_size=2, persistent_workers=True
    ),
    "cached tensors in batches that the consumer changes": case(
        Cached(tensor), functools.partial(epochs, change=-1), batch_size=2, persistent_workers=True
    ),
    # shutdown
    "workers end with the epoch": case(Made(array), children, batch_size=2, num_workers=2),
    "persistent workers stay": case(
        Made(array), persistent_children, batch_size=2, num_workers=2, persistent_workers=True
    ),
}

VARIANTS = {
    "register": tud.DataLoader,
    "DataLoader": torchshm.data.DataLoader,
    "pooled": functools.partial(torchshm.data.DataLoader, pooled=True),
}

_stock = {}


def stock(name, scenario):
    """The outcome with PyTorch alone. Once for all variants."""
    if name not in _stock:
        torchshm.unregister()
        _stock[name] = outcome(scenario, tud.DataLoader)
    return _stock[name]


def compare(name, scenario, variant):
    expected = stock(name, scenario)
    torchshm.register()
    try:
        assert outcome(scenario, VARIANTS[variant]) == expected
    finally:
        torchshm.unregister()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_as_pytorch(name, variant):
    compare(name, CASES[name], variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_as_pytorch_by_other_start_methods(method, variant):
    def scenario(Loader):
        return run(
            Loader,
            Made(rich),
            both_epochs,
            batch_size=4,
            persistent_workers=True,
            multiprocessing_context=method,
        )

    compare(method, scenario, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_spawned_worker_can_not_be_given(variant):
    compare(
        "lambda",
        lambda Loader: run(Loader, Made(lambda i: i), batch_size=2, multiprocessing_context="spawn"),
        variant,
    )
