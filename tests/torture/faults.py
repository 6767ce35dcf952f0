"""Plants each mistake of ``faults/*.patch`` in a copy of the sources and shows which layer of the tests catches it.

A patch begins with one line that says what the mistake is, and is against ``csrc``. Layers are tried from the cheapest to the dearest
until one notices; ``--every-layer`` tries all of them on all mistakes. A mistake that no layer catches, a patch that does not apply any
more and a layer that fails without any mistake are errors.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from result_file import ResultFile
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "tests/torture/faults"


@dataclass(frozen=True)
class Layer:
    """A program that fails, crashes or hangs when it notices something. Built by CMake, but for Relacy, which needs one source only."""

    name: str
    target: str
    arguments: tuple[str, ...] = ()
    seconds: float = 600.0  # a hang, after that


# From the cheapest to the dearest.
LAYERS = [
    Layer("relacy", "", ("--quiet", "--small")),
    # Each in a process of its own, by ctest.
    Layer("tests", "torchshm_tests"),
    Layer("points", "torchshm_points"),
    Layer("store_points", "torchshm_store_points"),
    Layer("step", "torchshm_step"),
]


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    patch: Path


def faults() -> list[Fault]:
    return [Fault(p.stem, p.read_text().splitlines()[0], p) for p in sorted(PATCHES.glob("*.patch"))]


def copy_sources(tree: Path) -> None:
    """Makes the tree equal to the sources, and leaves alone what is: the build then compiles only what differs."""
    wanted = [ROOT / "CMakeLists.txt"]
    wanted += [
        p
        for folder in ("csrc", "tests/cpp", "tests/torture")
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
    ]
    for source in wanted:
        target = tree / source.relative_to(ROOT)
        content = source.read_bytes()
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def plant(fault: Fault, tree: Path) -> None:
    """Applies a patch, without any tolerance for what has moved: it must still be the mistake that it was."""
    command = [
        "patch",
        "-p1",
        "--fuzz=0",
        "--force",
        "--silent",
        "--no-backup-if-mismatch",
        "-i",
        str(fault.patch),
    ]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{fault.patch.name} does not apply any more:\n{done.stdout}{done.stderr}")


def compiler() -> list[str]:
    return [*(["ccache"] if shutil.which("ccache") else []), os.environ.get("CXX", "c++")]


def run(layer: Layer, program: Path, jobs: int) -> str:
    """What the layer says: nothing when it has noticed nothing."""
    command = [str(program), *layer.arguments, "--json", str(program.parent / "results.json")]
    if layer.name == "tests":
        command = ["ctest", "--test-dir", str(program.parent), "--stop-on-failure", "--parallel", str(jobs)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=layer.seconds, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return ""
    return "fails" if done.returncode > 0 else f"dies ({-done.returncode})"


def with_relacy(layer: Layer, fault: Fault | None, work: Path) -> str:
    """Compiles the model over a copy of the core and explores it."""
    tree = work / (fault.name if fault else "none")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    if fault:
        plant(fault, tree)
    model = ROOT / "tests/torture/relacy"
    options = ["-std=c++20", "-O1", "-mcx16", "-w", "-I", str(tree / "csrc"), "-I", str(model)]
    program = tree / "torchshm_relacy"
    subprocess.run([*compiler(), *options, str(model / "relacy.cc"), "-o", str(program)], check=True)
    return run(layer, program, 1)


def with_cmake(
    layers: list[Layer], fault: Fault | None, work: Path, jobs: int, until_caught: bool
) -> dict[str, str]:
    """Builds the layers' programs in one tree that is kept, and runs them."""
    tree, build = work / "tree", work / "build"
    copy_sources(tree)
    if fault:
        plant(fault, tree)
    if not (build / "build.ninja").exists():
        options = [
            "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
            "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -D_GLIBCXX_ASSERTIONS",
        ]
        options += ["-DTORCHSHM_BUILD_TESTS=ON", "-DTORCHSHM_FAILPOINTS=ON", "-DTORCHSHM_BUILD_PYTHON=OFF"]
        subprocess.run(
            ["cmake", "-G", "Ninja", "-S", tree, "-B", build, *options], check=True, capture_output=True
        )
    said: dict[str, str] = {}
    for layer in layers:
        command = ["cmake", "--build", build, "--target", layer.target, "--parallel", str(jobs)]
        subprocess.run(command, check=True, capture_output=True)
        said[layer.name] = run(
            layer, next(p for p in build.rglob(layer.target) if p.is_file() and os.access(p, os.X_OK)), jobs
        )
        if said[layer.name] and until_caught:
            break
    return said


def main(
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Said in the result: all mistakes, through all layers until one notices."
        ),
    ] = False,
    every_layer: Annotated[bool, typer.Option("--every-layer", help="Every layer on every mistake.")] = False,
    check: Annotated[bool, typer.Option(help="Only whether the patches apply.")] = False,
    only: Annotated[str, typer.Option(help="Only mistakes whose name contains this.")] = "",
    layers: Annotated[str, typer.Option(help="Only these layers, with commas between.")] = "",
    jobs: Annotated[int, typer.Option(help="Compilers at a time.")] = 2,
    output: Annotated[Path, typer.Option("--json", help="Where the results go.")] = ROOT
    / "build/torture/faults.json",
) -> None:
    console = Console(width=150)
    begun = time.monotonic()
    chosen = [layer for layer in LAYERS if not layers or layer.name in layers.split(",")]
    planted = [fault for fault in faults() if only in fault.name]
    work = ROOT / "build/faults"
    said: dict[str, dict[str, str]] = {fault.name: {} for fault in planted}
    if check:
        for fault in planted:
            tree = work / "check"
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", tree / "csrc")
            plant(fault, tree)
        console.print(f"{len(planted)} patches apply")
        return

    built = [layer for layer in chosen if layer.target]
    violations: list[str] = []
    if chosen[0].name == "relacy":
        with ThreadPoolExecutor(jobs) as pool:
            everything = [None, *planted]
            for fault, words in zip(
                everything, pool.map(lambda f: with_relacy(chosen[0], f, work), everything), strict=True
            ):
                if fault:
                    said[fault.name]["relacy"] = words
                    console.print(f"{fault.name}: relacy {words or 'notices nothing'}")
                elif words:
                    violations.append(f"relacy {words} without any fault")
    if built:
        for name, words in with_cmake(built, None, work, jobs, False).items():
            if words:
                violations.append(f"{name} {words} without any fault")
        for fault in planted:
            if every_layer or not any(said[fault.name].values()):
                said[fault.name] |= with_cmake(built, fault, work, jobs, not every_layer)
                console.print(f"{fault.name}: {said[fault.name]}")

    table = Table(
        "fault", *(layer.name for layer in chosen), "what it is", title="planted mistakes and who notices"
    )
    for fault in planted:
        words = said[fault.name]
        cells = [words[x.name] or "-" if x.name in words else "" for x in chosen]
        table.add_row(fault.name if any(words.values()) else f"[red]{fault.name}", *cells, fault.what)
    console.print(table)
    violations += [f"{name} is caught by nobody" for name, words in said.items() if not any(words.values())]
    for violation in violations:
        console.print(f"[red]{violation}")
    figures: dict[str, object] = {
        "faults": len(planted),
        "caught": sum(any(w.values()) for w in said.values()),
    }
    figures |= {name: ", ".join(x for x, words in found.items() if words) for name, found in said.items()}
    whole = full and not (only or layers)
    ResultFile("faults", None, whole, time.monotonic() - begun, figures, violations).write(output)
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    typer.run(main)
