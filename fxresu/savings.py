"""What a phase's training step takes of memory for the managed weights and all activations, against plain dense
training of the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from fxresu.kernels import log8
from fxresu.passes import ActivationRecord, Phase

from .inspection_data import MemoryRow
from .kept import Kept
from .ledger import masks_of
from .managed import ManagedWeight
from .model_state import Managed, ModelState

ACTIVATIONS = "activations kept for the backward"
MOMENTS = 2  # tensors of the weight's shape and dtype that AdamW keeps


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Of one managed weight, on its device."""

    weight: int
    copies: int
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
    dense = sum(_dense(m) for m in weights.values())
    trained = sum(_dense(m) for m in weights.values() if m.parameter.requires_grad)
    unknown = next((k.unknown for k in (*plain, *phase) if k.unknown), "")

    def total(field: str) -> int:
        return sum(getattr(b, field) for b in now)

    rows = [
        MemoryRow("managed weights", dense, total("weight")),
        MemoryRow("their bfloat16 copies", 0, total("copies")),
        MemoryRow("masks and their indices", 0, total("masks")),
        MemoryRow("θ beside the weight", 0, total("theta")),
        MemoryRow("gradients", trained, total("gradient")),
        MemoryRow("θ's moments", 0, total("theta_moments")),
        MemoryRow("optimizer state", MOMENTS * trained, total("optimizer")),
        MemoryRow(ACTIVATIONS, _total(plain), _total(phase)),
    ]
    return tuple(r for r in rows if r.plain != 0 or r.phase != 0), unknown


def with_policy(rows: Sequence[MemoryRow], activations: Sequence[ActivationRecord]) -> tuple[MemoryRow, ...]:
    """The rows with what a policy leaves on the device, after the compiler's own recomputation."""
    kept = sum(a.total("save") for a in activations)
    return tuple(dataclasses.replace(r, phase=kept) if r.component == ACTIVATIONS else r for r in rows)


def _total(kept: Sequence[Kept]) -> int | None:
    return None if any(k.unknown for k in kept) else sum(k.total or 0 for k in kept)


def _dense(managed: Managed) -> int:
    return managed.parameter.numel() * managed.parameter.element_size()


def _now(record: ModelState, managed: Managed) -> _Bytes:
    entry, dense, plan = managed.entry, _dense(managed), record.state.plan
    resu, trains = record.base == "resu", managed.parameter.requires_grad
    gradient = dense if plan.trains else 0
    if plan.weights == "resu":
        gradient = _bytes(entry.anchor)
    return _Bytes(
        weight=0 if entry.host is not None else dense if entry.active is None else _bytes(entry.active),
        copies=_bytes(entry.low),
        masks=sum(map(_bytes, masks_of(entry))),
        theta=_bytes(entry.theta),
        gradient=gradient if trains else 0,
        theta_moments=_moments(entry) if resu and trains else 0,
        optimizer=_optimizer_state(record, managed, resu) if trains else 0,
    )


def _optimizer_state(record: ModelState, managed: Managed, resu: bool) -> int:
    """Of AdamW, where the plan sends it; forward-only phases that follow RESU find it where RESU sent it."""
    plan = record.state.plan
    strategy = plan.optimizer_state if plan.weights == "effective" else "keep"
    if resu and strategy == "keep":
        strategy = record.plans[Phase.RESU].optimizer_state
    if strategy == "compress":
        return MOMENTS * log8.compressed_bytes(managed.parameter.numel())
    return MOMENTS * _dense(managed) if strategy == "keep" else 0


def _moments(entry: ManagedWeight) -> int:
    """θ's moments as they are; float32 ones for a model that has only shapes."""
    if entry.m is None:
        return MOMENTS * prod(entry.theta_shape) * 4
    return sum(map(_bytes, (entry.m, entry.v, entry.m_scale, entry.v_scale)))


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
