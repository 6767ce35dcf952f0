"""Rounds: all arms in turn, again and again, so that a noisy minute hits them alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from benchmarks.remote import RemoteFailed

Arm = TypeVar("Arm")
Value = TypeVar("Value")


def interleave(
    arms: dict[Arm, Callable[[], Value]],
    rounds: int,
    failed: Callable[[Arm, str], None],
    after_round: Callable[[], None] = lambda: None,
) -> dict[Arm, list[Value]]:
    """What each arm returned, one value a round; value i of two arms comes from the same round.

    Each round has an order of its own (the same in every run), so no arm always runs after the
    same other and inherits what that one left in the caches. An arm that fails is reported to
    `failed` and dropped with all its values.
    """
    values: dict[Arm, list[Value]] = {arm: [] for arm in arms}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        turn = list(values)
        shuffle(turn)
        for arm in turn:
            try:
                values[arm].append(arms[arm]())
            except RemoteFailed as error:
                failed(arm, str(error))
                del values[arm]
        after_round()
    return values
