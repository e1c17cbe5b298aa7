"""Which parameters `StreamedAdamW` updates together, and whose moments travel together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fxresu.kernels import AdamW, AdamWOperands, adamw_steps_, factored_moments_

from .moment_stream import MomentStream, Parcel, Piece
from .streamed_state import StreamedState

__all__ = [
    "MOST", "Arrivals", "Group", "factor_moments", "operands_of", "parcels_of", "travelling_with", "update_parcels",
]  # fmt: skip

MOST = 32  # parameters whose moments are one parcel


@dataclasses.dataclass(eq=False)
class Group:
    """Parameters whose gradients come at the same time: those of a block that is compiled by itself.

    Attributes:
        late: a group beside the blocks, of what would take a launch of its own in each of them; complete with the last.
    """

    parameters: list[Tensor]
    late: bool = False

    @property
    def trainable(self) -> int:
        """How many of them can get a gradient."""
        return sum(p.requires_grad for p in self.parameters)

    def entries(self, travels: Callable[[Tensor], bool]) -> int:
        """Entries of those that travel."""
        return sum(p.numel() for p in self.parameters if travels(p))


class Arrivals:
    """Parameters whose gradients have come, until their groups are complete: of one block at a time, and of the group
    beside the blocks."""

    def __init__(self) -> None:
        self._block: dict[int, Tensor] = {}
        self._late: dict[int, Tensor] = {}
        self._groups: dict[bool, tuple[Group, int] | None] = {False: None, True: None}  # and how many will come

    def __bool__(self) -> bool:
        return bool(self._block or self._late)

    def add(self, group: Group, parameter: Tensor) -> list[list[Tensor]]:
        """Which parameters are to be updated now: those of this group if it is complete, and before them those of an
        earlier block not all of which got a gradient."""
        waiting, due, known = self._late if group.late else self._block, list[list[Tensor]](), self._groups[group.late]
        if waiting and (known is None or known[0] is not group):
            due.append(_emptied(waiting))
        if not waiting:
            known = self._groups[group.late] = group, group.trainable
        waiting[id(parameter)] = parameter
        assert known is not None
        if len(waiting) == known[1]:
            due.append(_emptied(waiting))
        return due

    def rest(self) -> list[list[Tensor]]:
        """Those that wait, to be updated though more might have come."""
        return [_emptied(waiting) for waiting in (self._block, self._late) if waiting]

    def clear(self) -> None:
        """Forget all that waits."""
        self._block.clear()
        self._late.clear()


def _emptied(waiting: dict[int, Tensor]) -> list[Tensor]:
    found = list(waiting.values())
    waiting.clear()
    return found


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


def parcels_of(group: Group, travels: Callable[[Tensor], bool], entries: int) -> int:
    """How many parcels of at most `entries` the moments of a group take."""
    count = filled = members = 0
    for size in (p.numel() for p in group.parameters if travels(p)):
        if not members or filled + size > entries or members == MOST:
            count, filled, members = count + 1, 0, 0
        filled, members = filled + size, members + 1
        if size > entries:
            count += -(-size // entries) - 1
    return count


def operands_of(
    parameter: Tensor, grad: Tensor, state: StreamedState, piece: Piece | None = None, tensors: Sequence[Tensor] = ()
) -> AdamWOperands:
    """Of the update of a parameter, or of a piece of it, with the tensors of its parcel on the device."""
    if piece is None:
        return _operands(parameter, grad, state.operands, 0, state.factors)
    own = tensors[piece.first :]
    if piece.stop - piece.start == parameter.numel():  # an update takes them as flat; views would cost more than it
        return _operands(parameter, grad, own, 0, state.factors)
    part = slice(piece.start, piece.stop)
    return _operands(parameter.detach().view(-1)[part], grad.view(-1)[part], own, piece.start, state.factors)


def _operands(
    weight: Tensor, grad: Tensor, own: Sequence[Tensor], offset: int, factors: Sequence[Tensor]
) -> AdamWOperands:
    if factors:
        return AdamWOperands(weight, grad, own[0], None, own[1], None, offset, *factors)
    m, v, *scales = own[: 4 if own[0].element_size() == 1 else 2]
    return AdamWOperands(weight, grad, m, v, *(scales or (None, None)), offset)


def factor_moments(
    updates: Iterable[tuple[Tensor, StreamedState, AdamW, Tensor | None]], scale: Tensor | None, measure: bool = False
) -> None:
    """Bring the second moments that are factored up to date, before anything reads them: of whole parameters, with a
    few launches. (gradient, state, rule, norm) of each; `measure` their norms on the way."""
    found = [(grad, *state.factors, rule.beta2, norm) for grad, state, rule, norm in updates if state.factored]
    if found:
        factored_moments_(found, scale, measure)


def update_parcels(
    stream: MomentStream, parcels: Mapping[Parcel, list[Any]], here: list[Any], factor: Tensor | None
) -> None:
    """Update what lies in these parcels: (parameter, gradient, state, piece, rule, norm) of each. A few parcels at a
    time, with one launch; the first takes `here` along, updates whose moments are on the device."""
    order = list(parcels)
    for i in range(0, len(order), stream.batch):
        taken = order[i : i + stream.batch]
        for parcel in taken:
            tensors = stream.take(parcel)
            for parameter, grad, state, piece, rule, norm in parcels[parcel]:
                here.append((operands_of(parameter, grad, state, piece, tensors), rule, norm))
        adamw_steps_(here, factor)
        here = []
        stream.give_back(*taken)
