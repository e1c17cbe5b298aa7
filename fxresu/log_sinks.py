"""Where a run's numbers go besides its own files: TensorBoard and Weights & Biases, if they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from .errors import ConfigError

__all__ = ["SINKS", "Sink", "open_sinks"]

SINKS = ("tensorboard", "wandb")
# Signs that the user wants runs sent to Weights & Biases: being installed alone does not open a connection.
_WANDB_SIGNS = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL")


class Sink(Protocol):
    """Takes numbers by name at a step."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""

    def close(self) -> None:
        """No more will come."""


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after a resume replace those of the run that was killed.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, step: int, info: Mapping[str, Any]) -> None:
        import wandb

        self._own = wandb.run is None
        note = folder / "wandb.json"
        known = json.loads(note.read_text())["id"] if step and note.exists() else None
        self._run: Any = wandb.run
        if self._own:
            self._run = wandb.init(dir=str(folder), name=folder.name, config=dict(info), id=known, resume="allow")
            note.write_text(json.dumps({"id": self._run.id}))

    def write(self, values: Mapping[str, float], step: int) -> None:
        # Its own step counter cannot go back, as it must after a resume: the step is a value like the others.
        self._run.log({**values, "step": step})

    def close(self) -> None:
        if self._own:
            self._run.finish()


def open_sinks(names: str | Iterable[str], folder: Path, step: int, info: Mapping[str, Any]) -> list[Sink]:
    """Open the named sinks, or with "auto" those that are installed and, for W&B, configured.

    Args:
        folder: of the run; TensorBoard's files go to its folder `tensorboard`.
        step: the step a resumed run goes on from, else 0.
        info: the run's configuration.

    Raises:
        ConfigError: an unknown name, or one that is not installed.
    """
    chosen = _automatic() if names == "auto" else [names] if isinstance(names, str) else list(names)
    check_sinks(chosen)
    made: list[Sink] = []
    for name in chosen:
        made.append(_TensorBoard(folder, step) if name == "tensorboard" else _Wandb(folder, step, info))
    return made


def check_sinks(names: str | Iterable[str]) -> None:
    """ConfigError for a name that is unknown or not installed."""
    for name in () if names == "auto" else [names] if isinstance(names, str) else names:
        if name not in SINKS:
            raise ConfigError(f"sinks: {name!r} is unknown; use {', '.join(SINKS)}, or 'auto'")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"sinks: {name!r} is not installed; pip install {name}, or leave it out")


def _automatic() -> list[str]:
    found = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    running = "wandb" in sys.modules and getattr(sys.modules["wandb"], "run", None) is not None
    if importlib.util.find_spec("wandb") and (running or any(s in os.environ for s in _WANDB_SIGNS)):
        found.append("wandb")
    return found
