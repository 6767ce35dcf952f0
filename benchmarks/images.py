"""Batches of images: a dataset that costs nothing, so that what is timed is the way out of it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from benchmarks.epochs import Epochs
from benchmarks.page import touch_pages
from benchmarks.result import Arm

BATCH = 64
SHAPE = (3, 224, 224)
BATCH_BYTES = BATCH * 3 * 224 * 224 * 4

Array = np.ndarray[Any, Any]


class Images:
    """Every sample is the same float32 image."""

    def __init__(self) -> None:
        self.image = np.random.default_rng(0).random(SHAPE, dtype=np.float32)

    def __len__(self) -> int:
        return BATCH

    def __getitem__(self, index: int) -> Array:
        return self.image


def stack(samples: list[Array]) -> Array:
    """The collate function of numpy users."""
    return np.stack(samples)


def stack_pooled(samples: list[Array]) -> Array:
    """The same with the batch allocated in the pool."""
    import torchshm

    with torchshm.pooled():
        return np.stack(samples)


class ImageLoader:
    """A DataLoader over the images, in one of the variants below."""

    VARIANTS: ClassVar[dict[str, Arm]] = {
        "stock": Arm("stock", "np.stack, nothing registered: the batch is pickled through a pipe"),
        "torchshm": Arm("torchshm", "np.stack after torchshm.register(): one copy into the pool"),
        "torchshm_pooled": Arm(
            "torchshm, collate in pooled()",
            "np.stack inside torchshm.pooled() after torchshm.register(): no copy",
        ),
        "torch_fd": Arm("torch fd", "default_collate to a torch tensor, sharing strategy file_descriptor"),
        "torch_fs": Arm("torch fs", "default_collate to a torch tensor, sharing strategy file_system"),
    }

    def __init__(self, variant: str, workers: int) -> None:
        import torch.multiprocessing
        from torch.utils.data import default_collate

        collate: Any = stack
        if variant.startswith("torchshm"):
            import torchshm

            torchshm.register()
            collate = stack_pooled if variant == "torchshm_pooled" else stack
        if variant.startswith("torch_"):
            collate = default_collate
            strategy = {"torch_fd": "file_descriptor", "torch_fs": "file_system"}[variant]
            torch.multiprocessing.set_sharing_strategy(strategy)
        images = Images()
        self._expected = stack([images.image] * BATCH)
        self._epochs = Epochs(images, collate, self._read, workers=workers, batch_size=BATCH)

    def check(self) -> None:
        """Gets a batch and compares it.

        Raises
        ------
        AssertionError
            It is not what ``np.stack`` gives here.
        """
        if not np.array_equal(np.asarray(self._epochs.first()), self._expected):
            raise AssertionError("the batch arrived damaged")

    def run(self, batches: int) -> tuple[float, float, float]:
        """Seconds, minor faults and processor seconds per batch."""
        return self._epochs.run(batches)

    @staticmethod
    def _read(batch: Any) -> None:
        touch_pages(np.asarray(batch))
