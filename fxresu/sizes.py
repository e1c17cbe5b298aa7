"""Sizes of memory as people write them."""

from __future__ import annotations

import math
import re

from .errors import ConfigError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*")
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def parse_size(value: object, name: str = "size") -> int:
    """Bytes of "14GB" (10^9), "14GiB" (2^30), "512 MB", or a number of bytes.

    Raises:
        ConfigError: names the argument, its value and what would be right.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
        return int(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) <= 0:
        raise ConfigError(
            f"{name}={value!r}: use a size such as '14GB' (10^9 bytes), '14GiB' (2^30), or a number of bytes"
        )
    return int(float(match[1]) * unit)


def size_text(size: float) -> str:
    """ "13.48 GB", "29.1 MB", "474 kB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= unit:
            return f"{size / unit:.3g} {name}" if abs(size) < 100 * unit else f"{size / unit:,.0f} {name}"
    return f"{size:.0f} B"
