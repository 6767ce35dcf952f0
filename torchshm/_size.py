"""Sizes and times as people write them."""

from __future__ import annotations

import math
import numbers
import operator
import re
from typing import Any

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}
_MOST = 9 * 10**18  # above, they do not fit
_UNKNOWN = 1 << 63  # the system tells of no memory


def parse_size(text: str | float) -> int:
    """Bytes of a size such as ``"256MiB"``, ``"8 GB"`` or ``4096``; of a number what is behind its point is cut off.

    Raises
    ------
    ValueError
        For other texts, and for numbers that are none.
    TypeError
        For other types, and for truth values.
    """
    given: Any = text
    if isinstance(given, bool) or not isinstance(given, (str, numbers.Real)):
        raise TypeError(f"not a size: {given!r}; write it as 256MiB, 8GB or a number of bytes")
    if isinstance(given, numbers.Integral):
        return operator.index(given)
    if isinstance(given, numbers.Real):
        if not math.isfinite(given):
            raise ValueError(f"not a size: {given!r}; write it as 256MiB, 8GB or a number of bytes")
        return int(float(given))
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", given, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"not a size: {text!r}; write it as 256MiB, 8GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_limit(text: str | float) -> int:
    """Bytes of a limit: a size, 1 byte or more, or a share of what the machine or its cgroup allows, such as ``"25%"``.

    Raises
    ------
    ValueError
        For anything else, and for a share of 0 or of more than 100 %.
    TypeError
        For other types, and for truth values.
    """
    match = isinstance(text, str) and re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match:
        return _share(text, float(match[1]))
    try:
        size = parse_size(text)
    except ValueError:
        size = 0
    if not 1 <= size <= _MOST:
        raise ValueError(
            f"not a size for a limit: {text!r}; write it as 256MiB, 8GB, a number of bytes, or 25%"
        )
    return size


FOREVER = (1 << 63) - 1  # ns


def nanoseconds(seconds: float) -> int:
    """A time that the core has told, as it takes one."""
    return min(round(seconds * 1e9), FOREVER)


def parse_seconds(seconds: Any, what: str) -> float:
    """A number of seconds; `what` is the parameter that it was given as. Without end is -1.

    Raises
    ------
    TypeError
        For what is no number, such as ``"1s"``.
    ValueError
        For NaN.
    """
    if isinstance(seconds, (str, bytes)) or not hasattr(seconds, "__float__"):
        raise TypeError(f"{what} is a number of seconds, not {seconds!r}")
    number = float(seconds)
    if math.isnan(number):
        raise ValueError(f"{what} is a number of seconds, not {seconds!r}")
    return -1.0 if number == math.inf else number


def _share(text: object, percent: float) -> int:
    from torchshm import _C

    if not 0 < percent <= 100:
        raise ValueError(f"not a share: {text!r}; it is more than 0 % and at most 100 %, as in 25%")
    allowed = _C.memory_allowed()
    if allowed >= _UNKNOWN:
        raise ValueError(
            f"no limit can be made of {text!r}: this system does not tell how much memory it has; write it as 8GB"
        )
    return max(1, int(allowed * percent / 100))


def format_size(nbytes: float) -> str:
    """Bytes for a reader, as in ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
