"""Between backward and step: float16's loss scale, the clip over all gradients, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import read_number

from .losses import NonFiniteGradientError

__all__ = ["Updates"]


class Updates:
    """Applies gradients: unscaled, checked and clipped together, whichever optimizer they belong to.

    Args:
        scaler: scales losses for float16; None does not.
        grad_clip: largest 2-norm of all gradients together; None leaves them.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None, grad_clip: float | None) -> None:
        self.scaler, self.grad_clip = scaler, grad_clip

    def backward(self, loss: Tensor) -> None:
        """Backward of the loss, scaled."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def apply(self, grads: Mapping[Optimizer, list[Tensor]], update: Callable[[float], None]) -> bool:
        """Call `update(factor)` on gradients that are unscaled and clipped; the first optimizer's are multiplied by
        the factor already, the others' not.

        Returns:
            False if a scaled gradient overflowed: the scale is reduced, and `update` was not called.

        Raises:
            NonFiniteGradientError: a gradient is not finite without a scale that could be blamed.
        """
        if self.scaler is not None:
            for optimizer, found in grads.items():
                if found:
                    self.scaler.unscale_(optimizer)
        own, *others = grads.values()
        rest = [g for found in others for g in found]
        finite = self._finite([*own, *rest])
        if finite:
            update(self.clip(own, rest))
        if self.scaler is not None and (own or rest):
            self.scaler.update()
        return finite

    def _finite(self, grads: list[Tensor]) -> bool:
        """Looks only where a norm is due anyway: it waits for the device."""
        if not grads or (self.scaler is None and self.grad_clip is None):
            return True
        if math.isfinite(read_number(nn.utils.get_total_norm(grads))):
            return True
        if self.scaler is None:
            raise NonFiniteGradientError(
                "is not finite, though the loss is: nothing was updated; lower the learning rate, or look at the batch"
            )
        return False

    def clip(self, grads: list[Tensor], others: list[Tensor]) -> float:
        """Clip by the norm over both; returns the factor, which is applied to `grads` only."""
        if self.grad_clip is None or not (grads or others):
            return 1.0
        norm = nn.utils.get_total_norm([*grads, *others])
        factor = min(1.0, self.grad_clip / (read_number(norm) + 1e-6))
        if factor < 1.0:
            for grad in grads:
                grad.mul_(factor)
        return factor
