"""What torch's CUDA allocator holds beside tensors in every stage: the stages of a run, replayed on its rules.

Where a tensor fits depends on what lay there before, so one allocator goes through all stages in their order, as
`memory_measure` runs them: two steps of every phase, and an emptied cache before each stage is looked at. It starts
with the weights; the optimizer's state comes in the first step, into what the backward has left free, and copies that
compiled steps of RESU read come with the first of these.

Steps must be those of the whole model, rehearsed so or unrolled from short ones. Gaps of short models say little of a
deep one's: pages alone make them jump.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from .caching_allocator import Block, CachingAllocator
from .memory_bill import STAGES
from .memory_static import Standing, selection_bytes
from .rehearsal import Trace

Key = tuple[str, str]
Layout = Mapping[Key, tuple[int, ...]]
"""Bytes of the tensors that are there between steps, by whose they are and component."""

_STATE = ("optimizer state, managed", "optimizer state, other")
_NO_GRADIENT = "θ gradient"  # a step's trace has it
_COPIES = "compute copies"

# The phases that a run has been in when it comes to a stage.
_BEFORE = {
    "dense": ("dense",),
    "prune": ("dense",),
    "sparse": ("dense", "sparse"),
    "start RESU": ("dense", "sparse"),
    "resu": ("dense", "sparse", "resu"),
    "predict": ("dense", "sparse", "resu", "predict"),
    "correct": ("dense", "sparse", "resu", "predict", "correct"),
    "commit": ("dense", "sparse", "resu"),
    "drop masks": ("dense", "sparse", "resu", "predict", "correct"),
}
PHASES = ("dense", "sparse", "resu", "predict", "correct")


def traced_phases(stages: Iterable[str]) -> tuple[str, ...]:
    """Phases whose steps must be known to tell what these stages hold."""
    needed = {phase for stage in stages for phase in _BEFORE[stage]}
    return tuple(p for p in PHASES if p in needed)


def layout_of(found: Standing) -> Layout:
    """What a phase has between its steps, weight by weight."""
    managed = {
        (w.fqn, component): sizes
        for w in found.weights
        for component, sizes in w.tensors.items()
        if sizes and component != _NO_GRADIENT
    }
    return managed | {key: sizes for key, sizes in found.rest.items() if any(sizes)}


def cached_bytes(standings: Mapping[str, Standing], traces: Mapping[str, Trace], workspace: int) -> dict[str, int]:
    """Bytes that the allocator holds beside tensors at each stage's highest point, as far as there are traces.

    Args:
        standings: of every phase in `PHASES`.
        traces: a step of each phase that the run has been in.
        workspace: bytes of cuBLAS's.
    """
    layouts = {phase: layout_of(found) for phase, found in standings.items()}
    late = [(w.fqn, _COPIES) for w in standings["resu"].weights if w.copied_by_step]
    device = _Device(workspace, {w.fqn: w.coordinates for w in standings["dense"].weights}, late)
    return _replayed(device, layouts, traces)


def _replayed(device: _Device, layouts: Mapping[str, Layout], traces: Mapping[str, Trace]) -> dict[str, int]:
    """The course of `memory_measure`, as far as there are traces."""
    found: dict[str, int] = {}

    def look(stage: str, act: Callable[[], None]) -> None:
        device.allocator.empty_cache()
        device.allocator.reset_peaks()
        act()
        found[stage] = device.allocator.peak_reserved - device.allocator.peak_live

    def phase(name: str) -> bool:
        if name in traces:
            device.copy(layouts[name])
            device.step(traces[name])
            look(name, lambda: device.step(traces[name]))
        return name in traces

    device.build(layouts["dense"])
    device.step(traces["dense"], device.state_of(layouts["dense"]))
    look("dense", lambda: device.step(traces["dense"]))
    look("prune", lambda: device.move(layouts["sparse"], select=True))
    if not phase("sparse"):
        return found
    look("start RESU", lambda: device.move(layouts["resu"]))
    if not phase("resu"):
        return found
    look("commit", lambda: device.move(layouts["sparse"], select=True, fresh=("masks",)))
    device.move(layouts["resu"])
    device.copy(layouts["resu"])
    device.step(traces["resu"])
    for name in ("predict", "correct"):
        device.move(layouts[name])
        if not phase(name):
            return found
    device.move(layouts["resu"])
    look("drop masks", lambda: device.move(layouts["dense"], select=True))
    assert set(found) == set(STAGES)
    return found


class _Device:
    """A device's memory with the tensors of a training, which steps and transitions come and go on.

    Args:
        workspace: bytes of cuBLAS's.
        weights: coordinates of the managed ones.
        late: what of a phase is not there before its first step.
    """

    def __init__(self, workspace: int, weights: Mapping[str, int], late: Collection[Key] = ()) -> None:
        self.allocator, self.weights, self.late = CachingAllocator(), weights, late
        self.held: dict[Key, list[Block]] = {}
        self._asked: dict[Key, tuple[int, ...]] = {}
        if workspace:
            self.allocator.allocate(workspace)

    def build(self, layout: Layout) -> None:
        """The model as it is before the first step."""
        for key, sizes in layout.items():
            if key[1] not in _STATE:
                self._put(key, sizes)

    def state_of(self, layout: Layout) -> Layout:
        """The optimizer's part of what is there."""
        return {key: sizes for key, sizes in layout.items() if key[1] in _STATE}

    def copy(self, layout: Layout) -> None:
        """What the first step of a phase makes before its forward."""
        for key in self.late:
            if key in layout and key not in self.held:
                self._put(key, layout[key])

    def step(self, trace: Trace, state: Layout | None = None) -> None:
        """One step; its update makes `state`. What it leaves at its end goes."""
        held: dict[int, Block] = {}
        self._replay(trace.events[: trace.update], held)
        for key, sizes in (state or {}).items():
            self._put(key, sizes)
        self._replay(trace.events[trace.update :], held)
        for block in held.values():
            self.allocator.free(block)

    def move(self, layout: Layout, select: bool = False, fresh: Sequence[str] = ()) -> None:
        """A transition: what is new comes weight by weight, the optimizer's state last; then what was there goes. Only
        a weight itself makes room for what stands for it at once.

        Args:
            select: every weight's mask is chosen, or looked at, on the way.
            fresh: components that are made anew even where they stay as large.
        """
        layout = {key: sizes for key, sizes in layout.items() if key in self.held or key not in self.late}
        old: list[Block] = []
        for fqn, coordinates in self.weights.items():
            self._pass(selection_bytes(coordinates) if select else ())
            for key in [k for k in layout if k[0] == fqn and k[1] not in _STATE]:
                if self._sizes(key) != layout[key] or key[1] in fresh:
                    gone = self.held.pop(key, [])
                    self._put(key, layout[key])
                    if key[1] == "managed weights":
                        self._drop(gone)
                    else:
                        old += gone
        for key, sizes in self.state_of(layout).items():
            if self._sizes(key) != sizes:
                old += self.held.pop(key, [])
                self._put(key, sizes)
        for key in [k for k in self.held if k not in layout]:
            old += self.held.pop(key)
        self._drop(old)

    def _sizes(self, key: Key) -> tuple[int, ...]:
        return self._asked[key] if key in self.held else ()

    def _put(self, key: Key, sizes: tuple[int, ...]) -> None:
        self.held[key] = [self.allocator.allocate(size) for size in sizes if size]
        self._asked[key] = sizes

    def _pass(self, sizes: Iterable[int]) -> None:
        self._drop([self.allocator.allocate(size) for size in sizes])

    def _drop(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self.allocator.free(block)

    def _replay(self, events: Iterable[tuple[int, int]], held: dict[int, Block]) -> None:
        for number, size in events:
            if size > 0:
                held[number] = self.allocator.allocate(size)
            elif number in held:  # the rest is there between steps
                self.allocator.free(held.pop(number))
