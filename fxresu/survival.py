"""How long resurrected weights stay: the last commits' cohorts, followed over later prunings and commits."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

from fxresu.kernels import count

from .host_values import on_host
from .model_state import managed_weights

__all__ = ["Cohorts"]


class Cohorts:
    """Coordinates that the last `limit` commits resurrected: one bit a coordinate and commit, kept on the host. Counted
    where the masks are, a weight at a time: a host would take longer over it than over all the rest of a transition.

    Attributes:
        bits: by the commit's cycle, then by FQN: int32 masks of what it resurrected.
        sizes: how many these were.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bits: dict[int, dict[str, Tensor]] = {}
        self.sizes: dict[int, int] = {}
        self._known: tuple[list[_Version], dict[str, float]] | None = None  # masks, and what was counted in them

    def before(self, model: nn.Module) -> dict[str, Tensor]:
        """The masks as they are, on the host, to be given to `after`; nothing if no cohort is followed."""
        return {name: bits.to("cpu", copy=True) for name, bits in _masks(model).items()} if self.limit else {}

    def after(self, cycle: int, model: nn.Module, old: Mapping[str, Tensor]) -> None:
        """A commit has happened: follow what it resurrected, and forget the oldest cohort beyond the limit."""
        if not self.limit:
            return
        cohort, sizes = dict[str, Tensor](), dict[str, Tensor]()
        for name, bits in _masks(model).items():
            if name in old:
                fresh = bits & ~old[name].to(bits.device)
                cohort[name], sizes[name] = fresh.cpu(), count(fresh)
        self.bits[cycle], self.sizes[cycle], self._known = cohort, sum(on_host(sizes).values()), None
        for gone in sorted(self.bits)[: -self.limit]:
            del self.bits[gone], self.sizes[gone]

    def survival(self, model: nn.Module) -> dict[str, float]:
        """Share of every cohort that is active now, by its cycle (as text, for JSON). 1.0 while the model is dense."""
        if not self.bits:
            return {}
        now = _masks(model)
        versions = [_Version(bits) for bits in now.values()]
        if self._known is None or self._known[0] != versions:
            self._known = versions, self._survival(now)
        return dict(self._known[1])

    def _survival(self, now: Mapping[str, Tensor]) -> dict[str, float]:
        found = {
            f"{cycle}.{name}": count(bits.to(now[name].device) & now[name]) if name in now else count(bits)
            for cycle, cohort in self.bits.items()
            for name, bits in cohort.items()
        }
        alive = on_host(found)
        total = {c: sum(alive[f"{c}.{name}"] for name in cohort) for c, cohort in self.bits.items()}
        return {str(c): n / self.sizes[c] if self.sizes[c] else 0.0 for c, n in total.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All masks, by "cycle.FQN"."""
        return {f"{cycle}.{name}": bits for cycle, named in self.bits.items() for name, bits in named.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors()` back."""
        self.bits, self.sizes, self._known = {}, {}, None
        for key, bits in tensors.items():
            cycle, _, name = key.partition(".")
            self.bits.setdefault(int(cycle), {})[name] = bits.to("cpu", copy=True)
        self.sizes = {c: sum(int(count(b)) for b in named.values()) for c, named in self.bits.items()}


class _Version:
    """A mask and what it held, told apart from what it holds later, without keeping it alive."""

    def __init__(self, bits: Tensor) -> None:
        self._bits, self._number = weakref.ref(bits), bits._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Version):
            return NotImplemented
        return self._bits() is not None and self._bits() is other._bits() and self._number == other._number

    __hash__ = None  # type: ignore[assignment]


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """The weights' masks; those without one are left out."""
    return {n: m.entry.bits for n, m in managed_weights(model).items() if m.entry.bits is not None}
