"""The cycle's configuration inside a trainer that has settings of its own: what one leaves open the other says, and
what contradicts is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import CycleConfig
from .errors import ConfigError

__all__ = ["TrainerSettings", "WantedCycle"]


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
