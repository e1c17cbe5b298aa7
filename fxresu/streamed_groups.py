"""Which parameters `StreamedAdamW` updates together, and whose moments travel together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from fxresu.kernels import AdamWOperands

from .moment_stream import Piece

__all__ = ["MOST", "Group", "operands_of", "travelling_with"]

MOST = 32  # parameters whose moments are one parcel


@dataclasses.dataclass(eq=False)
class Group:
    """Parameters whose gradients come at the same time: those of a block that is compiled by itself."""

    parameters: list[Tensor]

    def complete(self, arrived: int) -> bool:
        """Whether so many are all that can get a gradient."""
        return arrived == sum(p.requires_grad for p in self.parameters)

    def entries(self, travels: Callable[[Tensor], bool]) -> int:
        """Entries of those that travel."""
        return sum(p.numel() for p in self.parameters if travels(p))


def travelling_with(parameter: Tensor, group: Group, travels: Callable[[Tensor], bool], entries: int) -> list[Tensor]:
    """Parameters of its group whose moments are one parcel with its own: neighbours, of at most `entries` together."""
    parcel, filled = list[Tensor](), 0
    for other in group.parameters:
        if not travels(other):
            continue
        if filled + other.numel() > entries or len(parcel) == MOST:
            if any(p is parameter for p in parcel):
                break
            parcel, filled = [], 0
        parcel.append(other)
        filled += other.numel()
    return parcel


def operands_of(
    parameter: Tensor, grad: Tensor, tensors: Sequence[Tensor], piece: Piece | None = None
) -> AdamWOperands:
    """Of the update of a parameter, or of a piece of it, with the tensors of its parcel on the device."""
    weight, flat = parameter.detach().view(-1), grad.view(-1)
    if piece is None:
        return AdamWOperands(weight, flat, *tensors)
    if piece.stop - piece.start < weight.numel():
        weight, flat = weight[piece.start : piece.stop], flat[piece.start : piece.stop]
    count = 4 if tensors[piece.first].element_size() == 1 else 2
    return AdamWOperands(weight, flat, *tensors[piece.first : piece.first + count], offset=piece.start)
