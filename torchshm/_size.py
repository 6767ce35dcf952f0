"""Sizes as people write them."""

from __future__ import annotations

import re

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


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``"256MiB"``, ``"8 GB"`` or ``4096``.

    Raises
    ------
    ValueError
        For anything else.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"not a size: {text!r}; write it as 256MiB, 8GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])
