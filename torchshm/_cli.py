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

from torchshm import _store_commands

app = typer.Typer(
    help="Arrays that cross processes through shared memory.", no_args_is_help=True, add_completion=False
)


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


_store_commands.add_to(app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="torchshm")


if __name__ == "__main__":
    main()
