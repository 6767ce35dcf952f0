"""Whatever one process does in whatever order, every array has the content a plain one would have, and nothing is left over."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

import torchshm

SIZES = st.sampled_from([1, 7, 511, 512, 513, 2000, 2048, 5000, 40_000, 65_536, 70_000, 300_000])


class OneProcess(RuleBasedStateMachine):
    """An entry is an array and the plain one that says what it has to contain; views of the one go with views of the other.

    A message is always of a copy, so what is received has a content of its own; received twice it is one memory, and one content.
    """

    arrays = Bundle("arrays")
    messages = Bundle("messages")

    @initialize()
    def start(self):
        torchshm.register(min_bytes=0)
        gc.collect()
        self.before = torchshm.stats()
        self.number = 0
        self.live = []

    def content(self, size):
        self.number += 1
        return np.arange(float(size)) + 1e6 * self.number

    def add(self, array, wanted):
        entry = {"array": array, "wanted": wanted}
        self.live.append(entry)
        return entry

    @rule(target=arrays, size=SIZES)
    def make_empty(self, size):
        x = torchshm.empty(size)
        x[...] = wanted = self.content(size)
        return self.add(x, wanted)

    @rule(target=arrays, size=SIZES)
    def make_in_pool(self, size):
        with torchshm.pooled():
            x = np.ones(size) * 1
        x[...] = wanted = self.content(size)
        return self.add(x, wanted)

    @rule(target=arrays, size=SIZES, mode=st.sampled_from(["c", "r", "r+"]))
    def make_shared(self, size, mode):
        wanted = self.content(size)
        return self.add(torchshm.share(wanted, mode), wanted.copy())

    @rule(target=arrays, size=SIZES)
    def receive_a_copy(self, size):
        wanted = self.content(size)
        return self.add(torchshm.loads(torchshm.dumps(wanted)), wanted.copy())

    @rule(target=arrays, entry=arrays, mode=st.sampled_from(["c", "r", "r+"]))
    def share_a_copy(self, entry, mode):
        if entry["array"] is None:
            return self.add(None, None)
        return self.add(torchshm.share(entry["array"].copy(), mode), entry["wanted"].copy())

    @rule(target=arrays, entry=arrays, start=st.integers(0, 50), step=st.sampled_from([1, 2, -1, -3]))
    def view(self, entry, start, step):
        if entry["array"] is None:
            return self.add(None, None)
        return self.add(entry["array"][start:][::step], entry["wanted"][start:][::step])

    @rule(entry=arrays, value=st.floats(-100, 100))
    def write(self, entry, value):
        x = entry["array"]
        if x is not None and x.flags.writeable and x.size:
            x[x.size // 2] = value
            entry["wanted"][x.size // 2] = value

    @rule(target=messages, entry=arrays)
    def send(self, entry):
        x = entry["array"]
        if x is None:
            return None
        return torchshm.dumps(x.copy()), entry["wanted"].copy()

    @rule(target=arrays, message=messages)
    def receive(self, message):
        if message is None:
            return self.add(None, None)
        try:
            return self.add(torchshm.loads(message[0]), message[1])
        except torchshm.StaleHandleError:
            return self.add(None, None)

    @rule(entry=arrays)
    def drop(self, entry):
        entry["array"] = None

    @rule()
    def drop_all_but_the_last(self):
        for entry in self.live[:-1]:
            entry["array"] = None

    @rule(keep=st.sampled_from([0, 1 << 20, 1 << 30]))
    def trim(self, keep):
        torchshm.trim(keep)

    @invariant()
    def contents_are_right(self):
        for entry in getattr(self, "live", []):
            if entry["array"] is not None:
                assert np.array_equal(entry["array"], entry["wanted"])
        self.live = [entry for entry in getattr(self, "live", []) if entry["array"] is not None]

    @invariant()
    def figures_agree(self):
        figures = torchshm.stats()
        assert (
            figures["live_bytes"] + figures["warm_bytes"]
            <= figures["committed_bytes"]
            <= figures["limit_bytes"]
        )

    def teardown(self):
        if hasattr(self, "before"):
            for entry in self.live:
                entry["array"] = None
            gc.collect()
            after = torchshm.stats()
            assert after["blocks"] - after["tickets"] <= self.before["blocks"]
            torchshm.register()
            torchshm.unregister()


TestOneProcess = OneProcess.TestCase
TestOneProcess.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOneProcess = pytest.mark.timeout(300)(TestOneProcess)
