"""Measured times on disk: one JSON file a device, valid for one set of versions."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ._salt import kernel_salt
from ._triton import triton

Figures = dict[str, float | str]
"""By candidate: microseconds, or why it cannot run after all."""


def folder() -> Path:
    """`$FXRESU_CACHE`, or `fxresu` below the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    own = os.environ.get("FXRESU_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxresu"


def versions(device: torch.device) -> dict[str, str]:
    """What measured times depend on, beside the problem."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "fxresu": kernel_salt(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", "none"),
        "device": name,
    }


class ChoiceCache:
    """Times of candidates by problem, in memory and in one file.

    A file that is damaged or from other versions counts as empty, with one warning, and is replaced by the next `put`.
    A folder that cannot be written costs one warning and nothing else.
    """

    def __init__(self, path: Path, versions: dict[str, str]) -> None:
        self.path = path
        self.versions = versions
        self._warned = False
        self._problems = self._read()

    def get(self, key: str, names: Sequence[str]) -> Figures | None:
        """Figures of the candidates `names` for a problem, or None unless all of them are known."""
        found = self._problems.get(key, {})
        return {n: found[n] for n in names} if all(n in found for n in names) else None

    def known(self, key: str) -> Figures:
        """All figures of a problem."""
        return dict(self._problems.get(key, {}))

    def put(self, key: str, figures: Figures) -> None:
        """Remember figures. What other processes wrote meanwhile is kept; the file is replaced in one step."""
        ours = {**self._problems.get(key, {}), **figures}
        self._problems = {**self._read(), **self._problems, key: ours}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"versions": self.versions, "problems": self._problems}, file, indent=1)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            self._warn(f"measured kernel times cannot be kept in {self.path}: {error}")

    def _read(self) -> dict[str, Figures]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, UnicodeDecodeError) as error:
            self._warn(f"{self.path} cannot be read ({error}); kernels are measured again")
            return {}
        try:
            content = json.loads(text)
            written, problems = content["versions"], content["problems"]
            _check(problems)
        except (ValueError, KeyError, TypeError) as error:
            self._warn(f"{self.path} is damaged ({error}); kernels are measured again and the file is rebuilt")
            return {}
        if written != self.versions:
            changed = [n for n in self.versions if not isinstance(written, dict) or written.get(n) != self.versions[n]]
            self._warn(f"{self.path} is from another {', '.join(changed)}; kernels are measured again")
            return {}
        return problems

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _check(problems: Any) -> None:
    if not isinstance(problems, dict):
        raise TypeError(f"problems is a {type(problems).__name__}")
    for key, figures in problems.items():
        if not isinstance(figures, dict):
            raise TypeError(f"{key!r} has no figures")
        for name, value in figures.items():
            if not isinstance(value, str) and not (isinstance(value, float) and 0 < value < float("inf")):
                raise TypeError(f"{key!r}: {name} = {value!r}")


_OPEN: dict[tuple[Path, str], ChoiceCache] = {}


def of(device: torch.device) -> ChoiceCache:
    """The cache of a device, read once a process and folder."""
    current = versions(device)
    path = folder() / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', current['device']).strip('-').lower()}.json"
    key = (path, current["device"])
    if key not in _OPEN:
        _OPEN[key] = ChoiceCache(path, current)
    return _OPEN[key]
