"""fxresu: compiled graph transforms for phase-aware sparse training in PyTorch."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxresu.passes import (
        DEFAULT_PLANS,
        EagerFallbackWarning,
        FxresuWarning,
        MissingGradientWarning,
        PartialStepWarning,
        Phase,
        PhasePlan,
        RecompileWarning,
        RewriteWarning,
    )

    from .attach import Attached, attach
    from .calibration import calibrate
    from .config import CycleConfig
    from .cycle import ResuCycle
    from .errors import (
        CheckpointError,
        ConfigError,
        CoverageError,
        DataError,
        FxresuError,
        HostMemoryError,
        PhaseError,
    )
    from .inspection import Inspection, PhaseInspections, inspect, inspect_phases
    from .ledger import memory_bill
    from .lightning_callback import ResuLightningCallback as ResuLightningCallback
    from .memory_bill import MemoryBill
    from .memory_budget import BudgetError, MemoryPlan, plan_memory
    from .memory_predict import predict_memory
    from .phase_state import restore_ahead
    from .phases import current_phase, set_phase
    from .run_log import RunLog
    from .sampler import StepSampler
    from .sparsify import commit, prune, warm_start
    from .streamed import StreamedAdamW
    from .streamed_blocks import stream_blocks
    from .streamed_loss import linear_cross_entropy
    from .summary import summary
    from .theta import ThetaOptimizer, clip_grad_norm_, step_theta
    from .transform import transform, untransform
    from .transformers_callback import ResuTrainerCallback as ResuTrainerCallback

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PLANS",
    "Attached",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "CoverageError",
    "CycleConfig",
    "DataError",
    "EagerFallbackWarning",
    "FxresuError",
    "FxresuWarning",
    "HostMemoryError",
    "Inspection",
    "MemoryBill",
    "MemoryPlan",
    "MissingGradientWarning",
    "PartialStepWarning",
    "Phase",
    "PhaseError",
    "PhaseInspections",
    "PhasePlan",
    "RecompileWarning",
    "ResuCycle",
    "RewriteWarning",
    "RunLog",
    "StepSampler",
    "StreamedAdamW",
    "ThetaOptimizer",
    "attach",
    "calibrate",
    "clip_grad_norm_",
    "commit",
    "current_phase",
    "inspect",
    "inspect_phases",
    "linear_cross_entropy",
    "memory_bill",
    "plan_memory",
    "predict_memory",
    "prune",
    "restore_ahead",
    "set_phase",
    "step_theta",
    "stream_blocks",
    "summary",
    "transform",
    "untransform",
    "warm_start",
]

# Where each name is: imported when it is first used, because `fxresu --help` must not wait for torch. The callbacks are
# not in `__all__`: `import *` must not need the libraries that they are for.
_HOMES = {
    "fxresu.passes": (
        "DEFAULT_PLANS",
        "EagerFallbackWarning",
        "FxresuWarning",
        "MissingGradientWarning",
        "PartialStepWarning",
        "Phase",
        "PhasePlan",
        "RecompileWarning",
        "RewriteWarning",
    ),
    "fxresu.attach": ("Attached", "attach"),
    "fxresu.calibration": ("calibrate",),
    "fxresu.config": ("CycleConfig",),
    "fxresu.cycle": ("ResuCycle",),
    "fxresu.errors": (
        "CheckpointError",
        "ConfigError",
        "CoverageError",
        "DataError",
        "FxresuError",
        "HostMemoryError",
        "PhaseError",
    ),
    "fxresu.inspection": ("Inspection", "PhaseInspections", "inspect", "inspect_phases"),
    "fxresu.ledger": ("memory_bill",),
    "fxresu.lightning_callback": ("ResuLightningCallback",),
    "fxresu.memory_bill": ("MemoryBill",),
    "fxresu.memory_budget": ("BudgetError", "MemoryPlan", "plan_memory"),
    "fxresu.memory_predict": ("predict_memory",),
    "fxresu.phase_state": ("restore_ahead",),
    "fxresu.phases": ("current_phase", "set_phase"),
    "fxresu.run_log": ("RunLog",),
    "fxresu.sampler": ("StepSampler",),
    "fxresu.sparsify": ("commit", "prune", "warm_start"),
    "fxresu.streamed": ("StreamedAdamW",),
    "fxresu.streamed_blocks": ("stream_blocks",),
    "fxresu.streamed_loss": ("linear_cross_entropy",),
    "fxresu.summary": ("summary",),
    "fxresu.theta": ("ThetaOptimizer", "clip_grad_norm_", "step_theta"),
    "fxresu.transform": ("transform", "untransform"),
    "fxresu.transformers_callback": ("ResuTrainerCallback",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


class _Package(types.ModuleType):
    """A package whose exports survive the import of submodules that have their names (`transform`, `summary`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
