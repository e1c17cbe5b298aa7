"""The stages of a cycle: where it is, and how it goes from training to the mask, through RESU, to the commit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxresu.passes import Phase, PhasePlan

from .config import CycleConfig
from .cycle_plan import stage_steps
from .cycle_statistics import CycleStatistics
from .events import Listeners, PhaseEvent
from .mask_change import actual_sparsity, total_sparsity
from .metrics import PhaseMeter, PhaseSummary
from .model_state import freeze_rest, state_of, thaw_rest
from .phase_state import restore_ahead
from .phases import activate, set_phase
from .runner import cast_statistics
from .sparsify import Swaps, commit, drop_masks, prune
from .state_manager import AWAY, TransferCounts, find_manager, manager_of
from .survival import Cohorts
from .theta import ThetaOptimizer

__all__ = ["Stages"]


class Stages(Listeners):
    """Where a cycle is, and its transitions; whoever takes the steps counts them in `meter` and calls `_advance`.

    Attributes:
        cycle, stage: where it is: "train", "stabilize" or "resu" of this cycle.
        global_step: optimizer steps so far.
        finished: whether the last commit is done.
        meter: counts the present stage's steps.
        summaries: of the stages that are over.
        skipped: (cycle, stage) that had nothing to do.
        survival: what became of the coordinates that earlier commits resurrected.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: CycleConfig,
        statistics: CycleStatistics,
        theta_optimizer: ThetaOptimizer,
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.config = model, optimizer, config
        self.statistics, self.theta_optimizer = statistics, theta_optimizer
        self.survival = Cohorts(config.survival_cohorts)
        record = state_of(model)
        record.distribution = config.distribution
        record.capacity_sparsity = max(record.capacity_sparsity, *(config.sparsity(c) for c in range(config.cycles)))
        self.cycle, self.stage, self.global_step = 0, "train", 0
        self.finished = False
        self.summaries: list[PhaseSummary] = []
        self.skipped: list[tuple[int, str]] = []
        self.meter = PhaseMeter()
        self._moved = TransferCounts()
        if config.optimizer_state in AWAY:
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
    def total_steps(self) -> int:
        """Optimizer steps of all cycles."""
        return self.config.cycles * self.config.steps_in_cycle

    def stage_steps(self, cycle: int) -> dict[str, int]:
        """Steps of each stage. Where nothing is pruned, stabilize and RESU have nothing to do: all steps train."""
        return stage_steps(self.config, cycle)

    # From stage to stage

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
            theta_dtype=config.theta_dtype,
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
        self.survival.after(self.cycle, self.model, old, change.resurrected)
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

    def _look_ahead(self) -> None:
        """State that the next stage needs comes back beside the last steps of this one."""
        left = self.stage_steps(self.cycle)[self.stage] - self.meter.steps
        if left > 0 and not self.finished:
            restore_ahead(self.model, left)

    def _limit_pinned(self) -> None:
        manager, limit = manager_of(self.optimizer), self.config.pinned_limit
        manager.pinned_limit = None if limit is None else int(limit * 1e9)
        manager.pinned_required = self.config.pinned_required

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
