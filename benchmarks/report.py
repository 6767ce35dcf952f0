"""A result on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.result import Result, Row
from benchmarks.units import format_bytes, format_quantity


def print_result(console: Console, result: Result) -> None:
    """The rows, the facts that are single values, what was left out, and the figures."""
    console.print(f"\n[bold]{result.name}[/]: {result.quantity} ({result.seconds:.0f} s)", highlight=False)
    table = Table()
    points = list(dict.fromkeys(describe_point(row) for row in result.rows))
    table.add_column("arm")
    for point in points:
        table.add_column(point or "median", justify="right")
    for arm in dict.fromkeys(row.arm for row in result.rows):
        cells = {
            describe_point(row): describe_sample(row, result.unit) for row in result.rows if row.arm == arm
        }
        table.add_row(result.arms[arm].label, *(cells.get(point, "") for point in points))
    if result.rows:
        console.print(table)
    for name, value in result.facts.items():
        if not isinstance(value, dict):
            console.print(f"  {name}: {value}")
    for arm, reason in result.not_available.items():
        console.print(f"  [yellow]left out[/] {arm}: {reason}", highlight=False)
    for figure in result.figures:
        mark = {True: "[green]met[/]    ", False: "[red]not met[/]", None: "[yellow]not run[/]"}[figure.met]
        note = f" ({figure.note})" if figure.note else ""
        console.print(
            f"  {mark} {figure.claim}: {figure.measured_text}, target {figure.target_text}{note}",
            highlight=False,
        )


def describe_point(row: Row) -> str:
    """Where `row` was measured, as a column's head."""
    return ", ".join(
        _describe(key, value) for key, value in row.at.items() if (key, value) != ("read", "nothing")
    )


def describe_sample(row: Row, unit: str) -> str:
    """The median, and half the distance of the quartiles in per cent where there is one."""
    sample = row.sample
    text = format_quantity(sample.median, unit) if unit != "count" else f"{sample.median:,.0f}"
    spread = (sample.q3 - sample.q1) / 2 / sample.median if sample.median else 0
    return f"{text} ±{spread:.0%}" if sample.rounds > 1 else text


def _describe(key: str, value: object) -> str:
    if key == "bytes" and isinstance(value, int):
        return format_bytes(value)
    return f"{value:,} {key}" if isinstance(value, int) else f"{value} {key}" if key == "read" else str(value)
