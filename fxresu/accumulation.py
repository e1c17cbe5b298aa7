"""A window of micro-batches: how their losses and gradients become those of one step.

With loss l_i (a mean over its own micro-batch) and weight w_i, the gradient of a step is

==========  ==========================================================================================
"mean"      sum of d l_i / n: the gradient of one batch made of n micro-batches of equal size
"tokens"    sum of w_i · d l_i / sum of w_i: of one batch, whatever the sizes; w_i is given to `step`
"sum"       scale · sum of d l_i: for losses that are sums; `accumulation_scale`, 1 if it is left out
==========  ==========================================================================================

What a window lacks when it is closed early is made up for by one multiplication of all gradients, θ's included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from numbers import Real

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .model_state import managed_weights

__all__ = ["Window", "multiply_gradients", "own_gradients"]


@dataclasses.dataclass
class Window:
    """Micro-batches since the last update.

    Attributes:
        place: of the run when it began; a window does not outlive a change of phase.
        parts: micro-batches of a whole window.
        normalization: "mean", "tokens" or "sum".
        scale: of the summed gradients ("sum").
        count: micro-batches so far; weight: sum of their weights.
    """

    place: Hashable
    parts: int
    normalization: str = "mean"
    scale: float = 1.0
    count: int = 0
    weight: float = 0.0
    _reference: float = 1.0
    _loss: Tensor | None = None

    def add(self, loss: Tensor, weight: float | None = None) -> Tensor:
        """Take in a micro-batch; what `backward` is to be called on.

        Raises:
            ConfigError: "tokens" without a weight, another rule with one, or a weight that is no number above 0.
        """
        weight = self._checked(weight)
        if self.count == 0:
            self._reference = weight  # keeps what is multiplied near 1, for float16's sake
        self.count += 1
        self.weight += weight
        told = loss.detach() * weight
        self._loss = told if self._loss is None else self._loss + told
        factor = self._factor(weight)
        return loss if factor == 1.0 else loss * factor

    def _checked(self, weight: float | None) -> float:
        if self.normalization != "tokens":
            if weight is not None:
                raise ConfigError(
                    f"weight={weight!r}: accumulation_normalization={self.normalization!r} takes none; use 'tokens'"
                )
            return 1.0
        if isinstance(weight, Tensor):
            weight = weight.item()
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < float("inf"):
            raise ConfigError(
                f"weight={weight!r}: accumulation_normalization='tokens' needs the tokens of each micro-batch, a number"
                " above 0: cycle.step(batch, weight=tokens)"
            )
        return float(weight)

    def _factor(self, weight: float) -> float:
        if self.normalization == "sum":
            return self.scale
        return weight / (self._reference * self.parts)

    @property
    def full(self) -> bool:
        """Whether the step is due."""
        return self.count >= self.parts

    @property
    def remedy(self) -> float:
        """What the gradients have to be multiplied by in the end; 1 for a whole window of equal weights."""
        if self.normalization == "sum" or self.weight == self._reference * self.parts:
            return 1.0
        return self._reference * self.parts / self.weight

    def loss(self) -> Tensor:
        """The loss of the step: the weighted mean of the micro-batches' losses, or their scaled sum."""
        assert self._loss is not None
        return self._loss * self.scale if self.normalization == "sum" else self._loss / self.weight


@torch.no_grad()
def multiply_gradients(model: nn.Module, factor: float) -> None:
    """Multiply all gradients of a transformed model, θ's included."""
    grads = _gradients(model)
    if factor != 1.0 and grads:
        torch._foreach_mul_(grads, factor)


@torch.no_grad()
def own_gradients(model: nn.Module) -> None:
    """Move gradients out of memory that CUDA graphs write again at the next micro-batch."""
    for leaf in _leaves(model):
        leaf.grad = leaf.grad.clone()  # type: ignore[union-attr]


def _leaves(model: nn.Module) -> list[Tensor]:
    anchors = (m.entry.anchor for m in managed_weights(model).values())
    return [t for t in (*model.parameters(), *anchors) if t is not None and t.grad is not None]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [leaf.grad for leaf in _leaves(model) if leaf.grad is not None]
