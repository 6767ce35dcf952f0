"""What torch.multiprocessing sends, and what both sides see afterwards, with PyTorch alone and with torchshm."""

from __future__ import annotations

import collections
import contextlib

import numpy as np
import pytest
import torch
import torch.multiprocessing
from parity import DTYPES, outcome

import torchshm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:.*hooks"),
]

SIZE = 3000


def t(*shape, dtype=torch.float32):
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(dtype)


def not_a_leaf():
    return t(SIZE).requires_grad_() * 2


def hooked():
    x = t(SIZE).requires_grad_()
    x.register_hook(print)
    return x


class Subclass(torch.Tensor):
    pass


def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.BatchNorm1d(50)).state_dict()


def of_one_storage():
    x = t(SIZE)
    return x, x[10:20], x.view(-1, 2).t()


KINDS = {
    "contiguous": lambda: t(SIZE),
    "small": lambda: t(3),
    "of no dimension": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: t(SIZE, 4).t(),
    "a part": lambda: t(SIZE, 4)[5:90:3, 1:],
    "expanded": lambda: t(SIZE, 1).expand(SIZE, 8),
    "channels last": lambda: t(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "requires grad": lambda: t(SIZE).requires_grad_(),
    "not a leaf": not_a_leaf,
    "a parameter": lambda: torch.nn.Parameter(t(SIZE)),
    "a parameter without grad": lambda: torch.nn.Parameter(t(SIZE), requires_grad=False),
    "a subclass": lambda: t(SIZE).as_subclass(Subclass),
    "a buffer": lambda: torch.nn.Buffer(t(SIZE)),
    "over an array": lambda: torch.from_numpy(np.arange(SIZE)),
    "coo": lambda: torch.eye(64).to_sparse(),
    "csr": lambda: torch.eye(64).to_sparse_csr(),
    "csc": lambda: torch.eye(64).to_sparse_csc(),
    "bsr": lambda: torch.eye(64).to_sparse_bsr((2, 2)),
    "nested": lambda: torch.nested.nested_tensor([t(3), t(5)]),
    "jagged": lambda: torch.nested.nested_tensor([t(3), t(5)], layout=torch.jagged),
    "meta": lambda: torch.empty(SIZE, device="meta"),
    "shared by torch": lambda: t(SIZE).share_memory_(),
    "a state": module,
    "views of one storage": of_one_storage,
    "one tensor twice": lambda: [t(SIZE)] * 2,
    "a storage": lambda: t(SIZE).untyped_storage().tolist(),
    "in containers": lambda: {"a": [t(SIZE), (t(3), 1)], "b": collections.OrderedDict(x=t(2))},
    "an array": lambda: np.arange(SIZE),
    "a packed sequence": lambda: torch.nn.utils.rnn.pack_sequence([t(5), t(3)]),
    "a generator's state": lambda: torch.Generator().manual_seed(3).get_state(),
    "a function": lambda: print,
    "a lambda": lambda: lambda: 1,
}
KINDS |= {
    str(dtype): lambda dtype=dtype: t(SIZE).to(dtype)
    for dtype in DTYPES
    if dtype not in (torch.uint64, torch.float32, torch.complex32)
}


def add(x):
    (x[0] if isinstance(x, list | tuple) else x).detach().add_(1)


def resize(x):
    x.resize_(SIZE * 10)


def is_shared(x):
    return x.is_shared()


def total(x):
    return float(x.detach().sum())


def give(x):
    return x


def keep(x):
    global _kept
    _kept = x


def kept(_):
    return _kept.clone()


def grad(x):
    x.sum().backward()
    return x.grad


def _serve(pipe):
    while True:
        try:
            message = pipe.recv()
            if message is None:
                return
            function, x = message
            answer = function(x)
        except Exception as error:
            answer = error
        try:
            pipe.send(answer)
        except Exception as error:
            pipe.send(error)
        del answer


class Child:
    """A process with torch's pickler at both ends, or ours. Spawned: torch's own way needs a thread, whose locks a fork may find taken."""

    def __init__(self):
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, function, x):
        self.pipe.send((function, x))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join()


@pytest.fixture(scope="module")
def ends():
    torchshm.unregister()
    children = {"stock": Child()}
    torchshm.register()
    children["torchshm"] = Child()
    torchshm.unregister()
    yield children
    for child in children.values():
        child.close()


def compare(ends, scenario):
    torchshm.unregister()
    stock = outcome(scenario, ends["stock"])
    torchshm.register()
    try:
        assert outcome(scenario, ends["torchshm"]) == stock
    finally:
        torchshm.unregister()


def after(child, function, kind):
    """What the sender has when the receiver has called that."""
    x = KINDS[kind]()
    child(function, x)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(ends, kind):
    compare(ends, lambda child: child(give, KINDS[kind]()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_sender_keeps_what_it_sent(ends, kind):
    compare(ends, lambda child: after(child, type, kind))


@pytest.mark.parametrize(
    "kind",
    ["contiguous", "small", "transposed", "a part", "a parameter", "shared by torch", "views of one storage"],
)
def test_what_the_receiver_writes_is_seen(ends, kind):
    compare(ends, lambda child: after(child, add, kind))


@pytest.mark.parametrize("kind", ["contiguous", "small", "a parameter", "shared by torch", "transposed"])
def test_what_the_sender_writes_is_seen(ends, kind):
    def scenario(child):
        x = KINDS[kind]()
        child(keep, x)
        x.detach().mul_(3)
        return child(kept, None)

    compare(ends, scenario)


@pytest.mark.parametrize("function", [resize, is_shared, total, grad], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["contiguous", "small", "requires grad", "a parameter", "empty"])
def test_what_the_receiver_can_do(ends, kind, function):
    compare(ends, lambda child: child(function, KINDS[kind]()))


@pytest.mark.parametrize("function", [is_shared, torch.Tensor.clone, torch.Tensor.share_memory_])
@pytest.mark.parametrize("kind", ["contiguous", "small"])
def test_what_the_sender_can_do_afterwards(ends, kind, function):
    def scenario(child):
        x = KINDS[kind]()
        child(keep, x)
        return function(x), x

    compare(ends, scenario)


def _echo(source, target):
    while (x := source.get()) is not None:
        target.put(x)
        del x
    source.get()  # what was put is alive until it has been received


@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_through_queues(kind, method):
    names = ["contiguous", "small", "transposed", "coo", "views of one storage", "in containers", "an array"]

    def scenario():
        context = torch.multiprocessing.get_context(method)
        there, back = getattr(context, kind)(), getattr(context, kind)()
        child = context.Process(target=_echo, args=(there, back))
        child.start()
        for name in names:
            there.put(KINDS[name]())
        there.put(None)
        got = [back.get() for _ in names]
        there.put(0)
        child.join()
        return got, child.exitcode

    torchshm.unregister()
    stock = outcome(scenario)
    torchshm.register()
    try:
        assert outcome(scenario) == stock
    finally:
        torchshm.unregister()


def _double(x):
    return x * 2


@pytest.mark.parametrize("kind", ["contiguous", "small", "an array", "in containers"])
def test_in_a_pool_of_processes(kind):
    def scenario():
        with torch.multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(_double if kind != "in containers" else give, [KINDS[kind]() for _ in range(4)])

    torchshm.unregister()
    stock = outcome(scenario)
    torchshm.register()
    try:
        assert outcome(scenario) == stock
    finally:
        torchshm.unregister()
