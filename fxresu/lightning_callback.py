"""`ResuLightningCallback`: RESU cycles inside Lightning's Trainer, which keeps its loop, optimizer and checkpoints."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from .attach import attach
from .checkpoint_state import random_tensors, set_random, to_plain
from .config import CycleConfig
from .cycle_statistics import Batches
from .errors import CheckpointError, ConfigError
from .in_trainer import InTrainer, TrainerSettings, WantedCycle
from .losses import Loss, default_loss
from .model_state import is_transformed
from .run_log import RunLog
from .runner import runner_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        try:
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ImportError as error:
            raise ImportError("ResuLightningCallback needs Lightning: pip install 'fxresu[integrations]'") from error

__all__ = ["ResuLightningCallback"]

log = logging.getLogger("fxresu")
_CASTS = {"bf16-mixed": "bf16", "16-mixed": "fp16"}
_NAMES = {
    "steps": "max_steps", "accumulation": "accumulate_grad_batches", "autocast": "precision",
    "grad_clip": "gradient_clip_val",
}  # fmt: skip
# Callbacks that write weights themselves.
_RIVALS = ("StochasticWeightAveraging", "ModelPruning")


class ResuLightningCallback(InTrainer, Callback):
    """Give it to the Trainer: `Trainer(..., callbacks=[ResuLightningCallback(config)])`.

    The model is transformed when training begins and stays so afterwards (`fxresu.untransform`). Steps are optimizer
    steps. `gradient_clip_val` clips all gradients together, θ's included. Masks, θ, position and random states are part
    of Lightning's checkpoints, so `trainer.fit(..., ckpt_path=...)` goes on from them.

    Args:
        config: of the cycle, or a mapping of its options; without explicit steps, a cycle takes as many as the
            training has room for.
        module: name of the submodule to transform: the one that `training_step` calls, such as "model". Default: the
            only child with parameters, or the LightningModule itself if there are more.
        transform: further options of `fxresu.transform`.
        calibration: batches for scores that need statistics, and
        loss: `(model, batch) -> scalar` for these, as `fxresu.attach` takes them.
        log: a `RunLog`, or the folder of one; held-out losses are the trainer's own evaluations.

    Attributes:
        run: the `Attached`, once training has begun.
    """

    def __init__(
        self,
        config: CycleConfig | Mapping[str, Any] | None = None,
        *,
        module: str | None = None,
        transform: Mapping[str, Any] | None = None,
        calibration: Batches | None = None,
        loss: Loss = default_loss,
        log: RunLog | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.wanted, self.module = WantedCycle.of(config), module
        self._calibration, self._loss = calibration, loss
        self._transform, self._log = dict(transform or {}), log
        self._restored: dict[str, Any] | None = None
        self._taken_clip: float | None = None
        self._warned = False
        self._last_of_step = True

    # Lightning's events

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:  # before the data loader's iterator draws its seed
            state = self._restored["random"]
            set_random(state["torch"], state["python"], state["numpy"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_settings(trainer, pl_module)
        config = self.wanted.inside(self._settings(trainer))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        model = self._model(pl_module)
        options = None if is_transformed(model) else self._transform
        self.run = attach(
            model, trainer.optimizers[0], config, transform=options, scaler=scaler, calibration=self._calibration,
            loss=self._loss, log=self._log, more_follows=lambda: not self._last_of_step,
        )  # fmt: skip
        self.run.reads_losses = False  # `on_before_backward` has them
        # Under a closure the gradients are there only once the step has begun; a scaled step begins with them.
        self.run.clips = scaler is not None
        if self._restored is not None:
            self._resume(trainer, self._restored)
        if config.grad_clip is not None:
            self._taken_clip, trainer.gradient_clip_val = config.grad_clip, None  # done together with θ

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        parts, done = trainer.accumulate_grad_batches, batch_idx + 1
        self._last_of_step = done % parts == 0 or done >= trainer.num_training_batches or bool(trainer.is_last_batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.running.loss(loss / self.running.loss_scale())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.running.clips:
            self.running.clip()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.running.catch_up(trainer.global_step)
        self._warn_if_bypassed(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell_held_out(trainer.callback_metrics.get("val_loss"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._taken_clip is not None:
            trainer.gradient_clip_val = self._taken_clip
        self.end_run()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        if self.run is None:
            return {}
        numpy = to_plain([v.tolist() if isinstance(v, np.ndarray) else v for v in np.random.get_state()])
        return {
            "cycle": self.run.state_dict(),
            "random": {"torch": random_tensors(), "python": to_plain(random.getstate()), "numpy": numpy},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None  # applied in `on_train_start`, when the optimizer has its state again

    def _resume(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self._restored = None
        self.running.load_state_dict(state["cycle"])
        if self.cycle.global_step != trainer.global_step:
            raise CheckpointError(
                f"the checkpoint's cycle is at step {self.cycle.global_step}, the Trainer resumes at"
                f" {trainer.global_step}"
            )

    # Pieces

    def _model(self, pl_module: LightningModule) -> nn.Module:
        if self.module is not None:
            try:
                return pl_module.get_submodule(self.module)
            except AttributeError:
                names = ", ".join(n for n, _ in pl_module.named_children())
                raise ConfigError(
                    f"module={self.module!r}: {type(pl_module).__name__} has no such part; it has {names}"
                ) from None
        parts = [m for m in pl_module.children() if next(m.parameters(), None) is not None]
        own = next(pl_module.parameters(recurse=False), None)
        return parts[0] if len(parts) == 1 and own is None else pl_module

    def _settings(self, trainer: Trainer) -> TrainerSettings:
        clip = self._taken_clip if trainer.gradient_clip_val is None else float(trainer.gradient_clip_val)
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise ConfigError(f"max_steps={trainer.max_steps}: the training has no end; give the Trainer max_steps")
        return TrainerSettings(
            int(steps), trainer.accumulate_grad_batches, clip or None, _CASTS.get(str(trainer.precision)), _NAMES
        )

    def _warn_if_bypassed(self, pl_module: LightningModule) -> None:
        """Calls that go around the transformed module are right, but run eager; say so once."""
        if self._warned:
            return
        self._warned = True
        model = self.cycle.model
        options, runner = model.__dict__["_fxresu_model"].compile_options, runner_of(model)
        if options is not None and not runner.entries and not runner.eager_calls:
            log.warning(
                "%s.training_step does not call the transformed %s itself: it runs uncompiled; name the part that it"
                " calls with ResuLightningCallback(module=...), or pass transform={'compile': False}",
                type(pl_module).__name__, type(model).__name__,
            )  # fmt: skip


def refuse_settings(trainer: Trainer, pl_module: LightningModule) -> None:
    """ConfigError for settings of the Trainer under which masks or θ would not be kept."""
    strategy = type(trainer.strategy).__name__
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    rivals = [type(c).__name__ for c in callbacks if type(c).__name__ in _RIVALS]
    clipping = getattr(trainer.gradient_clip_algorithm, "value", None) if trainer.gradient_clip_val else None
    contradictions = [
        ("strategy", strategy if trainer.world_size > 1 else None, "θ's gradient is not reduced; use devices=1"),
        ("strategy", strategy if "SingleDevice" not in strategy else None, "weights cannot be managed; use 'auto'"),
        ("callbacks", rivals or None, "it writes weights or masks of its own"),
        ("gradient_clip_algorithm", clipping if clipping != "norm" else None, "use 'norm'"),
        ("optimizers", len(trainer.optimizers) if len(trainer.optimizers) != 1 else None, "the cycle follows one"),
    ]
    for name, value, why in contradictions:
        if value is not None:
            raise ConfigError(f"Trainer({name}={value!r}) contradicts the cycle: {why}")
