"""Progress: a bar where there is a terminal, a line per step where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

# A log gets no more than one line in this many seconds; the last step of a bar always gets one.
INTERVAL = 2.0


class Progress:
    """Context that shows bars on `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Bars | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", justify="left"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bars = Bars(*columns, console=console, transient=True)
        self._start = self._last = time.monotonic()

    def bar(self, title: str, total: int) -> Callable[..., None]:
        """Add a bar of `total` steps; what is returned counts one and may be given the name of that step."""
        if self._bars is not None:
            bars = self._bars
            task = bars.add_task(title, total=total)

            def advance(step: str = title) -> None:
                bars.update(task, advance=1, description=step)

            return advance

        done = 0

        def log(step: str = title) -> None:
            nonlocal done
            done += 1
            now = time.monotonic()
            if done == total or now - self._last >= INTERVAL:
                self._last = now
                self.console.print(f"{now - self._start:6.1f} s  {done}/{total}  {step}", highlight=False)

        return log

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
