"""The arms of one benchmark: those that can run here, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from benchmarks.availability import missing
from benchmarks.remote import Remote, RemoteFailed
from benchmarks.result import Result
from benchmarks.rounds import interleave


class Arms:
    """Remotes by name; an arm that fails is closed and goes to ``result.not_available``."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self._remotes: dict[str, Remote] = {}

    def start(self, arm: str, packages: tuple[str, ...], target: type, *args: Any) -> None:
        """Starts `arm`, or notes which of its packages is missing."""
        for package in packages:
            reason = missing(package)
            if reason:
                self._result.not_available[arm] = reason
                return
        self._remotes[arm] = Remote(target, *args)

    def __iter__(self):
        return iter(list(self._remotes))

    def __contains__(self, arm: str) -> bool:
        return arm in self._remotes

    def call(self, arm: str, method: str, *args: Any, timeout: float = 180.0) -> Any:
        """The answer, or None from an arm that failed (and is gone from now on)."""
        try:
            return self._remotes[arm].call(method, *args, timeout=timeout)
        except RemoteFailed as error:
            self.fail(arm, str(error))
            return None

    def fail(self, arm: str, reason: str) -> None:
        self._result.not_available[arm] = "failed: " + reason.strip().splitlines()[-1]
        self._result.facts.setdefault("failures", {})[arm] = reason.strip()
        self._remotes.pop(arm).close()

    def rounds(
        self, calls: dict[str, tuple[Any, ...]], rounds: int, after_round: Callable[[], None] = lambda: None
    ) -> dict[str, list[Any]]:
        """`rounds` interleaved answers of each arm to its call (a method and its arguments)."""
        return interleave(
            {arm: partial(self._remotes[arm].call, *call) for arm, call in calls.items()},
            rounds,
            self.fail,
            after_round,
        )

    def __enter__(self) -> Arms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for remote in self._remotes.values():
            remote.close()
