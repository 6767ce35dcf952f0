"""Lines on stderr that say how far each stage is while a plan runs.

The executor saves its statistics in the store; a thread of the process that iterates reads and draws them. rich is imported only then.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torchshm._size import format_size
from torchshm.data.blocks._home import client
from torchshm.errors import TorchshmError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from torchshm.data.blocks._job import Job
    from torchshm.data.blocks._plan import Stage

Statistics = dict[str, Any]

_LOOK = 0.2  # s between looks; the executor speaks as often
_CONNECT = 5.0  # s
_WIDTH = 12  # of a bar, in characters
_LOG_WIDTH = 120  # where there is no terminal


def _plain_output() -> None:
    """rich draws around what is printed. A forked child would do so too, and wait for a lock that a thread of its parent had."""
    for name in ("stdout", "stderr"):
        proxied = getattr(getattr(sys, name), "rich_proxied_file", None)
        if proxied is not None:
            setattr(sys, name, proxied)


os.register_at_fork(after_in_child=_plain_output)


def shares(stages: Sequence[Stage], statistics: Statistics) -> list[float | None]:
    """How much of each stage is done, from 0 to 1; None where that is not known.

    A source knows its tasks. What follows knows its rows when what comes before it has made all of them.
    """
    done = statistics["stages"]
    found: list[float | None] = []
    rows: list[int] = []  # that each stage hands on
    for stage, each in zip(stages, done, strict=True):
        share = None
        rows.append(each["rows"])
        if stage.source is not None:
            tasks = each.get("total")
            if tasks == 0:
                share = 1.0
            elif tasks is not None and (tasks > 1 or each["tasks"]):  # a single task says nothing on its way
                share = each["tasks"] / tasks
        elif stage.kind == "repeat":  # passes on what comes
            share, rows[-1] = found[stage.inputs[0]], rows[stage.inputs[0]]
        elif all(found[before] == 1 for before in stage.inputs):
            total = rows[stage.inputs[0]]
            if not stage.steps:
                share = each["rows"] / total if total else 1.0
            elif stage.kind != "shuffle" or stage.window is not None:  # else some go in twice
                share = each["rows_in"] / total if total else 1.0
        found.append(None if share is None else min(share, 1.0))
    return found


class Rates:
    """Rows a second of each stage, while it was at work."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float, int]] = []  # when it began, when rows came last, and how many

    def update(self, statistics: Statistics) -> list[float]:
        """Rates up to these statistics, which are later than those before."""
        now = statistics["seconds"]
        rows = [stage["rows"] for stage in statistics["stages"]]
        self._seen = self._seen or [(0.0, 0.0, 0)] * len(rows)
        for i, count in enumerate(rows):
            begun, _, before = self._seen[i]
            if count == 0:
                self._seen[i] = now, now, 0
            elif count != before:
                self._seen[i] = begun, now, count
        return [count / (last - begun) if last > begun else 0.0 for begun, last, count in self._seen]


class _Lines:
    """Draws on a console until it is stopped."""

    def __init__(self, job: Job, console: Console) -> None:
        from rich.live import Live

        self._job, self._owner = job, os.getpid()
        self._statistics: Statistics | None = None
        self._last: Statistics | None = None
        self._rates = Rates()
        self._live = Live(get_renderable=self._picture, console=console, auto_refresh=False)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="torchshm-progress", daemon=True)

    def start(self) -> None:
        self._live.start()
        self._thread.start()
        atexit.register(self.stop)  # an iterator that is never closed; the terminal has no cursor till then

    def tell(self, statistics: Statistics | None) -> None:
        """The last word: the consumer has it from elsewhere, and the store may not."""
        self._last = statistics

    def stop(self) -> None:
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        self._end.set()
        # An iterator that was forgotten may be collected in that thread.
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._statistics = self._last or self._statistics
        self._live.stop()
        if not self._live.console.is_terminal:  # there rich ends the line itself
            self._live.console.line()

    def _draw(self) -> None:
        store = client(self._job.store, _CONNECT)
        while not self._end.wait(_LOOK):
            with contextlib.suppress(KeyError, TorchshmError):
                self._statistics = store.load(self._job.prefix + "statistics")
            self._live.refresh()

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        statistics = self._statistics
        if statistics is None:
            return Text("the workers begin")
        done = shares(self._job.stages, statistics)
        table = Table.grid(padding=(0, 2))
        table.add_column()  # this one alone gets narrower with the terminal
        for _ in range(5):
            table.add_column(justify="right", no_wrap=True)
        rates = self._rates.update(statistics)
        for stage, each, share, rate in zip(self._job.stages, statistics["stages"], done, rates, strict=True):
            if stage.kind == "repeat":  # has nothing to do itself
                continue
            bar = ProgressBar(
                total=None if share is None else 1.0,
                completed=share or 0.0,
                width=_WIDTH,
                pulse=share is None,
            )
            table.add_row(
                Text(stage.label, no_wrap=True, overflow="ellipsis"),
                bar,
                "" if share is None else f"{int(share * 100)} %",
                f"{each['rows']:,} rows",
                format_size(each["nbytes"]),
                f"{rate:,.0f} rows/s",
            )
        foot = (
            f"{statistics['seconds']:.1f} s, {format_size(statistics['limit'])} for blocks, "
            f"{statistics['spills']:,} spilled, {statistics['restores']:,} read back"
        )
        return Group(table, Text(foot))


def _console(wanted: bool | None) -> Console | None:
    """Where to draw; None: nowhere."""
    if wanted is None and os.environ.get("TORCHSHM_PROGRESS", "0") in ("", "0"):
        return None
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        return None
    try:
        from rich.console import Console
    except ImportError:
        raise ImportError("progress needs rich: pip install 'torchshm[cli]'") from None
    if sys.stderr.isatty() and not Console(stderr=True).is_jupyter:  # a notebook says that it is one
        return Console(stderr=True)
    if wanted is None:
        return None
    return Console(stderr=True, force_jupyter=False, force_terminal=False, width=_LOG_WIDTH)


@contextlib.contextmanager
def shown(wanted: bool | None, job: Job) -> Iterator[Callable[[Statistics | None], None]]:
    """Draw the progress of an execution meanwhile, if it is wanted. What it gives takes the last statistics.

    Parameters
    ----------
    wanted : bool, optional
        Default: what the environment's ``TORCHSHM_PROGRESS`` says, and only on a terminal.
    job : Job

    Raises
    ------
    ImportError
        When it is wanted and there is no rich.
    """
    console = _console(wanted)
    if console is None:
        yield lambda statistics: None
        return
    lines = _Lines(job, console)
    lines.start()
    try:
        yield lines.tell
    finally:
        lines.stop()
