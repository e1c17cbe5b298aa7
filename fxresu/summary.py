"""`summary(model)`: what is managed, what is in its masks, and what was left alone and why."""

from __future__ import annotations

from tabulate import tabulate
from torch import nn

from fxresu.kernels import count

from .ledger import tensors_of_weight
from .model_state import Managed, managed_weights, state_of
from .topk import count_true


def summary(model: nn.Module) -> str:
    """Print, and return, a table of the managed weights and a list of the large weights that were left alone.

    Columns: name, shape, active coordinates, candidates (coordinates that θ covers), sparsity, bytes of weight, mask
    and θ's tensors together.

    Raises:
        NotTransformedError: if the model is not transformed.
    """
    record, weights = state_of(model), managed_weights(model)
    rows = [_row(name, managed) for name, managed in weights.items()]
    total = sum(m.entry.numel for m in weights.values())
    active = sum(r[2] for r in rows)
    rows.append(["total", "", active, sum(r[3] for r in rows), 1 - active / total, sum(r[5] for r in rows)])
    table = tabulate(
        [[n, s, f"{a:,}", f"{c:,}", f"{p:.1%}", f"{b / 1e6:,.2f}"] for n, s, a, c, p, b in rows],
        ["weight", "shape", "active", "candidates", "sparsity", "MB"],
        disable_numparse=True,
        colalign=("left", "left", "right", "right", "right", "right"),
    )
    head = (
        f"{type(model).__name__}: phase {record.state.plan.phase}, {len(weights)} managed weights of"
        f" {sum(p.numel() for p in model.parameters()):,} parameters, granularity {record.granularity},"
        f" storage {record.storage}"
    )
    if record.memory_plan is not None:
        head += f"\n{record.memory_plan}"
    left = [f"  {name}: {reason}" for name, reason in record.skipped.items()]
    text = "\n".join([head, "", table, *(["", "left alone:", *left] if left else [])])
    print(text)
    return text


def _row(name: str, managed: Managed) -> list:
    entry = managed.entry
    active = entry.numel if entry.bits is None else int(count(entry.bits))
    parts = tensors_of_weight(managed)
    tensors = [t for name, part in parts.items() if name != "θ gradient" for t in part]
    size = sum(t.untyped_storage().nbytes() for t in tensors if t is not None)
    return [name, "x".join(map(str, entry.shape)), active, _candidates(managed, active), 1 - active / entry.numel, size]


def _candidates(managed: Managed, active: int) -> int:
    entry = managed.entry
    if entry.anchor is None:
        return 0
    if entry.columns is None:
        return entry.numel - active
    mask = entry.mask()
    assert mask is not None
    return count_true(~mask & entry.covered())
