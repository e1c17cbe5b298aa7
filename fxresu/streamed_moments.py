"""Where the moments of `StreamedAdamW` are: with the parameter, or in host memory, in parcels that come by.

The first parameter's moments stay if they are given room: its gradient comes last, when nothing is left to compute
beside transfers. What room is left goes to others evenly, from the first to the last: were all of some blocks' moments
here and none of the others', the bus would be idle for a part of the backward, and too slow for the rest. Moments of
small parameters stay anyhow, since a transfer takes longer than it is worth.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .lanes import Lanes, aligned, lanes_for
from .moment_stream import MomentStream
from .streamed_groups import MOST, Group, parcels_of, travelling_with
from .streamed_state import StreamedState, bytes_per_entry, form_of, moment_sizes, new_states, slot_bytes

__all__ = ["StreamedMoments"]

_SMALL = 2**16  # entries up to which moments stay on the device


class StreamedMoments:
    """Makes the states of parameters, and the slots that their moments pass through.

    Args:
        form: "8bit", "factored", "bf16" or "fp32".
        ahead: parcels brought ahead of the one in use; None: those of the largest group, 2 at least.
        chunk: entries of a parcel at most.
        room: bytes of moments that stay on the device beside small ones.
        device: where the update computes.

    Attributes:
        groups: of parameters that are updated together, by a parameter's id.
        stream: brings parcels; None before the first one.
    """

    def __init__(self, form: str, ahead: int | None, chunk: int, room: int, device: torch.device) -> None:
        self.form, self.ahead, self.chunk, self.room, self.device = form, ahead, chunk, room, device
        self.groups: dict[int, Group] = {}
        self.stream: MomentStream | None = None
        self._capacity = 0  # entries of a slot that parcels of several parameters fit into, once there are such slots

    @functools.cached_property
    def lanes(self) -> Lanes:
        """Of the device."""
        return lanes_for(self.device)

    def move(self, device: torch.device) -> None:
        """Compute there; before there are moments."""
        self.device = device
        self.__dict__.pop("lanes", None)

    def group(self, groups: Iterable[Sequence[Tensor]]) -> None:
        """Update the parameters of each together; but small ones whose moments have another form than the others', as
        vectors beside factored ones, all at once."""
        wanted = [list(g) for g in groups]
        found = [Group([p for p in g if not self._apart(p)]) for g in wanted]
        found.append(Group([p for g in wanted for p in g if self._apart(p)], late=True))
        self.groups = {id(p): group for group in found for p in group.parameters}

    def _apart(self, parameter: Tensor) -> bool:
        return parameter.numel() <= _SMALL and form_of(parameter, self.form) != self.form

    def make_state(
        self, parameter: Tensor, states: MutableMapping[Any, Any], parameters: Sequence[Tensor]
    ) -> StreamedState:
        """The state of a parameter, and of those that travel with it; what is there under its name is taken over.

        Args:
            states: the optimizer's.
            parameters: all of them, in order.
        """
        staying = self._residents(parameters)
        group = self.groups.get(id(parameter))
        together, lanes = [parameter], None
        if not self._stays(parameter, staying):
            lanes = self.lanes
            if group is not None and (self.stream is None or self._capacity):

                def travels(other: Tensor) -> bool:
                    return not (self._stays(other, staying) or isinstance(states.get(other), StreamedState))

                together = travelling_with(parameter, group, travels, self._capacity or self.chunk)
        made = new_states(together, self.form, lanes, self.settle, self.chunk, self.device)
        for one, fresh in zip(together, made, strict=True):
            if states.get(one):
                fresh.absorb(states[one])
            states[one] = fresh
        return states[parameter]

    def ready_stream(self, states: Iterable[Any], parameters: Sequence[Tensor]) -> MomentStream:
        """The slots, made at the first parcel: large enough for any."""
        if self.stream is None:
            count, entries = self._slots(parameters)
            self._capacity = entries if self.groups else 0
            # States may have come from groups that there are no more.
            made = [s for s in states if isinstance(s, StreamedState)]
            own = max((piece.parcel.nbytes for s in made for piece in s.pieces), default=0)
            size = max(self._slot_bytes(entries, parameters), own)
            self.stream = MomentStream(self.lanes, self.device, count, size)
        return self.stream

    def _slots(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """How many slots there will be, and the entries of each."""
        together, staying = set(self.groups.values()), self._residents(parameters)

        def travels(parameter: Tensor) -> bool:
            return not self._stays(parameter, staying)

        largest = [p.numel() for p in parameters] + [g.entries(travels) for g in together]
        entries = min(self.chunk, max(largest))
        # The gradients of a group come together: what is not here by then keeps the backward waiting.
        ahead = self.ahead
        if ahead is None:
            ahead = max([2, *(parcels_of(g, travels, entries) for g in together)])
        return ahead + 2, entries

    def _slot_bytes(self, entries: int, parameters: Sequence[Tensor]) -> int:
        staying = self._residents(parameters)

        def vector(parameter: Tensor) -> bool:
            return form_of(parameter, self.form) != self.form and not self._stays(parameter, staying)

        vectors = [p.numel() for p in parameters if vector(p)] + [g.entries(vector) for g in set(self.groups.values())]
        return slot_bytes(entries, self.form, MOST if self.groups else 1, max(vectors, default=0))

    def slot_sizes(self, parameters: Sequence[Tensor]) -> int:
        """Bytes of all slots once there are some; 0 if no moments travel."""
        count, entries = self._slots(parameters)
        return count * self._slot_bytes(entries, parameters) if self.travelling_bytes(parameters) else 0

    def travelling_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Bytes of moments in host memory."""
        staying = self._residents(parameters)
        travel = [p for p in parameters if not self._stays(p, staying)]
        return sum(aligned(size) for p in travel for size in moment_sizes(p, self.form))

    def stays(self, parameter: Tensor, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameter's moments are on the device, given all parameters in order."""
        return self._stays(parameter, self._residents(parameters))

    def settle(self) -> None:
        """Wait until all moments are at home."""
        if self.stream is not None:
            self.stream.settle()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the slots."""
        return 0 if self.stream is None else self.stream.device_bytes

    def _stays(self, parameter: Tensor, residents: set[int]) -> bool:
        """Whether its moments are on the device."""
        return parameter.numel() <= _SMALL or id(parameter) in residents

    def _residents(self, parameters: Sequence[Tensor]) -> set[int]:
        """Parameters that are not small and whose moments stay."""
        sizes = [p.numel() * bytes_per_entry(self.form) for p in parameters]
        large = [(p, size) for p, size in zip(parameters, sizes, strict=True) if p.numel() > _SMALL]
        left, found, due = float(self.room), set[int](), 0.0
        if large and large[0][1] <= left:
            left -= large[0][1]
            found.add(id(large.pop(0)[0]))
        share = left / max(sum(size for _, size in large), 1.0)
        for parameter, size in large:
            due += share * size
            if due >= size / 2 and size <= left:
                due, left = due - size, left - size
                found.add(id(parameter))
        return found
