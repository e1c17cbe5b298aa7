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

from .rehearsal import DYNAMIC, Peak
from .shape_copy import meta_copy

SHORT = 2  # blocks of the shortest version: a first and a last one; one more for an odd number
_MORE = 2
_LONG = 9  # shorter rows are rehearsed as fast whole

Rehearse = Callable[[nn.Module], tuple[Peak, ...]]


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


def rehearse_whole(model: nn.Module, rehearse: Rehearse) -> tuple[Peak, ...]:
    """What `rehearse` says of a copy of the model."""
    return rehearse(meta_copy(model))


def rehearse_short(model: nn.Module, rehearse: Rehearse) -> tuple[Peak, ...]:
    """What `rehearse` says of the whole model, asked of short versions of it where it has rows of equal blocks.

    A model that does not run shortened (one that counts its blocks itself) is rehearsed whole.
    """
    rows = rows_of_blocks(model)
    if not rows:
        return rehearse_whole(model, rehearse)
    try:
        base = rehearse(shortened(model, [(r, _short(r)) for r in rows]))
        longer = [rehearse(shortened(model, [(r, _short(r) + _MORE * (r is one)) for r in rows])) for one in rows]
    except (IndexError, AttributeError, KeyError):
        return rehearse_whole(model, rehearse)
    result = []
    for i, peak in enumerate(base):
        parts = {
            name: peak.parts[name]
            + sum(
                (row.length - _short(row)) // _MORE * (more[i].parts[name] - peak.parts[name])
                for row, more in zip(rows, longer)
            )
            for name in DYNAMIC
        }
        result.append(Peak(peak.region, {n: max(0, v) for n, v in parts.items()}))
    return tuple(result)


def _short(row: Row) -> int:
    return SHORT + (row.length - SHORT) % _MORE
