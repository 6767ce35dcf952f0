"""``torchshm top``: stores, pools and processes as they change."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchshm import _C
from torchshm._figures import Sample, StoreSample, Watcher, hit_rate, rates
from torchshm._joining import unavailable
from torchshm._size import format_size
from torchshm._store_commands import Name, _fail
from torchshm.errors import StoreUnavailableError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement

_WIDTH = 32  # of a bar, in characters, where there is room
_MOST_PROCESSES = 8  # shown of a store or pool
_COLOURS = {"live": "green", "warm": "cyan", "in messages": "yellow", "spilled": "magenta"}


class _Bar:
    """As wide as there is room for, so that a narrow one tells the same."""

    def __init__(self, kind: str, part: int, limit: int) -> None:
        self._kind, self._part, self._limit = kind, part, limit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        width = min(_WIDTH, options.max_width)
        full = 0 if self._limit <= 0 else min(width, round(width * self._part / self._limit))
        full = max(full, 1 if self._part > 0 else 0)
        yield Text.assemble(("█" * full, _COLOURS[self._kind]), ("░" * (width - full), "dim"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(1, min(_WIDTH, options.max_width))


class _Cropped:
    """What does not fit into a line is cut off: a line that goes on below would push others off the screen."""

    def __init__(self, what: RenderableType) -> None:
        self._what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._what, options.update(no_wrap=True, overflow="ellipsis"))


def _memory(figures: dict[str, Any]) -> RenderableType:
    """Bars of bytes against the limit."""
    from rich.table import Table

    limit = int(figures.get("limit_bytes", 0))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()  # this one alone gets narrower with the terminal
    for _ in range(2):
        grid.add_column(no_wrap=True)
    for kind, key in (
        ("live", "live_bytes"),
        ("warm", "warm_bytes"),
        ("in messages", "ticket_bytes"),
        ("spilled", "spilled_bytes"),
    ):
        part = int(figures.get(key) or 0)
        share = f"{part / limit:4.0%}" if limit > 0 else ""
        grid.add_row(kind, _Bar(kind, part, limit), f"{format_size(part):>10}", share)
    return grid


def _processes(figures: dict[str, Any]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    rows = sorted(figures.get("processes", []), key=lambda row: -int(row["held_bytes"]))
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("pid", justify="right", no_wrap=True)
    table.add_column("process")  # this one alone gets narrower with the terminal
    for column in ("holds", "blocks"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows[:_MOST_PROCESSES]:
        name = Text(row["name"], no_wrap=True, overflow="ellipsis")
        table.add_row(str(row["pid"]), name, format_size(row["held_bytes"]), str(row["held_blocks"]))
    if len(rows) > _MOST_PROCESSES:
        table.add_row("", f"and {len(rows) - _MOST_PROCESSES} more", "", "")
    return table


def _execution(name: str, statistics: dict[str, Any]) -> RenderableType:
    """A plan of torchshm.data.blocks: a line for each of its stages."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = (
        f"execution {name}, {statistics['seconds']:.1f} s: {statistics['spills']:,} spilled, "
        f"{statistics['restores']:,} read back"
    )
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("stage")  # this one alone gets narrower with the terminal
    for column in ("tasks", "rows", "bytes", "seconds", "retries"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in statistics["stages"]:
        table.add_row(
            Text(stage["label"], no_wrap=True, overflow="ellipsis"),
            f"{stage['tasks']:,}",
            f"{stage['rows']:,}",
            format_size(stage["nbytes"]),
            f"{stage['seconds']:.1f}",
            str(stage["retries"]),
        )
    return Group(Text(head), table)


def _rates_in_words(by_second: dict[str, float]) -> str:
    if not by_second:
        return "rates: from the second look on"
    shown = [
        f"{by_second.get(key, 0):,.0f} {word}/s"
        for key, word in (
            ("loads", "loads"),
            ("saved", "saves"),
            ("restores", "restores"),
            ("spills", "spills"),
            ("evictions", "evictions"),
        )
        if key in by_second
    ]
    share = hit_rate(by_second)
    return ", ".join(shown) + ("" if share is None else f", {share:.1%} in memory")


def _store(store: StoreSample, before: StoreSample | None) -> RenderableType:
    from rich.console import Group
    from rich.markup import escape
    from rich.panel import Panel

    title = f"store [bold]{escape(store.name)}[/]"
    if store.figures is None:
        return Panel(escape(store.why), title=title, title_align="left")
    served = f"served by {store.service_pid}" if store.service_pid else "[yellow]nobody serves it[/]"
    head = (
        f"{served}, names: {store.number('names'):,}, blocks: {store.number('blocks'):,}, "
        f"limit {format_size(store.number('limit_bytes'))}"
    )
    lines: list[RenderableType] = [head, _memory(store.figures), _rates_in_words(rates(before, store))]
    if store.number("spilled_names"):
        lines.append(f"{store.number('spilled_names'):,} names on disk")
    if errors := store.number("spill_errors"):
        lines.append(f"[bold red]{errors:,} spill errors[/]")
    lines += [_execution(name, each) for name, each in store.figures.get("executions", {}).items()]
    lines.append(_processes(store.figures))
    return Panel(Group(*lines), title=title, title_align="left")


def draw(now: Sample, before: Sample | None) -> RenderableType:
    """Give the picture of a sample; rates come from the one before."""
    from rich.console import Group
    from rich.panel import Panel

    earlier = {} if before is None else {store.name: store for store in before.stores}
    parts: list[RenderableType] = [_store(store, earlier.get(store.name)) for store in now.stores]
    for pool in now.pools:
        head = f"blocks: {pool.figures['blocks']:,}, limit {format_size(pool.figures['limit_bytes'])}"
        body = Group(head, _memory(pool.figures), _processes(pool.figures))
        parts.append(Panel(body, title=f"pool {pool.pool_id:016x}", title_align="left"))
    if not parts:
        parts.append("No store and no pool of this user. `torchshm serve NAME` starts a store.")
    return Group(*parts)


def as_json(now: Sample, before: Sample | None) -> dict[str, Any]:
    """Give a sample as one object for JSON."""
    earlier = {} if before is None else {store.name: store for store in before.stores}
    stores = []
    for store in now.stores:
        row: dict[str, Any] = {"name": store.name, "service_pid": store.service_pid}
        if store.figures is None:
            row["why"] = store.why
        else:
            by_second = rates(earlier.get(store.name), store)
            row |= {**store.figures, "rates": by_second, "hit_rate": hit_rate(by_second)}
        stores.append(row)
    pools = [{**pool.figures, "pool_id": pool.pool_id} for pool in now.pools]
    return {"time": time.time(), "stores": stores, "pools": pools}


def _end(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _keys() -> Iterator[int | None]:
    """Keys come one by one, without an echo. The descriptor that they come from; None when there is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _rest(fd: int | None, seconds: float) -> bool:
    """Wait. True when q was pressed."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if fd is None:
            time.sleep(left)
        elif select.select([fd], [], [], left)[0]:
            key = os.read(fd, 64)
            if not key or b"q" in key.lower():
                return True
    return False


def _print(picture: RenderableType) -> None:
    from rich.console import Console

    console = Console()
    with console.capture() as captured:  # by itself it ends the program when nobody reads any more
        console.print(picture)
    typer.echo(captured.get(), nl=False)


def _check_there(name: str) -> None:
    """End the program with a message when there is no such store."""
    try:
        _C.store_status(name)
    except StoreUnavailableError as error:
        _fail(unavailable(name, error))
    except ValueError as error:
        _fail(error)


def top(
    argument: Name = None,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="A line of JSON for each look.")] = False,
) -> None:
    """Show stores, their memory, rates and processes, as they change. q or Ctrl-C ends it.

    Where standard output is no terminal, each look is printed below the one before.
    """
    from rich.live import Live

    signal.signal(signal.SIGTERM, _end)
    before: Sample | None = None
    try:
        if once and argument is not None:
            _check_there(argument)
        with Watcher(argument) as watcher:
            if once or json_lines or not sys.stdout.isatty():
                while True:
                    now = watcher.sample()
                    if json_lines:
                        typer.echo(json.dumps(as_json(now, before)))
                    else:
                        _print(draw(now, before))
                    sys.stdout.flush()
                    if once:
                        return
                    before = now
                    time.sleep(interval)
            now = watcher.sample()
            with _keys() as fd, Live(_Cropped(draw(now, None)), screen=True, auto_refresh=False) as live:
                while not _rest(fd, interval):
                    before, now = now, watcher.sample()
                    live.update(_Cropped(draw(now, before)), refresh=True)
    except KeyboardInterrupt:
        return
    except BrokenPipeError:  # whoever read the lines has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
