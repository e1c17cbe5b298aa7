"""Keeps what is computed again in the backward near to what was saved for it.

A sum of a residual stream is cheap to repeat from the sum before it, so that a min-cut likes to save the addends and to
repeat the whole chain. The backward needs the last sum first: all sums are then alive at its beginning, and nothing was
gained. This file finds such values and says which of them may not be repeated, so that every chain is short.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection

from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from ._compat_partition import SavedChoice


def chain_ends(
    choice: SavedChoice, free: Collection[Node], cheap: Callable[[Node], bool], limit: int | None = 1
) -> list[Node]:
    """Values that must not be repeated, so that no chain repeats more than `limit` values that are used far apart.

    With one, every other sum of a residual stream ends a chain: the sums between are repeated from their neighbour. It
    is enough for peaks, and saves less than all sums where a sum takes more than its addend (float32 and bfloat16).

    Args:
        free: nodes that may be repeated beside the cheap ones.
        cheap: whether the min-cut may repeat a node anyway.
        limit: None bounds nothing.
    """
    if limit is None:
        return []
    free, far = set(free), _used_far_apart(choice, cheap)
    length: dict[Node, int] = {}  # values used far apart on the longest repeated chain that ends in a node
    ends = []
    for node in choice.forward:
        if not (node in free or cheap(node) or _passes_on(choice, node)) or _saved_by_user(node):
            continue
        before = max((length.get(operand, 0) for operand in node.all_input_nodes), default=0)
        if node in far and before >= limit and not node.meta.get("recompute"):
            ends.append(node)
        else:
            length[node] = before + (node in far)
    return ends


def _used_far_apart(choice: SavedChoice, cheap: Callable[[Node], bool]) -> set[Node]:
    """Results with a cheap reader behind an expensive one that also depends on them: they live across it."""
    order = {node: i for i, node in enumerate(choice.forward)}
    expensive: dict[Node, int] = {}  # place of the first expensive operation that cheap ones lead to
    cheap_last: dict[Node, int] = {}  # place of the last cheap reader, through views
    for node in reversed(choice.forward):
        first, last = len(order), -1
        for user in node.users:
            if user not in order:
                continue
            if _passes_on(choice, user):
                first, last = min(first, expensive[user]), max(last, cheap_last[user])
            elif cheap(user):
                first, last = min(first, expensive[user]), max(last, order[user])
            elif user.op == "call_function":
                first = min(first, order[user])
        expensive[node], cheap_last[node] = first, last
    return {n for n in order if n.op == "call_function" and not choice.is_view(n) and cheap_last[n] > expensive[n]}


def _passes_on(choice: SavedChoice, node: Node) -> bool:
    """Views and single results of operations with several compute nothing."""
    return node.target is operator.getitem or (node.op == "call_function" and choice.is_view(node))


def _saved_by_user(node: Node) -> bool:
    return node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE
