"""What `explain` says."""

from __future__ import annotations

from typing import Any

from torchshm._size import format_size
from torchshm.data.blocks._job import Job


def describe_plan(job: Job) -> str:
    lines = [
        f"{job.workers} workers, {format_size(job.memory)} of memory, blocks of about {format_size(job.target)}"
    ]
    for number, stage in enumerate(job.stages):
        after = (
            f", after {' and '.join(map(str, stage.inputs))}"
            if stage.inputs and stage.inputs != [number - 1]
            else ""
        )
        lines.append(f"stage {number}: {stage.label}{after}")
    return "\n".join(lines)


def describe_run(statistics: dict[str, Any]) -> str:
    head = ["stage", "tasks", "blocks", "rows", "bytes", "seconds", "again"]
    rows = [
        [
            str(number),
            f"{stage['tasks']:,}",
            f"{stage['blocks']:,}",
            f"{stage['rows']:,}",
            format_size(stage["nbytes"]),
            f"{stage['seconds']:.2f}",
            str(stage["retries"]),
        ]
        for number, stage in enumerate(statistics["stages"])
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]
    return "\n".join(
        [
            *table,
            f"{statistics['seconds']:.2f} s; blocks of {format_size(statistics['most'])} at most, in memory and on disk, "
            f"of which {format_size(statistics['limit'])} may be in memory; "
            f"{statistics['spills']:,} spilled, {statistics['restores']:,} read back",
        ]
    )
