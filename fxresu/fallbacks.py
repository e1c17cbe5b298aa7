"""Watches compiled calls for what would go unnoticed: weights left to eager code, weights never rewritten, recompiles.

Each finding is counted on the phase's `CompiledEntry` and told once, with its cause, as a warning that can be filtered
by category.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fxresu.passes import EagerFallbackWarning, RecompileWarning, RewriteWarning
from fxresu.passes import _compat as compat
from fxresu.passes.notices import FxresuWarning, listed, warn

from .current_plan import PhaseState

if TYPE_CHECKING:
    from .runner import CompiledEntry

_BY_PYTHON = "torch.compile leaves the code that reads them to Python (TORCH_LOGS=graph_breaks shows where)"


@dataclasses.dataclass
class Call:
    """What was seen of one compiled call.

    Attributes:
        reads: FQNs of managed weights that eager code read.
        breaks: (reason, stack) of the graph breaks that Dynamo met.
        mark: where Dynamo's book of compilations stood before.
    """

    reads: set[str]
    breaks: list[tuple[str, list[Any]]]
    mark: object


@contextlib.contextmanager
def observed(state: PhaseState) -> Iterator[Call]:
    """Observe a compiled call of the model whose managed weights share `state`."""
    mark, outer = compat.last_compilation(), state.eager_reads
    state.eager_reads = set()
    try:
        with compat.recorded_breaks() as breaks:
            yield Call(state.eager_reads, breaks, mark)
    finally:
        state.eager_reads = outer


class Teller:
    """Gives each warning once."""

    def __init__(self) -> None:
        self._told: set[tuple[str, ...]] = set()

    def tell(self, category: type[FxresuWarning], key: tuple[str, ...], message: str) -> None:
        """Warn, unless a warning of that category and key was given before."""
        key = (category.__name__, *key)
        if key not in self._told:
            self._told.add(key)
            warn(category, message)

    def eager_call(self, reason: str, model: str) -> None:
        """A whole call ran eager although compilation is on."""
        message = f"{model} runs eager, not compiled: {reason}; numbers are the same, its speed is not"
        self.tell(EagerFallbackWarning, (reason,), message)

    def after_call(self, entry: CompiledEntry, call: Call, weights: set[str]) -> None:
        """Judge a compiled call that has just returned; `weights` are the FQNs of all managed weights."""
        phase, compilations = str(entry.plan.phase), compat.compilations_since(call.mark)
        if call.reads:
            for name in call.reads:
                entry.eager_reads[name] = entry.eager_reads.get(name, 0) + 1
            cause = _cause([failed for _, failed in compilations if failed], call.breaks)
            entry.eager_cause = entry.eager_cause or cause
            self.tell(
                EagerFallbackWarning,
                (entry.plan.tag, *sorted(call.reads)),
                f"phase {phase}: eager code read {len(call.reads)} of {len(weights)} managed weights"
                f" ({listed(call.reads)}): {cause}; numbers are the same, speed and memory are not",
            )
        if entry.calls == 1:
            self._never_rewritten(entry, weights - call.reads)
        elif entry.recompiles > entry.recompiles_told:
            entry.recompiles_told = entry.recompiles
            self._recompiled(entry, [reason for reason, _ in compilations if reason])

    def _never_rewritten(self, entry: CompiledEntry, weights: set[str]) -> None:
        consumers = [r for graph in entry.graphs for r in graph.rewrites]
        left = weights - {r.weight for r in consumers if not r.reason}
        reasons: dict[str, set[str]] = {}
        for name in sorted(left):
            why = {r.reason for r in consumers if r.weight == name} or {"not read by the phase's first call"}
            reasons.setdefault("; ".join(sorted(why)), set()).add(name)
        if reasons:
            told = "; ".join(f"{listed(names)} ({why})" for why, names in reasons.items())
            self.tell(
                RewriteWarning,
                (entry.plan.tag, told),
                f"phase {entry.plan.phase}: {len(left)} managed weights were not rewritten: {told}."
                " They are right, and as fast and as large as without the passes; exclude= leaves them alone",
            )

    def _recompiled(self, entry: CompiledEntry, reasons: list[str]) -> None:
        cause = "; ".join(dict.fromkeys(reasons)) or "unknown (TORCH_LOGS=recompiles shows it)"
        hint = ""
        if "size mismatch" in cause or "size" in cause.lower():
            hint = "; inputs of changing sizes share one graph with compile={'dynamic': True}"
        self.tell(
            RecompileWarning,
            (entry.plan.tag, cause),
            f"phase {entry.plan.phase} compiled again at call {entry.calls} (graph {len(entry.graphs)}): {cause}{hint}",
        )


def _cause(failures: list[str], breaks: list[tuple[str, list[Any]]]) -> str:
    """Why code ran eager, as far as Dynamo said it in this call."""
    if failures:
        return "; ".join(dict.fromkeys(failures))
    told = []
    for reason, stack in breaks:
        where = f" at {stack[-1].filename}:{stack[-1].lineno}" if stack else ""
        told.append(f"{reason.partition(chr(10))[0]}{where}")
    return f"{_BY_PYTHON}: {'; '.join(dict.fromkeys(told))}" if told else _BY_PYTHON
