"""ReadingService: DataLoader2's processes, their messages in the pool. Needs torchdata below 0.10, which still has DataLoader2."""

from __future__ import annotations

from typing import Any

from torchdata.dataloader2 import MultiProcessingReadingService

import torchshm
from torchshm import _reducers


class ReadingService(MultiProcessingReadingService):
    """A ``MultiProcessingReadingService`` of torchdata whose workers send through shared memory.

    Calls :func:`torchshm.register` before it starts workers, where that has not been done.
    ``MultiProcessingReadingService`` itself does the same once a program has called it.

    Parameters
    ----------
    *args, **kwargs
        Those of ``MultiProcessingReadingService``.
    """

    def initialize(self, datapipe: Any) -> Any:
        """Start the workers."""
        if self.num_workers > 0 and not _reducers.registered():
            torchshm.register()
        return super().initialize(datapipe)
