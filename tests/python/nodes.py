"""A program over torchdata.nodes: runs every pipeline of CASES, with PyTorch alone or after register(), and prints as JSON what came.

It runs in a process of its own, as torchdata 0.11 does not go together with the DataLoader2 of 0.9, which other tests use.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import warnings

import numpy as np
import torch
from torch.utils.data import RandomSampler, default_collate

import torchshm
import torchshm.data

SIZE = 3000  # of a sample: through the pool
LENGTH = 24
METHODS = ["forkserver", "spawn", None]  # None is that of this program: forkserver


def array(i):
    return np.full(SIZE, float(i))


def tensor(i):
    return torch.full((SIZE,), float(i))


def mapping(i):
    return {"x": array(i), "y": (tensor(i), i), "name": f"sample {i}"}


def collated(indices):
    return torchshm.data.collate([mapping(i) for i in indices])


def stacked(indices):
    return np.stack([array(i) for i in indices])


def half(x):
    """Of what arrives in a worker, which is an array itself."""
    return x / 2


def fails(i):
    if i == 5:
        raise LookupError(f"no sample {i}")
    return array(i)


def kills(i):
    if i == 5:
        time.sleep(1)  # what it has made before is sent by a thread
        os.kill(os.getpid(), signal.SIGKILL)
    return array(i)


def mapped(source, function, method=None, **options):
    return nodes.ParallelMapper(
        source, function, num_workers=2, method="process", multiprocessing_context=method, **options
    )


def indices():
    return nodes.IterableWrapper(range(LENGTH))


def shuffled():
    dataset = range(LENGTH)
    return nodes.SamplerWrapper(RandomSampler(dataset, generator=torch.Generator().manual_seed(1)))


def batches(function, method=None, source=None):
    made = nodes.Batcher(indices() if source is None else source(), batch_size=4, drop_last=False)
    return nodes.Prefetcher(mapped(made, function, method), prefetch_factor=2)


# ---- what is told of what came


def leaves(x):
    if isinstance(x, dict):
        return [leaf for value in x.values() for leaf in leaves(value)]
    if isinstance(x, list | tuple):
        return [leaf for value in x for leaf in leaves(value)]
    return [x]


def told(x):
    """Type, values, and whether large ones lie in the pool."""
    large = [
        leaf for leaf in leaves(x) if isinstance(leaf, np.ndarray | torch.Tensor) and leaf.nbytes >= 4096
    ]
    values = [
        [type(leaf).__name__, str(leaf.dtype), list(leaf.shape), float(leaf.sum()), float(leaf.flatten()[-1])]
        if isinstance(leaf, np.ndarray | torch.Tensor)
        else repr(leaf)
        for leaf in leaves(x)
    ]
    return {"values": values, "pooled": sorted({torchshm.is_shared(leaf) for leaf in large})}


def all_of(node):
    return [told(x) for x in nodes.Loader(node)]


def epochs(node):
    loader = nodes.Loader(node)
    return [[told(x) for x in loader] for _ in range(2)]


def resumed(make):
    """All that comes, the first three of another loader, and what comes of one more that gets its state."""
    whole = all_of(make())
    first, second = nodes.Loader(make()), nodes.Loader(make())
    iterator = iter(first)
    seen = [told(next(iterator)) for _ in range(3)]
    second.load_state_dict(first.state_dict())
    rest = [told(x) for x in second]
    return {"whole": whole, "seen": seen, "rest": rest}


def left_early():
    loader = nodes.Loader(batches(stacked))
    first = [told(x) for x, _ in zip(loader, range(2), strict=False)]
    return [*first, *(told(x) for x in loader)]


def raised(make):
    try:
        return all_of(make())
    except Exception as error:
        return [type(error).__name__, str(error).splitlines()[-1]]


def stateful():
    def loader():
        return StatefulDataLoader(range(LENGTH), batch_size=4, num_workers=2, collate_fn=stacked)

    first, second = loader(), loader()
    seen = [told(x) for x, _ in zip(first, range(3), strict=False)]
    second.load_state_dict(first.state_dict())
    return {"seen": seen, "rest": [told(x) for x in second], "whole": [told(x) for x in loader()]}


def killed():
    """All but the lost one come from the other worker; then next() waits, as the node does not look at its workers."""
    node = mapped(indices(), kills, in_order=False)
    node.reset()
    came = queue.Queue()

    def take():
        while True:
            came.put(told(next(node)))

    threading.Thread(target=take, daemon=True).start()
    seen = [came.get(timeout=60) for _ in range(LENGTH - 1)]
    time.sleep(1)
    return {"seen": sorted(seen, key=str), "more": came.qsize()}


def version():
    import torchdata

    return torchdata.__version__


CASES = {
    **{
        f"arrays, {method}": functools.partial(lambda m: all_of(mapped(indices(), array, m)), method)
        for method in METHODS
    },
    **{
        f"batches, {method}": functools.partial(lambda m: all_of(batches(stacked, m)), method)
        for method in METHODS
    },
    "tensors": lambda: all_of(mapped(indices(), tensor)),
    "mappings": lambda: all_of(mapped(indices(), mapping)),
    "mappings, batched afterwards": lambda: all_of(
        nodes.Mapper(nodes.Batcher(mapped(indices(), mapping), 4, drop_last=False), default_collate)
    ),
    "batches collated in the worker": lambda: all_of(batches(collated)),
    "arrays to the worker and back": lambda: all_of(mapped(nodes.Mapper(indices(), array), half)),
    "prebatch": lambda: all_of(mapped(indices(), array, prebatch=5)),
    "a mapper after another": lambda: all_of(mapped(mapped(indices(), array), half)),
    "shuffled, two epochs": lambda: epochs(batches(stacked, source=shuffled)),
    "two epochs": lambda: epochs(batches(stacked)),
    "left early": left_early,
    "resumed": lambda: resumed(lambda: batches(collated)),
    "resumed, shuffled": lambda: resumed(lambda: batches(stacked, source=shuffled)),
    "resumed, without Prefetcher": lambda: resumed(lambda: mapped(indices(), array, snapshot_frequency=4)),
    "an error": lambda: raised(lambda: mapped(indices(), fails)),
    "PinMemory": lambda: raised(lambda: nodes.PinMemory(batches(stacked))),
    "StatefulDataLoader": stateful,
    "a worker is killed": killed,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    # A node starts its workers after its threads: forked, they now and then wait forever for a lock that a thread had, with
    # PyTorch alone too.
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["torch", "torchshm.data", "nodes"])
    faulthandler.dump_traceback_later(100, exit=True)
    from torchdata import nodes
    from torchdata.stateful_dataloader import StatefulDataLoader

    if sys.argv[1] == "register":
        torchshm.register()
    print(json.dumps({"version": version(), **{name: case() for name, case in CASES.items()}}), flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)  # a thread waits for the killed worker's sample
