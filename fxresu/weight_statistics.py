"""What calibration batches say about one weight: its inputs' sums, and its gradients'."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fxresu.errors import ConfigError

__all__ = ["NEEDS", "TENSORS", "WeightStatistics"]

NEEDS = ("inputs", "gradients", "squares")
"""Kinds of statistics: of the input features, of the gradient, of its square."""

TENSORS = ("input_squares", "input_sums", "input_counts", "gradient_sums", "gradient_squares")


@dataclasses.dataclass
class WeightStatistics:
    """Running sums for one weight [rows, K], over micro-batches.

    Attributes:
        groups: matrices that the weight stacks along its rows, each with inputs of its own (a bank of experts); else 1.
        side: which dimension of the matrix the input features run along: "columns" (nn.Linear) or "rows" (Conv1D);
            None before the first input.
        batches: micro-batches seen.
        input_squares, input_sums, input_counts: float64 [groups, features], sums of x², x and 1 over all input vectors.
            Along rows the features of all groups follow each other, in one line.
        gradient_sums, gradient_squares: float32 [rows, K], sums of the micro-batches' gradients and their squares.
    """

    groups: int = 1
    side: str | None = None
    batches: int = 0
    input_squares: Tensor | None = None
    input_sums: Tensor | None = None
    input_counts: Tensor | None = None
    gradient_sums: Tensor | None = None
    gradient_squares: Tensor | None = None

    # Gathering

    def add_inputs(self, x: Tensor, side: str, first: int, features: int, group: int = 0) -> None:
        """Input vectors `x` [vectors, n] of the features first..first+n-1 of `features`, to the matrix `group`."""
        wide = torch.promote_types(x.dtype, torch.float32)  # of the reduction: no wide copy of the activation
        squares = torch.linalg.vector_norm(x, dim=0, dtype=wide).double().square()
        self.add_sums(squares, x.sum(0, dtype=wide), x.shape[0], side, first, features, group)

    def add_sums(
        self, squares: Tensor, sums: Tensor, count: int, side: str, first: int, features: int, group: int = 0
    ) -> None:
        """Sums [n] of x² and x over `count` input vectors."""
        if self.input_squares is None or self.input_sums is None or self.input_counts is None:
            shape = (self.groups if side == "columns" else 1, features)
            self.input_squares, self.input_sums, self.input_counts = (
                torch.zeros(shape, dtype=torch.float64, device=sums.device) for _ in range(3)
            )
        self.side = side
        last = first + sums.shape[0]
        self.input_squares[group, first:last] += squares
        self.input_sums[group, first:last] += sums
        self.input_counts[group, first:last] += count

    def add_gradient(self, gradient: Tensor, needs: Iterable[str], device: torch.device | None) -> None:
        """One micro-batch's gradient [rows, K]."""
        gradient = gradient.float()
        for need, name in (("gradients", "gradient_sums"), ("squares", "gradient_squares")):
            if need not in needs:
                continue
            value = gradient if need == "gradients" else gradient.square()
            total = getattr(self, name)
            if total is None:
                setattr(self, name, value.to(device, copy=True))
            else:
                total.add_(value.to(total.device))

    # Reading

    def check(self, name: str, needs: Iterable[str], score: object) -> None:
        """ConfigError unless all of `needs` were gathered for this weight, named `name`."""
        missing = {"inputs": self.input_squares, "gradients": self.gradient_sums, "squares": self.gradient_squares}
        for need in sorted(needs):
            if missing[need] is None:
                what = "no input of a matrix product" if need == "inputs" else "no gradient"
                raise ConfigError(
                    f"score={score!r}: {what} of weight {name!r} was seen in {self.batches} calibration batches;"
                    " exclude this weight from the transform, or use a score that needs none, such as 'magnitude'"
                )

    def input_norm(self) -> Tensor:
        """‖X‖₂ of every input feature over all vectors seen: float32 [groups, features]."""
        assert self.input_squares is not None
        return self.input_squares.sqrt().float()

    def input_mean_square(self) -> Tensor:
        """Mean over the micro-batches of ‖X‖₂²: float32 [groups, features]."""
        assert self.input_squares is not None
        return (self.input_squares / max(self.batches, 1)).float()

    def input_mean(self) -> Tensor:
        """Mean input: float32 [groups, features]."""
        assert self.input_sums is not None and self.input_counts is not None
        return (self.input_sums / self.input_counts.clamp_min(1)).float()

    def input_variance(self) -> Tensor:
        """Variance of every input feature over all vectors: float32 [groups, features]."""
        assert self.input_squares is not None and self.input_sums is not None and self.input_counts is not None
        n = self.input_counts.clamp_min(1)
        return (self.input_squares / n - (self.input_sums / n).square()).clamp_min(0.0).float()

    def along(self, values: Tensor, weight: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Values [groups, features], shaped to multiply the rows first..last-1 of the weight [rows, K]."""
        values, last = values.to(weight.device), weight.shape[0] if last is None else last
        if self.side == "rows":
            return values[0, first:last, None]
        if self.groups == 1:
            return values
        group = torch.arange(first, last, device=weight.device) // (weight.shape[0] // self.groups)
        return values[group]

    def mean_gradient(self, weight: Tensor, first: int, last: int) -> Tensor:
        """Mean gradient of the rows first..last-1, float32, where the weight is."""
        assert self.gradient_sums is not None
        return self.gradient_sums[first:last].to(weight.device) / max(self.batches, 1)

    def mean_square(self, weight: Tensor, first: int, last: int) -> Tensor:
        """Mean squared gradient of the rows first..last-1, float32, where the weight is."""
        assert self.gradient_squares is not None
        return self.gradient_squares[first:last].to(weight.device) / max(self.batches, 1)

    # State

    def tensors(self) -> dict[str, Tensor]:
        """The sums that there are, by attribute."""
        return {name: value for name in TENSORS if (value := getattr(self, name)) is not None}

    def plain(self) -> dict[str, Any]:
        """Everything that is no tensor."""
        return {"groups": self.groups, "side": self.side, "batches": self.batches}
