"""`set_phase`: from any phase to any other, or a reason why not."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import apply_mask_, fp8, pack
from fxresu.kernels.theta_rules import RULES
from fxresu.passes import Phase, PhasePlan

from . import weight_storage
from .candidates import THETA_INITS
from .errors import ConfigError, PhaseError
from .host_values import on_host
from .managed import ManagedWeight
from .model_state import Managed, managed_weights, state_of, stream_of
from .optimizer_state import check_holds
from .phase_state import settle, untrained
from .resurrection import MOMENTS, check_theta_dtype, discard_theta, start_theta
from .runner import runner_of
from .sparsify import commit, drop_masks, prune
from .state_manager import check_strategy, find_manager
from .streamed import StreamedAdamW
from .theta_layout import undone_on_error, unpack

log = logging.getLogger("fxresu")

LEAVE = ("commit", "discard")
_PATIENCE = 100  # steps after which a weight that has not moved is no longer watched: each look waits for the device


def current_phase(model: nn.Module) -> Phase:
    """The phase the model is in."""
    return state_of(model).state.plan.phase


def set_phase(
    model: nn.Module,
    phase: Phase | str,
    *,
    optimizer: Optimizer | None = None,
    sparsity: float | None = None,
    theta_init: str = "normal",
    theta_epsilon: float = 0.1,
    train_theta: bool = True,
    rule: str = "selective",
    optimizer_state: str | None = None,
    restore_lookahead: int | None = None,
    moments: str = "fp32",
    grad_dtype: torch.dtype = torch.float32,
    theta_dtype: str = "fp32",
    betas: tuple[float, float] = (0.9, 0.9),
    leave: str = "commit",
    amnesty: float = 0.1,
    seed: int = 0,
) -> Any:
    """Bring the model into a phase: weights, masks, θ, optimizer state, and the plan that the next call compiles for.

    ==================  ==================================================================================
    to                  what happens to the weights
    ==================  ==================================================================================
    warmup, dense       from sparse: the mask is given up. From RESU: W_eff becomes W, the mask is given up.
    sparse              from dense: pruned by magnitude. From sparse: pruned further if `sparsity` is given.
                        From RESU: `leave="commit"` by amnesty, or "discard" θ.
    resu                from sparse: θ is initialised. From dense: pruned first. After predict or correct: goes on.
    predict, correct    nothing; forward only. The phase before can be resumed with its masks and θ.
    ==================  ==================================================================================

    Args:
        optimizer: the one that trains the weights; its moments follow. Needed wherever weights or masks change.
        sparsity: of the new masks in [0, 1); default as before, or the transform's.
        theta_init, theta_epsilon, train_theta: θ's start ("normal", "uniform", "zero"; ε) and whether it trains.
        rule, betas: θ's update rule and moment decays, which decide what moments it has.
        optimizer_state: what becomes of the state that the phase does not train: "keep", "drop", "offload", "pinned" or
            "compress" (see `PhasePlan`); default is the plan's. So with restore_lookahead, in steps.
        moments: storage of θ's moments: "fp32", "bf16" or "8bit" (blockwise, rounded stochastically).
        theta_dtype: storage of θ in packed storage and beside weights of lower precision: "fp32" or "bf16", rounded
            stochastically.
        grad_dtype: of dθ, but in packed storage, where it is θ's; torch.bfloat16 loses nothing where the weight's
            gradient comes in it and is not accumulated.
        leave: what becomes of θ on the way from RESU to sparse.
        amnesty: share of the kept slots that a commit gives to candidates.
        seed: of θ's initial values.

    Returns:
        The `MaskChange` of a commit, else None.

    Raises:
        PhaseError: a backward of the old phase is pending, or the move is impossible.
        ConfigError: an argument does not fit. The model is unchanged in both cases.

    Any other error (out of memory) leaves it unchanged too; on the way from dense to RESU, pruned and in sparse.
    """
    try:
        target = Phase.parse(phase)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    record = state_of(model)
    if leave not in LEAVE:
        raise ConfigError(f"leave={leave!r}: use one of {', '.join(LEAVE)}")
    _refuse_pending(model, target)
    plan, result = _planned(record.plans[target], optimizer_state, restore_lookahead), None
    _refuse_precision(model, plan)
    check_holds(optimizer, managed_weights(model).values())
    if isinstance(optimizer, StreamedAdamW):
        optimizer.check_phases(model)
    _check_values(sparsity, theta_init, theta_epsilon, rule, amnesty, moments)
    if (stream := stream_of(model)) is not None:
        stream.send_home()  # blocks that have stayed on the device leave their room to the transition
    if plan.weights == "resu" and record.base != "resu":
        check_theta_dtype(model, theta_dtype)
    if plan.weights == "dense" and record.base != "dense":
        drop_masks(model, optimizer, rule=rule, betas=betas)
    elif plan.weights == "sparse" and record.base != "resu":
        if record.base == "dense" or sparsity is not None:
            prune(model, optimizer, sparsity=sparsity)
    elif plan.weights == "sparse" and leave == "commit":
        result = commit(model, optimizer, ratio=amnesty, sparsity=sparsity, rule=rule, betas=betas)
    elif plan.weights == "sparse":
        discard_theta(model, optimizer)
    elif plan.weights == "resu" and record.base != "resu":
        if record.base == "dense" or sparsity is not None:
            prune(model, optimizer, sparsity=sparsity)
            activate(model, record.plans[Phase.SPARSE], optimizer)  # where an error in what follows leaves the model
        start_theta(
            model,
            optimizer,
            init=theta_init,
            epsilon=theta_epsilon,
            seed=seed,
            rule=rule,
            trains=train_theta,
            optimizer_state=plan.optimizer_state,
            moments=moments,
            grad_dtype=grad_dtype,
            theta_dtype=theta_dtype,
            send=lambda: settle(model, plan, optimizer),
        )
    elif record.base == "resu" and record.storage == "offload":
        with undone_on_error() as undo:
            move = settle(model, plan, optimizer)
            undo(move.rollback)
            _place_weights(model, plan, undo)
        move.commit()
    activate(model, plan, optimizer)
    return result


def _planned(plan: PhasePlan, optimizer_state: str | None, restore_lookahead: int | None) -> PhasePlan:
    """The plan, with another word on the optimizer's state if one is given."""
    if optimizer_state is not None:
        check_strategy(optimizer_state)
    given = {"optimizer_state": optimizer_state, "restore_lookahead": restore_lookahead}
    try:
        return dataclasses.replace(plan, **{k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _place_weights(model: nn.Module, plan: PhasePlan, undo: Callable[..., object]) -> None:
    """Offloaded weights come back for a forward-only phase, which computes in its own precision, and leave again for
    RESU."""
    for managed in managed_weights(model).values():
        if plan.weights == "resu" and not managed.entry.packed:
            weight_storage.send_away(managed.entry, managed.parameter, "offload")
            undo(weight_storage.unpack_into, managed.entry, managed.parameter)
        elif plan.weights != "resu":
            unpack(managed, undo)


def _check_values(sparsity: float | None, init: str, epsilon: float, rule: str, amnesty: float, moments: str) -> None:
    """Refuse what a later part of a transition would refuse, before its first part changes anything."""
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity={sparsity!r}: use a number in [0, 1), the share of pruned coordinates")
    if init not in THETA_INITS:
        raise ConfigError(f"theta_init={init!r} is unknown; use one of {', '.join(THETA_INITS)}")
    if not 0 <= epsilon < float("inf"):
        raise ConfigError(f"theta_epsilon={epsilon!r}: use a finite number >= 0")
    if rule not in RULES:
        raise ConfigError(f"rule={rule!r} is unknown; use one of {', '.join(RULES)}")
    if moments not in MOMENTS:
        raise ConfigError(f"moments={moments!r} is unknown; use one of {', '.join(MOMENTS)}")
    if not 0 <= amnesty <= 1:
        raise ConfigError(f"amnesty={amnesty!r}: use a number in [0, 1], the share of slots for candidates")


def activate(model: nn.Module, plan: PhasePlan, optimizer: Optimizer | None) -> None:
    """Make `plan` the one that reads of managed weights and the next call follow, with the optimizer's state where it
    says. Nothing has changed after an error."""
    record = state_of(model)
    move = settle(model, plan, optimizer)
    record.state.set(plan)
    move.commit()
    if (manager := find_manager(optimizer)) is not None:
        manager.stay_away = untrained(model, plan), plan.optimizer_state
    record.transfers = manager if plan.transfers else None
    for managed in managed_weights(model).values():
        managed.entry.remove_hook()
        managed.parameter.grad = None
    if record.watch is not None:
        record.watch.remove()
        record.watch = None
    if isinstance(optimizer, StreamedAdamW):
        optimizer.follow(model)  # it updates in the backward, and keeps what is zero at zero by itself
    elif optimizer is not None and plan.weights in ("sparse", "resu"):
        record.watch = StepWatch(model, optimizer, plan.weights)


def _refuse_precision(model: nn.Module, plan: PhasePlan) -> None:
    """fp8 on a device that has no such products."""
    if "fp8" in (plan.precision, *(p for _, p in plan.precision_overrides)):
        first = next(iter(managed_weights(model).values()))
        device = first.entry.device(first.parameter)
        if why := fp8.unsupported(device):
            raise ConfigError(f"precision='fp8' in the plan of {plan.phase}: {why}; use 'bf16'")


def _refuse_pending(model: nn.Module, target: Phase) -> None:
    if runner_of(model).backward_pending:
        raise PhaseError(
            f"phase={str(target)!r}: a forward of phase {current_phase(model)} has not run its backward yet;"
            " call backward(), or drop the loss, before changing the phase"
        )


class StepWatch:
    """Observes the optimizer's first steps of a phase and acts on what they did to weights that must not move.

    Sparse: an optimizer that moves pruned coordinates although gradient and moments are zero there (Muon does) gets a
    projection after every step. RESU: one that moves frozen weights is refused.

    Attributes:
        projecting: FQNs of the weights that are projected after every step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, weights: str) -> None:
        self._model = weakref.ref(model)
        self.weights = weights
        self.projecting: list[str] = []
        self._before: dict[str, Tensor] = {}  # checksums, to see which weights a step has moved
        self._unproved = set(managed_weights(model))  # not yet seen to move: nothing is known about them
        self._patience = _PATIENCE
        self._pre = optimizer.register_step_pre_hook(self._before_step)
        self._post = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Stop watching."""
        self._pre.remove()
        self._post.remove()

    def _managed(self) -> dict[str, Managed]:
        model = self._model()
        return {} if model is None else managed_weights(model)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._before = {
            n: _checksum(m)
            for n, m in self._managed().items()
            if n in self._unproved and m.parameter.requires_grad and not m.entry.packed
        }

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        weights = self._managed()
        for name in self.projecting:
            _project(weights[name])
        if not self._unproved:
            return
        after = {n: _checksum(weights[n]) for n in self._before}
        moved = _which({n: after[n] != before for n, before in self._before.items()})
        if self.weights == "resu":
            self._refuse_moved(optimizer, moved)
        else:
            self._probe_pruned(optimizer, {n: weights[n] for n in moved})

    def _refuse_moved(self, optimizer: Optimizer, moved: list[str]) -> None:
        if moved:
            raise PhaseError(
                f"optimizer={type(optimizer).__name__} moved {len(moved)} frozen weights in RESU, such as {moved[0]!r},"
                " although their gradients are None; take managed weights out of its parameter groups for this phase"
            )
        if any(float(group.get("lr", 1.0)) != 0 for group in optimizer.param_groups):
            self.remove()

    def _probe_pruned(self, optimizer: Optimizer, moved: Mapping[str, Managed]) -> None:
        """Judge the weights that this step moved: one that a step leaves alone (learning rate 0) proves nothing."""
        found = _which({n: _pruned_nonzero(m.entry, m.parameter) for n, m in moved.items()})
        self._unproved -= moved.keys()
        self._patience -= 1
        if self._patience == 0:
            self._unproved.clear()
        for name in found:
            _project(moved[name])
        if found:
            log.warning(
                "%s moves pruned coordinates of %d weights (such as %s); they are projected back after every step",
                type(optimizer).__name__, len(found), found[0],
            )  # fmt: skip
        self.projecting += found
        if not self._unproved:
            self._pre.remove()
            if not self.projecting:
                self.remove()


def _project(managed: Managed) -> None:
    apply_mask_(managed.entry.matrix(managed.parameter), managed.entry.bits)


def _which(flags: Mapping[str, Tensor]) -> list[str]:
    """Names whose flag is set."""
    return [name for name, told in on_host(flags).items() if told]


def _pruned_nonzero(entry: ManagedWeight, parameter: Tensor) -> Tensor:
    assert entry.bits is not None
    return (pack(entry.matrix(parameter).ne(0)) & ~entry.bits).any()


def _checksum(managed: Managed) -> Tensor:
    """A sum over the bit patterns, so that any moved element shows. Where a backward may update θ, it may do so within
    the step (a closure's): active coordinates only."""
    entry, matrix = managed.entry, managed.entry.matrix(managed.parameter)
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()]
    patterns = matrix.contiguous().view(view)
    if entry.consume is not None and entry.anchor is not None and (mask := entry.mask()) is not None:
        patterns = patterns.masked_fill(~mask, 0)
    elif patterns.nbytes % 8 == 0 and patterns.storage_offset() * patterns.element_size() % 8 == 0:
        patterns = patterns.view(-1).view(torch.int64)  # a sum of narrower ones would make a copy of all in int64
    return patterns.sum(dtype=torch.int64)


def projected_weights(model: nn.Module) -> list[str]:
    """FQNs of managed weights whose optimizer has to be projected in this sparse phase."""
    watch = state_of(model).watch
    return list(watch.projecting) if watch is not None else []


__all__ = ["LEAVE", "StepWatch", "activate", "current_phase", "projected_weights", "set_phase"]
