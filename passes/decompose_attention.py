"""`nn.MultiheadAttention` is one opaque node in a captured graph: where it reads managed weights it becomes the
projections, the attention and the output projection that it stands for, which the passes after this one know.

Follows `torch.nn.functional.multi_head_attention_forward`, with one difference: sizes are not computed but left to
views, so that graphs of any batch and sequence length stay so.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from .contract import Graph, Pass, PassResult
from .emit import evaluate, example, rank
from .markers import is_marker
from .plan import PhasePlan

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_WEIGHTS = ("in_proj_weight", "out_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _bound(node: Node) -> dict[str, Any]:
    call = _SIGNATURE.bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return call.arguments


def _decomposable(node: Node) -> bool:
    if node.op != "call_function" or node.target is not F.multi_head_attention_forward:
        return False
    given = _bound(node)
    takes_results = all(u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users)
    known = rank(given["query"]) in (2, 3) and isinstance(given["embed_dim_to_check"], int)
    plain = given["static_k"] is None and given["static_v"] is None
    return takes_results and known and plain and any(is_marker(given[w]) for w in _WEIGHTS)


def _mask(mask: Any, value: Any, dtype: torch.dtype) -> Any:
    """A mask as something to add to scores."""
    if mask is None or value.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _projections(given: dict[str, Any], q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Projected queries, keys and values; inputs that are the same are projected in one product."""
    bias, width = given["in_proj_bias"], given["embed_dim_to_check"]
    same = [q.node is k.node, k.node is v.node]
    if given["use_separate_proj_weight"]:
        biases = (None,) * 3 if bias is None else tuple(bias[i * width : (i + 1) * width] for i in range(3))
        weights = (given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"])
        return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases))  # type: ignore[return-value]
    weight = given["in_proj_weight"]
    if all(same):
        out = F.linear(q, weight, bias)
        return out.narrow(-1, 0, width), out.narrow(-1, width, width), out.narrow(-1, 2 * width, width)

    def part(x: Any, first: int, last: int) -> Any:
        rows = slice(first * width, last * width)
        return F.linear(x, weight[rows], None if bias is None else bias[rows])

    if same[1]:
        both = part(k, 1, 3)
        return part(q, 0, 1), both.narrow(-1, 0, width), both.narrow(-1, width, width)
    return part(q, 0, 1), part(k, 1, 2), part(v, 2, 3)


def _merged_mask(given: dict[str, Any], values: dict[str, Any], batched: bool) -> tuple[Any, bool]:
    """(what to add to scores [N, heads, L, S] or None, whether to ask for a causal mask instead)."""
    dtype, heads = values["query"].dtype, given["num_heads"]
    padding = _mask(given["key_padding_mask"], values["key_padding_mask"], dtype)
    if given["is_causal"] and padding is None and not given["need_weights"]:
        return None, True
    mask = _mask(given["attn_mask"], values["attn_mask"], dtype)
    if mask is not None and values["attn_mask"].dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    if padding is not None:
        padding = padding if batched else padding.unsqueeze(0)
        padding = padding.unsqueeze(1).unsqueeze(1)
    extra = int(given["bias_k"] is not None) + int(given["add_zero_attn"])
    if extra:
        mask = None if mask is None else F.pad(mask, (0, extra))
        padding = None if padding is None else F.pad(padding, (0, extra))
    if mask is None or padding is None:
        return (mask if padding is None else padding), False
    return mask + padding, False


def _attention(given: dict[str, Any], values: dict[str, Any]) -> tuple[Any, Any]:
    """(output [L, N, E], weights or None) as `multi_head_attention_forward` returns them."""
    batched = values["query"].dim() == 3
    inputs = [given["query"], given["key"], given["value"]]
    if not batched:
        made = {id(x.node): x.unsqueeze(1) for x in inputs}
        inputs = [made[id(x.node)] for x in inputs]
    heads, width = given["num_heads"], given["embed_dim_to_check"]
    q, k, v = _projections(given, *inputs)
    if given["bias_k"] is not None:
        k, v = (torch.cat([x, b.expand_as(x[:1])]) for x, b in ((k, given["bias_k"]), (v, given["bias_v"])))
    q, k, v = (x.unflatten(-1, (heads, width // heads)).permute(1, 2, 0, 3) for x in (q, k, v))
    if given["add_zero_attn"]:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
    mask, causal = _merged_mask(given, values, batched)
    dropout = given["dropout_p"] if given["training"] else 0.0
    weights = None
    if given["need_weights"]:
        scores = torch.matmul(q * math.sqrt(1.0 / (width // heads)), k.transpose(-2, -1))
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = torch.matmul(weights, v)
        weights = weights.mean(1) if given["average_attn_weights"] else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    return (out if batched else out.squeeze(1)), weights


def _decompose(graph: Graph, node: Node) -> None:
    nodes = graph.module.graph
    tracer, earlier = GraphAppendingTracer(nodes), set(nodes.nodes)
    given = pytree.tree_map_only(Node, lambda n: Proxy(n, tracer), _bound(node))
    values = {name: example(value) for name, value in _bound(node).items()}
    with nodes.inserting_before(node):
        results = _attention(given, values)
    for new in nodes.nodes:
        if new not in earlier:
            new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
            evaluate(new)
    for user in list(node.users):
        result = results[user.args[1]]  # type: ignore[index]
        if result is not None:
            user.replace_all_uses_with(result.node)
            nodes.erase_node(user)
        else:
            _use_none(user)
            nodes.erase_node(user)
    nodes.erase_node(node)


def _use_none(result: Node) -> None:
    """Readers of the weights that were not asked for get None."""

    def replaced(value: Any) -> Any:
        return pytree.tree_map_only(Node, lambda n: None if n is result else n, value)

    for user in list(result.users):
        user.args, user.kwargs = replaced(user.args), replaced(user.kwargs)


def _run(graph: Graph, plan: PhasePlan) -> PassResult:
    found = [n for n in graph.module.graph.nodes if _decomposable(n)]
    for node in found:
        _decompose(graph, node)
    return PassResult(matches=len(found))


DECOMPOSE_ATTENTION = Pass("decompose_attention", _run, provides=frozenset({"attention_decomposed"}), quiet=True)
