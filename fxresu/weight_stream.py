"""Weights of some blocks in host memory: brought into a few slots on the device just before a block runs.

While a block is away its parameters hold their host memory, while it is here they hold a slot's; so `state_dict()` is
right at every moment, once `send_home()` has been called (`stream_blocks` sees to it). A block is here when its forward
runs, when that is run again for the backward, and until its gradients have been used; what an optimizer has written
goes home when the slot is needed for another block.

Blocks can also `reside` on the device, in memory of their own, for as long as a phase has room for them: others come
and go between them, so that copies and computation alternate.

A change of phase is done weight by weight, each of which `bring` has on the device for the time. A weight that packed
storage has taken over is `absent`: it travels no more, its host memory keeps what it held, and `join` puts it there
again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxresu.passes._compat import in_backward

from .errors import ConfigError
from .lanes import Lanes, aligned

__all__ = ["WeightStream"]


@dataclasses.dataclass(eq=False)
class _Slot:
    memory: Tensor
    free: Any = None


class _Block:
    """One block's parameters, and their memory on the host."""

    def __init__(self, module: nn.Module, lanes: Lanes) -> None:
        self.parameters = list(module.parameters())
        starts, size = [], 0
        for parameter in self.parameters:
            starts.append(size)
            size += aligned(parameter.nbytes)
        self.starts, self.size = starts, size
        self.host = lanes.host(size)
        for parameter, view in zip(self.parameters, self.views(self.host), strict=True):
            view.copy_(parameter.detach())
        self.slot: _Slot | None = None
        self.own: Tensor | None = None  # memory on the device while the block resides there
        self.here: Any = None  # mark of the copy to the device
        self.home: Any = None  # mark of the last copy back
        self.versions: list[int] = []
        self.absent: set[int] = set()  # places of parameters whose values are elsewhere

    def views(self, memory: Tensor) -> list[Tensor]:
        """The parameters' tensors in a memory of the block's size."""
        return [
            memory[start : start + p.nbytes].view(p.dtype).view(p.shape)
            for start, p in zip(self.starts, self.parameters, strict=True)
        ]

    def hold(self, memory: Tensor) -> None:
        """Let the parameters have their values there."""
        for parameter, view in zip(self.parameters, self.views(memory), strict=True):
            if id(parameter) not in self.absent:
                parameter.data = view
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [p._version for p in self.parameters if id(p) not in self.absent]

    @property
    def written(self) -> bool:
        """Whether somebody has changed a parameter since `hold`."""
        return self.versions != self._versions()

    def halves(self, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(in the slot, on the host): the memory that travels, in as few pieces as may be."""
        pieces: list[tuple[int, int]] = []
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            stop = start + aligned(parameter.nbytes)
            if id(parameter) in self.absent:
                continue
            if pieces and pieces[-1][1] == start:
                pieces[-1] = pieces[-1][0], stop
            else:
                pieces.append((start, stop))
        return [(slot[a:b], self.host[a:b]) for a, b in pieces]

    def at_home(self, parameter: Tensor) -> Tensor:
        """The parameter's host memory."""
        return next(v for p, v in zip(self.parameters, self.views(self.host), strict=True) if p is parameter)

    def leave(self, parameter: Tensor) -> None:
        """Its values are elsewhere from now on. A change of theirs before is not one of the block's."""
        before = dict(zip((id(p) for p in self.parameters if id(p) not in self.absent), self.versions, strict=True))
        self.absent.add(id(parameter))
        self.versions = [v for k, v in before.items() if k not in self.absent]


class WeightStream:
    """Keeps the weights of `blocks`, in the order in which the forward runs them, in host memory.

    Args:
        blocks: modules without parameters in common.
        lanes: of the device.
        slots: blocks that fit on the device at a time, 2 or more.
        device: where they compute; default is where they are.

    Attributes:
        device: where the slots are.
        away: blocks that come and go; the others reside on the device.
        fetched, misses: blocks brought, and those of them that nobody had brought ahead.

    Raises:
        ConfigError: parameters in common, or fewer than two slots.
        HostMemoryError: not enough host memory, or not enough that can be pinned.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], lanes: Lanes, slots: int = 3, device: torch.device | None = None
    ) -> None:
        if slots < 2:
            raise ConfigError(f"slots={slots}: use 2 or more: one block runs while another comes")
        ids = [id(p) for block in blocks for p in block.parameters()]
        if len(ids) != len(set(ids)):
            raise ConfigError("blocks: some of them have parameters in common, which cannot be in two places")
        self.lanes = lanes
        self.fetched = self.misses = 0
        home = next(blocks[0].parameters()).device
        self.device = device = home if device is None else device
        self._blocks = list[_Block]()
        for module in blocks:
            self._blocks.append(_Block(module, lanes))
            if home.type == "cpu" and home != device:  # the host need not have room for all of them twice
                self._blocks[-1].hold(self._blocks[-1].host)
        self._number = {id(block): i for i, block in enumerate(blocks)}
        self._number |= {id(p): i for i, block in enumerate(self._blocks) for p in block.parameters}
        for block in self._blocks:  # their old memory is free before the slots take some
            block.hold(block.host)
        size = max(block.size for block in self._blocks)
        count = min(slots, len(blocks))
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]
        made = lanes.mark()
        for slot in self._slots:
            slot.free = made
        self._vacant = list(self._slots)
        self._present: list[_Block] = []  # least recently used first
        self.away = len(blocks)

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots, and of blocks that reside on the device."""
        own = sum(block.own.nbytes for block in self._blocks if block.own is not None)
        return own + sum(slot.memory.nbytes for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory."""
        return sum(block.host.nbytes for block in self._blocks)

    def bring(self, what: nn.Module | Tensor) -> None:
        """Have the weights of this block, or of this parameter's block, on the device for what the computation does
        next, and begin to bring the next block's. What is always there is passed over."""
        number = self._number.get(id(what))
        if number is None or id(what) in self._blocks[number].absent:
            return
        block = self._blocks[number]
        if block.own is not None:
            self.lanes.wait(block.here)
            block.here = None
            return
        if block.slot is None:
            self.misses += 1
            self._fetch(block, keep=block)
        self._present.remove(block)
        self._present.append(block)
        self.lanes.wait(block.here)
        rest = self._blocks[:number][::-1] if in_backward() else self._blocks[number + 1 :]
        following = next((b for b in rest if b.own is None), None)
        if following is not None and following.slot is None:
            self._fetch(following, keep=block)

    def send_home(self) -> None:
        """All weights to host memory, and wait for it: for whoever reads or writes parameters."""
        self.reside(len(self._blocks))
        for block in list(self._present):
            self._release(block)
        for block in self._blocks:
            if block.home is not None:
                self.lanes.finish(block.home)

    def reside(self, away: int) -> None:
        """Let all blocks but so many, evenly spread, be on the device until the next call of this. Blocks with weights
        that have left stay away."""
        count = len(self._blocks)
        leaving = {int((i + 0.5) * count / away) for i in range(away)}
        for number, block in enumerate(self._blocks):
            if number in leaving and block.own is not None:
                self._move_out(block)
        for number, block in enumerate(self._blocks):
            if number not in leaving and block.own is None and not block.absent:
                self._move_in(block)
        self.away = away

    def comes_and_goes(self, block: nn.Module) -> bool:
        """Whether the block's weights are on the device at times only."""
        number = self._number.get(id(block))
        return number is not None and self._blocks[number].own is None

    def streams(self, parameter: Tensor) -> bool:
        """Whether it is one of the parameters that wait in host memory."""
        return id(parameter) in self._number

    def leave(self, parameter: Tensor) -> None:
        """Another form of the weight takes its place: it travels no more. Its host memory keeps what it held."""
        self._blocks[self._number[id(parameter)]].leave(parameter)

    def join(self, parameter: Tensor, values: Tensor | None = None) -> None:
        """A parameter that has left is back, at home, with these values; None: with what its host memory kept.
        Allocates nothing."""
        block = self._blocks[self._number[id(parameter)]]
        if block.own is not None:
            self._move_out(block)
        if block.slot is not None:
            self._release(block)
        if block.home is not None:
            self.lanes.finish(block.home)
        home = block.at_home(parameter)
        if values is not None:
            self.lanes.finish(self.lanes.copy("out", [(home, values)], [self.lanes.mark()]))
        block.absent.discard(id(parameter))
        block.hold(block.host)

    def give_up(self) -> None:
        """All weights to the device for good, each in memory of its own."""
        self.send_home()
        for block in self._blocks:
            for parameter in block.parameters:
                if id(parameter) not in block.absent:
                    parameter.data = parameter.data.to(self.device, copy=True)
        self._slots, self._vacant, self._number = [], [], {}

    def _fetch(self, block: _Block, keep: _Block) -> None:
        if not self._vacant:
            self._release(next(b for b in self._present if b is not keep))
        slot = self._vacant.pop(0)
        block.here = self.lanes.copy(
            "in", block.halves(slot.memory), [m for m in (slot.free, block.home) if m is not None]
        )
        block.slot = slot
        block.hold(slot.memory)
        self._present.append(block)
        self.fetched += 1

    def _move_in(self, block: _Block) -> None:
        """Let a block reside on the device."""
        own = torch.empty(block.size, dtype=torch.uint8, device=self.device)  # before anything else: it can fail
        if block.slot is not None:
            self._release(block)
        after = [m for m in (self.lanes.mark(), block.home) if m is not None]
        block.here = self.lanes.copy("in", block.halves(own), after)
        block.own = own
        block.hold(own)

    def _move_out(self, block: _Block) -> None:
        """Give its memory on the device back to the allocator."""
        own, block.own = block.own, None
        assert own is not None
        self.lanes.wait(block.here)
        if block.written:
            pairs = [(h, s) for s, h in block.halves(own)]
            block.home = self.lanes.copy("out", pairs, [m for m in (self.lanes.mark(),) if m is not None])
            self.lanes.wait(block.home)
        block.here = None
        block.hold(block.host)

    def _release(self, block: _Block) -> None:
        """Give a block's slot up, after what has been computed with it."""
        slot = block.slot
        assert slot is not None
        used = self.lanes.mark()
        if block.written:
            after = [m for m in (used, block.here) if m is not None]
            block.home = slot.free = self.lanes.copy("out", [(h, s) for s, h in block.halves(slot.memory)], after)
        else:
            # On a CPU the copy in may still be ahead; the lane does it before the next one into this slot.
            slot.free = used
        block.hold(block.host)
        block.slot = None
        self._present.remove(block)
        self._vacant.append(slot)
