"""fxresu: compiled graph transforms for phase-aware sparse training in PyTorch."""

from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan

from .config import CycleConfig
from .cycle import ResuCycle
from .errors import CheckpointError, ConfigError, CoverageError, DataError, FxresuError, PhaseError
from .ledger import memory_bill
from .phases import current_phase, set_phase
from .sparsify import commit, prune
from .summary import summary
from .theta import step_theta
from .transform import transform, untransform

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PLANS",
    "CheckpointError",
    "ConfigError",
    "CoverageError",
    "CycleConfig",
    "DataError",
    "FxresuError",
    "Phase",
    "PhaseError",
    "PhasePlan",
    "ResuCycle",
    "commit",
    "current_phase",
    "memory_bill",
    "prune",
    "set_phase",
    "step_theta",
    "summary",
    "transform",
    "untransform",
]
