"""State of a cycle beyond masks, θ and position: statistics under way, cohorts, θ's learning rate, the loss scaler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .cycle import ResuCycle

__all__ = ["extras_plain", "extras_tensors", "load_extras"]

_PREFIXES = ("statistics/", "cohort/")


def extras_tensors(cycle: ResuCycle) -> dict[str, Tensor]:
    """Tensors of that state, under names of their own."""
    parts = (cycle.statistics.tensors(), cycle.survival.tensors())
    return {prefix + name: t.detach().clone() for prefix, part in zip(_PREFIXES, parts) for name, t in part.items()}


def extras_plain(cycle: ResuCycle) -> dict[str, Any]:
    """The rest of it, for JSON."""
    group = cycle.theta_optimizer.state_dict()["param_groups"][0]
    numbers = {k: v for k, v in group.items() if isinstance(v, (int, float))}
    return {
        "statistics": cycle.statistics.plain(),
        "theta_optimizer": numbers,
        "scaler": None if cycle.scaler is None else cycle.scaler.state_dict(),
    }


def load_extras(cycle: ResuCycle, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put both back."""
    statistics, cohorts = (
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)} for prefix in _PREFIXES
    )
    cycle.statistics.load(statistics, plain["statistics"])
    cycle.survival.load(cohorts)
    cycle.theta_optimizer.load_state_dict({"param_groups": [plain["theta_optimizer"]]})
    if cycle.scaler is not None and plain["scaler"] is not None:
        cycle.scaler.load_state_dict(plain["scaler"])
