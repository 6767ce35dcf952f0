"""Sizes and durations of a demo."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How large, how long, with which workers.

    Attributes
    ----------
    time_steps : int
        Time steps of the climate field.
    grid : tuple of int
        Latitudes and longitudes the field is interpolated to; ERA5 crops are of this order.
    crop : tuple of int
        Shape of one numpy sample: consecutive time steps, rows, columns.
    batch_size : int
        Samples in one numpy batch.
    flights : int or None
        Rows of the flights frame; None for all 336,776.
    seconds : float
        A timed window lasts at least this long and at least `batches` batches.
    batches : int
        Fewest batches of a timed window.
    rounds : int
        Timed windows per arm; their medians are quoted.
    loss_steps : int
        Training steps whose losses are compared between the arms.
    workers : int
        DataLoader workers.
    start_method : str
        ``"fork"``, ``"forkserver"`` or ``"spawn"``.
    """

    time_steps: int = 100
    grid: tuple[int, int] = (700, 1400)
    crop: tuple[int, int, int] = (3, 224, 224)
    batch_size: int = 64
    flights: int | None = None
    # A compromise: ten or more batches of most arms, and thirteen arms in three rounds stay under two minutes.
    seconds: float = 1.0
    batches: int = 3
    rounds: int = 3
    loss_steps: int = 8
    workers: int = 2
    start_method: str = "fork"


def quick(workers: int, start_method: str) -> Settings:
    """The settings of ``--quick``: every path of the demo, at sizes whose speeds say nothing."""
    return Settings(
        time_steps=12,
        grid=(96, 192),
        crop=(3, 64, 64),
        batch_size=8,
        flights=20_000,
        seconds=0.1,
        batches=2,
        rounds=1,
        loss_steps=4,
        workers=workers,
        start_method=start_method,
    )
