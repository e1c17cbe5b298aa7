"""Selective checkpointing of a block: what products and attention give is kept, what lies between is computed again.

Norms, activation functions and rotations take a few reads and writes to repeat, and their results are a third of what a
compiler keeps of a transformer block: it keeps the input of every product, also where that is cheap to make. Where that
is too much still, products that widen what they read are computed again too: of a transformer block, the products of
two thirds of what is left, and neither attention nor norms with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ._compat_partition import partitioner_ops

__all__ = ["keeping_costly", "keeping_narrow"]

# Where their first factor is among the operands.
_PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}
_OWN = {"mm_few", "mm_24", "decode_linear"}  # fxresu's products


def keeping_costly() -> Any:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`."""
    return create_selective_checkpoint_contexts(_costly)


def keeping_narrow() -> Any:
    """The same, but for products whose result is wider than what they read: these are computed again."""
    return create_selective_checkpoint_contexts(_narrow)


# Compiled graphs with these contexts may come from torch's cache; another policy has to have another name.
keeping_costly.cache_hash = "fxresu keeps costly results, 1"  # type: ignore[attr-defined]
keeping_narrow.cache_hash = "fxresu keeps narrow results, 1"  # type: ignore[attr-defined]


def _narrow(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    place = _PRODUCTS.get(getattr(operation, "overloadpacket", operation))
    if place is not None and args[place + 1].shape[-1] > args[place].shape[-1]:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return _costly(context, operation, *args, **kwargs)


def _costly(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    packet = getattr(operation, "overloadpacket", operation)
    name = getattr(packet, "__name__", "")
    # Attention has many kernels, and torch's own list has not got those of CPUs.
    costly = packet in partitioner_ops().compute_intensive_ops or name.startswith("_scaled_dot_product")
    own = name in _OWN and getattr(operation, "namespace", "") == "fxresu"
    return CheckpointPolicy.MUST_SAVE if costly or own else CheckpointPolicy.PREFER_RECOMPUTE
