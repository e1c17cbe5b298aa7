"""Graph passes, their contract, the pipeline and the backend. Knows graphs and phase plans; holds no training loop."""

from fxresu.kernels import fp8 as _fp8  # noqa: F401  (registers the op that the casts put in)
from fxresu.kernels import managed as _markers  # noqa: F401  (registers the ops that passes match)
from fxresu.kernels import products as _products  # noqa: F401  (registers the ops that passes put in)

from .backend import PhaseBackend, install_partitioner, install_pre_grad_pass
from .contract import CONSIDERED, Considered, Graph, Pass, PassOrderError, PassResult, Rewrite, check_order
from .costly_results import keeping_costly, keeping_narrow
from .notices import (
    EagerFallbackWarning,
    FxresuWarning,
    MissingGradientWarning,
    PartialStepWarning,
    RecompileWarning,
    RewriteWarning,
)
from .pipeline import (
    DEFAULT_PASSES,
    MixedPlansError,
    PassRecord,
    Pipeline,
    PipelineRecord,
    configured_passes,
    op_counts,
    op_name,
)
from .plan import DEFAULT_PLANS, Phase, PhasePlan
from .tag_activations import Activation, ActivationBudgetError, ActivationRecord

__all__ = [
    "Activation",
    "ActivationBudgetError",
    "ActivationRecord",
    "CONSIDERED",
    "DEFAULT_PASSES",
    "DEFAULT_PLANS",
    "Considered",
    "EagerFallbackWarning",
    "FxresuWarning",
    "MissingGradientWarning",
    "Graph",
    "MixedPlansError",
    "Pass",
    "PassOrderError",
    "PassRecord",
    "PartialStepWarning",
    "PassResult",
    "Phase",
    "PhaseBackend",
    "PhasePlan",
    "Pipeline",
    "PipelineRecord",
    "RecompileWarning",
    "Rewrite",
    "RewriteWarning",
    "check_order",
    "configured_passes",
    "install_partitioner",
    "keeping_costly",
    "keeping_narrow",
    "install_pre_grad_pass",
    "op_counts",
    "op_name",
]
