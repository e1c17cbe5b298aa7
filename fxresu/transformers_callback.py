"""`ResuTrainerCallback`: RESU cycles inside `transformers.Trainer`, which keeps its loop, optimizer and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("ResuTrainerCallback needs transformers: pip install 'fxresu[integrations]'") from error

from .attach import accumulation_of, attach, plain_optimizer
from .checkpoint import load_state, save_state
from .config import CycleConfig
from .cycle_statistics import Batches
from .errors import CheckpointError, ConfigError
from .in_trainer import InTrainer, TrainerSettings, WantedCycle
from .model_state import is_transformed
from .run_log import RunLog

__all__ = ["ResuTrainerCallback"]

_FOLDER = "fxresu"  # in each of the Trainer's checkpoints
_NAMES = {
    "steps": "max_steps", "accumulation": "gradient_accumulation_steps", "autocast": "mixed precision (bf16, fp16)",
    "grad_clip": "max_grad_norm",
}  # fmt: skip

# Optimizers that step during the backward, before θ or a mask could act.
_IN_BACKWARD = ("lomo", "adalomo", "layerwise")


class ResuTrainerCallback(InTrainer, TrainerCallback):
    """Give it to the Trainer: `Trainer(..., callbacks=[ResuTrainerCallback(config)])`.

    The model is transformed when training begins and stays so afterwards (`fxresu.untransform`). Steps are the
    Trainer's optimizer steps. `max_grad_norm` clips all gradients together, θ's included. Each of the Trainer's
    checkpoints gets a folder `fxresu/` with masks, θ and position, and `trainer.train(resume_from_checkpoint=...)`
    goes on from it; the Trainer restores weights, optimizer, data order and random states.

    Args:
        config: of the cycle, or a mapping of its options; without explicit steps, a cycle takes as many as the
            Trainer's have room for.
        transform: further options of `fxresu.transform`.
        calibration: batches for scores that need statistics, as the model takes them; default is the training data.
        log: a `RunLog`, or the folder of one; held-out losses are the trainer's own evaluations.
        resume_from: the Trainer's checkpoint, where `resume_from_checkpoint` names a folder outside `output_dir`.

    Attributes:
        run: the `Attached`, once training has begun.
    """

    def __init__(
        self,
        config: CycleConfig | Mapping[str, Any] | None = None,
        *,
        transform: Mapping[str, Any] | None = None,
        calibration: Batches | None = None,
        log: RunLog | str | Path | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        self.wanted = WantedCycle.of(config)
        self._calibration = calibration
        self._transform, self._log, self._resume_from = dict(transform or {}), log, resume_from
        self._taken_clip: float | None = None

    # Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, (optimizer, scaler) = kwargs["model"], plain_optimizer(kwargs["optimizer"])
        refuse_arguments(args)
        config = self.wanted.inside(self._settings(args, state.max_steps))
        if self.run is not None:
            self.run.detach()
        options = None if is_transformed(model) else {"compile": not args.torch_compile, **self._transform}
        data = _batches(kwargs["train_dataloader"], args) if self._calibration is None else self._calibration
        self.run = attach(
            model, optimizer, config, transform=options, scaler=scaler, calibration=data, log=self._log,
            more_follows=accumulation_of(kwargs["optimizer"]),
        )  # fmt: skip
        if state.global_step:
            self._resume(args, state)
        if config.grad_clip is not None:
            self._taken_clip, args.max_grad_norm = config.grad_clip, 0.0  # done in the step, together with θ

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.running.catch_up(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir() and not args.save_only_model:
            save_state(self.cycle, folder / _FOLDER)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.tell_held_out(kwargs.get("metrics", {}).get("eval_loss"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._taken_clip is not None:
            args.max_grad_norm = self._taken_clip
        self.end_run()

    # Pieces

    def _settings(self, args: TrainingArguments, max_steps: int) -> TrainerSettings:
        # 0 may be what an interrupted `train()` has left of it.
        clip = float(args.max_grad_norm) if args.max_grad_norm else self._taken_clip
        autocast = "bf16" if args.bf16 else "fp16" if args.fp16 else None
        return TrainerSettings(max_steps, args.gradient_accumulation_steps, clip, autocast, _NAMES)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        places = [args.resume_from_checkpoint, self._resume_from, Path(str(args.output_dir)) / name]
        folders = [Path(p) / _FOLDER for p in places if isinstance(p, str | Path)]
        found = next((f for f in folders if f.is_dir()), None)
        if found is None:
            raise CheckpointError(
                f"the Trainer resumes at step {state.global_step}, but there is no {str(folders[-1])!r}: the checkpoint"
                " was written without this callback, or the run was killed while writing it (use an earlier one), or it"
                " is elsewhere (name it with ResuTrainerCallback(resume_from=...))"
            )
        load_state(self.cycle, found)
        if self.cycle.global_step != state.global_step:
            raise CheckpointError(
                f"{str(found)!r} is of step {self.cycle.global_step}, the Trainer resumes at {state.global_step}"
            )


def _batches(loader: Any, args: TrainingArguments) -> Callable[[], Iterator[dict[str, Any]]]:
    """Batches of the training data on the model's device, from an iterator of their own: the prepared loader is in use
    when statistics are gathered, and counts its batches for the Trainer."""
    own = getattr(loader, "base_dataloader", loader)
    return lambda: ({k: v.to(args.device) for k, v in batch.items() if hasattr(v, "to")} for batch in own)


def refuse_arguments(args: TrainingArguments) -> None:
    """ConfigError for arguments of the Trainer under which masks or θ would not be kept."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    contradictions = [
        ("deepspeed", args.deepspeed, "it shards optimizer and gradients, and θ's would not be reduced"),
        ("fsdp", args.fsdp, "sharded weights cannot be managed"),
        ("parallel_mode", args.parallel_mode.value if args.world_size > 1 else None, "θ's gradient is not reduced"),
        ("n_gpu", args.n_gpu if args.n_gpu > 1 else None, "DataParallel copies the model; set CUDA_VISIBLE_DEVICES=0"),
        ("auto_find_batch_size", args.auto_find_batch_size, "it restarts training with a model already in a phase"),
        ("load_best_model_at_end", args.load_best_model_at_end, "the best weights have another mask than the last"),
        ("optim", next((optimizer for o in _IN_BACKWARD if o in optimizer), None), "it steps during the backward"),
    ]
    for name, value, why in contradictions:
        if value:
            raise ConfigError(f"TrainingArguments({name}={value!r}) contradicts the cycle: {why}; leave it out")
