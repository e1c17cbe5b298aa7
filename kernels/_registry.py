"""Registration helpers shared by the operations."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "fxresu"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operation(name: str, mutates: tuple[str, ...] = (), *, fake: Callable[..., Any],
              backward: Callable[..., Any] | None = None, setup_context: Callable[..., Any] | None = None
              ) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the opaque operation `fxresu::name`; returns its default overload.

    `mutates` names the arguments written in place. The FLOP formula is zero: FLOP counters count matrix products, and
    these operations move bytes.
    """

    def register(function: Callable[..., Any]) -> Any:
        if mutates:
            _define_in_place(name, function, mutates, fake)
        else:
            op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
            op.register_fake(fake)
            if backward is not None:
                op.register_autograd(backward, setup_context=setup_context)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        register_flop_formula(packet)(_no_flops)
        return packet.default

    return register


def _define_in_place(name: str, function: Callable[..., Any], mutates: tuple[str, ...], fake: Callable[..., Any]) -> None:
    """Register straight with the dispatcher: `custom_op` spends about 0.1 ms a call on an operation that mutates, which
    a step that calls one for every weight would feel. What it does there, counting the tensors' versions up so that
    autograd notices, is done here."""
    positions = [list(inspect.signature(function).parameters).index(argument) for argument in mutates]

    def call(*args: Any) -> Any:
        result = function(*args)
        written = [args[i] for i in positions]
        # Inference tensors count no versions.
        torch.autograd.graph.increment_version([t for t in written if t is not None and not t.is_inference()])
        return result

    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0
