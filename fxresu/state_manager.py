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
import functools
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxresu.passes.notices import FxresuWarning, warn

from .copies import Copies, copies_for
from .errors import ConfigError
from .pinned_pool import PinnedMemoryError, PinnedPool
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


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors made inside are ordinary ones, whatever forward it is called in (`torch.inference_mode`)."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call


class TransferWarning(FxresuWarning):
    """Optimizer state is not where it was to be: right, but slower or larger."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a state tensor, or the slot in its place, is kept."""

    parameter: Tensor
    state: dict[str, Any]
    key: str

    @property
    def value(self) -> Any:
        return self.state[self.key]


@dataclasses.dataclass
class Move:
    """State that is about to change its owner; see the module."""

    _commit: list[Callable[[], object]] = dataclasses.field(default_factory=list)
    _rollback: list[Callable[[], object]] = dataclasses.field(default_factory=list)

    def with_(self, other: Move) -> Move:
        """Both as one."""
        return Move([*self._commit, *other._commit], [*self._rollback, *other._rollback])

    def commit(self) -> None:
        """The new owners are the only ones."""
        for step in self._commit:
            step()
        self._commit, self._rollback = [], []

    def rollback(self) -> None:
        """As if nothing had been begun. After `commit` this does nothing."""
        for step in reversed(self._rollback):
            step()
        self._commit, self._rollback = [], []


@dataclasses.dataclass
class TransferCounts:
    """What has moved so far, in bytes of the device's tensors.

    Attributes:
        out, back: sent away, and called back.
        ahead: of `back`: begun before the phase ended.
        pageable: of `out`: to pageable memory because the host gave no pinned memory.
        late: of `back`: because `optimizer.step()` came upon it.
        postponed: attempts to begin ahead for which the device had no memory.
        stall_seconds: that the computation stood still for copies (waits that were over when this was read).
    """

    out: int = 0
    back: int = 0
    ahead: int = 0
    pageable: int = 0
    late: int = 0
    postponed: int = 0
    stall_seconds: float = 0.0

    def since(self, earlier: TransferCounts) -> TransferCounts:
        """What came on top of `earlier`."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(earlier))
        return TransferCounts(*(a - b for a, b in pairs))


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

    def __init__(
        self, optimizer: Optimizer, pinned_limit: int | None = None, pinned_required: bool = False
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.pinned_limit, self.pinned_required = pinned_limit, pinned_required
        self.counts = TransferCounts()
        self.stays: dict[str, str] = {}
        self._told: set[str] = set()
        self._copies: dict[torch.device, Copies] = {}
        self._pools: dict[torch.device, PinnedPool] = {}
        self._armed = 0
        self._blocked = 0.0
        self.stay_away: tuple[list[Tensor], str] = ([], "keep")
        me = weakref.ref(self)
        optimizer.register_step_pre_hook(lambda opt, a, k: _call(me, "_before_step"))
        optimizer.register_state_dict_post_hook(lambda opt, d: _call(me, "_with_values", d))
        optimizer.register_load_state_dict_pre_hook(lambda opt, d: _call(me, "_on_host", d))
        optimizer.register_load_state_dict_post_hook(lambda opt: _call(me, "_send_loaded"))

    # Reading

    def places(self, parameters: Iterable[Tensor] | None = None) -> Iterator[_Place]:
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
                        yield _Place(parameter, state, key)

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
        self.counts.stall_seconds = self._blocked + sum(c.stalled() for c in self._copies.values())
        return dataclasses.replace(self.counts)

    # Away

    @_plainly
    def send(self, parameters: Iterable[Tensor], strategy: str) -> Move:
        """Prepare to send the state of these parameters away, or to drop it. What is away already stays where it is.

        Raises:
            PinnedMemoryError: no pinned memory, where that is required.
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
            _advise(error, strategy, "nothing was moved")
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

    def _send(self, place: _Place, strategy: str, move: Move) -> None:
        value = place.value
        slot = Slot(value, self._copies_of(value.device))
        pageable = 0
        if strategy == "compress":
            slot.compress(signed=bool((value < 0).any()))
        elif strategy == "pinned" and not self._pin(slot):
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

    def _pin(self, slot: Slot) -> bool:
        """Queue the copy to pinned memory; False if there is none and pageable memory will do."""
        copies = self._copies_of(slot.device)
        pool = self._pools.setdefault(slot.device, PinnedPool(copies.pinned, self.pinned_limit))
        pool.limit = self.pinned_limit
        try:
            slot.leave(pool)
            return True
        except PinnedMemoryError as error:
            if self.pinned_required:
                raise
            self._tell("pageable", f"{error}; optimizer state goes to pageable memory, whose copies wait")
            return False

    def _drop(self, parameters: Iterable[Tensor], move: Move) -> None:
        optimizer = self._optimizer()
        held = [
            p for p in parameters
            if optimizer is not None and optimizer.state.get(p) and not isinstance(optimizer.state[p], StreamedState)
        ]  # fmt: skip

        def drop() -> None:
            for parameter in held:
                for slot in self.slots([parameter]):
                    slot.go(Owner.DROPPED)
                del optimizer.state[parameter]

        move._commit.append(drop)

    def _may_leave(self, place: _Place, strategy: str, shared: Counter[int]) -> bool:
        """Whether this state tensor takes part; what has to stay though it is large is named."""
        value, parameter = place.value, place.parameter
        if value.dim() == 0 or value.numel() == 1 or value.device != parameter.device:
            return False
        reason = movable(value)
        if not reason and shared[value.untyped_storage().data_ptr()] > 1:
            return False  # tables that all parameters read
        if not reason and strategy == "compress":
            plain = type(value) in (Tensor, torch.nn.Parameter) and value.is_floating_point()
            if not plain and value.element_size() > 1:
                reason = f"a {type(value).__name__} of {value.dtype} has no running means to round"
            elif not plain or value.element_size() == 1:
                return False  # 8 bits or less already
            elif place.key not in _MEANS:
                reason = "it is not known to be a running mean, and may be a copy of the weight"
            elif not bool(value.isfinite().all()):
                reason = "it is not finite"
        if reason:
            self.stays[place.key] = reason
            self._tell(place.key, f"optimizer state {place.key!r} stays on its device under {strategy!r}: {reason}")
        return not reason

    def _shared(self) -> Counter[int]:
        """How often each storage is in the state."""
        tensors = (p.value for p in self.places() if type(p.value) in (Tensor, torch.nn.Parameter))
        return Counter(t.untyped_storage().data_ptr() for t in tensors)

    # Back

    @_plainly
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
            _advise(error, "keep", "the state is whole where it was")
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

    def _install(self, place: _Place, move: Move) -> None:
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

    @_plainly
    def begin(self) -> int:
        """Start the way back of what was armed, beside the computation; bytes begun. Without memory on the device for
        it the rest waits for the end of the phase."""
        if _capturing():
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
                if not _out_of_memory(error):
                    raise
                self.counts.postponed += 1
                self._tell("postponed", "the device has no memory to call optimizer state back ahead of the phase's"
                           " end; it comes at its end (restore_lookahead=0 does not try)")  # fmt: skip
                break
            begun += slot.nbytes
        self.counts.ahead += begun
        return begun

    @_plainly
    def finish(self) -> int:
        """Give the optimizer what has come back by now, without waiting; bytes of it."""
        if _capturing():
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

    # Hooks of the optimizer

    def _before_step(self) -> None:
        """State of parameters that this step will change comes back, however it came to be away."""
        optimizer = self._optimizer()
        stepped = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None] if optimizer else []
        slots = self.slots(stepped)
        if not slots:
            return
        self.counts.late += sum(s.nbytes for s in slots)
        self._tell("late", f"{type(optimizer).__name__}.step() changes parameters whose state this phase sends away"
                   " (optimizer_state in its plan): it was called back, and the step waited")  # fmt: skip
        self.fetch(stepped).commit()

    def _with_values(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Values in place of slots, in host memory; the owners stay."""
        for index, state in state_dict["state"].items():
            if isinstance(state, dict) and any(isinstance(v, Slot) for v in state.values()):
                values = {k: v.value() if isinstance(v, Slot) else v for k, v in state.items()}
                state_dict["state"][index] = values
        return state_dict

    def _on_host(self, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """State that is loaded for what is away does not pass through the device."""
        optimizer, (away, strategy) = self._optimizer(), self.stay_away
        if optimizer is None or strategy not in ("offload", "pinned"):
            return None
        kept = {id(p) for p in away}
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        parameters = dict(zip(ids, (p for g in optimizer.param_groups for p in g["params"])))
        loaded = {}
        for index, state in state_dict["state"].items():
            parameter = parameters.get(index)
            if id(parameter) in kept and isinstance(state, dict):
                state = {k: self._host_slot(parameter, k, v, strategy) for k, v in state.items()}
            loaded[index] = state
        return {**state_dict, "state": loaded}

    def _host_slot(self, parameter: Tensor, key: str, value: Any, strategy: str) -> Any:
        """A slot in host memory for what `load_state_dict` would copy to the device as it is; others unchanged."""
        if type(value) is not Tensor or value.numel() < 2 or value.dtype != parameter.dtype or movable(value):
            return value
        copies = self._copies_of(parameter.device)
        slot = Slot(value.detach().clone() if value.device.type == "cpu" else value, copies)
        if strategy == "offload" or not self._pin(slot):
            slot.leave_pageable()
        slot.depart()
        slot.land(wait=True)
        slot.belongs_on(parameter.device)
        return slot

    def _send_loaded(self) -> None:
        """What was loaded to the device and belongs elsewhere in this phase goes there."""
        parameters, strategy = self.stay_away
        if strategy in AWAY:
            self.send(parameters, strategy).commit()

    # Pieces

    def _copies_of(self, device: torch.device) -> Copies:
        if device not in self._copies:
            self._copies[device] = copies_for(device)
        return self._copies[device]

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warn(TransferWarning, message)


def _call(manager: weakref.ref[StateManager], name: str, *args: Any) -> Any:
    live = manager()
    return None if live is None else getattr(live, name)(*args)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: copies would become a part of it, and run at every replay."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _advise(error: BaseException, strategy: str, what: str) -> None:
    """Say what to change, on whatever error it is."""
    if isinstance(error, PinnedMemoryError):
        remedy = "raise pinned_limit, leave pinned_required False, or use optimizer_state='offload' or 'compress'"
    elif strategy == "compress":
        remedy = "compressing holds the codes beside the state for a moment: use optimizer_state='offload' or 'drop'"
    else:
        remedy = "free memory of the device, use a smaller batch, or keep less there (optimizer_state='drop')"
    error.add_note(f"optimizer state: {what}; {remedy}")


def find_manager(optimizer: Optimizer | None) -> StateManager | None:
    """The optimizer's manager, if anything of it has ever been sent away."""
    return None if optimizer is None else optimizer.__dict__.get(_KEY)


def manager_of(optimizer: Optimizer) -> StateManager:
    """The optimizer's manager, made on first use."""
    found = find_manager(optimizer)
    if found is None:
        found = optimizer.__dict__[_KEY] = StateManager(optimizer)
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


def check_strategy(strategy: str) -> None:
    """ConfigError for a name that is none of `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"optimizer_state={strategy!r}: use one of {', '.join(STRATEGIES)}, or None for the plan's")

