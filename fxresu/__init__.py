"""fxresu: compiled graph transforms for phase-aware sparse training in PyTorch."""

from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan

from .transform import transform, untransform

__version__ = "0.1.0"

__all__ = ["DEFAULT_PLANS", "Phase", "PhasePlan", "transform", "untransform"]
