"""Weakens every memory order of the ledger by one step, one at a time, and asks for a scenario that notices.

An order that nobody misses is either not needed, and then does not belong into the code, or needs a scenario. One build serves all
variants: in a copy of the sources each ``std::memory_order_x`` becomes a call that looks up, in the environment, whether it is the
one that is weakened.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))
from result_file import ResultFile

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
SOURCES = ["pair", "mark", "slots", "taking", "ledger_impl", "tickets_impl", "reaper_impl"]
ORDERS = ["relaxed", "consume", "acquire", "release", "acq_rel", "seq_cst"]
ORDER = re.compile(r"std::memory_order_(\w+)")
READS, WRITES = ("load",), ("store",)


@dataclass
class Variant:
    site: int
    where: str
    line: str
    order: str
    weaker: str
    caught_by: str = ""
    seconds: float = 0.0


def weaker(order: str, operation: str) -> list[str]:
    """The orders one step below, for a load, a store or a read-modify-write."""
    if order == "seq_cst":
        return ["acquire" if operation in READS else "release" if operation in WRITES else "acq_rel"]
    if order == "acq_rel":
        return ["acquire", "release"]
    return ["relaxed"] if order in ("acquire", "release") else []


def instrument(target: Path) -> list[Variant]:
    """Copies the core's sources with their orders numbered, and lists what can be weakened."""
    shutil.copytree(ROOT / "csrc", target)
    variants: list[Variant] = []
    site = 0
    for name in SOURCES:
        path = target / "pool" / f"{name}.h"
        text = path.read_text()

        def numbered(match: re.Match[str], text: str = text, name: str = name) -> str:
            nonlocal site
            before = text[: match.start()]
            call = re.findall(r"\.(\w+)\(", before)[-1]
            number = before.count("\n") + 1
            line = text.splitlines()[number - 1].strip()
            site += 1
            for less in weaker(match[1], call):
                variants.append(Variant(site, f"{name}.h:{number}", line, match[1], less))
            return f"::torchshm::order_at({site}, {match[0]})"

        path.write_text(ORDER.sub(numbered, text))
    return variants


def build(work: Path) -> Path:
    program = work / "weakened"
    compiler = ["ccache"] if shutil.which("ccache") else []
    compiler += [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-mcx16", "-w"]
    includes = ["-include", str(HERE / "weaken.h"), "-I", str(work / "csrc"), "-I", str(HERE)]
    subprocess.run([*compiler, *includes, str(HERE / "relacy.cc"), "-o", str(program)], check=True)
    return program


def explore(program: Path, variant: Variant, arguments: list[str]) -> Variant:
    environment = os.environ | {"TORCHSHM_WEAKEN": f"{variant.site}:{ORDERS.index(variant.weaker)}"}
    start = time.monotonic()
    done = subprocess.run(
        [program, "--quiet", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    variant.seconds = time.monotonic() - start
    if done.returncode != 0:
        found = re.search(r"VIOLATION in (\w+)", done.stdout)
        variant.caught_by = found[1] if found else f"exit {done.returncode}"
    return variant


def main(
    full: Annotated[bool, typer.Option(help="Explore each scenario as far as the full form does.")] = False,
    only: Annotated[str, typer.Option(help="Only orders whose place contains this.")] = "",
    small: Annotated[bool, typer.Option(help="The small scenarios only.")] = False,
    jobs: Annotated[int, typer.Option(help="Variants at a time.")] = 2,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = ROOT
    / "build/torture/relacy_orders.json",
) -> None:
    console = Console(width=150)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        variants = [v for v in instrument(work / "csrc") if only in v.where]
        program = build(work)
        with ThreadPoolExecutor(jobs) as pool:
            arguments = ["--full"] if full else ["--small"] if small else []
            for v in pool.map(lambda v: explore(program, v, arguments), variants):
                console.print(
                    f"{v.where} {v.order} -> {v.weaker}: {v.caught_by or 'nobody'} ({v.seconds:.0f} s)"
                )
    table = Table("place", "order", "weaker", "caught by", "s", "line", title="memory orders, each weakened")
    for v in variants:
        table.add_row(
            v.where,
            v.order,
            v.weaker,
            v.caught_by or "[red]nobody",
            f"{v.seconds:.1f}",
            v.line.replace("[", "\\[")[:70],
        )
    console.print(table)
    missed = [f"{v.where}: {v.order} -> {v.weaker} is not caught" for v in variants if not v.caught_by]
    console.print(f"{len(variants)} variants, {len(missed)} not caught")
    figures: dict[str, object] = {"variants": len(variants), "caught": len(variants) - len(missed)}
    figures |= {f"{v.where} {v.order} -> {v.weaker}": v.caught_by for v in variants}
    ResultFile("relacy_orders", None, full, time.monotonic() - begun, figures, missed).write(output)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
