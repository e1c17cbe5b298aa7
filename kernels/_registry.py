"""Registration helpers shared by the operations."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "fxresu"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operation(
    name: str,
    mutates: tuple[str, ...] = (),
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the opaque operation `fxresu::name`; returns its default overload.

    `mutates` names the arguments written in place. `flops` is the FLOP formula over shapes; without one it is zero:
    FLOP counters count matrix products, and most of these operations move bytes.

    Straight with the dispatcher and not through `torch.library.custom_op`, which spends 0.1 to 0.15 ms a call on the
    host (torch 2.11): a step that calls an operation for every weight would wait for it.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _counting(function, mutates) if mutates else function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        register_flop_formula(packet)(flops or _no_flops)
        return packet.default

    return register


def _counting(function: Callable[..., Any], mutates: tuple[str, ...]) -> Callable[..., Any]:
    """Counts the versions of the tensors it writes up, so that autograd notices."""
    positions = [list(inspect.signature(function).parameters).index(argument) for argument in mutates]

    def call(*args: Any) -> Any:
        result = function(*args)
        written(*(args[i] for i in positions))
        return result

    return call


def unobserved(*tensors: torch.Tensor) -> bool:
    """Whether an operation on the tensors may run without the dispatcher, which costs the host as much as the launch:
    nothing traces it, counts it or stands for them. (What `torch.func` wraps has the type of a plain tensor.)"""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


def written(*tensors: torch.Tensor | None) -> None:
    """Count the versions of tensors up that were written without the dispatcher, so that autograd notices."""
    # Inference tensors count no versions.
    torch.autograd.graph.increment_version([t for t in tensors if t is not None and not t.is_inference()])


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0
