"""Which implementation every rewritten linear runs: the node's argument `how`, set by the chooser.

Where the chooser stays with the default, the node stays as it is. What it compared is left on the node for `inspect`
(`CONSIDERED`), with every candidate that cannot run and the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxresu.kernels._autocast import active_dtype
from fxresu.kernels.choose import (
    Choice,
    Problem,
    UnmeasuredError,
    candidates,
    choose,
    forced_for,
    missing,
    remember,
)
from fxresu.kernels.quantized import kind_of, value_count

from ._compat import enter_autocast, exit_autocast, real_tensors, size_hint
from .contract import CONSIDERED, Considered, Graph, Pass, PassResult
from .insert_casts import DTYPES
from .markers import PATTERN, WEIGHT, target_of
from .measure_apart import measure_apart
from .plan import PhasePlan

_OPS: dict[object, str] = {
    torch.ops.fxresu.linear.default: "linear",
    torch.ops.fxresu.linear_packed.default: "linear_packed",
}


def _example(node: object) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _product_dtype(x: torch.Tensor, autocast: torch.dtype | None, plan: PhasePlan) -> torch.dtype:
    if plan.precision != "inherit":
        return DTYPES[plan.precision]
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


def _sparsity(kept: int, of: int) -> float:
    return round(20 * (1 - kept / max(of, 1))) / 20


def _theta_layout(theta: torch.Tensor | None, columns: object, rows: int) -> str:
    if theta is None:
        return ""
    if columns is not None:
        return "columns"
    return "rows" if theta.shape[0] == rows > 1 else "flat"


def problem_of(node: Node, plan: PhasePlan, autocast: torch.dtype | None, graphed: bool) -> Problem | None:
    """The problem that a rewritten linear poses, from the example values of its operands; None if they are unknown."""
    x, first = _example(node.args[0]), _example(node.args[1])
    if x is None or first is None:
        return None
    common: dict[str, Any] = {
        "tokens": max(size_hint(x.numel() // max(x.shape[-1], 1)), 0),
        "dtype": _dtype_name(_product_dtype(x, autocast, plan)),
        "weight_dtype": _dtype_name(first.dtype),
        "pattern": node.meta.get(PATTERN, ""),
        "input_grad": x.requires_grad and plan.activations != "discard",
        "graphed": graphed,
    }
    if target_of(node) is torch.ops.fxresu.linear_packed.default:
        theta, rows, K = _example(node.args[2]), int(node.args[7]), int(node.args[8])  # type: ignore[arg-type]
        trains = theta is not None and theta.requires_grad and plan.trains
        values = kind_of(first)
        return Problem(
            "linear_packed", "resu" if trains else "frozen", rows, K, layout=_theta_layout(theta, None, rows),
            sparsity=_sparsity(size_hint(first.shape[0] * value_count(first)), rows * K), values=values, **common,
        )  # fmt: skip
    anchor, columns, mode, transposed = _example(node.args[3]), node.args[6], str(node.args[7]), bool(node.args[9])
    rows, K = first.shape
    return Problem(
        "linear", mode, rows, K, layout=_theta_layout(anchor, columns, rows), transposed=transposed, **common
    )


def _considered(op: str, choice: Any) -> list[Considered]:
    return [
        Considered(c.name, choice.reasons.get(c.name, ""), choice.microseconds.get(c.name), c.name == choice.chosen)
        for c in candidates(op)
    ]


def _run(
    graph: Graph,
    plan: PhasePlan,
    overrides: Mapping[str, str],
    graphed: bool,
) -> PassResult:
    result = PassResult()
    posed = list(_posed(graph, plan, overrides, graphed))
    with real_tensors():
        failure = _measure_missing(posed)
        for node, problem, device, forced in posed:
            choice = _choose(problem, device, forced, failure)
            node.meta[CONSIDERED] = _considered(problem.op, choice)
            if not choice.default:
                node.kwargs = {**node.kwargs, "how": choice.chosen}
                result.matches += 1
    return result


Posed = tuple[Node, Problem, torch.device, str | None]  # the last: the candidate that is forced


def _measure_missing(posed: Sequence[Posed]) -> str:
    """Measure what no file knows yet, all at once; why that failed, or ""."""
    wanted: dict[torch.device, dict[Problem, list[str]]] = {}
    for _, problem, device, forced in posed:
        if names := missing(problem, device, forced):
            wanted.setdefault(device, {})[problem] = names
    try:
        for device, problems in wanted.items():
            for problem, figures in zip(problems, measure_apart(list(problems.items()), device), strict=True):
                remember(problem, device, figures)
    except UnmeasuredError as error:
        return str(error)
    return ""


def _choose(problem: Problem, device: torch.device, forced: str | None, failure: str) -> Choice:
    def unknown(*_: object) -> Mapping[str, float | str]:
        raise UnmeasuredError(failure or "the device was out of memory")

    return choose(problem, device, forced, unknown)


def _posed(graph: Graph, plan: PhasePlan, overrides: Mapping[str, str], graphed: bool) -> Iterator[Posed]:
    ambient: list[torch.dtype | None] = []  # autocast regions of the graph that are open, innermost last
    for node in graph.module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is enter_autocast:
            ambient.append(_region(node))
        elif node.target is exit_autocast and ambient:
            ambient.pop()
        op = _OPS.get(target_of(node))
        x = _example(node.args[0]) if op else None
        if op is None or x is None:
            continue
        problem = problem_of(node, plan, ambient[-1] if ambient else active_dtype(x.device.type), graphed)
        if problem is not None:
            yield node, problem, x.device, forced_for(node.meta.get(WEIGHT, ""), overrides)


def _region(node: Node) -> torch.dtype | None:
    """The dtype that entering an autocast region asks for; None where it switches autocast off."""
    kind, dtype, enabled = (*node.args, None, True, None)[:3]
    if not enabled:
        return None
    return dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(kind))


def choose_kernels(overrides: Mapping[str, str] | None = None, *, graphed: bool = False) -> Pass:
    """The pass with its configuration.

    Args:
        overrides: candidate by FQN pattern of the weight or its module; what cannot run there is refused.
        graphed: the graphs are going to be replayed by CUDA graphs.
    """
    run = functools.partial(_run, overrides=dict(overrides or {}), graphed=graphed)
    return Pass("choose_kernels", run, provides=frozenset({"kernels_chosen"}), requires=frozenset({"linear_rewritten"}))


CHOOSE_KERNELS = choose_kernels()
