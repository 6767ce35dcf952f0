"""share() of what people hold data in: equal, in the pool, and in another process without a copy."""

from __future__ import annotations

import gc
import multiprocessing

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
