"""Charts, drawn from results alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.report import describe_point
from benchmarks.result import Result
from benchmarks.units import format_bytes, format_quantity, format_seconds

OURS, LIMIT = "#d1495b", "#222222"
THEIRS = ("#30638e", "#00798c", "#edae49", "#8a817c", "#6a4c93", "#9bc53d", "#c9ada7")
OVERVIEW = "overview.png"


def draw(result: Result, folder: Path) -> Path | None:
    """``<name>.png`` of one result: lines where it has sizes, bars otherwise; None without rows."""
    if not result.rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    if "bytes" in (first := set(result.rows[0].at)) and first <= {"bytes", "read"}:
        draw_lines(axes, result)
    else:
        draw_bars(axes, result)
    return _save(figure, folder / f"{result.name}.png")


def draw_overview(results: dict[str, Result], folder: Path) -> Path | None:
    """The README's picture: batches through a DataLoader, and messages by size."""
    message, loader = results.get("message"), results.get("loader_tensors")
    if not message or not loader:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(2, 3))
    images = [row for row in loader.rows if row.at == {"batch": "images"}]
    draw_bars(left, replace(loader, rows=[replace(row, at={}) for row in images]))
    left.set_title("time per batch of 38.5 MB, 2 workers", fontsize=10, loc="left")
    draw_lines(right, message)
    return _save(figure, folder / OVERVIEW)


def draw_lines(axes: Axes, result: Result) -> None:
    """Medians over bytes on two logarithmic axes, with a band between the quartiles."""
    others = cycle(THEIRS)
    for arm in result.arms:
        rows = [row for row in result.rows if row.arm == arm and set(row.at) <= {"bytes", "read"}]
        rows = [row for row in rows if row.at.get("read") != "pages"]
        if not rows:
            continue
        sizes = [row.at["bytes"] for row in rows]
        style = _style(arm, result.arms[arm].label, others)
        axes.plot(
            sizes, [row.sample.median for row in rows], label=result.arms[arm].label, marker=".", **style
        )
        low, high = [row.sample.q1 for row in rows], [row.sample.q3 for row in rows]
        axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
    crossover = result.facts.get("crossover_bytes")
    if crossover:
        axes.axvline(crossover, color=LIMIT, linestyle=":", label=f"crossover, {format_bytes(crossover)}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.at["bytes"] for row in result.rows}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_seconds(seconds)))
    axes.set_title(fill(result.quantity, 44), fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_bars(axes: Axes, result: Result) -> None:
    """One bar a row, the median written at its end."""
    others = cycle(THEIRS)
    colours: dict[str, str] = {}
    for row in result.rows:
        if row.arm not in colours:
            colours[row.arm] = _style(row.arm, result.arms[row.arm].label, others)["color"]
    medians = [row.sample.median for row in result.rows]
    errors = [
        [row.sample.median - row.sample.q1 for row in result.rows],
        [row.sample.q3 - row.sample.median for row in result.rows],
    ]
    places = range(len(medians))
    bars = axes.barh(
        places, medians, xerr=errors, color=[colours[row.arm] for row in result.rows], ecolor="#555555"
    )
    plain = result.unit != "s" and "/" not in result.unit  # a count, or a unit that the title has
    text = "{:,.0f}".format if plain else partial(format_quantity, unit=result.unit)
    axes.bar_label(bars, [text(median) for median in medians], padding=4, fontsize=9)
    names = [
        ", ".join(filter(None, (result.arms[row.arm].label, describe_point(row)))) for row in result.rows
    ]
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    positive = [median for median in medians if median > 0]
    if positive and max(positive) > 50 * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive))  # linear to the smallest: bars begin at zero
    axes.margins(x=0.2)
    if result.unit == "s":
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda seconds, _: format_seconds(seconds) if seconds else "0")
        )
    axes.set_title(fill(result.quantity, 44), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _style(arm: str, label: str, others: Iterator[str]) -> dict[str, Any]:
    if label.startswith("torchshm"):
        return {"color": OURS, "linewidth": 2.4, "linestyle": "-" if arm == "torchshm" else "--"}
    if arm in ("limit", "ring"):
        return {"color": LIMIT, "linewidth": 1.4, "linestyle": ":"}
    return {"color": next(others), "linewidth": 1.3}


def _save(figure: Any, path: Path) -> Path:
    # No date or version in the file: the same results give the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path
