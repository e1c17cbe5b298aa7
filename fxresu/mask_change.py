"""How sparse the masks are, and what a change of them kept, brought back and dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from fxresu.kernels import count

from .host_values import on_host
from .model_state import managed_weights

__all__ = ["CommitResult", "MaskChange", "actual_sparsity", "mask_change", "total_sparsity"]


@dataclasses.dataclass(frozen=True)
class MaskChange:
    """What a pruning or a commit changed, summed over all managed weights.

    Attributes:
        kept: coordinates active before and after.
        resurrected: coordinates that became active.
        dropped: active coordinates that were pruned.
        churn: 1 - Jaccard overlap of the old and the new mask.
        sparsity: of the new masks.
        layer_churn, layer_sparsity: the last two by FQN.
    """

    kept: int
    resurrected: int
    dropped: int
    churn: float
    sparsity: float
    layer_churn: dict[str, float] = dataclasses.field(default_factory=dict)
    layer_sparsity: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def resurrection_rate(self) -> float:
        """Share of the new active coordinates that were resurrected."""
        active = self.kept + self.resurrected
        return self.resurrected / active if active else 0.0


CommitResult = MaskChange
"""What a commit returns."""


def mask_change(model: nn.Module, numbers: Mapping[str, Sequence[int]]) -> MaskChange:
    """From `transition_counts` (kept, resurrected, dropped, union) by FQN, read on the host. Takes no memory of a
    device, so that it cannot fail beside the masks' own change."""
    kept, resurrected, dropped, union = (sum(n[i] for n in numbers.values()) for i in range(4))
    sizes = {name: m.entry.numel for name, m in managed_weights(model).items()}
    sparsity = {name: 1 - (n[0] + n[1]) / sizes[name] for name, n in numbers.items()}
    return MaskChange(
        kept,
        resurrected,
        dropped,
        _churn(kept, union),
        sum(share * sizes[name] for name, share in sparsity.items()) / sum(sizes.values()),
        {name: _churn(n[0], n[3]) for name, n in numbers.items()},
        sparsity,
    )


def _churn(kept: int, union: int) -> float:
    return 1 - kept / union if union else 0.0


def actual_sparsity(model: nn.Module) -> dict[str, float]:
    """Share of pruned coordinates by FQN; 0 where a weight is dense."""
    entries = {name: m.entry for name, m in managed_weights(model).items()}
    active = on_host({name: count(e.bits) for name, e in entries.items() if e.bits is not None})
    return {name: 1 - active.get(name, e.numel) / e.numel for name, e in entries.items()}


def total_sparsity(model: nn.Module) -> float:
    """Share of pruned coordinates over all managed weights together."""
    weights = managed_weights(model)
    shares = actual_sparsity(model)
    total = sum(m.entry.numel for m in weights.values())
    return sum(shares[n] * m.entry.numel for n, m in weights.items()) / total
