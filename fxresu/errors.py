"""Exceptions that fxresu raises on purpose.

Every message names the argument, its value and what would be right. `ConfigError` and `DataError` are also
`ValueError`s and `PhaseError` is also a `RuntimeError`, so that code that knows neither name catches them too.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CoverageError",
    "DataError",
    "FxresuError",
    "HostMemoryError",
    "PhaseError",
]


class FxresuError(Exception):
    """Base of every error that fxresu raises on purpose."""


class ConfigError(FxresuError, ValueError):
    """An argument, a configuration value or a model specification is wrong."""


class DataError(FxresuError, ValueError):
    """Training data is missing, damaged, not text, or too short for what was asked."""


class CheckpointError(FxresuError):
    """A checkpoint is truncated, damaged, or belongs to another model or configuration."""


class PhaseError(FxresuError, RuntimeError):
    """A phase change or a step is not legal in the present state."""


class HostMemoryError(FxresuError, MemoryError):
    """Host memory, or host memory that can be pinned, did not suffice, or is at its limit."""


class CoverageError(FxresuError):
    """Fewer (or other) layers were rewritten or compiled than was demanded."""


class NothingCompiledError(FxresuError, RuntimeError):
    """`compile` was asked for, and no graph came out."""
