"""The commands of the command line that move data between stores and files: import, export, snapshot.

Exit codes: 0 done; 1 there is no such store, name or file, or it can't be read or written; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from torchshm import _exchange, _snapshot
from torchshm._size import format_size
from torchshm._store_commands import Json, _fail, _keys, _lifetime, _open, _say, _stores
from torchshm.errors import TorchshmError

Store = Annotated[str, typer.Argument(metavar="NAME", help="The store's name.", autocompletion=_stores)]
FilePath = Annotated[
    Path, typer.Argument(metavar="PATH", help="Ends with .safetensors, .npy, .npz, .zarr or .zarr.zip.")
]
Format = Annotated[
    str | None, typer.Option(metavar="SUFFIX", help="What PATH would end with, where it does not.")
]


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int, int], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def tell(name: str, nbytes: int, done: int, of: int) -> None:
            size = f", {format_size(nbytes)}" if nbytes else ""
            progress.update(task, description=f"{what} {escape(name)}{size}", completed=done, total=of)

        yield tell


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Say in a line what is wrong with files, names and values."""
    try:
        yield
    except (OSError, TorchshmError, ValueError, TypeError, ImportError, MemoryError, KeyError) as error:
        _fail(error)


def _checked(path: Path, format: str | None) -> None:
    try:
        _exchange.format_of(path, format)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def import_(
    argument: Store,
    path: FilePath,
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Put before the names in the file.")] = "",
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Save all of it as one value, a dict, of this name.")
    ] = None,
    format: Format = None,
    framework: Annotated[
        str | None, typer.Option(metavar="np|pt", help="Save arrays, or torch's tensors.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long the names live, as in 2h.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="drop, spill, keep or pin: what goes when room is short."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace names that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Save what a file holds into a store."""
    _checked(path, format)
    if framework not in (None, "np", "pt"):
        raise typer.BadParameter(f"--framework is np or pt, not {framework!r}")
    if key is not None and prefix:
        raise typer.BadParameter("--key and --prefix exclude one another")
    lifetime = _lifetime(ttl)
    with _open(argument) as store, _failures(), _progress("Importing") as tell:
        saved = _exchange.import_(
            store,
            path,
            prefix=prefix,
            key=key,
            format=format,
            framework=framework,
            overwrite=overwrite,
            ttl=lifetime,
            policy=policy,
            tell=tell,
        )
    _say(
        as_json,
        {"name": argument, "path": str(path), "keys": saved},
        f"Saved {_names(saved)} into the store {argument}.",
    )


def export(
    argument: Store,
    path: FilePath,
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Names in it. Default: all.", autocompletion=_keys),
    ] = None,
    prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="Only names that begin with this, which is cut off.")
    ] = "",
    format: Format = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at PATH.")] = False,
    as_json: Json = False,
) -> None:
    """Write arrays and tensors of a store into a file."""
    _checked(path, format)
    with _open(argument) as store, _failures():
        missing = [key for key in keys or () if key not in store]
        if missing:
            _fail(f"the store {argument} has no name {', '.join(map(repr, missing))}")
        with _progress("Exporting") as tell:
            written = _exchange.export(
                store, path, keys or None, prefix=prefix, format=format, overwrite=overwrite, tell=tell
            )
    _say(
        as_json, {"name": argument, "path": str(path), "keys": written}, f"Wrote {_names(written)} to {path}."
    )


def snapshot(
    argument: Store,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.", dir_okay=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at PATH.")] = False,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out, and name, values that can't be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write all of a store into a file that can be opened without a service."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with _open(argument) as store, _failures(), _progress("Writing") as tell:
            written = _snapshot.snapshot(
                store, path, overwrite=overwrite, skip_damaged=skip_damaged, tell=tell
            )
    for warning in said:
        typer.echo(f"torchshm: {warning.message}", err=True)
    _say(
        as_json, {"name": argument, "path": str(path), "keys": written}, f"Wrote {_names(written)} to {path}."
    )


def _names(keys: list[Any]) -> str:
    return f"{len(keys)} name{'' if len(keys) == 1 else 's'}"


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("import")(import_)
    app.command()(export)
    app.command()(snapshot)
