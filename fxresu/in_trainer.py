"""A cycle inside a trainer that has settings of its own: what one leaves open the other says, and what contradicts is
refused by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .attach import Attached
from .config import CycleConfig
from .errors import ConfigError

if TYPE_CHECKING:
    from .cycle import ResuCycle

__all__ = ["InTrainer", "TrainerSettings", "WantedCycle"]

log = logging.getLogger("fxresu")


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """What a trainer was told, with the names of its own options for messages.

    Attributes:
        steps: optimizer steps of the whole training.
        accumulation: micro-batches a step.
        clip: largest norm of the gradients, or None.
        autocast: "bf16", "fp16" or None.
        names: of these four options, as the trainer calls them.
    """

    steps: int
    accumulation: int
    clip: float | None
    autocast: str | None
    names: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class WantedCycle:
    """A configuration as the user gave it; `fixed` if its number of steps is part of it."""

    config: CycleConfig
    fixed: bool

    @classmethod
    def of(cls, config: CycleConfig | Mapping[str, Any] | None) -> WantedCycle:
        """From a configuration, or a mapping of options, which may leave the steps open."""
        if isinstance(config, CycleConfig):
            return cls(config, True)
        given = dict(config or {})
        return cls(CycleConfig.from_dict(given), "steps_per_cycle" in given or "train_steps" in given)

    def inside(self, trainer: TrainerSettings) -> CycleConfig:
        """The configuration to run: open steps fitted, clipping taken over, the rest the trainer's.

        Raises:
            ConfigError: a setting of the trainer contradicts one of the cycle.
        """
        config, names = self.config, trainer.names
        for field, own in (("accumulation", trainer.accumulation), ("autocast", trainer.autocast),
                           ("grad_clip", trainer.clip)):  # fmt: skip
            wanted = getattr(config, field)
            default = 1 if field == "accumulation" else None
            # A trainer that clips nothing is asked to; what it accumulates and casts is its own affair.
            if wanted not in (default, own) and not (field == "grad_clip" and own is None):
                raise ConfigError(
                    f"config.{field}={wanted!r} contradicts {names[field]}={own!r}; leave it out, or give both the same"
                )
        clip = trainer.clip if config.grad_clip is None else config.grad_clip
        if config.theta_in_backward:
            _refuse_in_backward(trainer, clip)
        changes: dict[str, Any] = {"accumulation": 1, "autocast": None, "grad_clip": clip}
        if not self.fixed:
            if trainer.steps < config.cycles:
                raise ConfigError(f"{names['steps']}={trainer.steps} is below cycles={config.cycles}; train longer")
            changes["steps_per_cycle"] = trainer.steps // config.cycles
        config = config.replace(**changes)
        total = config.cycles * config.steps_in_cycle
        if total > trainer.steps:
            raise ConfigError(
                f"{names['steps']}={trainer.steps}: the cycle needs {total} ({config.cycles} cycles of"
                f" {config.steps_in_cycle}) and would end without its last commit; train longer, or leave"
                " steps_per_cycle out to have it fitted"
            )
        return config


def _refuse_in_backward(trainer: TrainerSettings, clip: float | None) -> None:
    """ConfigError for what needs all gradients of θ at once, by the trainer's own names."""
    if clip is not None:
        option = trainer.names["grad_clip"]
        raise ConfigError(
            f"config.theta_in_backward=True contradicts clipping ({option}={clip!r}), which needs the norm of all"
            f" gradients first; turn {option} off, or leave theta_in_backward out"
        )
    if trainer.autocast == "fp16":
        raise ConfigError(
            f"config.theta_in_backward=True contradicts {trainer.names['autocast']}='fp16', which scales the loss; use"
            " bf16, or leave theta_in_backward out"
        )


class InTrainer:
    """What callbacks of all trainers have.

    Attributes:
        run: the `Attached`, once training has begun.
    """

    run: Attached | None = None

    @property
    def cycle(self) -> ResuCycle:
        """The cycle in training; ConfigError before the first step."""
        return self.running.cycle

    @property
    def running(self) -> Attached:
        """`run`; ConfigError before the first step."""
        if self.run is None:
            raise ConfigError("there is no cycle yet: it begins with the trainer's first step")
        return self.run

    def tell_held_out(self, value: Any) -> None:
        """A held-out loss of the trainer's own evaluation, or None, for the log if there is one."""
        if self.run is not None and self.run.log is not None and value is not None:
            self.run.log.held_out(float(value))

    def end_run(self) -> None:
        """Training is over: stop following, write the report, and say so if the cycle was not completed."""
        cycle = self.cycle
        if not cycle.finished:
            log.warning(
                "training ended in cycle %d, %s: %d of %d steps; the weights are the effective ones of that phase",
                cycle.cycle, cycle.stage, cycle.global_step, cycle.total_steps,
            )  # fmt: skip
        self.running.detach()
