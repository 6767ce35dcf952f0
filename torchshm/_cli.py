"""The command line, ``torchshm``."""

from __future__ import annotations

import enum
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    raise SystemExit("torchshm's command line needs typer: pip install 'torchshm[cli]'") from None

from torchshm import _exchange_commands, _metrics, _store_commands, _top

app = typer.Typer(help="Arrays that cross processes through shared memory.", no_args_is_help=True)


class StartMethod(str, enum.Enum):
    """How multiprocessing starts a process."""

    fork = "fork"
    forkserver = "forkserver"
    spawn = "spawn"


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"torchshm {version('torchshm')}")
        except PackageNotFoundError:
            typer.echo("torchshm, not installed")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: does it work? Speeds say nothing.")
    ] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="PATH", dir_okay=False, help="Save all figures as JSON."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="PNG", dir_okay=False, help="Where the picture goes.")
    ] = Path("torchshm-demo.png"),
    workers: Annotated[int, typer.Option(min=1, help="DataLoader workers.")] = 2,
    start_method: Annotated[StartMethod, typer.Option(help="How workers start.")] = StartMethod.fork,
) -> None:
    """Real climate and flight data through DataLoader workers: stock PyTorch against torchshm."""
    from torchshm.demo.libraries import install, missing

    if lacking := missing():
        typer.echo(f"The demo needs {', '.join(lacking)}: {install(lacking)}", err=True)
        raise typer.Exit(1)
    from rich.console import Console
    from rich.markup import escape

    from torchshm.demo import picture, report
    from torchshm.demo.conductor import conduct
    from torchshm.demo.progress import Progress
    from torchshm.demo.result import DemoError
    from torchshm.demo.settings import Settings
    from torchshm.demo.settings import quick as quick_settings

    for path in filter(None, (json_path, output)):
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is not a folder")
    method = start_method.value
    settings = quick_settings(workers, method) if quick else Settings(workers=workers, start_method=method)
    console = Console()
    start = time.monotonic()
    try:
        with Progress(console) as progress:
            results = conduct(settings, progress)
    except DemoError as error:
        Console(stderr=True).print(f"[red]The demo failed.[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
    console.print(report.table(results, settings))
    for line in report.remarks(results):
        console.print(line, highlight=False)
    picture.draw(results, settings, output)
    console.print(f"Picture: {output}", highlight=False, soft_wrap=True)
    if json_path is not None:
        json_path.write_text(json.dumps(report.as_json(results, settings), indent=2) + "\n")
        console.print(f"JSON: {json_path}", highlight=False, soft_wrap=True)
    console.print(f"Done in {time.monotonic() - start:.0f} s.", highlight=False)


def _a_path(context: typer.Context, option: typer.CallbackParam, value: Path | None) -> Path | None:
    if value is not None and str(value).startswith("--"):
        raise typer.BadParameter(
            f"a PATH is to follow, not {str(value)!r}: torchshm {context.info_name} {option.opts[0]} PATH {value}"
        )
    return value


@app.command()
def check(
    pid: Annotated[int | None, typer.Option("--pid", min=1, help="Only the pools of this process.")] = None,
    files: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--files", metavar="CONTROL DATA", help="The two files of a pool, or copies of them."),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option("--catalogue", metavar="FILE", help="With --files: the catalogue of the pool's store."),
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="NAME", help="Only the store of this name.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="PATH",
            callback=_a_path,
            help="The file of a persistent store, served or not: its tables.",
        ),
    ] = None,
    data: Annotated[
        bool,
        typer.Option(
            "--data",
            help="With --file, when nobody uses it: read the values too, and compare them with what store.sync() has recorded.",
        ),
    ] = False,
    repair: Annotated[
        Path | None,
        typer.Option(
            "--repair",
            metavar="PATH",
            callback=_a_path,
            help="Of a persistent store that was in use when the machine went down: keep what is as store.sync() has recorded it.",
        ),
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="With --repair: keep what was saved since, too, as it is.")
    ] = False,
    at_rest: Annotated[
        bool,
        typer.Option(
            "--at-rest", help="No member is inside an operation and the dead were taken back: be exact."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Check the invariants of every pool and store of this user's processes, without joining and while they work.

    They are those of the tables: what values hold is not looked at, but with --data.

    Exit status: 0 when all hold, 1 when one does not, 2 when there is no pool.
    """
    from rich.console import Console

    from torchshm import _check
    from torchshm.errors import StoreUnavailableError

    if sum(choice is not None for choice in (files, pid, store, file, repair)) > 1:
        raise typer.BadParameter("--files, --pid, --store, --file and --repair exclude one another")
    if unverified and repair is None:
        raise typer.BadParameter("--unverified needs --repair")
    if data and file is None:
        raise typer.BadParameter("--data needs --file")
    if catalogue is not None and files is None:
        raise typer.BadParameter("--catalogue needs --files")
    if repair is not None:
        _repair(repair, unverified, as_json)
        return
    try:
        if file is not None:
            pools = [_check.check_file(file, at_rest=at_rest, data=data)]
        elif files is not None:
            pools = [_check.check_files(*files, catalogue, at_rest=at_rest)]
        elif store is not None:
            pools = [_check.check_store(store, at_rest=at_rest)]
        else:
            pools = _check.check_machine(pid, at_rest=at_rest)
    except (StoreUnavailableError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"{error.filename}: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps({"pools": [pool.as_json() for pool in pools]}, indent=2))
    elif pools:
        console = Console()
        console.print(_check.table(pools))
        for line in _check.remarks(pools):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not pools:
        typer.echo(f"No pool found{'' if pid is None else f' in process {pid}'}.", err=True)
        raise typer.Exit(2)
    if not all(pool.sound for pool in pools):
        raise typer.Exit(1)


def _repair(path: Path, unverified: bool, as_json: bool) -> None:
    from torchshm import _persistence
    from torchshm.errors import TorchshmError

    try:
        result = _persistence.repair(path, unverified=unverified)
    except (TorchshmError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"{error.filename}: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    else:
        unsure = f", {len(result.unverified)} unverified" if unverified else ""
        typer.echo(f"{result.path}: {len(result.kept)} names kept{unsure}, {len(result.lost)} lost.")
        for key, why in result.lost.items():
            typer.echo(f"lost {key!r}: {why}")
        typer.echo(f"The file as it was: {result.damaged}")
    if result.lost:
        raise typer.Exit(1)


_store_commands.add_to(app)
app.command()(_top.top)
app.command()(_metrics.metrics)
_exchange_commands.add_to(app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="torchshm")
