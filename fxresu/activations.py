"""Bytes that a forward keeps for its backward, read off the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def saved_bytes(output: Tensor, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that the graph of `output` holds for the backward.

    Args:
        output: result of a forward whose backward has not run yet.
        exclude: tensors that are counted elsewhere (parameters, masks).
    """
    counted = {t.untyped_storage().data_ptr() for t in exclude}
    total = 0
    for tensor in _saved(output):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _saved(output: Tensor) -> Iterator[Tensor]:
    seen, queue = set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        queue += [following for following, _ in node.next_functions]
        yield from _saved_by(node)


def _saved_by(node: torch.autograd.graph.Node) -> Iterator[Tensor]:
    """Python and compiled functions list their tensors; built-in nodes have one attribute for each."""
    names = ["saved_tensors"] if hasattr(node, "saved_tensors") else [n for n in dir(node) if n.startswith("_saved_")]
    for name in names:
        value = getattr(node, name)
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor):
                yield tensor
