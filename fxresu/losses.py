"""Where the cycle's loss comes from, and what a loss that is no number raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import ConfigError, FxresuError

Loss = Callable[[nn.Module, Any], Tensor]


class NonFiniteLossError(FxresuError, ArithmeticError):
    """A loss is infinite or not a number. Nothing was updated with it."""


class NonFiniteGradientError(FxresuError, ArithmeticError):
    """A gradient is infinite or not a number, though the loss is finite. Nothing was updated with it."""


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Call the model on a batch (mapping: as keywords; tuple or list: as arguments) and find the loss in its output.

    The loss is the output itself if that is a scalar, else its `.loss` or `["loss"]`, else its first element.

    Raises:
        ConfigError: if none of these is a scalar tensor; pass `loss=` then.
    """
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    loss = loss_in(out)
    if loss is None:
        raise ConfigError(
            f"the model returned {type(out).__name__}, in which there is no scalar loss; pass"
            " loss=lambda model, batch: ... to ResuCycle"
        )
    return loss


def loss_in(out: Any) -> Tensor | None:
    """The scalar loss in a model's output: itself, its `.loss` or `["loss"]`, or its first element; None if there is
    none."""
    loss = out
    if not isinstance(out, Tensor):
        loss = out["loss"] if isinstance(out, Mapping) and "loss" in out else getattr(out, "loss", None)
        loss = out[0] if loss is None and isinstance(out, (tuple, list)) and out else loss
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None
