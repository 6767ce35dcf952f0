"""Quantities as people read them: bytes and seconds."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def format_bytes(count: float) -> str:
    """Bytes in binary units: ``65536`` is ``"64 KiB"``."""
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds to three significant digits: ``0.00042`` is ``"420 us"``."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def format_quantity(value: float, unit: str) -> str:
    """`value` in `unit`, where seconds choose their own prefix and "x" is a ratio."""
    if unit == "s":
        return format_seconds(value)
    if unit == "x":
        return f"{_three_digits(value)}x"
    return f"{_three_digits(value)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
