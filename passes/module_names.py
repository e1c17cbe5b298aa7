"""FQNs of the modules that a node came from, in captured graphs and in those that AOTAutograd makes of them."""

from __future__ import annotations

import re

from torch.fx import Node

_STEP = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_ROOT = re.compile(r"^L\['\w+'\]")


def modules_of(node: Node) -> list[str]:
    """FQNs of the modules whose forwards were running, outermost first; without the model itself.

    After a graph break the path starts where the rest of the model was taken up.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return [name for name in (_fqn(entry[0]) for entry in stack.values()) if name]


def _fqn(path: str) -> str:
    """`L['module']._modules['h'].0.attn` and `L['module'].h[0].attn` are "h.0.attn"."""
    root = _ROOT.match(path)
    if root is None:
        return path
    steps = ("".join(groups) for groups in _STEP.findall(path[root.end() :]))
    return ".".join(s for s in steps if s not in ("_modules", "_parameters", "_buffers"))
