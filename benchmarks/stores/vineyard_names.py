"""Vineyard's names: vineyardd with its metadata in its own memory, which is its quickest way; etcd is not needed."""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.stores.named_store import Bytes, NamedStore

SECONDS_TO_START = 20.0


class VineyardNames(NamedStore):
    """put + put_name, and get_name + get over vineyardd's socket."""

    label: ClassVar[str] = "Vineyard"
    how: ClassVar[str] = "put + put_name, and get_name + get (vineyardd --meta local)"
    package: ClassVar[str | None] = "vineyard"
    _daemon: subprocess.Popen[bytes] | None = None

    def serve(self, capacity: int) -> str:
        spec = importlib.util.find_spec("vineyard")
        assert spec is not None
        assert spec.origin is not None
        executable = Path(spec.origin).parent / "bdist" / "vineyardd"
        if not executable.exists():
            raise RuntimeError(f"vineyard-bdist is not installed: there is no {executable}")
        self._folder = tempfile.TemporaryDirectory(prefix="vineyard-")
        address = f"{self._folder.name}/socket"
        options = ["-meta", "local", "-rpc=false", "-size", str(capacity), "-socket", address]
        with open(f"{self._folder.name}/log", "wb") as log:
            self._daemon = subprocess.Popen([executable, *options], stdout=log, stderr=log)
        deadline = time.monotonic() + SECONDS_TO_START
        while not Path(address).exists():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("vineyardd: " + Path(f"{self._folder.name}/log").read_text()[-400:])
            time.sleep(0.05)
        self.attach(address)
        return address

    def attach(self, address: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vineyard
        self._client = vineyard.connect(address)

    def save(self, key: str, array: Bytes) -> None:
        self._client.put(array, name=key, persist=True)

    def load(self, key: str) -> Bytes:
        return self._client.get(self._client.get_name(key))

    def remove(self, key: str) -> None:
        saved = self._client.get_name(key)
        self._client.drop_name(key)
        self._client.delete(saved, deep=True)

    def close(self) -> None:
        self._client.close()
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait()
            self._folder.cleanup()
