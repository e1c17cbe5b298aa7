"""Where an optimizer's state is: sent away while a phase does not need it, called back before the next one does.

Any `torch.optim.Optimizer`: every tensor of a parameter's state that fills its memory can leave, whatever its form
(plain, factored, blocks of bytes, subclasses that say what they are made of). Step counts and other single numbers
stay, and so does what several parameters share. What has to stay is named once.

=========  =============================================================================================================
strategy   where the state is meanwhile
=========  =============================================================================================================
keep       where it is
drop       nowhere: the optimizer begins anew (RESU: as zeros at θ's step count)
offload    in pageable host memory; exact; copies wait
pinned     in pinned host memory; exact; copies run beside the computation
compress   in 8-bit codes on the device (`kernels.log8`): running means only; they come back within 4.4 %
=========  =============================================================================================================

A move has two parts. `send` and `fetch` do all that can fail, with the former owners untouched; an error there undoes
what they began. `commit` (or `rollback`) cannot fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxresu.passes.notices import warn

from .errors import ConfigError, HostMemoryError
from .lanes import Lanes, lanes_for
from .pinned_pool import PinnedPool
from .state_hooks import follow
from .state_move import Move, Place, TransferCounts, TransferWarning, advise, capturing, out_of_memory, plainly
from .state_owners import Owner, Slot, movable
from .streamed_state import StreamedState

__all__ = [
    "AWAY", "STRATEGIES", "Move", "StateManager", "TransferCounts", "TransferWarning", "check_strategy", "find_manager",
    "loading_to_host", "manager_of",
]  # fmt: skip

STRATEGIES = ("keep", "drop", "offload", "pinned", "compress")
AWAY = ("offload", "pinned", "compress")
_KEY = "_fxresu_state"
_HOST = (Owner.LEAVING, Owner.PINNED, Owner.HOST)
# Running means, by the names that torch.optim and others give them. Copies of weights are nothing to round.
_MEANS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "max_exp_avg_sqs", "momentum_buffer", "grad_avg", "square_avg",
    "acc_delta", "sum", "exp_inf", "exp_avg_diff", "exp_avg_slow", "exp_avg_fast",
}  # fmt: skip


class StateManager:
    """Moves the state of one optimizer; found with `manager_of`.

    Args:
        optimizer: any.
        pinned_limit: bytes of pinned memory at most; None leaves it to the host.
        pinned_required: refuse where there is not enough pinned memory, instead of using pageable memory.

    Attributes:
        counts: what has moved.
        stays: why a state tensor cannot leave, by its key.
        stay_away: parameters whose state is away in the present phase, and the strategy; `load_state_dict` keeps to it.
    """

    def __init__(self, optimizer: Optimizer, pinned_limit: int | None = None, pinned_required: bool = False) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.pinned_limit, self.pinned_required = pinned_limit, pinned_required
        self.counts = TransferCounts()
        self.stays: dict[str, str] = {}
        self._told: set[str] = set()
        self._lanes: dict[torch.device, Lanes] = {}
        self._pools: dict[torch.device, PinnedPool] = {}
        self._armed = 0
        self._blocked = 0.0
        self.stay_away: tuple[list[Tensor], str] = ([], "keep")

    # Reading

    def places(self, parameters: Iterable[Tensor] | None = None) -> Iterator[Place]:
        """State tensors and slots of these parameters, or of all."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        wanted = optimizer.state if parameters is None else dict.fromkeys(parameters)
        chosen = [p for p in wanted if p in optimizer.state]
        for parameter in chosen:
            state = optimizer.state[parameter]
            # Streamed state lives in host memory for good, and comes and goes by itself.
            if isinstance(parameter, Tensor) and isinstance(state, dict) and not isinstance(state, StreamedState):
                for key, value in list(state.items()):
                    if isinstance(value, (Tensor, Slot)):
                        yield Place(parameter, state, key)

    def slots(self, parameters: Iterable[Tensor] | None = None) -> list[Slot]:
        """What is away."""
        return [p.value for p in self.places(parameters) if isinstance(p.value, Slot)]

    def owners(self) -> dict[str, int]:
        """Bytes of state tensors (as they are on the device) by owner."""
        found: Counter[str] = Counter()
        for place in self.places():
            value = place.value
            if isinstance(value, Slot):
                value.land()
                found[str(value.owner)] += value.nbytes
            else:
                found[str(Owner.DEVICE)] += value.numel() * value.element_size()
        return dict(found)

    def pinned_bytes(self) -> int:
        """Bytes of all chunks of pinned memory, in use or kept for the next phase."""
        return sum(pool.nbytes for pool in self._pools.values())

    def read_counts(self) -> TransferCounts:
        """A copy of `counts` with the stalls that are over by now."""
        self.counts.stall_seconds = self._blocked + sum(lanes.stalled() for lanes in self._lanes.values())
        return dataclasses.replace(self.counts)

    # Away

    @plainly
    def send(self, parameters: Iterable[Tensor], strategy: str) -> Move:
        """Prepare to send the state of these parameters away, or to drop it. What is away already stays where it is.

        Raises:
            HostMemoryError: no pinned memory, where that is required.
            torch.OutOfMemoryError: while compressing. Nothing has changed in either case.
        """
        move = Move()
        if strategy == "keep":
            return move
        if strategy == "drop":
            self._drop(parameters, move)
            return move
        self._call_in_misplaced(parameters := list(parameters), strategy)
        shared = self._shared()
        try:
            for place in list(self.places(parameters)):
                if isinstance(place.value, Tensor) and self._may_leave(place, strategy, shared):
                    self._send(place, strategy, move)
        except BaseException as error:
            move.rollback()
            advise(error, strategy, "nothing was moved")
            raise
        return move

    def _call_in_misplaced(self, parameters: list[Tensor], strategy: str) -> None:
        """State that is away in another way than the strategy's comes home first."""
        fits = {"offload": _HOST, "pinned": _HOST, "compress": (Owner.COMPRESSED,)}[strategy]
        for slot in self.slots(parameters):
            if slot.owner is Owner.RETURNING:
                slot.go_back()
        odd = [p.parameter for p in self.places(parameters) if isinstance(p.value, Slot) and p.value.owner not in fits]
        self.fetch(odd).commit()

    def _send(self, place: Place, strategy: str, move: Move) -> None:
        value = place.value
        slot = Slot(value, self.lanes_of(value.device))
        pageable = 0
        if strategy == "compress":
            slot.compress(signed=_extremes(value)[0] < 0)
        elif strategy == "pinned" and not self.pin(slot):
            strategy, pageable = "offload", slot.nbytes
        if strategy == "offload":
            start = time.perf_counter()
            slot.leave_pageable()
            self._blocked += time.perf_counter() - start
        move._rollback.append(slot.stay)

        def leave() -> None:
            place.state[place.key] = slot
            slot.depart()
            self.counts.out += slot.nbytes
            self.counts.pageable += pageable

        move._commit.append(leave)

    def pin(self, slot: Slot) -> bool:
        """Queue the copy to pinned memory; False if there is none and pageable memory will do."""
        pool = self._pools.setdefault(slot.device, PinnedPool(self.lanes_of(slot.device), self.pinned_limit))
        pool.limit = self.pinned_limit
        try:
            slot.leave(pool)
            return True
        except HostMemoryError as error:
            if self.pinned_required:
                raise
            self.tell("pageable", f"{error}; optimizer state goes to pageable memory, whose copies wait")
            return False

    def _drop(self, parameters: Iterable[Tensor], move: Move) -> None:
        optimizer = self._optimizer()
        state = {} if optimizer is None else optimizer.state
        held = [p for p in parameters if state.get(p) and not isinstance(state[p], StreamedState)]

        def drop() -> None:
            for parameter in held:
                for slot in self.slots([parameter]):
                    slot.go(Owner.DROPPED)
                del state[parameter]

        move._commit.append(drop)

    def _may_leave(self, place: Place, strategy: str, shared: Counter[int]) -> bool:
        """Whether this state tensor takes part; what has to stay though it is large is named."""
        value, parameter = place.value, place.parameter
        if value.dim() == 0 or value.numel() == 1 or value.device != parameter.device:
            return False
        reason = movable(value)
        ordinary = type(value) in (Tensor, torch.nn.Parameter)
        if not reason and ordinary and shared[value.untyped_storage().data_ptr()] > 1:
            return False  # tables that all parameters read
        if not reason and strategy == "compress":
            plain = ordinary and value.is_floating_point()
            if not plain and value.element_size() > 1:
                reason = f"a {type(value).__name__} of {value.dtype} has no running means to round"
            elif not plain or value.element_size() == 1:
                return False  # 8 bits or less already
            elif place.key not in _MEANS:
                reason = "it is not known to be a running mean, and may be a copy of the weight"
            elif not all(map(math.isfinite, _extremes(value))):
                reason = "it is not finite"
        if reason:
            self.stays[place.key] = reason
            self.tell(place.key, f"optimizer state {place.key!r} stays on its device under {strategy!r}: {reason}")
        return not reason

    def _shared(self) -> Counter[int]:
        """How often each storage is in the state."""
        tensors = (p.value for p in self.places() if type(p.value) in (Tensor, torch.nn.Parameter))
        return Counter(t.untyped_storage().data_ptr() for t in tensors)

    # Back

    @plainly
    def fetch(self, parameters: Iterable[Tensor] | None = None) -> Move:
        """Call the state of these parameters (or all) back and put it in its place; the computation may use it.

        Raises:
            torch.OutOfMemoryError: the device has no room. Nothing has changed then.
        """
        move = Move()
        away = [p for p in self.places(parameters) if isinstance(p.value, Slot)]
        try:
            for place in away:  # all copies are queued before any is waited for
                if place.value.owner is not Owner.RETURNING:
                    move._rollback.append(self._call(place.value))
            for place in away:
                self._install(place, move)
        except BaseException as error:
            move.rollback()
            advise(error, "keep", "the state is whole where it was")
            raise
        return move

    def _call(self, slot: Slot) -> Callable[[], object]:
        """Queue the way back; returns what undoes it."""
        before, start = slot.owner, time.perf_counter()
        slot.come_back()
        if before is Owner.HOST:
            self._blocked += time.perf_counter() - start
        self.counts.back += slot.nbytes

        def undo() -> None:
            if slot.owner is Owner.RETURNING:
                slot.go_back()
                self.counts.back -= slot.nbytes

        return undo if before is not Owner.RETURNING else lambda: None

    def _install(self, place: Place, move: Move) -> None:
        slot = place.value
        place.state[place.key] = slot.arrive()
        move._rollback.append(lambda: place.state.__setitem__(place.key, slot))
        move._commit.append(slot.forget)

    # Ahead of time

    def arm(self, steps: int) -> None:
        """The phase ends in `steps` steps: the next `begin` starts one of as many parts of what is away."""
        left = sum(s.nbytes for s in self.slots() if s.owner in _HOST)
        self._armed = -(-left // max(steps, 1))

    @property
    def armed(self) -> bool:
        """Whether `begin` has something to do."""
        return self._armed > 0

    @plainly
    def begin(self) -> int:
        """Start the way back of what was armed, beside the computation; bytes begun. Without memory on the device for
        it the rest waits for the end of the phase."""
        if capturing():
            return 0
        wanted, self._armed, begun = self._armed, 0, 0
        for slot in self.slots():
            if begun >= wanted:
                break
            if slot.owner not in _HOST:
                continue
            try:
                self._call(slot)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.counts.postponed += 1
                self.tell("postponed", "the device has no memory to call optimizer state back ahead of the phase's"
                           " end; it comes at its end (restore_lookahead=0 does not try)")  # fmt: skip
                break
            begun += slot.nbytes
        self.counts.ahead += begun
        return begun

    @plainly
    def finish(self) -> int:
        """Give the optimizer what has come back by now, without waiting; bytes of it."""
        if capturing():
            return 0
        finished = 0
        for place in self.places():
            if isinstance(place.value, Slot):
                place.value.land()
                if place.value.returned:
                    move = Move()
                    finished += place.value.nbytes
                    self._install(place, move)
                    move.commit()
        return finished

    # Pieces

    def lanes_of(self, device: torch.device) -> Lanes:
        """The lanes of a device."""
        if device not in self._lanes:
            self._lanes[device] = lanes_for(device)
        return self._lanes[device]

    def tell(self, key: str, message: str) -> None:
        """Warn, once for a key."""
        if key not in self._told:
            self._told.add(key)
            warn(TransferWarning, message)


def find_manager(optimizer: Optimizer | None) -> StateManager | None:
    """The optimizer's manager, if anything of it has ever been sent away."""
    return None if optimizer is None else optimizer.__dict__.get(_KEY)


def manager_of(optimizer: Optimizer) -> StateManager:
    """The optimizer's manager, made on first use."""
    found = find_manager(optimizer)
    if found is None:
        found = optimizer.__dict__[_KEY] = StateManager(optimizer)
        follow(found, optimizer)
    return found


@contextlib.contextmanager
def loading_to_host(optimizer: Optimizer, strategy: str) -> Iterator[None]:
    """`optimizer.load_state_dict` inside leaves all state in host memory, pinned if the strategy is "pinned"; the next
    change of phase brings what it needs to the device. Only where the optimizer has a manager; others load as ever."""
    manager = find_manager(optimizer)
    if manager is None:
        yield
        return
    earlier = manager.stay_away
    everything = [p for g in optimizer.param_groups for p in g["params"]]
    manager.stay_away = everything, "pinned" if strategy == "pinned" else "offload"
    try:
        yield
    finally:
        manager.stay_away = earlier


def _extremes(value: Tensor) -> tuple[float, float]:
    """Least and largest value, NaN if there is one, without a tensor of flags beside the value."""
    low, high = torch.aminmax(value)
    return float(low), float(high)


def check_strategy(strategy: str) -> None:
    """ConfigError for a name that is none of `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"optimizer_state={strategy!r}: use one of {', '.join(STRATEGIES)}, or None for the plan's")
