"""share() of what people hold data in: equal, in the pool, and in another process without a copy."""

from __future__ import annotations

import gc
import multiprocessing
import pickle

import numpy as np
import pytest
from peer import give
from shareable import CASES

import torchshm

cases = pytest.mark.parametrize("name", CASES)
# A message's pickle has no buffers out of band: they are a part of it.
MESSAGES = [name for name in CASES if name != "out of band"]


def blocks() -> int:
    gc.collect()
    return torchshm.stats()["blocks"]


def left() -> tuple[int, int]:
    return blocks(), torchshm.stats()["tickets"]


def pooled(name, x):
    return [torchshm.is_shared(each) for each in CASES[name].memory(x)]


@cases
def test_shared_object_is_equal_and_in_the_pool(registered, name):
    case = CASES[name]
    x = case.make()
    assert not any(pooled(name, x))
    y = torchshm.share(x)
    assert case.equal(y, x)
    assert all(pooled(name, y)) and pooled(name, y)
    assert type(y) is type(x)


@cases
def test_sharing_again_copies_nothing(registered, name):
    y = torchshm.share(CASES[name].make())
    before = blocks()
    again = torchshm.share(y)
    assert blocks() == before
    assert all(pooled(name, again))
    assert CASES[name].equal(again, y)


def found(name, x):
    return all(pooled(name, x)), blocks()


@pytest.mark.parametrize("name", MESSAGES)
def test_shared_object_crosses_to_another_process_without_a_copy(peer, name):
    y = torchshm.share(CASES[name].make())
    before = blocks()
    assert peer.call(found, name, y) == (True, before)
    assert CASES[name].equal(peer.call(give, y), y)
    assert blocks() == before


def relay(argument, inbox, outbox):
    outbox.put({name: all(pooled(name, x)) for name, x in argument.items()})
    while (message := inbox.get()) is not None:
        name, x = message
        outbox.put((all(pooled(name, x)), blocks(), x))
        del message, x


def test_shared_objects_cross_as_arguments_and_through_queues(registered):
    shared = {name: torchshm.share(CASES[name].make()) for name in MESSAGES}
    before = blocks()
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=relay, args=(shared, inbox, outbox))
    child.start()
    assert outbox.get() == dict.fromkeys(MESSAGES, True)
    for name in MESSAGES:
        inbox.put((name, shared[name]))
        there, count, back = outbox.get()
        assert (name, there, count) == (name, True, before)
        assert CASES[name].equal(back, shared[name])
    inbox.put(None)
    child.join()
    assert child.exitcode == 0


@cases
def test_message_of_an_ordinary_object_is_equal(peer, name):
    x = CASES[name].make()
    assert CASES[name].equal(peer.call(give, x), x)


@cases
def test_inline_pickles_carry_all_of_it(registered, name):
    x = torchshm.share(CASES[name].make())
    before = blocks()
    with torchshm.inline():
        b = torchshm.dumps(x)
    assert blocks() == before
    got = torchshm.loads(b)
    assert CASES[name].equal(got, x)
    assert not any(pooled(name, got))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", MESSAGES)
def test_any_protocol_sends_shared_objects_by_handle(registered, name, protocol):
    x = torchshm.share(CASES[name].make())
    before = blocks()
    b = torchshm.dumps(x, protocol)
    assert blocks() == before
    assert len(b) < 40_000
    got = torchshm.loads(b)
    assert CASES[name].equal(got, x)
    assert all(pooled(name, got))


class Objects:
    """Sample i is the object of the i-th name: made here, or the middle third of it where it can be sliced."""

    def __len__(self):
        return len(MESSAGES)

    def __getitem__(self, i):
        x = CASES[MESSAGES[i]].make()
        return x[1000:2000] if MESSAGES[i] in SLICED else x


SLICED = [name for name in MESSAGES if name.startswith(("Arrow", "polars", "pandas"))]


@pytest.mark.parametrize("pooled_fetch", [False, True])
def test_objects_come_through_a_loader(pooled_fetch):
    from torchshm.data import DataLoader

    loader = DataLoader(
        Objects(),
        batch_size=None,
        collate_fn=give,
        num_workers=2,
        multiprocessing_context="spawn",  # polars has threads, which a fork does not copy
        pooled=pooled_fetch,
    )
    here = Objects()
    for i, got in enumerate(loader):
        assert CASES[MESSAGES[i]].equal(got, here[i])


@pytest.mark.parametrize("name", MESSAGES)
def test_objects_come_through_a_pooled_queue(registered, name):
    queue = torchshm.get_context("spawn").Queue()
    x = CASES[name].make()
    queue.put(x)
    queue.put(torchshm.share(x))
    for _ in range(2):
        assert CASES[name].equal(queue.get(), x)


# ---- what is pickled, or received, runs code of its own


class Sharing:
    """Shares something while it is shared."""

    def __init__(self, *held, mode="r+"):
        self.held, self.mode = held, mode
        self.made = None

    def __reduce__(self):
        try:
            self.made = torchshm.share(self.held, self.mode)
        except RuntimeError:
            self.made = None
        return give, (self.made,)


class NotPicklable:
    def __reduce__(self):
        raise RuntimeError("not this one")


class NotReceivable:
    """Can be pickled, and not received."""

    def __init__(self, *held):
        self.held = held

    def __setstate__(self, state):
        raise ValueError("not this one")


class OutOfBand:
    def __init__(self, held):
        self.held = held

    def __reduce_ex__(self, protocol):
        return _not_received, (pickle.PickleBuffer(self.held),)


def _not_received(buffer):
    raise ValueError("not this one")


def write(arrays):
    for each in arrays:
        each[0] = 7


def ones():
    return np.ones(3000)


@pytest.mark.parametrize("inside", [(), (ones(),), (ones(), NotPicklable())])
@pytest.mark.parametrize("mode", ["c", "r", "r+"])
def test_share_within_share_does_not_end_it(peer, mode, inside):
    before = left()
    first, _, small, last = torchshm.share([ones(), Sharing(*inside), np.ones(10), ones()], mode)
    arrays = [first, small, last]
    assert all(map(torchshm.is_shared, arrays))
    assert [each.flags.writeable for each in arrays] == [mode != "r"] * 3
    if mode != "r":
        peer.call(write, arrays)
        assert [each[0] for each in arrays] == [7 if mode == "r+" else 1] * 3
    del first, small, last, arrays, _
    assert left() == before


def test_share_within_share_has_its_own_mode(registered):
    for outer, own in (("r", "r+"), ("r+", "r")):
        inner = Sharing(ones(), mode=own)
        y = torchshm.share([ones(), inner, ones()], outer)
        assert [each.flags.writeable for each in (y[0], inner.made[0], y[2])] == [
            mode == "r+" for mode in (outer, own, outer)
        ]


def test_share_within_share_leaves_nothing_when_either_fails(registered):
    before = left()
    with pytest.raises(RuntimeError):
        torchshm.share([ones(), Sharing(ones()), ones(), NotPicklable()])
    with pytest.raises(ValueError, match="not this one"):
        torchshm.share([ones(), Sharing(ones()), ones(), NotReceivable(ones()), ones()])
    torchshm.share([ones(), Sharing(ones(), NotPicklable()), ones()])
    assert left() == before


@pytest.mark.parametrize(
    "options", [{}, {"report": True}, {"consume": True}, {"consume": True, "report": True}]
)
@pytest.mark.parametrize("make", [NotReceivable, OutOfBand])
def test_nothing_is_left_of_what_can_not_be_received(registered, make, options):
    before = left()
    with pytest.raises(ValueError, match="not this one"):
        torchshm.share([ones(), make(ones()), ones(), pickle.PickleBuffer(ones())], **options)
    assert left() == before


def test_nothing_is_left_of_tensors_either(registered):
    torch = pytest.importorskip("torch")
    before = left()
    with pytest.raises(ValueError, match="not this one"):
        torchshm.share([torch.ones(3000), NotReceivable(torch.ones(3000)), torch.ones(3000)])
    assert left() == before
