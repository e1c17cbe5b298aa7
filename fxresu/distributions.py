"""How a sparsity is shared out over the layers: the same for all, or Erdős-Rényi by shape."""

from __future__ import annotations

from collections.abc import Mapping

from fxresu.errors import ConfigError
from fxresu.options import Named, import_callable

__all__ = ["DISTRIBUTIONS", "layer_sparsities"]

DISTRIBUTIONS = ("uniform", "erk")


def layer_sparsities(
    shapes: Mapping[str, tuple[int, int]], sparsity: float, distribution: Named = "uniform"
) -> dict[str, float]:
    """Sparsity in [0, 1) of every weight, so that all of them together have `sparsity`.

    shapes: [rows, K] by FQN. distribution: "uniform"; "erk", densities in proportion to (rows + K) / (rows * K), where
    a weight whose share exceeds 1 stays dense and the others make up for it (Mocanu et al. 2018; Evci et al. 2020); or
    a callable (shapes, sparsity) -> sparsity by FQN, also as "module:function", which answers for its own total.

    Raises:
        ConfigError: an unknown name, or a callable's answer that misses a weight or leaves [0, 1).
    """
    if isinstance(distribution, str) and ":" in distribution:
        distribution = import_callable(distribution, "distribution")
    if callable(distribution):
        return _checked(distribution(dict(shapes), sparsity), shapes)
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"distribution={distribution!r}; use one of {', '.join(DISTRIBUTIONS)}, or a callable")
    if distribution == "uniform" or sparsity == 0.0:
        return dict.fromkeys(shapes, sparsity)
    return _erk(shapes, sparsity)


def _erk(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    sizes = {name: rows * k for name, (rows, k) in shapes.items()}
    raw = {name: (rows + k) / max(rows * k, 1) for name, (rows, k) in shapes.items()}
    dense: set[str] = set()
    while True:
        left = (1.0 - sparsity) * sum(sizes.values()) - sum(sizes[n] for n in dense)
        sparse = [n for n in shapes if n not in dense]
        if not sparse:  # a sparsity that rounds to none
            return dict.fromkeys(shapes, 0.0)
        scale = left / sum(raw[n] * sizes[n] for n in sparse)
        full = [n for n in sparse if scale * raw[n] >= 1.0]
        if not full:
            return {n: 0.0 if n in dense else min(max(1.0 - scale * raw[n], 0.0), 1.0 - 1e-9) for n in shapes}
        dense.update(full)


def _checked(found: object, shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise ConfigError(f"distribution returned {type(found).__name__}; it must return a mapping of FQN to sparsity")
    for name in shapes:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise ConfigError(f"distribution returned {value!r} for {name!r}; a sparsity is a number in [0, 1)")
    return {name: float(found[name]) for name in shapes}
