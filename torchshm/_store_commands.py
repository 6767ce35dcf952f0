"""The commands of the command line that are about stores: serve, stop, ls, info, rm.

Exit codes: 0 done; 1 there is no such store or name, or it can't be served; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import enum
import grp
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from torchshm import _C
from torchshm._arguments import whole_path
from torchshm._size import format_size, parse_limit
from torchshm._starting import connect, spill_warning, start
from torchshm._store import Store
from torchshm._store_file import StoreFile, open_file
from torchshm.errors import StoreUnavailableError, TorchshmError

_MOST = 9 * 10**18  # nanoseconds; above, they do not fit
_FILE_MAGIC = b"TRHSFILE"  # csrc/store/file_layout.h
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _stores(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [name for name in _C.store_names() if name.startswith(incomplete)]


def _keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the shell's completion: names in the store that the line has named before."""
    try:
        with connect(ctx.params.get("argument") or "", 0) as store:
            return store.keys(incomplete)[:1000]
    except (TorchshmError, ValueError):
        return []


Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="The store's name.", show_default=False, autocompletion=_stores),
]
NameOrPath = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME|PATH",
        help="The store's name, or a path to its file.",
        show_default=False,
        autocompletion=_stores,
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The store's name.", autocompletion=_stores),
]


class Policy(str, enum.Enum):
    """What may become of a value when room is needed."""

    keep = "keep"
    drop = "drop"
    spill = "spill"
    pin = "pin"


Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]


def _text(error: object) -> str:
    """What is wrong, in a line that does not begin with the name of the program."""
    said: object = error
    if isinstance(error, OSError) and not isinstance(error, TorchshmError):
        said = f"{error.filename}: {error.strerror}" if error.filename else error
    elif isinstance(error, Exception) and error.args:
        said = error.args[0]
    return str(said).removeprefix("torchshm: ")


def _fail(error: object, status: int = 1) -> NoReturn:
    typer.echo(f"torchshm: {_text(error)}", err=True)
    raise typer.Exit(status)


def _one(argument: str | None, option: str | None) -> str:
    if argument and option and argument != option:
        raise typer.BadParameter(f"which store, {argument!r} or {option!r}?")
    name = argument or option
    if name is None:
        raise typer.BadParameter("which store? Give its NAME")
    return name


def _say(as_json: bool, what: Any, text: str) -> None:
    typer.echo(json.dumps(what) if as_json else text)


def _seconds(text: str | None, option: str) -> float | None:
    """Seconds of "90", "90s", "15m", "2h" or "1d", given as this option."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "s")
    try:
        return float(number) * _UNITS[unit]
    except ValueError:
        raise typer.BadParameter(
            f"not a time: {text!r}; write it as 90s, 15m, 2h or 1d", param_hint=option
        ) from None


def _lifetime(text: str | None) -> float | None:
    seconds = _seconds(text, "--ttl")
    if seconds is not None and not 1e-9 <= seconds <= _MOST / 1e9:
        raise typer.BadParameter(f"not a time: {text!r}; write it as 90s, 15m, 2h or 1d", param_hint="--ttl")
    return seconds


def _limit(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_limit(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--limit") from None


def _mode(text: str) -> int:
    if re.fullmatch("[0-7]+", text) is None or int(text, 8) > 0o777:
        raise typer.BadParameter(f"not permissions: {text!r}; write them as 0660", param_hint="--mode")
    return int(text, 8)


def _group(text: str | None) -> int | None:
    """The number of a group that is given by number or name."""
    if text is None:
        return None
    if text.isascii() and text.isdecimal() and int(text) < 1 << 32:
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise typer.BadParameter(f"no group named {text!r}", param_hint="--group") from None


def _spill_directory(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        directory = whole_path(text, "spill", "a directory")
    except ValueError:
        raise typer.BadParameter(
            "not a directory: the name is empty; is a variable not set?", param_hint="--spill"
        ) from None
    if warning := spill_warning(directory):
        typer.echo(f"torchshm: {warning}", err=True)
    return directory


def _status_of(error: Exception) -> int:
    """The exit code when start() has failed: these two are known to be none only there."""
    return 2 if isinstance(error, ValueError) and _text(error).startswith(("hugepages", "numa")) else 1


def _age(seconds: float) -> str:
    for unit, step in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= step:
            return f"{seconds / step:.1f} {unit}"
    return f"{seconds:.0f} s"


def _table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _detach() -> int | None:
    """Go on in a process of its own session. The descriptor to report to, in that process; None in a foreground process."""
    reading, writing = os.pipe()
    if os.fork() > 0:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        # What is said is the pid, or the exit code and why there is none.
        if not said.startswith("{"):
            status, _, why = said.partition(" ")
            typer.echo(f"torchshm: {why or 'the service died while it started'}", err=True)
            os._exit(int(status or 1))
        sys.stdout.write(said)
        sys.stdout.flush()
        os._exit(0)
    os.close(reading)
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return writing


def serve(
    argument: Name = None,
    name: NameOption = None,
    no_fork: Annotated[
        bool, typer.Option("--no-fork", help="Stay in the foreground, until SIGTERM or Ctrl-C.")
    ] = False,
    limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most memory, as in 8GiB or 25%. Default: half of the machine's."),
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long names live, as in 2h. Default: for ever.")
    ] = None,
    mode: Annotated[str, typer.Option(metavar="OCTAL", help="Permissions of the socket.")] = "0600",
    group: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP", help="Its members, by name or number, may use the store; with --mode 0660."
        ),
    ] = None,
    spill: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="On a disk: where values go that do not fit into memory."),
    ] = None,
    spill_sync: Annotated[
        bool,
        typer.Option(
            help="Give memory up when the disk has the file; with --no-spill-sync when the kernel has it, which is faster."
        ),
    ] = True,
    policy: Annotated[
        Policy | None,
        typer.Option(
            help="What may become of values when room is needed: keep (to disk), spill (to disk first), drop (removed), pin (nothing). "
            "Default: keep, or what the store has that is there already.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long savers and loaders wait for room. Default: 10s where it can be made.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Keep the store in this file. Default: in memory."),
    ] = None,
    hugepages: Annotated[
        str,
        typer.Option(
            metavar="auto|never|2MiB", help="Huge pages: transparent ones, none, or those that are reserved."
        ),
    ] = "auto",
    prefault: Annotated[
        bool, typer.Option("--prefault", help="Take the memory up to the limit at the start.")
    ] = False,
    numa: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY", help="Nodes that memory is put on: local, interleave, bind:0,1, preferred:0."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a store, in the background."""
    place = None if file is None else file.expanduser().absolute()
    store_name, size, lifetime, permissions = _one(argument, name), _limit(limit), _lifetime(ttl), _mode(mode)
    members, patience = _group(group), _seconds(timeout, "--timeout")
    if patience is not None and not 0 <= patience <= _MOST / 1e9:
        raise typer.BadParameter(
            f"not a time: {timeout!r}; write it as 0s, 90s or 15m", param_hint="--timeout"
        )
    directory = _spill_directory(spill)
    report = None if no_fork else _detach()
    # From here on a signal ends the service cleanly, and not in the middle of its start.
    ended: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or report is not None:
            signal.signal(number, lambda number, _frame: ended.append(number))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it has been said
            store = start(
                store_name,
                size,
                lifetime,
                mode=permissions,
                group=members,
                spill=directory,
                spill_sync=spill_sync,
                policy=None if policy is None else policy.value,
                timeout=patience,
                file=place,
                hugepages=hugepages,
                prefault=prefault,
                numa=numa,
            )
    except (TorchshmError, ValueError, OSError) as error:
        if report is None:
            _fail(error, _status_of(error))
        os.write(report, f"{_status_of(error)} {_text(error)}".encode())
        os._exit(1)
    core = store._core
    told = {"name": store_name, "pid": os.getpid(), "took_over": core.took_over}
    if report is None:
        _say(as_json, told, f"Serving the store {store_name} as process {os.getpid()}.")
        sys.stdout.flush()
    else:
        os.write(report, (json.dumps(told) + "\n").encode())
        os.close(report)
    try:
        while not ended and not core.wait_stop(200):
            pass
    finally:
        store.close()


def stop(argument: Name = None, name: NameOption = None, as_json: Json = False) -> None:
    """End a store's service. Who uses the store keeps it, and a new service takes it over."""
    store_name = _one(argument, name)
    try:
        pid = _C.store_stop(store_name)["pid"]
        for _ in range(500):  # 10 s
            _C.store_status(store_name)
            time.sleep(0.02)
    except StoreUnavailableError as error:
        if "pid" not in locals():
            _fail(f"no store named {store_name}: {error}")
        # A persistent store's service writes it out before it lets go of the file.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while os.path.exists(_C.store_lock_path(store_name)):
                os.kill(pid, 0)
                time.sleep(0.02)
        _say(as_json, {"name": store_name, "pid": pid}, f"The store {store_name} is not served any more.")
        return
    except ValueError as error:
        _fail(error)
    _fail(
        f"process {pid} goes on serving the store {store_name}: it did not start the service by `torchshm serve`"
    )


def _status(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "running": False}
    try:
        status = _C.store_status(name)
        row |= {
            "running": True,
            "pid": status["pid"],
            "clients": status["clients"],
            "started": status["started"],
        }
        with connect(name, 1) as store:
            figures = store.info()
    except (TorchshmError, ValueError) as error:
        row["why"] = str(error)
        return row
    return row | {key: figures[key] for key in ("names", "live_bytes", "limit_bytes")}


def ls(
    argument: NameOrPath = None,
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Only names that begin with this.")] = "",
    as_json: Json = False,
) -> None:
    """List the stores of this user, or the names in one of them, or in the file of one that nobody serves."""
    if argument is None:
        stores = [_status(each) for each in _C.store_names()]
        if as_json:
            typer.echo(json.dumps(stores))
            return
        rows = [
            [
                s["name"],
                str(s["pid"]),
                str(s["clients"]),
                str(s["names"]),
                format_size(s["live_bytes"]),
                format_size(s["limit_bytes"]),
            ]
            if "names" in s
            else [s["name"], "not served", "", "", "", ""]
            for s in stores
        ]
        _table(["store", "process", "clients", "names", "used", "limit"], rows)
        return
    with _open_any(argument) as store:
        found = []
        for key in store.keys(prefix):
            try:
                found.append({"key": key, **store.info(key)})
            except KeyError:
                pass  # removed meanwhile
    if as_json:
        typer.echo(json.dumps(found))
        return
    now = time.time()
    _table(
        ["name", "kind", "size", "age", "expires in", "saved by"],
        [
            [
                f["key"],
                f["kind"],
                format_size(f["bytes"]),
                _age(now - f["created"]),
                "" if f["expires_in"] is None else _age(f["expires_in"]),
                str(f["pid"]),
            ]
            for f in found
        ],
    )


def info(
    argument: NameOrPath = None,
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A name in it.", show_default=False, autocompletion=_keys),
    ] = None,
    as_json: Json = False,
) -> None:
    """Figures about a store, or about a name in it; also of the file of one that nobody serves."""
    name = _one(argument, None)
    with _open_any(name) as store:
        try:
            figures = store.info(key)
        except KeyError:
            _fail(f"the store {name} has no name {key!r}")
    if as_json:
        typer.echo(json.dumps(figures))
        return
    rows = [
        [f"process {each['pid']} ({each['name']})", format_size(each["held_bytes"])]
        for each in figures.pop("processes", [])
    ]
    _table(
        ["", ""],
        [[k, format_size(v) if k.endswith("bytes") else str(v)] for k, v in figures.items()] + rows,
    )


def rm(
    argument: Annotated[
        str, typer.Argument(metavar="NAME", help="The store's name.", autocompletion=_stores)
    ],
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Names in it.", autocompletion=_keys)],
    as_json: Json = False,
) -> None:
    """Remove names from a store. Who holds the data keeps it."""
    removed, missing = [], []
    with _open(argument) as store:
        for key in keys:
            try:
                store.remove(key)
                removed.append(key)
            except (KeyError, ValueError):
                missing.append(key)
    if as_json:
        typer.echo(json.dumps({"removed": removed, "missing": missing}))
    if missing:
        _fail(f"the store {argument} has no name {', '.join(map(repr, missing))}")


def _open(name: str) -> Store:
    try:
        return connect(name, 0)
    except (TorchshmError, ValueError) as error:
        _fail(error)


def _is_file(argument: str) -> bool:
    """Whether it is no store's name: no name has a slash, and a file has to be a store's."""
    if "/" in argument:
        return True
    if argument in _C.store_names():
        return False
    try:
        with open(argument, "rb") as file:
            return file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    except OSError:
        return False


def _open_any(argument: str) -> Store | StoreFile:
    if not _is_file(argument):
        return _open(argument)
    try:
        return open_file(argument)
    except (TorchshmError, ValueError, OSError) as error:
        _fail(error)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (serve, stop, ls, info, rm):
        app.command()(command)
