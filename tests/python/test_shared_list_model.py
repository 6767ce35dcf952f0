"""Whatever is done to a SharedList and to a list gives the same."""

from __future__ import annotations

import copy
import pickle

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import torchshm
from torchshm.data import SharedList

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=3000)
    | st.datetimes()
)
numbers = arrays.arrays(
    st.sampled_from(["f4", "i8", "u1", ">i4", "?"]),
    arrays.array_shapes(max_dims=3, max_side=30),
    elements={"allow_nan": False},
    fill=st.nothing() | st.just(1),
)
objects = st.recursive(
    leaves | numbers,
    lambda x: (
        st.lists(x, max_size=4)
        | st.lists(x, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), x, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    """Equal, arrays in all their values."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


class Lists(RuleBasedStateMachine):
    @initialize(items=st.lists(objects, max_size=5), mode=st.sampled_from("cr"))
    def start(self, items, mode):
        self.ours, self.plain = SharedList(iter(items), mode), copy.deepcopy(items)

    @rule(item=objects)
    def append(self, item):
        if self.ours.sealed:
            self.ours = SharedList(self.ours)
        self.ours.append(item)
        self.plain.append(copy.deepcopy(item))

    @rule(items=st.lists(objects, max_size=40))
    def extend(self, items):
        if not self.ours.sealed:
            self.ours.extend(items)
            self.plain.extend(copy.deepcopy(items))

    @rule()
    def seal(self):
        self.ours.seal()

    @rule(
        start=st.none() | st.integers(-50, 50),
        stop=st.none() | st.integers(-50, 50),
        step=st.sampled_from([None, 1, 2, -1, -3]),
    )
    def slice(self, start, stop, step):
        key = slice(start, stop, step)
        assert same(list(self.ours[key]), self.plain[key])
        if stop is None:
            self.ours, self.plain = self.ours[key], self.plain[key]

    @rule(data=st.data())
    def choose(self, data):
        if self.plain:
            chosen = data.draw(st.lists(st.integers(-len(self.plain), len(self.plain) - 1), max_size=10))
            assert same(list(self.ours[chosen]), [self.plain[i] for i in chosen])
            mask = np.array(
                data.draw(st.lists(st.booleans(), min_size=len(self.plain), max_size=len(self.plain)))
            )
            assert same(list(self.ours[mask]), [x for x, m in zip(self.plain, mask, strict=True) if m])

    @rule(by_handle=st.booleans())
    def send(self, by_handle):
        self.ours = pickle.loads(torchshm.dumps(self.ours) if by_handle else pickle.dumps(self.ours))

    @invariant()
    def equal(self):
        if hasattr(self, "ours"):
            assert len(self.ours) == len(self.plain)
            assert same(list(self.ours), self.plain)
            assert all(same(self.ours[-i - 1], self.plain[-i - 1]) for i in range(min(3, len(self.plain))))


TestLists = Lists.TestCase
TestLists.settings = settings(deadline=None, max_examples=40, stateful_step_count=15)
