"""What a phase's training step takes of memory for the managed weights and all activations, against plain dense
training of the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from fxresu.passes import Phase

from .inspection_data import MemoryRow
from .kept import Kept
from .model_state import Managed, ModelState

MOMENTS = 2  # tensors of the weight's shape and dtype that AdamW keeps
_THETA_BYTES = 4  # θ, its gradient and its moments are float32


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Of one managed weight."""

    weight: int
    masks: int
    theta: int
    gradient: int
    theta_moments: int
    optimizer: int


def memory_rows(
    record: ModelState, weights: Mapping[str, Managed], plain: Sequence[Kept], phase: Sequence[Kept]
) -> tuple[tuple[MemoryRow, ...], str]:
    """Rows by component, and why activations are unknown if they are.

    Args:
        record, weights: of a model that is in the phase (its values do not matter, only shapes).
        plain, phase: what each captured graph keeps, with plain weights and after the passes.
    """
    now = [_now(record, m) for m in weights.values()]
    dense = sum(m.parameter.numel() * m.parameter.element_size() for m in weights.values())
    trained = sum(m.parameter.numel() * m.parameter.element_size() for m in weights.values() if _trains(m))
    unknown = next((k.unknown for k in (*plain, *phase) if k.unknown), "")

    def total(field: str) -> int:
        return sum(getattr(b, field) for b in now)

    rows = [
        MemoryRow("managed weights", dense, total("weight")),
        MemoryRow("masks and their indices", 0, total("masks")),
        MemoryRow("θ beside the weight", 0, total("theta")),
        MemoryRow("gradients", trained, total("gradient")),
        MemoryRow("θ's moments", 0, total("theta_moments")),
        MemoryRow("optimizer state", MOMENTS * trained, total("optimizer")),
        MemoryRow("activations kept for the backward", _total(plain), _total(phase)),
    ]
    return tuple(r for r in rows if r.plain != 0 or r.phase != 0), unknown


def _total(kept: Sequence[Kept]) -> int | None:
    return None if any(k.unknown for k in kept) else sum(k.total or 0 for k in kept)


def _trains(managed: Managed) -> bool:
    return managed.parameter.requires_grad


def _now(record: ModelState, managed: Managed) -> _Bytes:
    entry, size = managed.entry, managed.parameter.element_size()
    dense = managed.parameter.numel() * size
    plan, resu = record.state.plan, record.base == "resu"
    theta = prod(entry.theta_shape) * _THETA_BYTES if resu else 0
    gradient = theta if plan.weights == "resu" else dense if plan.trains else 0
    # RESU may let the optimizer's state of the weights go; forward-only phases that follow it find it gone.
    kept = not resu or record.plans[Phase.RESU].optimizer_state == "keep"
    trains = _trains(managed)
    return _Bytes(
        weight=dense if entry.active is None else entry.active.numel() * size,
        masks=sum(map(_bytes, (entry.bits, entry.row_start, entry.columns, entry.active_start))),
        theta=_bytes(entry.theta),
        gradient=gradient if trains else 0,
        theta_moments=2 * theta if trains else 0,
        optimizer=MOMENTS * dense if kept and trains else 0,
    )


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
