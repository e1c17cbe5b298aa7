"""Sizes in words, as budgets are given on the command line. Needs no torch."""

from __future__ import annotations

import re

from .errors import ConfigError

__all__ = ["budget_bytes"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def budget_bytes(text: str) -> int:
    """Bytes of a size such as "472MB" (10^6), "1.5 GiB" (2^30) or "650000000".

    Raises:
        ConfigError: no positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or not (size := round(float(match[1]) * _UNITS[match[2]])):
        raise ConfigError(f"size {text!r}: give a size such as 472MB or 1.5GiB")
    return size
