"""Shorter versions of models that are rows of equal blocks, and what they say about the whole.

What two blocks add to memory at a given moment of a step is the same anywhere between the first and the last, so two
short models give the long one. It saves the time of tracing and lowering every block. Two, because "recompute" keeps
every other sum of a residual stream, and a block may add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .rehearsal import DYNAMIC, Peak, Trace
from .shape_copy import meta_copy
from .trace_unrolling import lives, peak_of, unrolled

SHORT = 2  # blocks of the shortest version: a first and a last one; one more for an odd number
_MORE = 2
_LONG = 9  # shorter rows are rehearsed as fast whole
# For its trace a model is shortened less: of the last two blocks the compiler makes other buffers than of those before,
# and the repeated stretch must come out between them and the first. Its rows are rehearsed whole up to `_LONG_TRACED`.
_MORE_TRACED = 2
_LONG_TRACED = _LONG + _MORE_TRACED
_AGREES = 0.01  # share of the peak by which both ways to it may differ

Rehearsed = tuple[tuple[Peak, ...], Trace]
Rehearse = Callable[[nn.Module], Rehearsed]


@dataclasses.dataclass(frozen=True)
class Row:
    """A list of blocks alike.

    Attributes:
        fqn: of the `nn.ModuleList` or `nn.Sequential`.
        length: how many blocks it has.
    """

    fqn: str
    length: int


def rows_of_blocks(model: nn.Module) -> tuple[Row, ...]:
    """The rows of equal blocks that are not inside one another."""
    found: list[Row] = []
    for fqn, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < _LONG:
            continue
        if any(fqn.startswith(f"{row.fqn}.") for row in found):
            continue
        if len({_signature(block) for block in module}) == 1 and any(True for _ in module.parameters()):
            found.append(Row(fqn, len(module)))
    return tuple(found)


def _signature(module: nn.Module) -> tuple[Any, ...]:
    parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in module.named_parameters())
    return type(module), tuple(type(m) for m in module.modules()), parameters


def shortened(model: nn.Module, lengths: Sequence[tuple[Row, int]]) -> nn.Module:
    """A meta copy whose rows have these lengths; the first blocks stay."""
    copied = meta_copy(model)
    for row, length in lengths:
        blocks = copied.get_submodule(row.fqn)
        assert isinstance(blocks, (nn.ModuleList, nn.Sequential))
        del blocks[length:]
    return copied


def rehearse_whole(model: nn.Module, rehearse: Rehearse) -> Rehearsed:
    """What `rehearse` says of a copy of the model."""
    return rehearse(meta_copy(model))


Found = tuple[tuple[Peak, ...], Trace | None]
Alike = list[tuple[tuple[Any, ...], Found]]
"""What was found for whole models, with what their shortest versions do."""


def rehearse_short(model: nn.Module, rehearse: Rehearse, traced: bool = False, alike: Alike | None = None) -> Found:
    """What `rehearse` says of the whole model, asked of short versions of it where it has rows of equal blocks.

    A model that does not run shortened (one that counts its blocks itself) is rehearsed whole.

    Args:
        traced: the trace is wanted, too. It is None where that of the whole model does not follow from short ones.
        alike: of other phases of this model. One whose shortest version takes and frees the same, storage by storage
            (dense and sparse steps do), needs no longer ones; new finds are added.
    """
    rows = rows_of_blocks(model)
    if traced:
        rows = tuple(r for r in rows if r.length >= _LONG_TRACED)
    if not rows:
        return rehearse_whole(model, rehearse)
    short = {r: _short(r) + _MORE_TRACED * traced for r in rows}
    try:
        base, trace = rehearse(shortened(model, list(short.items())))
        seen = (traced, short, base, lives(trace))
        for other, known in alike or ():
            if other == seen:
                return known
        found = [rehearse(shortened(model, [(r, n + _MORE * (r is one)) for r, n in short.items()])) for one in rows]
    except (IndexError, AttributeError, KeyError):
        return rehearse_whole(model, rehearse)
    copies = {r: (r.length - n) // _MORE for r, n in short.items()}
    peaks = _extrapolated(base, [(copies[r], longer) for r, (longer, _) in zip(rows, found)])
    whole = unrolled(trace, found[0][1], copies[rows[0]]) if traced and len(rows) == 1 else None
    highest = max(p.total for p in peaks)
    if whole is not None and abs(peak_of(whole) - highest) > _AGREES * highest:
        whole = None
    if alike is not None:
        alike.append((seen, (peaks, whole)))
    return peaks, whole


def _extrapolated(base: Sequence[Peak], longer: Sequence[tuple[int, Sequence[Peak]]]) -> tuple[Peak, ...]:
    """Peaks with what longer models have more, so many times."""
    result = []
    for i, peak in enumerate(base):
        parts = {
            name: peak.parts[name]
            + sum(copies * (more[i].parts[name] - peak.parts[name]) for copies, more in longer)
            for name in DYNAMIC
        }
        result.append(Peak(peak.region, {n: max(0, v) for n, v in parts.items()}))
    return tuple(result)


def _short(row: Row) -> int:
    return SHORT + (row.length - SHORT) % _MORE
