"""Node: a dataset at the beginning of a graph of torchdata.nodes."""

from __future__ import annotations

from typing import Any

import torchdata.nodes

from torchshm.data.blocks._torch import IterableDataset


class Node(torchdata.nodes.BaseNode):  # type: ignore[misc]
    """Batches, or rows, of a dataset; from :meth:`Dataset.to_node`. The plan is run when the first one is asked for."""

    def __init__(self, dataset: IterableDataset) -> None:
        super().__init__()
        self._dataset = dataset
        self._items: Any = None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin the next epoch, or go on from a state."""
        super().reset(initial_state)
        self._items = None  # ends an execution that is under way, before the next one begins
        self._items = iter(self._dataset)
        if initial_state is not None:
            self._items.load_state_dict(initial_state)

    def next(self) -> Any:
        """The next batch."""
        return next(self._items)

    def get_state(self) -> dict[str, Any]:
        """Where this epoch is."""
        state: dict[str, Any] = self._items.state_dict()
        return state
