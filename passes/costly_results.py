"""Selective checkpointing of a block: what products and attention give is kept, what lies between is computed again.

Norms, activation functions and rotations take a few reads and writes to repeat, and their results are a third of what a
compiler keeps of a transformer block: it keeps the input of every product, also where that is cheap to make.
"""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ._compat_partition import partitioner_ops

__all__ = ["keeping_costly"]

_OWN = {"mm_few", "mm_24", "decode_linear"}  # fxresu's products


def keeping_costly() -> Any:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`."""
    return create_selective_checkpoint_contexts(_policy)


# Compiled graphs with this context may come from torch's cache; another policy has to have another name.
keeping_costly.cache_hash = "fxresu keeps costly results, 1"  # type: ignore[attr-defined]


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    packet = getattr(operation, "overloadpacket", operation)
    name = getattr(packet, "__name__", "")
    # Attention has many kernels, and torch's own list has not got those of CPUs.
    costly = packet in partitioner_ops().compute_intensive_ops or name.startswith("_scaled_dot_product")
    own = name in _OWN and getattr(operation, "namespace", "") == "fxresu"
    return CheckpointPolicy.MUST_SAVE if costly or own else CheckpointPolicy.PREFER_RECOMPUTE
