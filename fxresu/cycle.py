"""`ResuCycle`: train, prune, stabilize, RESU, commit, again and again, one `step(batch)` at a time.

The cycle of RESU (huy209vn/RESU). Pruning and the commit take no step: they happen at the end of the last step of the
stage before them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import read_number
from fxresu.passes.notices import listed

from .accumulation import Window, multiply_gradients, own_gradients
from .config import CycleConfig
from .cycle_plan import (
    autocast_of,
    check_in_backward,
    check_streamed,
    matching_config,
    phases_ahead,
    scaler_for,
    stage_steps,
)
from .cycle_stages import Stages
from .cycle_statistics import Batches, CycleStatistics
from .events import PhaseEvent, StepEvent
from .losses import Loss, NonFiniteGradientError, NonFiniteLossError, default_loss
from .model_state import managed_weights
from .optimizer_state import check_holds, check_state
from .resurrection import check_theta_dtype
from .runner import uses_cuda_graphs
from .sparsify import warm_start
from .streamed import StreamedAdamW, accumulating
from .theta import ThetaOptimizer, rest_gradients, theta_gradients
from .updates import Updates


class ResuCycle(Stages):
    """Trains a transformed model through the cycles of RESU. The stages are `cycle_stages`', the steps are here.

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
        config = matching_config(model, config)
        check_holds(optimizer, managed_weights(model).values())
        check_state(optimizer, managed_weights(model).values())
        check_streamed(model, optimizer, config, scaler)
        check_in_backward(model, config, scaler)
        check_theta_dtype(model, config.theta_dtype)
        statistics = CycleStatistics(model, config, self._calibration_loss, calibration)
        for cycle in range(config.cycles):
            if config.has_work(cycle):
                statistics.check_steps(stage_steps(config, cycle))
        theta_optimizer = ThetaOptimizer(model, config, follow=optimizer)
        self.updates = Updates(scaler_for(model, config, scaler), config.grad_clip)
        super().__init__(model, optimizer, config, statistics, theta_optimizer)
        self.loss = loss
        self._window: Window | None = None
        self._started = False

    # Reading

    @property
    def accumulated(self) -> int:
        """Micro-batches since the last update."""
        return 0 if self._window is None else self._window.count

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler, where a phase computes in float16."""
        return self.updates.scaler

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
            Exception: of the model or its backward: the gradients of the step are discarded. With `theta_in_backward`
                θ of some weights may have been updated, which a note on the error says.
            ConfigError: a weight that is missing, or that nothing asks for.
        """
        if not self._started:
            self._start()
        window = self._open_window()
        self._set_theta_rate()
        self.observe(functools.partial(self._calibration_loss, batch))
        with self._autocast():
            loss = self.loss(self.model, batch)
        self._check_finite(loss)
        # A CUDA graph's output is overwritten by its next replay, and callers keep losses.
        shown = loss.detach().clone() if uses_cuda_graphs(self.model) else loss.detach()
        weighted = window.add(loss, weight)
        if loss.requires_grad:
            self._backward(weighted, more=not window.full or window.remedy != 1.0)
        if window.full:
            self.flush()
        elif window.count == 1 and self._graphed():
            own_gradients(self.model)
        return shown

    def _backward(self, loss: Tensor, more: bool) -> None:
        """Backward of a micro-batch's part of the loss; `more` of the same step follows it."""
        try:
            # What uses gradients as they come needs to know whether they are final.
            with accumulating(self.optimizer, more), self.theta_optimizer.accumulate(more):
                self.updates.backward(loss)
        except BaseException as error:
            if names := self.theta_optimizer.abandon():
                of = f"{len(names)} of {len(managed_weights(self.model))} managed weights"
                error.add_note(
                    f"fxresu: theta_in_backward=True, and θ of {of} had been updated when the backward of step"
                    f" {self.global_step} failed ({listed(names)}); it stays so, and the step is not counted. Go on"
                    " with the next batch, or load a checkpoint"
                )
            self._forget_gradients()
            raise

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
        self.survival.reserve(self.model, self.config.cycles)
        self._enter_train()
        self._tell("phase", self._event("start"))
        self._advance()

    def _check_finite(self, loss: Tensor) -> None:
        value = read_number(loss)
        if math.isfinite(value):
            return
        self._forget_gradients()
        raise NonFiniteLossError(
            f"loss={value} at step {self.global_step} (cycle {self.cycle}, {self.stage}): nothing was"
            " updated; lower the learning rate, clip gradients (grad_clip), or look at the batch"
        )

    def _forget_gradients(self) -> None:
        self._window = None
        self.optimizer.zero_grad(set_to_none=True)
        self.theta_optimizer.zero_grad()

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
        streamed = self.config.train_rest and isinstance(self.optimizer, StreamedAdamW)  # its gradients are used by now

        def update(factor: float) -> None:
            self._step_theta(factor)
            if rest or streamed:
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
            self._set_theta_rate()
            self.theta_optimizer.step(grad_scale=scale)
            if self.theta_optimizer.last_stats is not None:
                self.meter.theta(self.theta_optimizer.last_stats)

    def _set_theta_rate(self) -> None:
        """θ's rate in this step, before what may use it: the backward, or the step itself."""
        if self.plan.weights == "resu":
            self.theta_optimizer.factor = self.config.theta_lr_factor(self.meter.steps)

    def _count_step(self, loss: Tensor) -> None:
        """An optimizer step is done, by `step` or by the user's own loop (see `attach`)."""
        self.global_step += 1
        self.meter.step(loss)
        self._tell("step", StepEvent(self.global_step, self.cycle, self.stage, self.phase, loss))
        self._look_ahead()
        self._advance()

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
