"""RNN, GRU and LSTM: left to Python, so that the code around them is compiled.

Dynamo gives up every frame that so much as mentions one of them, and with it the linears beside it; told to trace
them, AOTAutograd unrolls them into as many steps as the sequence has. So Dynamo may see them, and finds a call that it
is not to follow: one graph break each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxresu.passes._compat import compiling

RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)


def recurrent(model: nn.Module) -> bool:
    """Whether the model has a module of these."""
    return any(isinstance(m, RECURRENT) for m in model.modules())


@torch.compiler.disable(reason="RNN, GRU and LSTM are left to Python; compiled, they would be unrolled step by step")
def _left_to_python(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def forward_of(base: type[nn.Module]) -> Callable[..., Any]:
    """`forward` for a subclass of `base` whose calls Dynamo does not follow (export does: it unrolls them anyway)."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if compiling():
            return _left_to_python(base.forward, (self, *args), kwargs)
        return base.forward(self, *args, **kwargs)

    return forward
