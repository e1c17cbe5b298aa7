"""`ResuCycle`: train, prune, stabilize, RESU, commit, again and again, one `step(batch)` at a time.

The cycle of RESU (huy209vn/RESU). Pruning and the commit take no step: they happen at the end of the last step of the
stage before them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.passes import Phase, PhasePlan

from .config import CycleConfig, phase_steps
from .errors import ConfigError, PhaseError
from .events import PhaseEvent, StepEvent
from .losses import Loss, NonFiniteLossError, default_loss
from .metrics import PhaseMeter, PhaseSummary
from .model_state import managed_weights, other_parameters, state_of
from .optimizer_state import check_holds
from .phases import activate, set_phase
from .schedules import has_work
from .sparsify import CommitResult, commit, prune, total_sparsity
from .theta import clear_theta_gradients, step_theta, theta_gradients


class ResuCycle:
    """Trains a transformed model through the cycles of RESU.

    Args:
        model: transformed by `fxresu.transform`.
        optimizer: holds its parameters; stepped in every stage but RESU (there too with `train_rest`, for the rest).
        config: default is `CycleConfig` at the transform's sparsity, granularity and candidates.
        loss: `(model, batch) -> scalar`; default is `default_loss`.

    Raises:
        ConfigError: an optimizer that does not hold the weights, a configuration that contradicts the transform.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: CycleConfig | None = None,
        *,
        loss: Loss = default_loss,
    ) -> None:
        record = state_of(model)
        self.config = matching_config(model, config)
        check_holds(optimizer, managed_weights(model).values())
        self.model, self.optimizer, self.loss = model, optimizer, loss
        record.capacity_sparsity = max(
            record.capacity_sparsity, *(self.config.sparsity(c) for c in range(self.config.cycles))
        )
        self.cycle, self.stage, self.global_step = 0, "train", 0
        self.finished = False
        self.summaries: list[PhaseSummary] = []
        self.skipped: list[tuple[int, str]] = []
        self.meter = PhaseMeter()
        self._micro = 0
        self._micro_loss: Tensor | None = None
        self._frozen: list[Tensor] = []
        self._listeners: dict[str, list[Callable[[Any], None]]] = {"phase": [], "step": [], "commit": []}
        self._started = False

    # Reading

    @property
    def phase(self) -> Phase:
        """The model's current phase."""
        return state_of(self.model).state.plan.phase

    @property
    def plan(self) -> PhasePlan:
        """The current phase's plan."""
        return state_of(self.model).state.plan

    @property
    def accumulation(self) -> int:
        """Micro-batches for one update in this phase: the plan's, or the configuration's where the plan has 1."""
        return self.plan.accumulation if self.plan.accumulation > 1 else self.config.accumulation

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all cycles."""
        return self.config.cycles * self.config.steps_in_cycle

    def stage_steps(self, cycle: int) -> dict[str, int]:
        """Steps of each stage. Where nothing is pruned, stabilize and RESU have nothing to do: all steps train."""
        return stage_steps(self.config, cycle)

    # Events

    def on_phase(self, listener: Callable[[PhaseEvent], None]) -> Callable[[PhaseEvent], None]:
        """Call `listener` when a stage starts and ends. Usable as a decorator."""
        return self._listen("phase", listener)

    def on_step(self, listener: Callable[[StepEvent], None]) -> Callable[[StepEvent], None]:
        """Call `listener` after every optimizer step. Usable as a decorator."""
        return self._listen("step", listener)

    def on_commit(self, listener: Callable[[CommitResult], None]) -> Callable[[CommitResult], None]:
        """Call `listener` after every commit. Usable as a decorator."""
        return self._listen("commit", listener)

    def _listen(self, kind: str, listener: Callable[[Any], None]) -> Callable[[Any], None]:
        self._listeners[kind].append(listener)
        return listener

    def _tell(self, kind: str, event: Any) -> None:
        for listener in self._listeners[kind]:
            listener(event)

    # Training

    def step(self, batch: Any) -> Tensor:
        """Forward, backward and, once the phase's micro-batches are complete, the update; then stage changes if due.

        After the last commit further steps train the committed sparse model.

        Returns:
            The batch's loss, detached.

        Raises:
            NonFiniteLossError: before anything is updated; gradients accumulated so far are discarded.
        """
        if not self._started:
            self._start()
        parts = self.accumulation
        with self._autocast():
            loss = self.loss(self.model, batch)
        self._check_finite(loss)
        if loss.requires_grad:
            (loss / parts if parts > 1 else loss).backward()
        loss = loss.detach()
        self._micro += 1
        mean = loss / parts if self._micro_loss is None else self._micro_loss + loss / parts
        self._micro_loss = mean
        if self._micro >= parts:
            self._micro, self._micro_loss = 0, None
            self._update(mean)
        return loss

    def _start(self) -> None:
        self._started = True
        self._enter_train()
        self._tell("phase", self._event("start"))
        self._advance()

    def _check_finite(self, loss: Tensor) -> None:
        if bool(torch.isfinite(loss.detach())):
            return
        value, self._micro, self._micro_loss = float(loss.detach()), 0, None
        self._clear_gradients()
        raise NonFiniteLossError(
            f"loss={value} at step {self.global_step} (cycle {self.cycle}, {self.stage}): nothing was updated;"
            " lower the learning rate, clip gradients (grad_clip), or look at the batch"
        )

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        clear_theta_gradients(managed_weights(self.model).values())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.autocast is None:
            return contextlib.nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16)

    def _update(self, loss: Tensor) -> None:
        if self.plan.weights == "resu":
            self._update_theta()
        else:
            self._clip([p.grad for p in self.model.parameters() if p.grad is not None])
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_step(loss)

    def _update_theta(self) -> None:
        rest = [p.grad for _, p in other_parameters(self.model) if p.grad is not None]
        self._step_theta(self._clip(rest, theta_gradients(managed_weights(self.model).values())))
        if self.config.train_rest and rest:
            self.optimizer.step()

    def _step_theta(self, scale: float) -> None:
        """One update of θ, whose gradients are multiplied by `scale` first."""
        if self.config.train_theta:
            record = state_of(self.model)
            record.theta_steps += 1
            lr = self.config.resolved_theta_lr(self._managed_lr())
            stats = step_theta(managed_weights(self.model).values(), self.config, lr, record.theta_steps, scale)
            self.meter.theta(stats)

    def _count_step(self, loss: Tensor) -> None:
        """An optimizer step is done, by `step` or by the user's own loop (see `attach`)."""
        self.global_step += 1
        self.meter.step(loss)
        self._tell("step", StepEvent(self.global_step, self.cycle, self.stage, self.phase, loss))
        self._advance()

    def _managed_lr(self) -> float:
        """Learning rate of the group that holds the managed weights, as a scheduler left it."""
        managed = {id(m.parameter) for m in managed_weights(self.model).values()}
        group = next(g for g in self.optimizer.param_groups if any(id(p) in managed for p in g["params"]))
        return float(group["lr"])

    def _clip(self, grads: list[Tensor], theta: list[Tensor] | None = None) -> float:
        """Clip by the global norm over all gradients, θ's included; returns the factor, applied to `grads` only."""
        if self.config.grad_clip is None or not (grads or theta):
            return 1.0
        norm = nn.utils.get_total_norm([*grads, *(theta or [])])
        factor = min(1.0, self.config.grad_clip / (float(norm) + 1e-6))
        if factor < 1.0:
            for grad in grads:
                grad.mul_(factor)
        return factor

    # Stages

    def _advance(self) -> None:
        """Change the stage, as often as the current one is complete."""
        while not self.finished and self.meter.steps >= self.stage_steps(self.cycle)[self.stage]:
            self._end_stage()
            if not self.finished:
                self._tell("phase", self._event("start"))

    def _end_stage(self) -> None:
        sparsity = self.config.sparsity(self.cycle)
        summary = self._summary(sparsity)
        self._tell("phase", self._event("end", summary))
        if self.stage == "train" and has_work(sparsity):
            self._enter_stabilize(sparsity)
        elif self.stage == "stabilize" and has_work(sparsity):
            self._enter_resu()
        else:
            if self.stage == "resu":
                summary = self._commit(summary, sparsity)
            else:
                self.skipped += [(self.cycle, "stabilize"), (self.cycle, "resu")]
            self._next_cycle()
        self.summaries.append(summary)
        self.meter = PhaseMeter()

    def _next_cycle(self) -> None:
        if self.cycle + 1 >= self.config.cycles:
            self.finished = True
            return
        self.cycle, self.stage = self.cycle + 1, "train"
        self._enter_train()

    def _enter_train(self) -> None:
        """The published cycle trains under the current mask; without one, dense."""
        base = state_of(self.model).base
        set_phase(self.model, Phase.DENSE if base == "dense" else Phase.SPARSE, optimizer=self.optimizer)

    def _enter_stabilize(self, sparsity: float) -> None:
        prune(self.model, self.optimizer, sparsity=sparsity)
        activate(self.model, state_of(self.model).plans[Phase.SPARSE], self.optimizer)
        self.stage = "stabilize"

    def _enter_resu(self) -> None:
        config = self.config
        set_phase(
            self.model,
            Phase.RESU,
            optimizer=self.optimizer,
            theta_init=config.theta_init,
            theta_epsilon=config.theta_epsilon,
            train_theta=config.train_theta,
            rule=config.rule,
            optimizer_state=config.optimizer_state,
            moments=config.theta_moments,
            grad_dtype=self._theta_grad_dtype(),
            seed=config.seed,
        )
        self.stage = "resu"
        self._freeze_rest()

    def _theta_grad_dtype(self) -> torch.dtype:
        """bfloat16 where dW comes in it anyway; accumulated gradients are kept in float32."""
        low = self.config.autocast == "bf16" and self.accumulation == 1
        return torch.bfloat16 if low else torch.float32

    def _commit(self, summary: PhaseSummary, sparsity: float) -> PhaseSummary:
        config = self.config
        result = commit(
            self.model,
            self.optimizer,
            ratio=config.amnesty(self.cycle),
            sparsity=sparsity,
            rule=config.rule,
            betas=config.resolved_theta_betas(),
        )
        self._thaw_rest()
        activate(self.model, state_of(self.model).plans[Phase.SPARSE], self.optimizer)
        self._tell("commit", result)
        return dataclasses.replace(
            summary,
            sparsity=result.sparsity,
            resurrected=result.resurrected,
            kept=result.kept,
            dropped=result.dropped,
            churn=result.churn,
            resurrection_rate=result.resurrection_rate,
        )

    def _freeze_rest(self) -> None:
        """Without `train_rest` the optimizer is not stepped in RESU: no gradient for the rest is computed either."""
        if not self.config.train_rest:
            self._frozen = [p for _, p in other_parameters(self.model) if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def _thaw_rest(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _event(self, when: str, summary: PhaseSummary | None = None) -> PhaseEvent:
        return PhaseEvent(when, self.global_step, self.cycle, self.stage, self.phase, summary)

    def _summary(self, target: float) -> PhaseSummary:
        return PhaseSummary(
            cycle=self.cycle,
            stage=self.stage,
            phase=str(self.phase),
            target_sparsity=target,
            sparsity=total_sparsity(self.model),
            **self.meter.read(),
        )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Masks, θ, its moments, position and metrics: all that neither model nor optimizer hold. See `checkpoint`."""
        from .checkpoint import cycle_state

        return cycle_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model's and the optimizer's own state first."""
        from .checkpoint import load_cycle_state

        load_cycle_state(self, state)

    def save(self, path: str | Path, extra: Mapping[str, Any] | None = None, *, keep_last: int = 1) -> None:
        """Write model, optimizer, cycle and random states into a folder, atomically (see `checkpoint.save`)."""
        from .checkpoint import save

        save(self, path, extra, keep_last=keep_last)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Resume from a folder that `save` wrote and return its `extra`; verified before anything changes."""
        from .checkpoint import load

        return load(self, path)


def matching_config(model: nn.Module, config: CycleConfig | None = None) -> CycleConfig:
    """The configuration to run: the given one if it fits the transform, or one made from the transform."""
    record = state_of(model)
    if config is None:
        grain = record.granularity
        schedule: dict[str, Any] = {"schedule": "constant"} if grain.pattern_sparsity is not None else {}
        config = CycleConfig(
            sparsity_end=record.sparsity,
            granularity=str(grain),
            candidates=record.candidates,
            optimizer_state=record.plans[Phase.RESU].optimizer_state,
            **schedule,
        )
    for name, value, have in (
        ("granularity", config.granularity, str(record.granularity)),
        ("candidates", config.candidates, record.candidates),
    ):
        if value != have:
            raise ConfigError(
                f"config.{name}={value!r}, but the model was transformed with {name}={have!r}; give both the same"
            )
    if config.autocast == "fp16":
        raise ConfigError("config.autocast='fp16' needs loss scaling, which the cycle does not do; use 'bf16'")
    if record.base == "resu":
        raise PhaseError("the model is in RESU already; commit or discard θ (set_phase) before a cycle takes over")
    return config


def stage_steps(config: CycleConfig, cycle: int) -> dict[str, int]:
    """Steps of each stage of a cycle, all of them in "train" where nothing is pruned."""
    steps = phase_steps(config)
    if has_work(config.sparsity(cycle)):
        return steps
    return {"train": sum(steps.values()), "stabilize": 0, "resu": 0}


def phases_ahead(config: CycleConfig) -> Iterator[tuple[int, str, int, float]]:
    """(cycle, stage, steps, sparsity) of everything that a run will do; for displays and budgets."""
    for cycle in range(config.cycles):
        sparsity = config.sparsity(cycle)
        for stage, count in stage_steps(config, cycle).items():
            if stage == "train" or has_work(sparsity):
                yield cycle, stage, count, sparsity


__all__ = [
    "NonFiniteLossError",
    "PhaseEvent",
    "ResuCycle",
    "StepEvent",
    "default_loss",
    "phases_ahead",
]
