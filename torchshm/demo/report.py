"""The table and the JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from torchshm.demo.case import WAYS
from torchshm.demo.result import Result
from torchshm.demo.settings import Settings

TITLES = {
    "numpy": "numpy, climate crops",
    "tensor": "torch, climate crops",
    "xarray": "xarray, climate field",
    "pandas": "pandas, flights",
    "train": "training on numpy",
}

LIBRARIES = ("torchshm", "torch", "numpy", "xarray", "pandas")


def stock_of(result: Result, results: Sequence[Result]) -> Result:
    """The stock result of the same case."""
    return next(other for other in results if other.case == result.case and other.way == "stock")


def table(results: Sequence[Result], settings: Settings) -> Table:
    """The results as a table that fits 80 columns; medians of the rounds."""
    drawn = Table(
        title=f"DataLoader, workers: {settings.workers} by {settings.start_method}, cores: {os.cpu_count()}",
        caption="Medians of interleaved rounds. CPU: parent and workers, for each GB delivered. "
        "Peak PSS: all processes together, shared pages once. Only the training reads the batches.",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    drawn.add_column("batch, and how it is\nhanded over", no_wrap=True)
    for name in ("batches\n/s", "\nMB/s", "times\nstock", "CPU\ns/GB", "peak PSS\nMB"):
        drawn.add_column(name, justify="right", no_wrap=True)
    last = ""
    for result in results:
        if result.case != last:
            if last:
                drawn.add_section()
            drawn.add_row(f"[bold]{TITLES[result.case]}[/], {_digits(result.batch_bytes / 1e6)} MB")
            last = result.case
        speedup = result.speedup(stock_of(result, results))
        drawn.add_row(
            f"  {WAYS[result.way]}",
            _digits(result.batches_per_s),
            _digits(result.mb_per_s),
            _digits(speedup),
            _digits(result.cpu_s_per_gb),
            _digits(result.peak_pss / 1e6),
        )
    return drawn


def _digits(number: float) -> str:
    """Three significant digits, no exponent."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:#.3g}".rstrip(".") if number >= 1e-4 else f"{number:.1g}"


def remarks(results: Sequence[Result]) -> list[str]:
    """What was checked, and what the reader should know before believing the table."""
    said = ["Every way delivered equal batches."]
    steps = max((len(result.losses) for result in results), default=0)
    if steps:
        said.append(f"Every way trained to the same losses, to the last bit, over {steps} steps.")
    for result in results:
        if result.way != "stock" and not result.pooled:
            said.append(f"[yellow]{result.case}, {result.way}: batches did not arrive in the pool.[/]")
        if result.messages:
            said.append(f"[yellow]{result.case}, {result.way} said:[/] {escape(result.messages)}")
    return said


def as_json(results: Sequence[Result], settings: Settings) -> dict[str, Any]:
    """Everything measured, with the machine and the versions it was measured on."""
    return {
        "quantity": "batches through a DataLoader's workers, a second",
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "machine": platform.machine()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "settings": asdict(settings),
        "equal": True,  # a difference ends the demo before this
        "results": [result.as_json(stock_of(result, results)) for result in results],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
