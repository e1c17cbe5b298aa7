"""`ResuCycle`: train, prune, stabilize, RESU, commit, again and again, one `step(batch)` at a time.

The cycle of RESU (huy209vn/RESU). Pruning and the commit take no step: they happen at the end of the last step of the
stage before them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.passes import Phase, PhasePlan

from .accumulation import Window, multiply_gradients, own_gradients
from .config import CycleConfig
from .cycle_plan import autocast_of, check_streamed, matching_config, phases_ahead, scaler_for, stage_steps
from .cycle_statistics import Batches, CycleStatistics
from .events import Listeners, PhaseEvent, StepEvent
from .losses import Loss, NonFiniteGradientError, NonFiniteLossError, default_loss
from .mask_change import actual_sparsity, total_sparsity
from .metrics import PhaseMeter, PhaseSummary
from .model_state import freeze_rest, managed_weights, state_of, thaw_rest
from .optimizer_state import check_holds, check_state
from .phase_state import restore_ahead
from .phases import activate, set_phase
from .runner import cast_statistics, uses_cuda_graphs
from .sparsify import Swaps, commit, drop_masks, prune, warm_start
from .state_manager import AWAY, TransferCounts, find_manager, manager_of
from .streamed import accumulating
from .survival import Cohorts
from .theta import ThetaOptimizer, clear_theta_gradients, rest_gradients, theta_gradients
from .updates import Updates


class ResuCycle(Listeners):
    """Trains a transformed model through the cycles of RESU.

    Args:
        model: transformed by `fxresu.transform`.
        optimizer: holds its parameters; stepped in every stage but RESU (there too with `train_rest`, for the rest).
        config: default is `CycleConfig` at the transform's sparsity, granularity and candidates.
        loss: `(model, batch) -> scalar`; default is `default_loss`.
        calibration: batches for scores that need statistics (see `cycle_statistics`): a list, a DataLoader, or a
            function that returns them. By default the last batches of the stage serve, as they come.
        scaler: for float16; default is a `GradScaler` of its own where a phase computes in float16.

    Attributes:
        theta_optimizer: θ as an optimizer, for learning-rate schedulers of its own.

    Raises:
        ConfigError: an optimizer that does not hold the weights or whose state cannot follow a mask, a configuration
            that contradicts the transform.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: CycleConfig | None = None,
        *,
        loss: Loss = default_loss,
        calibration: Batches | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__()
        record = state_of(model)
        self.config = matching_config(model, config)
        check_holds(optimizer, managed_weights(model).values())
        check_state(optimizer, managed_weights(model).values())
        check_streamed(model, optimizer, self.config, scaler)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.statistics = CycleStatistics(model, self.config, self._calibration_loss, calibration)
        for cycle in range(self.config.cycles):
            if self.config.has_work(cycle):
                self.statistics.check_steps(self.stage_steps(cycle))
        self.theta_optimizer = ThetaOptimizer(model, self.config, follow=optimizer)
        self.updates = Updates(scaler_for(model, self.config, scaler), self.config.grad_clip)
        self.survival = Cohorts(self.config.survival_cohorts)
        record.distribution = self.config.distribution
        record.capacity_sparsity = max(
            record.capacity_sparsity, *(self.config.sparsity(c) for c in range(self.config.cycles))
        )
        self.cycle, self.stage, self.global_step = 0, "train", 0
        self.finished = False
        self.summaries: list[PhaseSummary] = []
        self.skipped: list[tuple[int, str]] = []
        self.meter = PhaseMeter()
        self._window: Window | None = None
        self._started = False
        self._moved = TransferCounts()
        if self.config.optimizer_state in AWAY:
            self._limit_pinned()

    # Reading

    @property
    def phase(self) -> Phase:
        """The model's current phase."""
        return state_of(self.model).state.plan.phase

    @property
    def plan(self) -> PhasePlan:
        """The current phase's plan."""
        return state_of(self.model).state.plan

    def plan_of(self, phase: Phase) -> PhasePlan:
        """A phase's plan, with the configuration's word on the optimizer's state in RESU."""
        plan, config = state_of(self.model).plans[phase], self.config
        if phase is not Phase.RESU:
            return plan
        return dataclasses.replace(
            plan, optimizer_state=config.optimizer_state, restore_lookahead=config.restore_lookahead
        )

    @property
    def accumulation(self) -> int:
        """Micro-batches for one update in this phase: the plan's, or the configuration's where the plan has 1."""
        return self._accumulation(self.plan)

    def _accumulation(self, plan: PhasePlan) -> int:
        return plan.accumulation if plan.accumulation > 1 else self.config.accumulation

    @property
    def accumulated(self) -> int:
        """Micro-batches since the last update."""
        return 0 if self._window is None else self._window.count

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler, where a phase computes in float16."""
        return self.updates.scaler

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all cycles."""
        return self.config.cycles * self.config.steps_in_cycle

    def stage_steps(self, cycle: int) -> dict[str, int]:
        """Steps of each stage. Where nothing is pruned, stabilize and RESU have nothing to do: all steps train."""
        return stage_steps(self.config, cycle)

    # Training

    def step(self, batch: Any, *, weight: float | None = None) -> Tensor:
        """Forward, backward and, once the phase's micro-batches are complete, the update; then stage changes if due.

        After the last commit further steps train the committed sparse model. Micro-batches of a phase that was changed
        by hand (`set_phase`) before their update are dropped, and counted (`PhaseSummary.dropped_micro_batches`).

        Args:
            weight: of the micro-batch in its step (its tokens), where `accumulation_normalization` is "tokens".

        Returns:
            The batch's loss, detached.

        Raises:
            NonFiniteLossError: before anything is updated; gradients accumulated so far are discarded.
            ConfigError: a weight that is missing, or that nothing asks for.
        """
        if not self._started:
            self._start()
        window = self._open_window()
        self.observe(functools.partial(self._calibration_loss, batch))
        with self._autocast():
            loss = self.loss(self.model, batch)
        self._check_finite(loss)
        weighted = window.add(loss, weight)
        if loss.requires_grad:
            # A streamed optimizer uses gradients as they come, so they must be final.
            with accumulating(self.optimizer, not window.full or window.remedy != 1.0):
                self.updates.backward(weighted)
        if window.full:
            self.flush()
        elif window.count == 1 and self._graphed():
            own_gradients(self.model)
        return loss.detach()

    def flush(self) -> bool:
        """Update with the micro-batches of a window that is not complete: the last of an epoch, say. The gradient is
        normalised by what the window holds.

        Returns:
            Whether there were any.
        """
        window, self._window = self._window, None
        if window is None or not window.count:
            return False
        multiply_gradients(self.model, window.remedy)
        self._update(window.loss())
        return True

    def _open_window(self) -> Window:
        place = (self.cycle, self.stage, self.plan)
        if self._window is not None and self._window.place != place:
            self.meter.drop(self._window.count)
            self._forget_gradients()
        if self._window is None:
            config = self.config
            scale = 1.0 if config.accumulation_scale is None else config.accumulation_scale
            self._window = Window(place, self.accumulation, config.accumulation_normalization, scale)
        return self._window

    def _graphed(self) -> bool:
        """Whether CUDA graphs replay the backward, into the same memory every time."""
        return self.accumulation > 1 and uses_cuda_graphs(self.model)

    def _start(self) -> None:
        if self.config.warm_start:
            warm_start(self.model, self.optimizer)
        self._started = True
        self._enter_train()
        self._tell("phase", self._event("start"))
        self._advance()

    def _check_finite(self, loss: Tensor) -> None:
        if bool(torch.isfinite(loss.detach())):
            return
        self._forget_gradients()
        raise NonFiniteLossError(
            f"loss={float(loss.detach())} at step {self.global_step} (cycle {self.cycle}, {self.stage}): nothing was"
            " updated; lower the learning rate, clip gradients (grad_clip), or look at the batch"
        )

    def _forget_gradients(self) -> None:
        self._window = None
        self.optimizer.zero_grad(set_to_none=True)
        clear_theta_gradients(managed_weights(self.model).values())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast_of(self.model, self.config.autocast)

    def _update(self, loss: Tensor) -> None:
        updated = self._update_theta() if self.plan.weights == "resu" else self._update_weights()
        if not updated:
            self.meter.skip()
        self.optimizer.zero_grad(set_to_none=True)
        self.theta_optimizer.zero_grad()
        self._count_step(loss)

    def _update_weights(self) -> bool:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return self._apply(grads, [], lambda factor: self.optimizer.step())

    def _update_theta(self) -> bool:
        rest = rest_gradients(self.model) if self.config.train_rest else []

        def update(factor: float) -> None:
            self._step_theta(factor)
            if rest:
                self.optimizer.step()

        return self._apply(rest, theta_gradients(managed_weights(self.model).values()), update)

    def _apply(self, grads: list[Tensor], theta: list[Tensor], update: Callable[[float], None]) -> bool:
        try:
            return self.updates.apply({self.optimizer: grads, self.theta_optimizer: theta}, update)
        except NonFiniteGradientError as error:
            self._forget_gradients()
            raise NonFiniteGradientError(
                f"the gradient at step {self.global_step} (cycle {self.cycle}, {self.stage}) {error}"
            ) from None

    def _step_theta(self, scale: float) -> None:
        """One update of θ, whose gradients are multiplied by `scale` first."""
        if self.config.train_theta:
            self.theta_optimizer.factor = self.config.theta_lr_factor(self.meter.steps)
            self.theta_optimizer.step(grad_scale=scale)
            if self.theta_optimizer.last_stats is not None:
                self.meter.theta(self.theta_optimizer.last_stats)

    def _count_step(self, loss: Tensor) -> None:
        """An optimizer step is done, by `step` or by the user's own loop (see `attach`)."""
        self.global_step += 1
        self.meter.step(loss)
        self._tell("step", StepEvent(self.global_step, self.cycle, self.stage, self.phase, loss))
        self._look_ahead()
        self._advance()

    def _look_ahead(self) -> None:
        """State that the next stage needs comes back beside the last steps of this one."""
        left = self.stage_steps(self.cycle)[self.stage] - self.meter.steps
        if left > 0 and not self.finished:
            restore_ahead(self.model, left)

    def _limit_pinned(self) -> None:
        manager, limit = manager_of(self.optimizer), self.config.pinned_limit
        manager.pinned_limit = None if limit is None else int(limit * 1e9)
        manager.pinned_required = self.config.pinned_required

    def _clip(self, grads: list[Tensor], theta: list[Tensor] | None = None) -> float:
        """Clip by the global norm over all gradients, θ's included; returns the factor, applied to `grads` only."""
        return self.updates.clip(grads, theta or [])

    # Statistics for scores

    def observe(self, loss: Callable[[], Any]) -> None:
        """Let a micro-batch count in the statistics of the coming transition, if that is near and its score needs some;
        `loss()` computes the batch's loss. `step` does this for its batches; a loop of one's own calls it before each
        forward, or gives `calibration`."""
        if not self.finished and self._transition_ahead():
            left = self.stage_steps(self.cycle)[self.stage] - self.meter.steps
            self.statistics.observe(self.stage, loss, left * self.accumulation - self.accumulated)

    def _transition_ahead(self) -> bool:
        return self.config.has_work(self.cycle) and (self.stage != "train" or self._will_prune())

    def _calibration_loss(self, batch: Any) -> Tensor:
        # Unscaled gradients vanish in float16.
        with autocast_of(self.model, None if self.config.autocast == "fp16" else self.config.autocast):
            return self.loss(self.model, batch)

    # Stages

    def _advance(self) -> None:
        """Change the stage, as often as the current one is complete."""
        while not self.finished and self.meter.steps >= self.stage_steps(self.cycle)[self.stage]:
            self._end_stage()
            if not self.finished:
                self._tell("phase", self._event("start"))

    def _end_stage(self) -> None:
        sparsity, work = self.config.sparsity(self.cycle), self.config.has_work(self.cycle)
        summary = self._summary(sparsity)
        self._tell("phase", self._event("end", summary))
        if self.stage == "train" and work:
            summary = self._enter_stabilize(summary, sparsity)
        elif self.stage == "stabilize" and work:
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

    def _will_prune(self) -> bool:
        """A mask that is sparser than the cycle's target stays for RESU: the commit makes it denser."""
        record = state_of(self.model)
        return record.base == "dense" or self.config.sparsity(self.cycle) >= record.nominal_sparsity - 1e-9

    def _enter_stabilize(self, summary: PhaseSummary, sparsity: float) -> PhaseSummary:
        config = self.config
        change = None
        if self._will_prune():
            swaps = Swaps(config.dsnot_swaps, config.dsnot_threshold, config.dsnot_variance_power)
            change = prune(
                self.model,
                self.optimizer,
                sparsity=sparsity,
                score=config.prune_score,
                statistics=self.statistics.take("train"),
                distribution=config.distribution,
                stabilizer=swaps if config.stabilizer == "dsnot" else None,
                alpha=config.wanda_alpha,
                seed=config.seed,
            )
            summary = summary.changed(change, self.survival.survival(self.model))
        activate(self.model, state_of(self.model).plans[Phase.SPARSE], self.optimizer)
        self.stage = "stabilize"
        if change is not None:
            self._tell("prune", change)
        return summary

    def _enter_resu(self) -> None:
        self._freeze_rest()
        try:
            self._start_resu()
        except BaseException:
            self._thaw_rest()
            raise
        self.stage = "resu"
        self.theta_optimizer.begin_phase()

    def _start_resu(self) -> None:
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
            restore_lookahead=config.restore_lookahead,
            moments=config.theta_moments,
            grad_dtype=self._theta_grad_dtype(),
            seed=config.seed,
        )

    def _theta_grad_dtype(self) -> torch.dtype:
        """bfloat16 where dW comes in it anyway; accumulated gradients are kept in float32."""
        plan = state_of(self.model).plans[Phase.RESU]
        low = self.config.autocast == "bf16" and self._accumulation(plan) == 1
        return torch.bfloat16 if low else torch.float32

    def _commit(self, summary: PhaseSummary, sparsity: float) -> PhaseSummary:
        config, old = self.config, self.survival.before(self.model)
        change = commit(
            self.model,
            self.optimizer,
            method=config.commit,
            ratio=config.amnesty(self.cycle),
            threshold=config.commit_threshold,
            sparsity=sparsity,
            score=config.commit_score,
            statistics=self.statistics.take("resu"),
            alpha=config.wanda_alpha,
            seed=config.seed + self.cycle + 1,
            rule=config.rule,
            betas=config.resolved_theta_betas(),
        )
        self.survival.after(self.cycle, self.model, old)
        self._thaw_rest()
        if change.sparsity == 0.0:
            drop_masks(self.model, self.optimizer)
        plan = Phase.DENSE if change.sparsity == 0.0 else Phase.SPARSE
        activate(self.model, state_of(self.model).plans[plan], self.optimizer)
        self._tell("commit", change)
        budget = config.amnesty(self.cycle) if config.commit == "amnesty" else 0.0
        return summary.changed(change, self.survival.survival(self.model), budget)

    def _freeze_rest(self) -> None:
        """Without `train_rest` the optimizer is not stepped in RESU: no gradient for the rest is computed either."""
        if not self.config.train_rest:
            freeze_rest(self.model)

    def _thaw_rest(self) -> None:
        thaw_rest(self.model)

    def _event(self, when: str, summary: PhaseSummary | None = None) -> PhaseEvent:
        return PhaseEvent(when, self.global_step, self.cycle, self.stage, self.phase, summary)

    def _summary(self, target: float) -> PhaseSummary:
        return PhaseSummary(
            cycle=self.cycle,
            stage=self.stage,
            phase=str(self.phase),
            target_sparsity=target,
            sparsity=total_sparsity(self.model),
            layer_sparsity=actual_sparsity(self.model),
            survival=self.survival.survival(self.model),
            **self.meter.read(),
            **self._transfers(),
            **cast_statistics(self.model),
        )

    def _transfers(self) -> dict[str, Any]:
        """What the optimizer's state has moved since the last stage's end."""
        manager = find_manager(self.optimizer)
        if manager is None:
            return {}
        counts, earlier = manager.read_counts(), self._moved
        self._moved = counts
        return {f"state_{name}": value for name, value in dataclasses.asdict(counts.since(earlier)).items()}

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


__all__ = [
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "PhaseEvent",
    "ResuCycle",
    "StepEvent",
    "default_loss",
    "matching_config",
    "phases_ahead",
]
