"""What is to be done, and how it is divided: nodes as the user wrote them, and the operators that they become.

A :class:`Node` is one call of the user's; nodes are immutable and know what they follow. `lower` makes :class:`Stage` objects of them, in
the order in which data goes through: functions that follow one another are fused into the stage before them, so that a stage is a source
or a place where rows change company, and all functions up to the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torchshm.data.blocks._sources import Source


@dataclass(frozen=True)
class Step:
    """A function of the user's, and what it is called with."""

    kind: str  # map_batches, filter, flat_map
    fn: Callable[..., Any]
    batch_size: int | None = None
    batch_format: str | None = "numpy"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    zero_copy: bool = False

    @property
    def label(self) -> str:
        name = getattr(self.fn, "__name__", None) or type(self.fn).__name__
        return f"{self.kind}({name})"


@dataclass(frozen=True)
class Node:
    """A call of the user's, and what comes before it."""

    before: Node | None


@dataclass(frozen=True)
class Read(Node):
    source: Source


@dataclass(frozen=True)
class Apply(Node):
    step: Step


@dataclass(frozen=True)
class Shuffle(Node):
    seed: int | None
    window: int | None  # bytes; None: all


@dataclass(frozen=True)
class Repartition(Node):
    rows: int | None  # of each block
    blocks: int | None  # in all


@dataclass(frozen=True)
class Repeat(Node):
    times: int | None  # None: without end


@dataclass(frozen=True)
class Window(Node):
    """What follows and needs all rows is done for so many bytes at a time."""

    nbytes: int


@dataclass(frozen=True)
class Zip(Node):
    other: Node


@dataclass
class Stage:
    """A source, or a place where rows change company, and the functions that follow it."""

    kind: str  # read, shuffle, repartition, repeat, zip
    inputs: list[int]
    steps: list[Step] = field(default_factory=list)
    source: Source | None = None
    seed: int | None = None
    window: int | None = None
    rows: int | None = None
    blocks: int | None = None
    times: int | None = 1

    @property
    def label(self) -> str:
        first = {
            "read": lambda: self.source.label if self.source else "read",
            "shuffle": lambda: "shuffle" if self.window is None else "shuffle in windows",
            "zip": lambda: "zip",
            "repartition": lambda: "repartition",
            "repeat": lambda: "repeat",
        }[self.kind]()
        return " -> ".join([first, *(step.label for step in self.steps)])


def nodes_of(last: Node) -> list[Node]:
    """From the source on; what is zipped is its node's own."""
    nodes = []
    node: Node | None = last
    while node is not None:
        nodes.append(node)
        node = node.before
    return nodes[::-1]


def lower(last: Node) -> list[Stage]:
    """The stages, each after its inputs."""
    stages: list[Stage] = []
    _lower(last, stages)
    return stages


def _lower(last: Node, stages: list[Stage]) -> int:
    window: int | None = None
    here = -1

    def add(stage: Stage) -> int:
        stages.append(stage)
        return len(stages) - 1

    for node in nodes_of(last):
        if isinstance(node, Read):
            here = add(Stage("read", [], source=node.source))
        elif isinstance(node, Apply):
            if stages[here].kind == "repeat":  # passes on what comes, and does nothing
                here = add(Stage("repartition", [here]))
            stages[here].steps.append(node.step)
        elif isinstance(node, Shuffle):
            here = add(Stage("shuffle", [here], seed=node.seed, window=node.window or window))
        elif isinstance(node, Repartition):
            here = add(Stage("repartition", [here], rows=node.rows, blocks=node.blocks))
        elif isinstance(node, Repeat):
            here = add(Stage("repeat", [here], times=node.times))
        elif isinstance(node, Window):
            window = node.nbytes
        elif isinstance(node, Zip):
            other = _lower(node.other, stages)
            here = add(Stage("zip", [here, other]))
        else:
            raise TypeError(node)
    return here
