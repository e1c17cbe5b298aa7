"""The memory bill of a run: what was predicted for every stage, or counted in it, against what was measured.

Reads what `stage_memory` has written into the log. Needs no torch: `fxresu report` is a small process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .memory_bill import STAGES, TRANSITIONS, WORKSPACE, MemoryBill, StageBill

__all__ = ["FREE_HEAP", "bill_of", "highest", "peak_of", "stage_of"]

FREE_HEAP = "heap, free between steps"
"""Part of the host's memory that steps use again; the bill shows what of it is beyond what a step takes."""
_BEYOND = "heap, free beyond what a step takes"
# What a step takes and gives back.
_OF_A_STEP = ("activations", "temporaries", "gradients", "θ gradient")

Found = Mapping[str, Any]
"""One stage as `StageMemory` has found it."""


def stage_of(phase: str) -> str:
    """The bill's name of a phase."""
    return "dense" if phase == "warmup" else phase


def highest(found: Sequence[Found]) -> dict[str, Found]:
    """Of every stage the time that held the most, in the order of a run."""
    best: dict[str, Found] = {}
    for one in found:
        name = stage_of(one["stage"])
        if name not in best or peak_of(one) > peak_of(best[name]):
            best[name] = one
    return {name: best[name] for name in (*STAGES, *best) if name in best}


def peak_of(found: Found) -> int:
    """Bytes of a stage's highest point: of the device's tensors, or of the process where it ran on a CPU."""
    return found["host_peak"] if found.get("device_peak") is None else found["device_peak"]


def bill_of(found: Sequence[Found], predicted: Mapping[str, Any] | None, model: str = "") -> MemoryBill | None:
    """The bill of a run; None if no stage was completed.

    Args:
        found: stages in the order of the run; of those that came several times the one that held the most is shown.
        predicted: `MemoryBill.to_dict` of the same model. Without it, components are those counted in the run.
    """
    stages = highest(found)
    if not stages:
        return None
    known = None if predicted is None else MemoryBill.from_dict(predicted)
    on_cpu = all(one.get("device_peak") is None for one in stages.values())
    bills = tuple(_stage(name, one, known) for name, one in stages.items())
    overhead = {} if on_cpu else _overhead(stages, known)
    if known is None:
        return MemoryBill(model, "cpu" if on_cpu else "cuda", {}, bills, overhead, {}, basis="counted")
    return MemoryBill(known.model, known.device, known.settings, bills, overhead, {}, seconds=known.seconds)


def _overhead(stages: Mapping[str, Found], known: MemoryBill | None) -> dict[str, int]:
    """What the device holds beside tensors. The context is what is in use and not the allocator's."""
    context = min(one["whole_device"] - one["reserved"] for one in stages.values())
    rest = {} if known is None else {n: s for n, s in known.overhead.items() if n == WORKSPACE}
    return {"CUDA context and libraries": context, **rest}


def _stage(name: str, found: Found, known: MemoryBill | None) -> StageBill:
    parts, when = {**found["counted"], **found["extra"]}, "between steps"
    if known is not None and any(s.name == name for s in known.stages):
        stage = known[name]
        # Counted beside a prediction only what it cannot know.
        parts = {**{n: s for n, s in found["extra"].items() if n != "activations"}, **stage.parts}
        when = stage.when
    host = dict(found["host"])
    free = host.pop(FREE_HEAP, 0)
    beyond = max(0, free - sum(parts.get(n, 0) for n in _OF_A_STEP))
    host |= {_BEYOND: beyond} if beyond else {}
    return StageBill(
        name, name in TRANSITIONS, parts, when, host, found.get("device_peak"), found.get("whole_device"),
        found["host_peak"],
    )  # fmt: skip
