"""The command line of the benchmarks."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.benchmark import Benchmark
from benchmarks.catalog import BENCHMARKS
from benchmarks.machine import describe_machine, describe_versions
from benchmarks.meter import Meter
from benchmarks.report import print_result
from benchmarks.result import Result

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

app = typer.Typer(add_completion=False)


@app.command()
def run(
    only: Annotated[list[str] | None, typer.Option(help="Run this one (may be given again).")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look in a minute: not written to the README.")
    ] = False,
    list_names: Annotated[bool, typer.Option("--list", help="Name the benchmarks and end.")] = False,
    readme: Annotated[
        bool, typer.Option("--readme", help="Only redraw and rewrite from the stored JSON.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where a figure is not met.")] = False,
) -> None:
    """Measures torchshm and its opponents; writes JSON, charts, and the README's tables and picture."""
    console = Console()
    if list_names:
        for benchmark in BENCHMARKS.values():
            console.print(f"{benchmark.name:18}{benchmark.summary}", highlight=False)
        return
    folder = RESULTS / "quick" if quick else RESULTS
    unmet = 0
    if not readme:
        for benchmark in _chosen(only):
            result = measure(benchmark, quick, console)
            result.write(folder)
            print_result(console, result)
            unmet += sum(figure.met is not True for figure in result.figures)
    publish(folder, console, rewrite_readme=not quick)
    if strict and unmet:
        console.print(f"{unmet} figures were not met or not measured")
        raise typer.Exit(1)


def measure(benchmark: Benchmark, quick: bool, console: Console) -> Result:
    """Runs `benchmark` under its progress bar; the result says when, where and how long."""
    machine, date = describe_machine(), datetime.datetime.now(datetime.timezone.utc)
    begin = time.perf_counter()
    with Meter(console, benchmark.name) as meter:
        result = benchmark.measure(quick, meter)
    result.seconds = round(time.perf_counter() - begin, 1)
    result.machine, result.versions = machine, describe_versions()
    result.date = date.isoformat(timespec="seconds")
    return result


def publish(folder: Path, console: Console, rewrite_readme: bool) -> None:
    """Draws every stored result again, and writes the README's part from them."""
    # matplotlib takes a second to import, and the measurements should not have it in memory.
    from benchmarks.chart import draw, draw_overview
    from benchmarks.readme import rewrite

    stored = {name: folder / f"{name}.json" for name in BENCHMARKS}
    results = {name: Result.read(path) for name, path in stored.items() if path.exists()}
    for result in results.values():
        draw(result, folder)
    draw_overview(results, folder)
    console.print(f"results in {folder}")
    if rewrite_readme and not rewrite(ROOT / "README.md", results, folder):
        console.print("README.md has no benchmark markers: not rewritten")


def _chosen(only: list[str] | None) -> list[Benchmark]:
    unknown = [name for name in only or () if name not in BENCHMARKS]
    if unknown:
        raise typer.BadParameter(
            f"no benchmark named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}"
        )
    return [BENCHMARKS[name] for name in only or BENCHMARKS]
