"""The stages of a run that a memory bill is about: phases, and the transitions between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from fxresu.passes import Phase

from .errors import ConfigError
from .memory_bill import STAGES, TRANSITIONS
from .options import near


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which stages, and how they are entered.

    Attributes:
        wanted: names out of `STAGES`.
        sparsity: of the masks.
        moments: storage of θ's moments, see `resurrection.MOMENTS`.
        theta_dtype: storage of θ, see `resurrection.DTYPES`.
        grad_dtype: of dθ.
        train_rest: biases, norms and embeddings train in RESU too.
    """

    wanted: tuple[str, ...] = STAGES
    sparsity: float = 0.5
    moments: str = "fp32"
    theta_dtype: str = "fp32"
    grad_dtype: torch.dtype = torch.float32
    train_rest: bool = False


def stage_names(wanted: Iterable[str] | str | None) -> tuple[str, ...]:
    """Names out of `STAGES`, in their order; None is all of them.

    Raises:
        ConfigError: an unknown one.
    """
    if wanted is None:
        return STAGES
    asked = [wanted] if isinstance(wanted, str) else [str(w) for w in wanted]
    asked = [str(Phase.DENSE) if w == Phase.WARMUP else w.replace("_", " ") for w in asked]
    for name in asked:
        if name not in STAGES:
            raise ConfigError(f"phase={name!r} is unknown{near(name, STAGES)}; use one of {', '.join(STAGES)}")
    return tuple(s for s in STAGES if s in asked)


def is_transition(stage: str) -> bool:
    """Whether it takes no step."""
    return stage in TRANSITIONS
