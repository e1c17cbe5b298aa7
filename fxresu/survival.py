"""How long resurrected weights stay: the last commits' cohorts, followed over later prunings and commits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxresu.kernels import count

from .model_state import managed_weights

__all__ = ["Cohorts"]


class Cohorts:
    """Coordinates that the last `limit` commits resurrected: one bit a coordinate and commit, on the host.

    Attributes:
        bits: by the commit's cycle, then by FQN: int32 masks of what it resurrected.
        sizes: how many these were.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bits: dict[int, dict[str, Tensor]] = {}
        self.sizes: dict[int, int] = {}

    def before(self, model: nn.Module) -> dict[str, Tensor]:
        """The masks as they are, to be given to `after`; nothing if no cohort is followed."""
        return _masks(model) if self.limit else {}

    def after(self, cycle: int, model: nn.Module, old: Mapping[str, Tensor]) -> None:
        """A commit has happened: follow what it resurrected, and forget the oldest cohort beyond the limit."""
        if not self.limit:
            return
        new = _masks(model)
        self.bits[cycle] = {name: new[name] & ~bits for name, bits in old.items() if name in new}
        self.sizes[cycle] = sum(int(count(bits)) for bits in self.bits[cycle].values())
        for gone in sorted(self.bits)[: -self.limit]:
            del self.bits[gone], self.sizes[gone]

    def survival(self, model: nn.Module) -> dict[str, float]:
        """Share of every cohort that is active now, by its cycle (as text, for JSON). 1.0 while the model is dense."""
        if not self.bits:
            return {}
        now = _masks(model)
        shares = {}
        for cycle, bits in self.bits.items():
            alive = sum(int(count(b & now[n])) if n in now else int(count(b)) for n, b in bits.items())
            shares[str(cycle)] = alive / self.sizes[cycle] if self.sizes[cycle] else 0.0
        return shares

    def tensors(self) -> dict[str, Tensor]:
        """All masks, by "cycle.FQN"."""
        return {f"{cycle}.{name}": bits for cycle, named in self.bits.items() for name, bits in named.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors()` back."""
        self.bits, self.sizes = {}, {}
        for key, bits in tensors.items():
            cycle, _, name = key.partition(".")
            self.bits.setdefault(int(cycle), {})[name] = bits.cpu().clone()
        self.sizes = {c: sum(int(count(b)) for b in named.values()) for c, named in self.bits.items()}


def _masks(model: nn.Module) -> dict[str, Any]:
    """Masks on the host, copied; weights without one are left out."""
    entries = {n: m.entry for n, m in managed_weights(model).items()}
    return {n: e.bits.cpu().clone() for n, e in entries.items() if e.bits is not None}
