"""The forms that the values of a managed weight are kept in, and the way from one to another.

Resident: the Parameter holds them, pruned slots included. In RESU they can be away: packed (the active values and θ
alone, from which a read composes the dense weight) or offloaded (in host memory, while a bfloat16 copy computes). The
Parameter then stays with its shape and no values. Where weights are resident and products run in bfloat16, a copy in it
stands beside them.

`ManagedWeight` holds the tensors of every form and reads any of them; only changes of phase, loading and undoing bring
a weight from one form to another, by these functions. Callers put the module's name in front of them: `pack` alone
makes the bits of a mask (`fxresu.kernels`).
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fxresu.kernels import gather, pack_active, row_counts, row_starts
from fxresu.kernels.quantized import LARGEST, quantize
from fxresu.passes._compat import mark_dynamic, mark_static, version_of

from .managed import ManagedWeight

__all__ = [
    "copied",
    "keep_master",
    "make_copy",
    "offload",
    "pack",
    "rounds",
    "send_away",
    "set_active",
    "stand_in",
    "storage_of",
    "unpack_into",
]


def storage_of(entry: ManagedWeight) -> str:
    """Where the values are now: "resident", "packed" or "offload"."""
    if entry.host is not None:
        return "offload"
    return "resident" if entry.active is None else "packed"


def send_away(entry: ManagedWeight, weight: Tensor, storage: str) -> None:
    """Take a weight in RESU out of the device's memory in the way that its storage says, "packed" or "offload"."""
    if storage == "packed":
        pack(entry, weight)
    else:
        offload(entry, weight)


def pack(entry: ManagedWeight, weight: Tensor) -> None:
    """Packed storage: keep the active values and θ, let the dense weight go.

    The Parameter stays, but every element of it reads NaN: code that bypasses the module's property must not take stale
    values for weights.
    """
    entry.bring(weight)
    counts = row_counts(entry.bits, entry.k, invert=False)
    least, most, total = torch.stack((counts.min(), counts.max(), counts.sum())).tolist()
    rowwise = entry.theta_shape[0] == entry.rows > 1
    if entry.panel_start is not None:  # θ's shape does not tell
        rowwise = entry.rows > 1 and least == most
    shape = (entry.rows, max(most, 1)) if rowwise else (1, max(total, 1))
    if entry.packed_values == "int4":  # two to a byte
        shape = (shape[0], shape[1] + shape[1] % 2)
    start = row_starts(counts, shape, fit=True)
    dtype = torch.bfloat16 if entry.packed_values == "bf16" else weight.dtype
    active, scale = pack_active(entry.matrix(weight), entry.bits, start, shape, dtype), None
    if entry.packed_values in LARGEST:
        active, scale = quantize(active, entry.packed_values)
    left = stand_in(entry, weight)  # the last thing that can fail
    set_active(entry, active, start, scale)
    grad, trains = (None, True) if entry.anchor is None else (entry.anchor.grad, entry.anchor.requires_grad)
    entry.set_anchor(weight.device, trains).grad = grad
    if entry.stream is not None:
        entry.stream.leave(weight)
    weight.data = left


def offload(entry: ManagedWeight, weight: Tensor) -> None:
    """The full-precision weight waits in host memory (pinned, with a GPU); a bfloat16 copy computes, θ has a master of
    its own."""
    theta = _master(entry, weight) if entry.theta is None else entry.theta
    host = torch.empty(entry.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
    host.copy_(weight.detach())
    left = stand_in(entry, weight)
    make_copy(entry, weight)  # the last thing that can fail
    entry.theta, entry.host = theta, host
    weight.data = left


def unpack_into(entry: ManagedWeight, weight: Tensor, exact: Tensor | None = None) -> None:
    """Back to resident storage; `exact`: the values from before they were packed, where packing rounded them."""
    dense = entry.dense(weight) if exact is None else exact
    if entry.stream is None:
        weight.data = dense
    else:  # exact values are those that its own memory has kept
        entry.stream.join(weight, dense if exact is None else None)
    offloaded = entry.host is not None
    entry.active = entry.active_start = entry.active_scale = entry.host = None
    if offloaded and weight.dtype == torch.float32:
        entry.theta = None  # its slots are the master again


def rounds(entry: ManagedWeight, weight: Tensor) -> bool:
    """Whether `pack` changes the active values of this weight."""
    return entry.packed_values in LARGEST or (entry.packed_values == "bf16" and weight.dtype != torch.bfloat16)


def set_active(entry: ManagedWeight, active: Tensor, start: Tensor, scale: Tensor | None = None) -> None:
    """Keep the packed active values. Their length follows the sparsity, which must not recompile: a capacity for the
    whole run would cost the memory that packing saves."""
    entry.active, entry.active_start, entry.active_scale = active, start, scale
    for tensor in (active, scale):
        if tensor is not None:
            mark_dynamic(tensor, 1)


def stand_in(entry: ManagedWeight, weight: Tensor) -> Tensor:
    """What the Parameter holds while its values are elsewhere: its shape, one element of memory, NaN."""
    return torch.full((1,), float("nan"), dtype=weight.dtype, device=weight.device).expand(entry.shape)


def _master(entry: ManagedWeight, weight: Tensor) -> Tensor:
    """θ in float32, out of the slots of a weight that holds it."""
    return gather(entry.matrix(weight), entry.bits, entry.row_start, entry.columns, entry.theta_shape, torch.float32)


def keep_master(entry: ManagedWeight, weight: Tensor) -> None:
    """θ in float32 beside a weight that is about to lose precision."""
    theta = _master(entry, weight)
    assert entry.anchor is not None
    grad, trains = entry.anchor.grad, entry.anchor.requires_grad
    entry.theta, entry.low = theta, None
    entry.set_anchor(weight.device, trains).grad = grad


def make_copy(entry: ManagedWeight, weight: Tensor) -> None:
    """The bfloat16 copy of a resident effective weight that products read."""
    if entry.low is None:
        fresh = weight.detach().to(torch.bfloat16)
        mark_static(fresh)
        entry.low = fresh
    else:  # graphs hold its address
        entry.low.copy_(weight.detach())
    entry.low_version, entry.low_of = version_of(weight), weakref.ref(weight)


def copied(entry: ManagedWeight, weight: Tensor) -> bool:
    """Whether `low` holds what this very tensor holds now. The Parameter's place may be another's for one call
    (torch.func.functional_call), and tensors of different values have the same version."""
    same = entry.low is not None and entry.low_of is not None and entry.low_of() is weight
    return same and entry.low_version == version_of(weight)
