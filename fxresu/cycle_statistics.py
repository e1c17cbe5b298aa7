"""Where the cycle's statistics come from: calibration batches of the user's, or the last ones of the stage."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration, refuse_streamed
from .config import CycleConfig
from .errors import ConfigError
from .saliency import needs_of

__all__ = ["Batches", "CycleStatistics"]

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
_NAMES = {"train": "prune_score", "resu": "commit_score"}


class CycleStatistics:
    """Gathers what the scores of the next pruning or commit need.

    Args:
        loss: of the model on a batch, as the cycle computes it.
        source: batches to calibrate on, the first `config.calibration_batches` of them at every transition; None takes
            the last micro-batches before the transition as they come.

    Raises:
        ConfigError: an iterator, which only one transition could read; a stage without steps before a transition whose
            score needs statistics, and no `source`.
    """

    def __init__(
        self, model: nn.Module, config: CycleConfig, loss: Callable[[Any], Tensor], source: Batches | None
    ) -> None:
        if isinstance(source, Iterator):
            raise ConfigError(
                f"calibration={type(source).__name__}: every transition reads it anew; give a list, a DataLoader, or a"
                " function that returns batches"
            )
        self.model, self.config, self.source, self._loss = model, config, source, loss
        dsnot = {"inputs"} if config.stabilizer == "dsnot" else set()
        self.needs = {
            "train": needs_of(config.prune_score) | dsnot,
            "stabilize": frozenset(),
            "resu": needs_of(config.score_of_commit),
        }
        refuse_streamed(model, frozenset().union(*self.needs.values()))
        self.current: Calibration | None = None

    def check_steps(self, steps: Mapping[str, int]) -> None:
        """ConfigError if a stage that takes no step would have to provide statistics."""
        for stage, name in _NAMES.items():
            if self.needs[stage] and not steps[stage] and self.source is None:
                raise ConfigError(
                    f"{name}={getattr(self.config, name)!r} needs statistics, but the stage {stage!r} before it takes"
                    " no step; give calibration=batches to ResuCycle, or that stage some steps"
                )

    def observe(self, stage: str, loss: Callable[[], Any], remaining: int) -> None:
        """A micro-batch is about to be trained on, with `remaining` of them (it included) before the transition;
        `loss()` computes its loss."""
        if self.source is not None or not self.needs[stage] or remaining > self.config.calibration_batches:
            return
        self.current = self.current or self._new(stage)
        if self.current.batches < self.config.calibration_batches:
            self.current.observe(loss)

    def take(self, stage: str) -> Calibration | None:
        """The statistics for the transition that ends `stage`; None if its score needs none.

        Raises:
            ConfigError: there are none, because the model was trained without the cycle seeing a batch.
        """
        found, self.current = self.current, None
        if not self.needs[stage]:
            return None
        if self.source is not None:
            return self._from_source(stage)
        if found is None:
            raise ConfigError(
                f"{_NAMES[stage]}={getattr(self.config, _NAMES[stage])!r} needs statistics, and no batch of the stage"
                f" {stage!r} went through cycle.step; give calibration=batches to ResuCycle"
            )
        return found

    def _from_source(self, stage: str) -> Calibration:
        found = self._new(stage)
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws its seed from the default generator
            batches = self.source() if callable(self.source) else self.source
            for batch in itertools.islice(batches or (), self.config.calibration_batches):
                found.observe(functools.partial(self._loss, batch))
        if not found.batches:
            raise ConfigError("calibration gave no batch; statistics need at least 1")
        return found

    def _new(self, stage: str) -> Calibration:
        return Calibration(self.model, self.needs[stage], self.config.calibration_device)

    # State: statistics of a stage that is not over

    def tensors(self) -> dict[str, Tensor]:
        """Sums gathered so far, by "FQN.attribute"."""
        return {} if self.current is None else self.current.tensors()

    def plain(self) -> dict[str, Any] | None:
        """The rest of them, or None."""
        return None if self.current is None else self.current.plain()

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None) -> None:
        """Put both back."""
        self.current = None
        if plain is not None:
            self.current = Calibration(self.model, plain["needs"], self.config.calibration_device)
            self.current.load(tensors, plain)
