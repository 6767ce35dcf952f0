"""A real transform in DataLoader workers: pictures decoded, cropped, mirrored, resized and normalised.

Quantity: time per batch of 32 float32 images 3x224x224 (19.3 MB) over whole epochs of a DataLoader with two persistent workers. Its
samples are scikit-image's own colour pictures as JPEG in memory, decoded and augmented by Pillow, the same random parts of them in all
arms; the consumer reads one byte of every page. Unit: seconds.
Opponent: PyTorch alone with its strategy file_descriptor.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.epochs import Epochs
from benchmarks.figure import at_most
from benchmarks.loader_tensors import ARMS as LOADERS
from benchmarks.loading import measure_loading
from benchmarks.meter import Meter
from benchmarks.page import touch_pages
from benchmarks.result import Result
from benchmarks.sample import Sample, ratio

NAME = "transforms"
WORKERS, BATCH, SIDE = 2, 32, 224
ARMS = {arm: LOADERS[arm] for arm in ("stock", "register", "loader")}
PICTURES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
MEAN, DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class Pictures:
    """A Dataset; what is random about a sample follows from its index."""

    def __init__(self) -> None:
        import skimage.data
        from PIL import Image

        self._files = []
        for name in PICTURES:
            file = io.BytesIO()
            Image.fromarray(getattr(skimage.data, name)()).save(file, "JPEG", quality=90)
            self._files.append(file.getvalue())

    def __len__(self) -> int:
        return BATCH

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        random = np.random.default_rng(index)
        picture = Image.open(io.BytesIO(self._files[index % len(self._files)])).convert("RGB")
        side = random.uniform(0.5, 1) * min(picture.size)
        left, top = random.uniform(0, picture.width - side), random.uniform(0, picture.height - side)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        values = (pixels.astype(np.float32) / 255 - MEAN) / DEVIATION
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


class TransformLoader:
    """One arm."""

    def __init__(self, arm: str) -> None:
        import torch.multiprocessing

        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        make: Any = None
        if arm != "stock":
            import torchshm

            torchshm.register()
        if arm == "loader":
            import torchshm.data

            make = torchshm.data.DataLoader
        self._pictures = Pictures()
        self._epochs = Epochs(
            self._pictures, None, self._read, workers=WORKERS, batch_size=BATCH, loader=make
        )

    def check(self) -> None:
        """Gets a batch and compares it.

        Raises
        ------
        AssertionError
            It is not what ``torch.stack`` gives here.
        """
        import torch

        if not torch.equal(self._epochs.first(), torch.stack([self._pictures[i] for i in range(BATCH)])):
            raise AssertionError("the batch arrived damaged")

    def run(self, batches: int) -> tuple[float, float, float]:
        """Seconds, minor faults and processor seconds per batch."""
        return self._epochs.run(batches)

    @staticmethod
    def _read(batch: Any) -> None:
        touch_pages(batch.numpy())


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm, epoch by epoch in turn."""
    result = Result(
        NAME,
        f"time per batch of {BATCH} decoded and augmented pictures through a DataLoader with {WORKERS} workers",
        "s",
        ARMS,
        quick=quick,
    )
    with Arms(result) as arms:
        for arm in ARMS:
            packages = ("torch", "skimage", "PIL", *(() if arm == "stock" else ("torchshm",)))
            arms.start(arm, packages, TransformLoader, arm)
        seconds = measure_loading(
            result, arms, meter, epoch_seconds=1.0, rounds=5 if quick else 15, fewest=4 if quick else 16
        )

    def to_stock(arm: str) -> Sample | None:
        return ratio(seconds[arm], seconds["stock"]) if arm in seconds and "stock" in seconds else None

    result.figures = [
        at_most("torchshm.data.DataLoader / stock", 1.05, "x", to_stock("loader")),
        at_most("torchshm.register() / stock", 1.05, "x", to_stock("register")),
    ]
    return result


BENCHMARK = Benchmark(NAME, "decoded and augmented pictures through two DataLoader workers", measure)
