"""`attach`: the cycle follows the optimizer of a training loop that keeps forward, backward and step to itself.

Phases change, θ is updated and θ's gradients are clipped inside `optimizer.step()`, through the hooks that torch gives
every optimizer; accumulation, autocast and learning-rate schedules stay the loop's own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fxresu.kernels import read_number
from fxresu.kernels._autocast import autocast_off
from fxresu.passes import _compat as compat

from . import checkpoint
from .config import CycleConfig
from .cycle import ResuCycle, matching_config
from .cycle_statistics import Batches
from .errors import ConfigError, PhaseError
from .losses import Loss, default_loss, loss_in
from .model_state import is_transformed, managed_weights, state_of
from .run_log import RunLog
from .runner import runner_of
from .theta import clear_theta_gradients, theta_gradients
from .transform import transform as transform_model
from .transform import untransform

__all__ = ["Attached", "accumulation_of", "attach", "fitted", "plain_model", "plain_optimizer"]

# Wrappers that split or copy a model: none of them would reduce the gradient of θ.
_DISTRIBUTED = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
_KEY = "_fxresu_attached"


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    config: CycleConfig | Mapping[str, Any] | None = None,
    *,
    total_steps: int | None = None,
    transform: Mapping[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    calibration: Batches | None = None,
    loss: Loss = default_loss,
    log: RunLog | str | Path | None = None,
    more_follows: Callable[[], bool] | None = None,
) -> Attached:
    """Train `model` through RESU cycles in a loop that knows nothing of them: one line after the optimizer is made.

    The first phase begins at once. From then on each `optimizer.step()` is a step of the cycle.

    Args:
        model: any module; transformed here unless it is already. A `torch.compile`d one is taken apart.
        optimizer: holds the model's parameters; Accelerate's wrapper is taken off.
        config: of the cycle, or a mapping of its options. `accumulation` must be 1 and `autocast` None: both are the
            loop's own. `grad_clip` clips all gradients together, θ's included; leave the loop's own clipping out then.
        total_steps: optimizer steps that the loop will make. The cycle's steps are fitted to it (see `fitted`).
        transform: further options of `fxresu.transform` (`include`, `exclude`, `storage`, `compile`, `plans`).
        scaler: the loop's GradScaler, if it has one.
        calibration: batches for scores that need statistics, as `ResuCycle` takes them, and
        loss: `(model, batch) -> scalar` for these; default is `default_loss`. Without them the loop's last batches
            before a transition serve; scores of gradients then need a model that returns its loss.
        log: a `RunLog`, or the folder of one: JSON lines while it trains, a report when `detach` is called.
        more_follows: with `theta_in_backward` and gradients that the loop accumulates: says during a backward whether
            another one of the same step follows. Accelerate's optimizer is asked by itself; other loops may use
            `Attached.accumulate` instead.

    Raises:
        ConfigError: an optimizer that does not hold the weights, a distributed wrapper, options of the loop's, or
            anything that `transform` and `ResuCycle` refuse. The model is untouched then.
    """
    model, compiled = plain_model(model)
    more_follows = more_follows or accumulation_of(optimizer)
    optimizer, own_scaler = plain_optimizer(optimizer)
    if _KEY in optimizer.__dict__:
        raise ConfigError(f"optimizer={type(optimizer).__name__} drives a cycle already; detach() that one first")
    config = _loop_config(config, model)
    if total_steps is not None:
        config = fitted(config, total_steps)
    transformed = is_transformed(model)
    if transformed and transform:
        raise ConfigError(f"transform={dict(transform)!r}, but the model is transformed already; leave transform out")
    scaler = own_scaler if scaler is None else scaler
    if scaler is not None and scaler.is_enabled() and not config.train_rest:
        raise ConfigError(
            "scaler: fp16 loss scaling needs train_rest=True: GradScaler.step() refuses an optimizer without any"
            " gradient, which is what RESU leaves otherwise; or use bf16, which needs no scaler"
        )
    if scaler is not None and scaler.is_enabled() and config.theta_in_backward:
        raise ConfigError(
            "scaler: fp16 loss scaling with config.theta_in_backward=True: a scaled gradient cannot be unscaled in"
            " time; use bf16, which needs no scaler, or leave theta_in_backward out"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} holds no parameter of model={type(model).__name__}; build it from"
            " model.parameters() of this very model"
        )
    _refuse_accumulation(state_of(model).plans if transformed else (transform or {}).get("plans") or {})
    if not transformed:
        options: dict[str, Any] = {"compile": not compiled, **(transform or {})}
        last = config.sparsity(config.cycles - 1)
        transform_model(
            model, **{"sparsity": last, "granularity": config.granularity, "candidates": config.candidates, **options}
        )
    try:
        cycle = ResuCycle(model, optimizer, config, loss=loss, calibration=calibration)
    except BaseException:
        if not transformed:
            untransform(model)
        raise
    cycle.theta_optimizer.more_follows = more_follows
    attached = Attached(cycle, scaler, log if log is None or isinstance(log, RunLog) else RunLog(log))
    attached.start()
    return attached


def plain_model(model: nn.Module) -> tuple[nn.Module, bool]:
    """(the module itself, whether the user's own `torch.compile` wraps it); ConfigError for distributed wrappers."""
    if type(model).__name__ in _DISTRIBUTED:
        raise ConfigError(
            f"model={type(model).__name__}: distributed wrappers are not supported, since they would not reduce θ's"
            " gradient; use one process and one device"
        )
    inner = compat.inside_compiled(model)
    return (model, False) if inner is None else (inner, True)


def plain_optimizer(optimizer: Any) -> tuple[Optimizer, Any]:
    """(the torch optimizer under wrappers such as Accelerate's and Lightning's, the loss scaler that they hold)."""
    scaler = None
    while not isinstance(optimizer, Optimizer) or "_optimizer_step_post_hooks" not in optimizer.__dict__:
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ConfigError(f"optimizer={type(optimizer).__name__}: expected a torch.optim.Optimizer")
        scaler = scaler or getattr(optimizer, "scaler", None)
        optimizer = inner
    return optimizer, scaler


def accumulation_of(optimizer: Any) -> Callable[[], bool] | None:
    """What says during a backward whether another one of the same step follows, if a wrapper of the optimizer's
    (Accelerate's) knows; else None."""
    state = getattr(optimizer, "gradient_state", None)
    return None if state is None else lambda: not state.sync_gradients


def fitted(config: CycleConfig, total_steps: int) -> CycleConfig:
    """`config` with as many steps a cycle as `total_steps` have room for; its split stays. Left-over steps train the
    committed model.

    Raises:
        ConfigError: fewer steps than cycles, or explicit steps (`train_steps` and so on) that do not fit.
    """
    if config.train_steps is not None:
        if config.cycles * config.steps_in_cycle > total_steps:
            raise ConfigError(
                f"total_steps={total_steps} is less than the {config.cycles * config.steps_in_cycle} steps of"
                f" {config.cycles} cycles; use fewer or leave train_steps, stabilize_steps and resu_steps out"
            )
        return config
    if total_steps < config.cycles:
        raise ConfigError(f"total_steps={total_steps} is below cycles={config.cycles}; each takes 1 step or more")
    return config.replace(steps_per_cycle=total_steps // config.cycles)


def _loop_config(config: CycleConfig | Mapping[str, Any] | None, model: nn.Module) -> CycleConfig:
    if config is None:
        config = matching_config(model) if is_transformed(model) else CycleConfig()
    elif not isinstance(config, CycleConfig):
        config = CycleConfig.from_dict(config)
    for name, want, whose in (
        ("accumulation", 1, "accumulates gradients"),
        ("accumulation_normalization", "mean", "accumulates gradients"),
        ("accumulation_scale", None, "accumulates gradients"),
        ("autocast", None, "sets autocast"),
    ):
        if getattr(config, name) != want:
            raise ConfigError(
                f"config.{name}={getattr(config, name)!r}: the training loop itself {whose}; leave it {want!r} here"
            )
    return config


def _refuse_accumulation(plans: Mapping[Any, Any]) -> None:
    for key, plan in plans.items():
        if getattr(plan, "accumulation", 1) != 1:
            raise ConfigError(
                f"plans[{str(key)!r}].accumulation={plan.accumulation}: the training loop itself accumulates gradients;"
                " leave it 1 here"
            )


class Attached:
    """A cycle that a loop's own `optimizer.step()` drives. Lives as long as the optimizer, or until `detach`.

    Attributes:
        cycle: the `ResuCycle`: its phase, events and metrics.
        log: the `RunLog` that follows it, or None.
        clips: whether `config.grad_clip` is applied when `optimizer.step()` begins. A caller whose loop computes
            gradients inside the step (a closure) sets it to False and calls `clip` itself.
        reads_losses: whether a scalar loss that the model returns is taken for the loss; a caller that tells losses
            through `loss` sets it to False.
    """

    def __init__(self, cycle: ResuCycle, scaler: torch.amp.GradScaler | None = None, log: RunLog | None = None) -> None:
        self.cycle, self.log = cycle, log
        self.clips = True
        self.reads_losses = True
        self._scaler = scaler
        self._scale = 1.0
        self._objective: Tensor | None = None
        self._remove: list[Callable[[], None]] = []

    # Life

    def start(self) -> None:
        """Begin to follow the optimizer, and enter the first phase unless the cycle is under way already."""
        cycle, optimizer, me = self.cycle, self.cycle.optimizer, weakref.ref(self)

        def before(stepping: Optimizer, args: tuple, kwargs: dict) -> None:
            if (live := me()) is not None and live._drives(stepping):
                live._before_step(args, kwargs)

        def after(stepping: Optimizer, args: tuple, kwargs: dict) -> None:
            if (live := me()) is not None and live._drives(stepping):
                live._after_step()

        # Global hooks run after the optimizer's own, whose table changes with the phase and is not to be iterated then.
        handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        self._remove = [handle.remove for handle in handles]
        weakref.finalize(self, _call_all, self._remove)
        optimizer.__dict__[_KEY] = self
        self._clear_with(optimizer)
        runner_of(cycle.model).on_output = self._seen
        runner_of(cycle.model).on_input = self._coming
        if self.log is not None:
            self.log.follow(cycle)
        if not cycle._started:
            cycle._start()

    def detach(self) -> None:
        """Stop following the optimizer and write the log's report. The model stays in its phase, with its masks."""
        _call_all(self._remove)
        optimizer = self.cycle.optimizer
        for name in (_KEY, "zero_grad"):
            optimizer.__dict__.pop(name, None)
        if is_transformed(self.cycle.model):
            runner_of(self.cycle.model).on_output = runner_of(self.cycle.model).on_input = None
            self.cycle.theta_optimizer.unfollow()
        if self.log is not None:
            self.log.finish()

    def _drives(self, optimizer: Optimizer) -> bool:
        return optimizer is self.cycle.optimizer and is_transformed(self.cycle.model)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _clear_with(self, optimizer: Optimizer) -> None:
        """A step that the loop skips ends in `zero_grad`, which must forget θ's gradients too."""
        original, owner, me = type(optimizer).zero_grad, weakref.ref(optimizer), weakref.ref(self)

        @functools.wraps(original)
        def zero_grad(*args: Any, **kwargs: Any) -> None:
            if (mine := owner()) is not None:
                original(mine, *args, **kwargs)
            if (live := me()) is not None:
                live.cycle.theta_optimizer.zero_grad()
                live._objective = None

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]

    # What happens in a step

    def _coming(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Let the loop's own batches count in the statistics of scores; their loss is what the model returns."""
        model = self.cycle.model
        device = next(model.parameters()).device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        self.cycle._set_theta_rate()
        if model.training:
            # Without a loss scale gradients vanish in float16.
            with autocast_off(device) if half else contextlib.nullcontext():
                self.cycle.observe(lambda: loss_in(model(*args, **kwargs)))

    def loss(self, value: Tensor) -> None:
        """Tell the loss of a micro-batch, for log and metrics. Not needed where the model itself returns it."""
        value = value.detach()
        self._objective = value if self._objective is None else self._objective + value

    def _seen(self, out: Any) -> None:
        """Read the loss from what the model returned, weighted as it enters the backward: a mean over micro-batches."""
        self._refuse_unknown_scaler()
        if not self.reads_losses:
            return
        loss = out if isinstance(out, Tensor) else getattr(out, "loss", None)
        if loss is None and isinstance(out, Mapping):
            loss = out.get("loss")
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            return
        value, me = loss.detach(), weakref.ref(self)

        def weigh(weight: Tensor) -> None:
            if (live := me()) is not None:
                live.loss(value * weight / live.loss_scale())

        loss.register_hook(weigh)

    def _refuse_unknown_scaler(self) -> None:
        """θ's gradient would arrive multiplied by a scale that nobody here knows."""
        if self._scaler is not None:
            return
        device = next(self.cycle.model.parameters()).device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ConfigError(
                "autocast to float16 needs scaler=, the GradScaler of the loop (GradScaler(enabled=False) if the loss"
                " is not scaled); or use bfloat16"
            )

    def accumulate(self, more: bool = True) -> contextlib.AbstractContextManager[None]:
        """With `theta_in_backward`: the backward passes inside are not the last of their step (see
        `ThetaOptimizer.accumulate`)."""
        return self.cycle.theta_optimizer.accumulate(more)

    def loss_scale(self) -> float:
        return 1.0 if self._scaler is None else self._scaler.get_scale()  # of a disabled scaler: 1

    def _theta_gradients(self) -> list[Tensor]:
        return theta_gradients(managed_weights(self.cycle.model).values())

    def _before_step(self, args: tuple, kwargs: dict) -> None:
        if (theta := self._theta_gradients()) and (scale := self.loss_scale()) != 1.0:
            torch._foreach_mul_(theta, 1.0 / scale)
        if not self.clips or self.cycle.config.grad_clip is None:
            return
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise PhaseError(
                f"grad_clip={self.cycle.config.grad_clip}: optimizer.step(closure) computes the gradients after this"
                " point; leave grad_clip None and clip in the closure"
            )
        self.clip()

    def clip(self) -> None:
        """Clip all gradients to `config.grad_clip` by their global norm, θ's included."""
        grads = [p.grad for p in self.cycle.model.parameters() if p.grad is not None]
        self._scale = self.cycle._clip(grads, self._theta_gradients())

    def _after_step(self) -> None:
        cycle, before = self.cycle, self._place()
        if not cycle.plan.trains:
            raise PhaseError(f"optimizer.step() in phase {cycle.phase}, which trains nothing; set_phase another one")
        if cycle.plan.weights == "resu" and self._theta_is_finite():
            cycle._step_theta(self._scale)
        self._scale = 1.0
        cycle._count_step(self._told())
        self._forget_gradients(before)

    def catch_up(self, steps: int) -> None:
        """Count steps that the loop has counted and a loss scaler has left out, up to `steps` in all."""
        before = self._place()
        while self.cycle.global_step < steps:
            self.cycle.meter.skip()
            self.cycle._count_step(self._told())
        self._forget_gradients(before)

    def _told(self) -> Tensor:
        """The losses of this step's micro-batches, or NaN if none was told."""
        objective, self._objective = self._objective, None
        return torch.tensor(math.nan) if objective is None else objective

    def _forget_gradients(self, before: tuple[object, ...]) -> None:
        """A gradient that outlives its phase, even a zero one, would let the optimizer move frozen weights."""
        if self._place() != before:
            for parameter in self.cycle.model.parameters():
                parameter.grad = None

    def _place(self) -> tuple[object, ...]:
        return self.cycle.cycle, self.cycle.stage, self.cycle.phase

    def _theta_is_finite(self) -> bool:
        """A loss scaler judges the other gradients only; where θ's alone overflowed, θ sits this step out."""
        if self._scaler is None or not (theta := self._theta_gradients()):
            return True
        if math.isfinite(read_number(nn.utils.get_total_norm(theta))):
            return True
        clear_theta_gradients(managed_weights(self.cycle.model).values())
        return False

    # Checkpoints

    def save(self, path: str | Path, extra: Mapping[str, Any] | None = None, *, keep_last: int = 1) -> None:
        """Write a checkpoint folder after a completed step (see `fxresu.checkpoint.save`)."""
        checkpoint.save(self.cycle, path, extra, keep_last=keep_last)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Resume from a folder that `save` wrote; returns its `extra` (see `fxresu.checkpoint.load`)."""
        return checkpoint.load(self.cycle, path)

    def state_dict(self) -> dict[str, Any]:
        """The cycle's state, as `ResuCycle.state_dict`: for loops that store model and optimizer themselves."""
        return self.cycle.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model's and the optimizer's own state first."""
        self.cycle.load_state_dict(state)


def _call_all(functions: list[Callable[[], None]]) -> None:
    while functions:
        functions.pop()()
