"""Warnings about what would otherwise happen in silence. Each category can be filtered by itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


class FxresuWarning(UserWarning):
    """Base of fxresu's warnings."""


class RewriteWarning(FxresuWarning):
    """A managed weight was never rewritten in a phase: right, but as fast and as large as without the passes."""


class EagerFallbackWarning(FxresuWarning):
    """Code that was to be compiled ran eager: right, but slower."""


class RecompileWarning(FxresuWarning):
    """A phase compiled again after its first call."""


class MissingGradientWarning(FxresuWarning):
    """θ of some weights got no gradient in a step of RESU, and stays as it is."""


class PartialStepWarning(FxresuWarning):
    """A step was given up after its backward had updated θ of some weights."""


def warn(category: type[FxresuWarning], message: str) -> None:
    """Show a warning. It is the caller who sees to it that each is given once."""
    warnings.warn_explicit(message, category, filename="fxresu", lineno=0, registry={})


def listed(names: Iterable[str], most: int = 3) -> str:
    """'a, b, c and 4 more' of the names."""
    names = sorted(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
