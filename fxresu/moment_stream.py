"""Moments on their way: from host memory through a few slots on the device, and back.

The slots are all the device memory there is for them. The order in which an optimizer asked for parcels in the last
step is the order in which they are brought ahead of time in the next; one that comes out of order is fetched when it is
asked for, and counted as a miss.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lanes import Lanes, Pairs, aligned

__all__ = ["MomentStream", "Parcel", "Piece"]


@dataclasses.dataclass(eq=False)
class Parcel:
    """Tensors in host memory that travel together: the moments of a piece of one parameter, or of a few small ones.

    Attributes:
        host: contiguous tensors.
        whole: uint8, the memory of them all, as a slot has it; None where it is not in one piece.
        home: mark of the last copy back; None if there was none, or it is known to be over.
    """

    host: tuple[Tensor, ...]
    whole: Tensor | None = None
    home: Any = None

    def __post_init__(self) -> None:
        self.layout = tuple((t.dtype, t.shape) for t in self.host)

    @property
    def nbytes(self) -> int:
        """Bytes in a slot, every tensor aligned."""
        return sum(aligned(t.nbytes) for t in self.host)


@dataclasses.dataclass(eq=False)
class Piece:
    """A parameter's part in a parcel.

    Attributes:
        start, stop: entries of the parameter.
        first: number of its first tensor in the parcel.
    """

    parcel: Parcel
    start: int
    stop: int
    first: int = 0


@dataclasses.dataclass(eq=False)
class _Slot:
    memory: Tensor
    free: Any = None  # mark after which it may be written again
    # Making views takes time: by layout, and of so many bytes.
    views: dict[Any, tuple[Tensor, ...]] = dataclasses.field(default_factory=dict)
    wholes: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def tensors(self, parcel: Parcel) -> tuple[Tensor, ...]:
        """The parcel's tensors in here."""
        found = self.views.get(parcel.layout)
        if found is None:
            found = self.views[parcel.layout] = _views(self.memory, parcel.host)
        return found

    def pairs(self, parcel: Parcel) -> list[tuple[Tensor, Tensor]]:
        """(in here, on the host): the memory that travels, in as few pieces as may be."""
        if parcel.whole is not None:
            size = parcel.whole.numel()
            here = self.wholes.get(size)
            if here is None:
                here = self.wholes[size] = self.memory[:size]
            return [(here, parcel.whole)]
        return list(zip(self.tensors(parcel), parcel.host, strict=True))


@dataclasses.dataclass(eq=False)
class _Guest:
    slot: _Slot
    tensors: tuple[Tensor, ...]
    here: Any
    taken: bool = False


class MomentStream:
    """Brings parcels to the device and takes them back.

    Args:
        lanes: of the device.
        device: where the slots are.
        slots: how many; one of them is in use, the others arrive or leave.
        size: bytes of a slot.

    Attributes:
        fetched, misses: parcels brought, and those of them that nobody had brought ahead.
        batch: parcels that may be taken at a time: two slots are left, for others that arrive meanwhile.
    """

    def __init__(self, lanes: Lanes, device: torch.device, slots: int, size: int) -> None:
        self.lanes, self.device = lanes, device
        self.fetched = self.misses = 0
        self.batch = max(slots - 2, 1)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(slots)]
        # A slot's memory comes from the computation's stream: nothing may write it before what used it there is done.
        made = lanes.mark()
        for slot in self._slots:
            slot.free = made
        self._vacant = deque(self._slots)
        self._guests: dict[Parcel, _Guest] = {}  # brought or asked for, and not given back
        self._order: list[Parcel] = []
        self._seen: dict[Parcel, None] = {}  # of this step, in order
        self._ahead = 0  # place in the order up to which parcels have been brought
        self._out: deque[Parcel] = deque()  # on their way home, in order

    @property
    def device_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def take(self, parcel: Parcel, blank: bool = False) -> tuple[Tensor, ...]:
        """The parcel's tensors on the device, for the computation's next operations; `give_back` must follow.

        blank: all of it will be overwritten, so that it need not be brought.
        """
        guest = self._guests.get(parcel)
        if guest is None:
            if not self._vacant:
                self._send_off_latest()
            if blank:
                slot = self._vacant.popleft()
                guest = self._guests[parcel] = _Guest(slot, slot.tensors(parcel), slot.free)
            else:
                self.misses += 1
                self._fetch([parcel])
                guest = self._guests[parcel]
        self._seen[parcel] = None
        guest.taken = True
        self.lanes.wait(guest.here)
        return guest.tensors

    def give_back(self, *parcels: Parcel) -> None:
        """What the computation has written into the parcels' tensors goes home; the next ones come."""
        slots = [self._guests.pop(parcel).slot for parcel in parcels]
        after = [self.lanes.mark()]  # of the first: a lane does its copies in order
        each = list[tuple[Pairs, Sequence[Any]]]()
        for parcel, slot in zip(parcels, slots, strict=True):
            each.append(([(host, here) for here, host in slot.pairs(parcel)], () if each else after))
        for parcel, slot, mark in zip(parcels, slots, self.lanes.copies("out", each), strict=True):
            parcel.home = slot.free = mark
        self._out += parcels
        while self._out and self.lanes.reached(self._out[0].home):
            self._out.popleft().home = None  # nobody has to wait for it any more
        self._vacant += slots
        self._bring_ahead()

    def let_go(self, parcel: Parcel) -> None:
        """The parcel's tensors are used up: nothing goes home."""
        guest = self._guests.pop(parcel)
        guest.slot.free = self.lanes.mark()
        self._vacant.append(guest.slot)
        self._bring_ahead()

    def end_step(self, ahead: bool = True) -> None:
        """The step is complete: its order is that of the next one, whose first parcels are brought now if `ahead`."""
        if self._seen:
            self._order, self._seen, self._ahead = list(self._seen), {}, 0
            for parcel in list(self._guests):
                if not ahead or parcel not in self._order[: len(self._slots)]:
                    self._dismiss(parcel)
        if ahead:
            self._bring_ahead()
        else:
            self._ahead = len(self._order)

    def settle(self) -> None:
        """Wait until all moments are in host memory, and forget what was brought ahead: the host may write them."""
        for parcel in list(self._guests):
            self._dismiss(parcel)
        while self._out:
            self.lanes.finish(self._out.popleft().home)
        self._ahead = 0

    def _dismiss(self, parcel: Parcel) -> None:
        """Give the slot of an unused parcel up. Its copy must be over: the host may write what it reads."""
        guest = self._guests.pop(parcel)
        self.lanes.finish(guest.here)
        self._vacant.append(guest.slot)

    def _send_off_latest(self) -> None:
        """Make room for a parcel that came out of order, at the cost of the one that is needed last."""
        latest = next(parcel for parcel in reversed(self._guests) if not self._guests[parcel].taken)
        slot = self._guests.pop(latest).slot
        if latest in self._order:
            self._ahead = min(self._ahead, self._order.index(latest))
        self._vacant.append(slot)

    def _bring_ahead(self) -> None:
        coming = list[Parcel]()
        while len(coming) < len(self._vacant) and self._ahead < len(self._order):
            parcel = self._order[self._ahead]
            self._ahead += 1
            if parcel not in self._seen and parcel not in self._guests:
                coming.append(parcel)
        if coming:
            self._fetch(coming)

    def _fetch(self, parcels: Sequence[Parcel]) -> None:
        """Bring parcels, for which there are vacant slots."""
        slots = [self._vacant.popleft() for _ in parcels]
        each = [(slot.pairs(p), (slot.free, p.home)) for p, slot in zip(parcels, slots, strict=True)]
        for parcel, slot, here in zip(parcels, slots, self.lanes.copies("in", each), strict=True):
            self._guests[parcel] = _Guest(slot, slot.tensors(parcel), here)
        self.fetched += len(parcels)


def _views(memory: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors of these shapes and dtypes, one after another in a slot."""
    views, offset = [], 0
    for tensor in like:
        views.append(memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        offset += aligned(tensor.nbytes)
    return tuple(views)
