"""The part of the README that is written from results: its tables and its picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.chart import OVERVIEW
from benchmarks.report import describe_point
from benchmarks.result import Result
from benchmarks.units import format_bytes, format_seconds

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def rewrite(readme: Path, results: dict[str, Result], folder: Path) -> bool:
    """Replaces what stands between the markers; False where there is no README with both."""
    if not readme.exists():
        return False
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        return False
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    picture = (folder / OVERVIEW).resolve().relative_to(readme.parent.resolve())
    readme.write_text(f"{before}{BEGIN}\n{compose(results, picture.as_posix())}{END}{after}")
    return True


def compose(results: dict[str, Result], picture: str) -> str:
    """The Markdown between the markers."""
    parts = [_provenance(results)]
    if "message" in results and "loader_tensors" in results:
        parts.append(f"![Time per DataLoader batch, and time per message by size]({picture})")
    if "loader_tensors" in results:
        parts.append(_batches(results["loader_tensors"]))
    if "message" in results:
        parts.append(_messages(results["message"]))
    for name in ("dataloader", "xarray", "pooled_dumps"):
        if name in results and results[name].rows:
            parts.append(_medians(results[name]))
    parts.append(_figures(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _provenance(results: dict[str, Result]) -> str:
    if not results:
        return "Not measured yet: `make bench`."
    dates = sorted(result.date[:10] for result in results.values())
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    machines: dict[str, list[str]] = {}
    for name, result in results.items():
        of = result.machine
        what = f"{of['cores']} cores of {of['cpu']} with {format_bytes(of['memory_bytes'])}"
        machines.setdefault(what, []).append(name)
    most, *others = sorted(machines, key=lambda what: -len(machines[what]))
    also = "".join(f" ({', '.join(machines[what])}: {what})" for what in others)
    software = [f"Linux {_each(result.machine['kernel'] for result in results.values())}"]
    for label, key in (("Python", "python"), ("numpy", "numpy"), ("torch", "torch")):
        software.append(f"{label} {_each(result.versions[key] for result in results.values())}")
    return (
        f"Medians of interleaved rounds, {when}, on {most}{also}, {', '.join(software)}. "
        "`make bench` measures again and rewrites this part."
    )


def _each(versions: Iterable[str]) -> str:
    return " and ".join(sorted(set(versions)))


def _messages(result: Result) -> str:
    arms = [arm for arm in result.arms if any(row.arm == arm for row in result.rows)]
    sizes = dict.fromkeys(row.at["bytes"] for row in result.rows if row.at["read"] == "nothing")
    lines = []
    for size in sizes:
        rows = [result.find(arm, bytes=size, read="nothing") for arm in arms]
        cells = [format_seconds(row.sample.median) if row else "" for row in rows]
        lines.append([format_bytes(size), *cells])
    return _titled(result, ["", *(result.arms[arm].label for arm in arms)], lines)


BATCHES = {  # of loader_tensors
    "images": "a tensor of 64 x 3 x 224 x 224 floats, 38.5 MB",
    "dict": "a dict of 1,000 tensors of 100 bytes",
    "floats": "a tensor of 32 x 16 floats",
}


def _batches(result: Result) -> str:
    arms = [arm for arm in result.arms if arm != "ring"]
    lines = []
    for batch, what in BATCHES.items():
        rows = [result.find(arm, batch=batch) for arm in arms]
        lines.append([what, *(format_seconds(row.sample.median) if row else "" for row in rows)])
    return _titled(result, ["", *(result.arms[arm].label for arm in arms)], lines)


def _medians(result: Result) -> str:
    lines = []
    for row in result.rows:
        what = f"{result.arms[row.arm].how} {describe_point(row)}".strip()
        lines.append([what, format_seconds(row.sample.median)])
    return _titled(result, ["", "median"], lines)


def _titled(result: Result, head: list[str], lines: list[list[str]]) -> str:
    return f"**{result.quantity[0].upper()}{result.quantity[1:]}:**\n\n{_table(head, lines)}"


def _figures(results: dict[str, Result]) -> str:
    lines = [
        [
            result.name,
            f"{figure.claim} ({figure.note})" if figure.note else figure.claim,
            figure.target_text,
            figure.measured_text,
            {True: "yes", False: "**no**", None: ""}[figure.met],
        ]
        for result in results.values()
        for figure in result.figures
    ]
    if not lines:
        return ""
    table = _table(["benchmark", "figure", "target", "measured", "met"], lines)
    return f"<details><summary>All figures and their targets</summary>\n\n{table}\n\n</details>"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])
