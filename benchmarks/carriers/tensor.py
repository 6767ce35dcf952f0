"""torch tensors through torch.multiprocessing's reducers."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, ClassVar

from benchmarks.carriers.carrier import Bytes, Carrier


class _Tensor(Carrier):
    package: ClassVar[str | None] = "torch"
    strategy: ClassVar[str]

    def open(self, bytes_in_flight: int) -> None:
        import torch.multiprocessing

        torch.multiprocessing.set_sharing_strategy(self.strategy)
        self._from_numpy = torch.from_numpy

    def send(self, link: Connection) -> None:
        # A new tensor each time: sending moves a tensor's storage to shared memory for good, and
        # the second message with the same one would carry nothing.
        link.send(self._from_numpy(self.source))

    def view(self, received: Any) -> Bytes:
        return received.numpy()


class FileDescriptorTensor(_Tensor):
    """torch's default on Linux."""

    label: ClassVar[str] = "torch fd"
    how: ClassVar[str] = "a torch tensor, sharing strategy file_descriptor"
    strategy: ClassVar[str] = "file_descriptor"


class FileSystemTensor(_Tensor):
    """torch's way around its own use of descriptors."""

    label: ClassVar[str] = "torch fs"
    how: ClassVar[str] = "a torch tensor, sharing strategy file_system"
    strategy: ClassVar[str] = "file_system"
