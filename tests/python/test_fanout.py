"""publish() and subscribe(): unrelated programs read each batch of one loader in place, whoever is slow, late or killed."""

import itertools
import signal

import pytest
from program import Program, ProgramError, until

BEGIN = """
import collections
import gc
import os
import threading

import numpy as np
import torch
import torchshm
from torchshm.data import DataLoader, publish, subscribe

Pair = collections.namedtuple("Pair", "x y")


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size=40):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"x": torch.full((64, 64), float(i)), "n": np.full(9000, i), "s": f"s{i}"}


class Counted:
    'Epochs of so many batches of 1 MB; counts what it has made.'

    def __init__(self, batches):
        self.batches, self.made = batches, 0

    def __iter__(self):
        for i in range(self.batches):
            self.made += 1
            yield {"x": torch.full((4, 1 << 16), float(i)), "i": i}


def blocks():
    gc.collect()
    info = torchshm.connect(STORE).info()
    return info["blocks"], info["live_bytes"]


def summary(batch):
    return [float(batch["x"].double().mean()), torchshm.is_shared(batch["x"]), list(batch["x"].shape)]


def take(count):
    'So many batches of this epoch.'
    global batch
    found = []
    for _ in range(count):
        batch = next(epoch)
        found.append(batch["i"])
    return found
"""
STORE = "fanout"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def _programs(runtime):
    programs = [Program(BEGIN + f"STORE = {STORE!r}") for _ in range(4)]
    programs[0].do("store = torchshm.start(STORE, limit='512MiB')")
    yield programs
    for program in programs:
        program.close()


@pytest.fixture
def programs(_programs):
    """One that publishes and serves the store, and three that subscribe; and that all comes back in the end."""
    name = f"stream{next(_numbers)}"
    for program in _programs:
        program.do(f"name = {name!r}; publisher = subscription = epoch = batch = None; gc.collect()")
    before = _programs[0].ask("blocks()")
    yield _programs
    for program in _programs[1:]:
        program.do(
            "subscription is None or subscription.close(); subscription = epoch = batch = None; gc.collect()"
        )
    _programs[0].do("publisher is None or publisher.close(); publisher = batch = None; gc.collect()")
    assert _programs[0].ask("blocks()") == before
    assert _programs[0].ask("store._core.keys('\\0')") == []


@pytest.fixture
def extra(runtime):
    """Programs that a test kills."""
    made = []

    def make(store=STORE):
        made.append(Program(BEGIN + f"STORE = {store!r}"))
        return made[-1]

    yield make
    for program in made:
        program.kill()


SUBSCRIBE = "subscription = subscribe(name, store=STORE{}); epoch = iter(subscription)"


def subscribe(program, options="", name=None):
    if name is not None:
        program.do(f"name = {name!r}")
    program.do(SUBSCRIBE.format(options))


def start(program, loader, options=""):
    program.do(f"loader = {loader}; publisher = publish(loader, name, store=STORE{options}).start()")


@pytest.mark.parametrize(
    "make",
    ["DataLoader({}, num_workers=2)", "torch.utils.data.DataLoader({}, num_workers=2)", "DataLoader({})"],
)
def test_all_get_the_same_batches_in_order(programs, make):
    publisher, *consumers = programs
    start(publisher, make.format("Numbers(), batch_size=8"), ", epochs=3, min_consumers=3")
    for consumer in consumers:
        consumer.do(SUBSCRIBE.format(""))
        consumer.begin(
            """
found, ends = [], []
while not subscription.ended:
    for batch in subscription:
        found.append([*summary(batch), int(batch["n"][5, 0]), batch["s"], subscription.position])
    ends.append(subscription.position)
del batch
"""
        )
    wanted = [
        [8 * i + 3.5, True, [8, 64, 64], 8 * i + 5, [f"s{8 * i + j}" for j in range(8)], [epoch, i + 1]]
        for epoch in range(3)
        for i in range(5)
    ]
    for consumer in consumers:
        consumer.answer()
        assert consumer.ask("found") == wanted
        assert consumer.ask("ends") == [[1, 0], [2, 0], [3, 0]]
        assert consumer.ask("list(subscription)") == []
    assert publisher.ask("publisher.join(60)")


COUNT_COPIES = """
copied, copy = [], torchshm._C.copy_into

def count(target, offset, address, length):
    copied.append(length)
    copy(target, offset, address, length)

torchshm._C.copy_into = count
"""


def test_nothing_is_copied_for_a_consumer(programs):
    publisher, *consumers = programs
    publisher.do(COUNT_COPIES)
    start(
        publisher,
        "DataLoader(Numbers(), batch_size=8, num_workers=1)",
        ", epochs=1, min_consumers=3, ahead=5",
    )
    used = publisher.ask("blocks()")
    for consumer in consumers:
        consumer.do(SUBSCRIBE.format(""))
    for consumer in consumers:
        consumer.do("held = list(epoch)")
    assert publisher.ask("publisher.join(60)")
    assert [consumer.ask("len(held)") for consumer in consumers] == [5, 5, 5]
    publisher.do("torchshm._C.copy_into = copy")
    assert publisher.ask("copied") == []
    # Five batches of 8 x 16 KiB and 8 x 9000 int64, once; and a little to talk.
    batches = 5 * 8 * (64 * 64 * 4 + 9000 * 8)
    assert publisher.ask("blocks()")[1] - used[1] < 1.1 * batches
    consumers[0].do("for batch in held: batch['x'].fill_(-1.0)\nbatch = None")
    assert consumers[0].ask("float(held[0]['x'].mean())") == -1
    assert [consumer.ask("float(held[0]['x'].mean())") for consumer in consumers[1:]] == [3.5, 3.5]
    for consumer in consumers[:2]:
        consumer.do("del held; gc.collect()")
    assert consumers[2].ask("[float(each['x'].mean()) for each in held]") == [3.5, 11.5, 19.5, 27.5, 35.5]
    consumers[2].do("del held; gc.collect()")


def test_arrays_and_the_publishers_own_batches_are_private_too(programs):
    publisher, consumer, other, _ = programs
    publisher.do(
        """
given = [{"a": np.full(100_000, 1.0), "t": torch.ones(100_000)}]
publisher = publish(given, name, store=STORE, min_consumers=0)
published = iter(publisher)
"""
    )
    subscribe(consumer)
    subscribe(other)
    publisher.do("mine = next(published)")
    publisher.do("mine['a'][:] = 2; mine['t'][:] = 3; given[0]['a'][:] = 4; given[0]['t'][:] = 5")
    assert publisher.ask("torchshm.is_shared(mine['a'])")
    seen = "[float(batch['a'].mean()), float(batch['t'].mean()), torchshm.is_shared(batch['a'])]"
    for number, each in enumerate((consumer, other)):
        each.do("batch = next(epoch)")
        assert each.ask(seen) == [1, 1, True]
        each.do(f"batch['a'][:] = 6 + {number}; batch['t'][:] = 8 + {number}")
    assert consumer.ask(seen) == [6, 8, True] and other.ask(seen) == [7, 9, True]
    assert publisher.ask("[float(mine['a'].mean()), float(mine['t'].mean())]") == [2, 3]
    publisher.do("del mine, published, given")


def test_the_structure_of_a_batch_stays(programs):
    publisher, consumer, *_ = programs
    publisher.do(
        """
x = torch.arange(12.0).reshape(6, 2)
given = [Pair(x, {"y": (np.arange(6), [x, "text"]), "n": None}), [1, 2.5, b"b"], Pair(x, x[:, :1])]
publisher = publish(given, name, store=STORE, epochs=1).start()
"""
    )
    subscribe(consumer)
    consumer.do("got = list(epoch); x = torch.arange(12.0).reshape(6, 2)")
    for true in (
        "type(got[0]) is Pair and torch.equal(got[0].x, x)",
        "type(got[0].y['y']) is tuple and got[0].y['y'][0].tolist() == list(range(6)) and got[0].y['n'] is None",
        "torch.equal(got[0].y['y'][1][0], x) and got[0].y['y'][1][1] == 'text'",
        "got[1] == [1, 2.5, b'b']",
        "torch.equal(got[2].y, x[:, :1]) and got[2].y.data_ptr() == got[2].x.data_ptr()",
    ):
        assert consumer.ask(true), true
    consumer.do("del got")
    publisher.do("del given, x")


def test_pickles_are_only_loaded_where_that_is_allowed(programs):
    publisher, consumer, *_ = programs
    start(publisher, "[Pair(torch.ones(3), 1)]", ", epochs=1")
    subscribe(consumer, ", allow_pickle=False")
    with pytest.raises(ProgramError, match="allow_pickle=True"):
        consumer.do("next(epoch)")


@pytest.mark.parametrize("size", [1, 3, 8, 11, 16, 100])
def test_batches_of_another_size(programs, size):
    publisher, consumer, other, _ = programs
    start(publisher, "DataLoader(Numbers(30), batch_size=8, num_workers=1)", ", epochs=2, min_consumers=2")
    subscribe(consumer, f", batch_size={size}")
    subscribe(other, f", batch_size={size}, drop_last=True")
    take = """
found = []
while not subscription.ended:
    for batch in subscription:
        found.append([batch["x"][:, 3, 3].tolist(), batch["n"][:, 7].tolist(), batch["s"], torchshm.is_shared(batch["x"])])
        batch["x"].zero_()
batch = None
"""
    for program in (consumer, other):
        program.begin(take)
    for program, last in ((consumer, True), (other, False)):
        program.answer()
        wanted = []
        for begin in range(0, 30, size):
            samples = range(begin, min(begin + size, 30))
            inside = samples[0] // 8 == samples[-1] // 8
            if len(samples) == size or last:
                wanted.append([[*samples], [*samples], [f"s{i}" for i in samples], inside])
        assert program.ask("found") == wanted * 2


def test_what_can_not_be_cut_is_said(programs):
    publisher, consumer, *_ = programs
    start(publisher, "[{'a': torch.ones(3), 'b': torch.ones(4)}]", ", epochs=1")
    subscribe(consumer, ", batch_size=2")
    with pytest.raises(ProgramError, match=r"ValueError: .* lengths \[3, 4\]"):
        consumer.do("next(epoch)")


def test_who_comes_late_begins_with_the_next_batch(programs):
    publisher, first, late, _ = programs
    start(publisher, "Counted(10)", ", epochs=2, ahead=1")
    subscribe(first)
    assert first.ask("take(4)") == [0, 1, 2, 3]
    until(lambda: publisher.ask("publisher.position") == [0, 5])  # one is published and not taken
    subscribe(late)
    first.do("take(1)")
    until(lambda: len(publisher.ask("publisher.consumers")) == 2)
    assert late.ask("subscription.position") in ([0, 5], [0, 6])
    begin = late.ask("subscription.position")[1]
    for program in (first, late):
        program.begin("rest = [b['i'] for b in epoch]; second = [b['i'] for b in subscription]; batch = None")
    for program in (first, late):
        program.answer()
    assert first.ask("rest") == [5, 6, 7, 8, 9]
    assert late.ask("rest") == list(range(begin, 10))
    assert first.ask("second") == late.ask("second") == list(range(10))


def test_the_slowest_sets_the_pace(programs):
    publisher, fast, slow, _ = programs
    start(publisher, "Counted(20)", ", epochs=1, min_consumers=2, ahead=2")
    subscribe(fast)
    subscribe(slow)
    assert slow.ask("take(1)") == [0]
    assert fast.ask("take(3)") == [0, 1, 2]
    until(lambda: publisher.ask("loader.made") == 4)  # two published after the slow one's, one in hand
    until(lambda: [each[2] for each in publisher.ask("publisher.consumers")] == [0, 2])
    fast.begin("rest = take(17); batch = None")
    for i in range(1, 20):
        assert publisher.ask("loader.made") <= i + 3
        assert slow.ask("take(1)") == [i]
        assert publisher.ask("blocks()[1]") < 8 << 20  # of 20 MB
    fast.answer()
    assert fast.ask("rest") == list(range(3, 20))
    assert fast.ask("subscription.dropped") == slow.ask("subscription.dropped") == 0


def test_a_slow_one_is_dropped_from_where_that_is_asked_for(programs):
    publisher, fast, slow, _ = programs
    start(publisher, "Counted(20)", ", epochs=3, min_consumers=2, ahead=3, slow='drop'")
    subscribe(fast)
    subscribe(slow)
    assert slow.ask("take(1)") == [0]
    assert fast.ask("take(15)") == list(range(15))
    until(lambda: publisher.ask("loader.made") == 19)  # three published and taken by nobody, one in hand
    assert slow.ask("take(1)") == [12]
    assert slow.ask("subscription.dropped") == 11 and fast.ask("subscription.dropped") == 0
    until(lambda: publisher.ask("publisher.consumers")[1][3] == 11)
    for program in (fast, slow):
        program.begin(
            "rest = [[b['i'] for b in each] for each in (epoch, subscription, subscription)]; batch = None"
        )
    for program, taken in ((fast, 15), (slow, 2)):
        program.answer()
        rest = program.ask("rest")
        assert all(numbers == sorted(numbers) for numbers in rest)
        assert program.ask("subscription.ended")
        assert taken + sum(map(len, rest)) + program.ask("subscription.dropped") == 60


def test_the_end_of_an_epoch_is_not_dropped(programs):
    publisher, fast, slow, _ = programs
    start(publisher, "Counted(20)", ", epochs=3, min_consumers=2, ahead=3, slow='drop'")
    subscribe(fast)
    subscribe(slow)
    assert slow.ask("take(1)") == [0]
    assert fast.ask("[b['i'] for b in epoch]") == list(range(20))
    assert fast.ask("[b['i'] for _, b in zip(range(10), subscription)]") == list(range(10))
    until(lambda: publisher.ask("loader.made") == 34)
    slow.do("batch = None; rest = [[b['i'] for b in epoch]]; epoch = iter(subscription)")
    assert slow.ask("rest") == [[]] and slow.ask("subscription.position") == [1, 7]
    assert slow.ask("take(1)") == [7] and slow.ask("subscription.dropped") == 26


def test_who_takes_nothing_for_too_long_is_left_behind(programs):
    publisher, fast, slow, _ = programs
    start(publisher, "Counted(30)", ", epochs=1, min_consumers=2, timeout=0.3")
    subscribe(fast)
    subscribe(slow)
    assert slow.ask("take(2)") == [0, 1]
    assert fast.ask("take(30)") == list(range(30))
    with pytest.raises(ProgramError, match=r"TimeoutError: .*longer than the publisher's timeout"):
        slow.do("take(30)")


@pytest.mark.parametrize("slow", ["wait", "drop"])
def test_the_death_of_a_consumer_costs_the_others_nothing(programs, extra, slow):
    publisher, one, two, _ = programs
    victim = extra()
    subscribed = [one, two, victim]
    start(publisher, "Counted(200)", f", epochs=2, min_consumers=3, slow={slow!r}, ahead=4")
    name = publisher.ask("name")
    for program in subscribed:
        subscribe(program, name=name)
    victim.do("held = [next(epoch) for _ in range(3)]")
    victim.begin("for batch in epoch: held.append(batch)")
    for program in (one, two):
        program.begin(
            "first = [batch['i'] for batch in epoch]; second = [batch['i'] for batch in subscription]; batch = None"
        )
    until(lambda: publisher.ask("publisher.position")[1] > 20)
    victim.kill()
    until(lambda: len(publisher.ask("publisher.consumers")) == 2)
    for program in (one, two):
        program.answer()
        assert program.ask("sum(map(len, (first, second))) + subscription.dropped") == 400
        assert slow == "drop" or program.ask("first == second == list(range(200))")
    assert publisher.ask("publisher.join(60)")


def test_a_consumer_that_is_killed_without_having_taken_anything(programs, extra):
    publisher, one, *_ = programs
    victim = extra()
    start(publisher, "Counted(10)", ", epochs=1, min_consumers=2")
    subscribe(victim, name=publisher.ask("name"))
    subscribe(one)
    victim.kill()
    assert one.ask("[batch['i'] for batch in epoch]") == list(range(10))


def test_publishing_rests_while_nobody_is_there(programs):
    publisher, one, two, _ = programs
    start(publisher, "Counted(10)", ", epochs=1")
    subscribe(one)
    assert one.ask("take(3)") == [0, 1, 2]
    one.do("subscription.close(); batch = None")
    until(lambda: publisher.ask("publisher.consumers") == [])
    subscribe(two)
    begin = two.ask("next(epoch)['i']")
    assert 3 <= begin <= 5 and two.ask("[b['i'] for b in epoch]") == list(range(begin + 1, 10))


def test_a_publisher_that_is_killed_is_an_error_and_its_successor_is_found(programs, extra, runtime):
    _, one, two, _ = programs
    name = "restarted"
    publisher = extra(name)
    publisher.do(
        "publisher = publish(DataLoader(Numbers(400), batch_size=8, num_workers=2), 'restarted', min_consumers=2).start()"
    )
    for consumer in (one, two):
        consumer.do("subscription = subscribe('restarted'); epoch = iter(subscription)")
    for consumer in (
        one,
        two,
    ):  # of both workers: torch's notice the end of their parent once they have begun
        consumer.begin("for _ in range(4): batch = next(epoch)")
    for consumer in (one, two):
        consumer.answer()
    one.begin("for batch in epoch: pass")
    publisher.kill()
    with pytest.raises(ProgramError, match="StoreUnavailableError: the publisher of 'restarted' has gone"):
        one.answer()
    two.do("held = batch; was = summary(held)")
    with pytest.raises(ProgramError, match="StoreUnavailableError: the publisher of 'restarted' has gone"):
        two.do("for batch in epoch: pass")
    with pytest.raises(ProgramError, match="StoreUnavailableError: nothing is published as 'restarted'"):
        two.do("subscribe('restarted', store=subscription._store, timeout=0)")
    again = extra(name)
    again.do("publisher = publish(Counted(5), 'restarted', epochs=1, min_consumers=2).start()")
    for consumer in (one, two):
        consumer.do("subscription = subscribe('restarted'); epoch = iter(subscription)")
        consumer.begin("got = [batch['i'] for batch in epoch]; batch = None")
    for consumer in (one, two):
        consumer.answer()
        assert consumer.ask("got") == list(range(5))
    assert two.ask("summary(held) == was and was[1]")  # what it has stays
    assert again.ask("publisher.join(60)")
    for consumer in (one, two):
        consumer.do("held = None; subscription.close()")
    again.do("publisher.close(); del publisher; gc.collect()")
    until(lambda: again.ask("torchshm.stats()['blocks']") == 0)


COUNT_REFUSALS = """
refused, describe = [], torchshm._values.describe

def counting(core, batch):
    try:
        return describe(core, batch)
    except torchshm.PoolFullError:
        refused.append(batch["i"])
        raise

torchshm._values.describe = counting
"""


def test_a_store_that_consumers_have_filled_is_waited_for(programs, extra, runtime):
    _, consumer, *_ = programs
    publisher = extra("small")
    publisher.do(COUNT_REFUSALS)
    publish = "publisher = publish(Counted(40), 'small', epochs=1, limit='12MiB', timeout={}).start()"
    hold = """
subscription = subscribe('small')
epoch, held, numbers = iter(subscription), [], []

def hold():
    for each in epoch:
        held.append(each)
        numbers.append(each['i'])

thread = threading.Thread(target=hold)
thread.start()
"""
    publisher.do(publish.format(60))
    consumer.do(hold)
    until(lambda: publisher.ask("refused"))
    assert consumer.ask("thread.is_alive()")
    until(lambda: consumer.do("each = None; held.clear()") or not consumer.ask("thread.is_alive()"))
    assert consumer.ask("numbers") == list(range(40))
    consumer.do("subscription.close()")
    publisher.do("publisher.close()")
    publisher.do(publish.format(0.3))
    consumer.do("subscription = subscribe('small'); epoch = iter(subscription)")
    with pytest.raises(ProgramError, match="has failed: PoolFullError"):
        consumer.do("for batch in epoch: held.append(batch)")
    consumer.do("held = None")


def test_a_loader_that_fails_is_the_consumers_error_too(programs):
    publisher, consumer, *_ = programs
    publisher.do(
        """
def failing():
    yield {"x": torch.ones(4), "i": 0}
    raise OSError("the disk is gone")
"""
    )
    start(publisher, "failing()")
    subscribe(consumer)
    consumer.do("batch = next(epoch)")
    with pytest.raises(ProgramError, match="has failed: OSError: the disk is gone"):
        consumer.do("next(epoch)")
    with pytest.raises(ProgramError, match="OSError: the disk is gone"):
        publisher.do("publisher.join()")


def test_what_fails_beside_the_loader_is_no_end_either(programs):
    publisher, consumer, *_ = programs
    publisher.do("publisher = publish(Counted(5), name, store=STORE)")
    subscribe(consumer)
    consumer.begin("for batch in epoch: pass")
    with pytest.raises(ProgramError, match="ZeroDivisionError"):
        publisher.do("with publisher:\n  for batch in publisher: batch['i'] and 1 / 0")
    with pytest.raises(ProgramError, match="has failed: ZeroDivisionError"):
        consumer.answer()


def test_a_forked_child_ends_nothing(programs):
    publisher, consumer, *_ = programs
    start(publisher, "Counted(5)", ", epochs=1, ahead=1")
    subscribe(consumer)
    assert consumer.ask("take(2)") == [0, 1]
    publisher.do(
        """
child = os.fork()
if child == 0:
    publisher.close()
    publisher = None
    gc.collect()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    )
    consumer.do(
        """
child = os.fork()
if child == 0:
    try:
        next(epoch)
    except RuntimeError:
        subscription.close()
        subscription = None
        gc.collect()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    )
    assert consumer.ask("[b['i'] for b in epoch]") == [2, 3, 4]
    assert publisher.ask("publisher.join(60)")


def test_closing_is_an_end_and_not_an_error(programs):
    publisher, consumer, *_ = programs
    start(publisher, "Counted(1000)")
    subscribe(consumer)
    assert consumer.ask("take(5)") == list(range(5))
    consumer.begin("count = 5 + sum(1 for batch in epoch); batch = None")
    until(lambda: publisher.ask("publisher.position")[1] > 50 or publisher.ask("publisher.position")[0] > 0)
    publisher.do("position = publisher.position; publisher.close()")
    consumer.answer()
    assert consumer.ask("count") >= 50 and consumer.ask("subscription.ended")
    assert consumer.ask("list(subscription)") == []


def test_a_batch_that_does_not_come_in_time(programs):
    publisher, consumer, *_ = programs
    publisher.do(
        """
go = threading.Event()

def waiting():
    go.wait()
    yield {"x": torch.ones(4), "i": 7}
"""
    )
    start(publisher, "waiting()")
    subscribe(consumer, ", timeout=0.2")
    with pytest.raises(ProgramError, match="TimeoutError: nothing was published"):
        consumer.do("next(epoch)")
    publisher.do("go.set()")
    consumer.do("epoch = iter(subscription)")
    assert consumer.ask("next(epoch)['i']") == 7


def test_nobody_and_nothing_to_wait_for(programs):
    publisher, consumer, *_ = programs
    with pytest.raises(ProgramError, match="StoreUnavailableError: nothing is published as"):
        consumer.do("subscribe('nobody', store=STORE, timeout=0.1)")
    with pytest.raises(ProgramError, match="StoreUnavailableError: no store named"):
        consumer.do("subscribe('nobody', timeout=0)")
    with pytest.raises(ProgramError, match="TimeoutError: 0 of 1 consumers"):
        publisher.do("publish(Counted(3), name, store=STORE, timeout=0.1).run()")
    publisher.do("gc.collect(); publisher = publish(Counted(3), name, store=STORE)")
    with pytest.raises(ProgramError, match=r"KeyExistsError: .something is being published"):
        publisher.do("publish(Counted(3), name, store=STORE)")
    for wrong in ("slow='never'", "ahead=0", "min_consumers=-1", "limit=5"):
        with pytest.raises(ProgramError, match="ValueError"):
            publisher.do(f"publish(Counted(3), 'wrong', store=STORE, {wrong})")
    with pytest.raises(ProgramError, match="ValueError: an iterator"):
        publisher.do("publish(iter([1]), 'wrong', store=STORE, epochs=2)")
    for wrong in ("batch_size=0", "drop_last=True"):
        with pytest.raises(ProgramError, match="ValueError"):
            consumer.do(f"subscribe(name, store=STORE, {wrong})")


def test_a_stopped_consumer_is_not_taken_for_dead(programs, extra):
    publisher, *_ = programs
    stopped = extra()
    start(publisher, "Counted(6)", ", epochs=1, ahead=1")
    subscribe(stopped, name=publisher.ask("name"))
    stopped.do("batch = next(epoch)")
    stopped.signal(signal.SIGSTOP)
    until(lambda: publisher.ask("loader.made") == 3)
    assert len(publisher.ask("publisher.consumers")) == 1
    stopped.signal(signal.SIGCONT)
    assert stopped.ask("[b['i'] for b in epoch]") == [1, 2, 3, 4, 5]
    assert publisher.ask("publisher.join(60)")
