"""Registration helpers shared by the operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "fxresu"


def operation(name: str, mutates: tuple[str, ...] = (), *, fake: Callable[..., Any],
              backward: Callable[..., Any] | None = None, setup_context: Callable[..., Any] | None = None
              ) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the opaque operation `fxresu::name`; returns its default overload.

    `mutates` names the arguments written in place. The FLOP formula is zero: FLOP counters count matrix products, and
    these operations move bytes.
    """

    def register(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=mutates)
        op.register_fake(fake)
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        register_flop_formula(packet)(_no_flops)
        return packet.default

    return register


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0
