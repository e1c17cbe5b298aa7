"""How long resurrected weights stay: the last commits' cohorts, followed over later prunings and commits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fxresu.kernels import count
from fxresu.kernels.bits import words

from .errors import HostMemoryError
from .host_values import on_host
from .lanes import lanes_for
from .model_state import managed_weights

__all__ = ["Cohorts"]


class Cohorts:
    """Coordinates that the last `limit` commits resurrected: one bit a coordinate and commit, kept on the host.

    Masks on a GPU are compared and counted there, a weight at a time, and cohorts are in pinned memory: a host would
    take longer over them than over all the rest of a commit.

    Attributes:
        bits: by the commit's cycle, then by FQN: int32 masks of what it resurrected. Copies into them may be under way;
            `tensors` waits for them.
        sizes: how many these were.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bits: dict[int, dict[str, Tensor]] = {}
        self.sizes: dict[int, int] = {}
        self._spare: list[Tensor] = []  # for cohorts to come, each for all weights
        self._held: dict[int, Tensor] = {}  # the same by cycle: what the cohorts are in
        self._devices: set[torch.device] = set()  # of the masks
        self._newest: tuple[int, list[_Version]] | None = None  # a cohort that no mask has changed since
        self._known: tuple[list[_Version], dict[str, float]] | None = None  # masks, and what was counted in them

    def reserve(self, model: nn.Module, commits: int) -> None:
        """Get the memory for so many commits now: pinning takes longer than a commit should."""
        weights = list(managed_weights(model).values())
        size = sum(m.entry.rows * words(m.entry.k) for m in weights)
        count = min(self.limit, commits) + 1 if self.limit else 0  # one is filled before the oldest is forgotten
        for _ in range(count - len(self.bits) - len(self._spare)):
            self._spare.append(_memory(weights[0].entry.device(weights[0].parameter), size))

    def before(self, model: nn.Module) -> dict[str, Tensor]:
        """The masks as they are, on the host, to be given to `after`; nothing if no cohort is followed."""
        if not self.limit:
            return {}
        masks = _masks(model)
        sizes = [bits.numel() for bits in masks.values()]
        self._devices = {bits.device for bits in masks.values()}
        if not self._spare or self._spare[-1].numel() != sum(sizes):
            self._spare = [_memory(next(iter(self._devices)), sum(sizes))]
        pieces = self._spare[-1].split(sizes)
        old = {name: piece.view(bits.shape) for (name, bits), piece in zip(masks.items(), pieces, strict=True)}
        for name, bits in masks.items():
            old[name].copy_(bits, non_blocking=True)
        return old

    def after(self, cycle: int, model: nn.Module, old: dict[str, Tensor], resurrected: int) -> None:
        """A commit has happened: follow the `resurrected` coordinates that it brought back, where `old` is from
        `before`, and forget the oldest cohort beyond the limit."""
        if not self.limit:
            return
        masks = _masks(model)
        for name, bits in old.items():
            bits.copy_(_compared(masks[name], bits, lambda new, before: new & ~before), non_blocking=True)
        self.bits[cycle], self.sizes[cycle], self._held[cycle] = old, resurrected, self._spare.pop()
        self._newest, self._known = (cycle, [_Version(bits) for bits in masks.values()]), None
        for gone in sorted(self.bits)[: -self.limit]:
            del self.bits[gone], self.sizes[gone]
            if gone in self._held:  # not of a checkpoint
                self._spare.append(self._held.pop(gone))

    def survival(self, model: nn.Module) -> dict[str, float]:
        """Share of every cohort that is active now, by its cycle (as text, for JSON). 1.0 while the model is dense."""
        if not self.bits:
            return {}
        now = _masks(model)
        versions = [_Version(bits) for bits in now.values()]
        if self._known is None or self._known[0] != versions:
            self._known = versions, self._survival(now, versions)
        return dict(self._known[1])

    def _survival(self, now: Mapping[str, Tensor], versions: list[_Version]) -> dict[str, float]:
        whole = self._newest[0] if self._newest is not None and self._newest[1] == versions else None
        found = {
            f"{cycle}.{name}": _compared(now[name], bits, lambda mask, cohort: count(mask & cohort))
            for cycle, cohort in self.bits.items()
            for name, bits in cohort.items()
            if now and cycle != whole
        }
        alive = on_host(found)
        shares = {}
        for cycle, cohort in self.bits.items():
            size = self.sizes[cycle]
            left = sum(alive[f"{cycle}.{name}"] for name in cohort) if now and cycle != whole else size
            shares[str(cycle)] = left / size if size else 0.0
        return shares

    def tensors(self) -> dict[str, Tensor]:
        """All masks, by "cycle.FQN"."""
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return {f"{cycle}.{name}": bits for cycle, named in self.bits.items() for name, bits in named.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors()` back."""
        self.bits, self.sizes, self._held, self._known, self._newest = {}, {}, {}, None, None
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


def _memory(device: torch.device, count: int) -> Tensor:
    """int32 [count] in host memory, pinned if that can be had; copies to and from other memory wait."""
    size = 4 * count
    try:  # torch's own pinned memory, of such sizes, may go while a copy is under way
        return lanes_for(device).host(1 << max(size - 1, 0).bit_length(), pooled=True)[:size].view(torch.int32)
    except HostMemoryError:
        return torch.empty(count, dtype=torch.int32)


def _compared(mask: Tensor, bits: Tensor, work: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`work` on a mask and bits of the host, where the mask is; on the host if the device has no memory for it, since
    this is counting, and no reason for a transition to fail."""
    try:
        return work(mask, bits.to(mask.device, non_blocking=True))
    except torch.OutOfMemoryError:
        return work(mask.cpu(), bits)


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """The weights' masks; those without one are left out."""
    return {n: m.entry.bits for n, m in managed_weights(model).items() if m.entry.bits is not None}
