"""The picture: speed, CPU, memory, and the losses of the trained model in every way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter

from torchshm.demo.case import WAYS
from torchshm.demo.report import TITLES, stock_of
from torchshm.demo.result import Result
from torchshm.demo.settings import Settings

COLOURS = {"stock": "#9aa0a6", "register": "#7fb3e0", "pooled": "#1f6fb5", "share": "#123a6b"}

# Curves that coincide hide each other: each way is drawn thinner than the one before.
WIDTHS = {"stock": 9, "register": 5, "pooled": 1.5}


def draw(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """Save the picture of `results` as a PNG at `path`, whose folder must exist."""
    figure = Figure(figsize=(13, 8), layout="constrained")  # without pyplot, which would pick a backend
    (speed, cpu), (memory, losses) = figure.subplots(2, 2)
    factors = [f"{result.speedup(stock_of(result, results)):.3g}x" for result in results]
    _bars(speed, results, [result.mb_per_s for result in results], factors)
    speed.set(title="MB/s delivered, and times stock (log scale)")
    _logarithmic(speed)
    _bars(cpu, results, [result.cpu_s_per_gb for result in results])
    cpu.set(title="CPU seconds a GB, workers and parent (log scale)")
    _logarithmic(cpu)
    _bars(memory, results, [result.peak_pss / 1e6 for result in results])
    memory.set(title="peak PSS of all processes, MB")
    _curves(losses, [result for result in results if result.losses])
    losses.set(title="training: the same losses, to the last bit", xlabel="step", ylabel="loss")
    seen = dict.fromkeys(result.way for result in results)
    patches = [Rectangle((0, 0), 1, 1, color=COLOURS[way]) for way in seen]
    figure.legend(
        patches, [WAYS[way] for way in seen], loc="outside upper center", ncols=len(seen), frameon=False
    )
    figure.supxlabel(
        f"torch DataLoader, workers: {settings.workers} by {settings.start_method}; "
        f"medians over {settings.rounds} interleaved round{'s' * (settings.rounds > 1)}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110, format="png")


def _bars(axes: Axes, results: Sequence[Result], values: Sequence[float], notes: Sequence[str] = ()) -> None:
    """One bar per result, a gap between the cases, `notes` over the bars."""
    places: list[int] = []
    for number, result in enumerate(results):
        new_case = number > 0 and result.case != results[number - 1].case
        places.append(places[-1] + 1 + new_case if places else 0)
    bars = axes.bar(places, values, width=0.9, color=[COLOURS[result.way] for result in results])
    if notes:
        axes.bar_label(bars, notes, fontsize=8)
    middles: dict[str, list[int]] = {}
    for place, result in zip(places, results, strict=True):
        middles.setdefault(result.case, []).append(place)
    axes.set_xticks(
        [sum(own) / len(own) for own in middles.values()],
        [TITLES[case].replace(", ", ",\n") for case in middles],
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)


def _logarithmic(axes: Axes) -> None:
    """From the decade below the smallest bar, so that no bar vanishes, with plain numbers."""
    smallest = min(bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle))
    largest = axes.get_ylim()[1]
    axes.set_yscale("log")
    axes.set_ylim(10 ** math.floor(math.log10(smallest / 2)), largest * 1.5)
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curves(axes: Axes, results: Sequence[Result]) -> None:
    for result in results:
        steps = range(1, len(result.losses) + 1)
        axes.plot(steps, result.losses, color=COLOURS[result.way], linewidth=WIDTHS[result.way])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
