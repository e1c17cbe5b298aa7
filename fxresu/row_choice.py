"""Selection in every row by kernels, where there are kernels for it (see `kernels.row_select`): a launch a weight.

The host does not wait for it. A NaN in a score raises a flag on the device, which is read once for a weight, or once
for all weights where the caller says so (`NanFlags`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxresu.errors import ConfigError
from fxresu.kernels import row_select, row_share
from fxresu.kernels.row_select import takes_rows

from .host_values import on_host
from .scores import Score, nan_message
from .topk import row_chunks

__all__ = ["NanFlags", "best_in_rows", "kernels_choose", "shared_in_rows"]


class NanFlags:
    """Flags of scores that have not been looked at yet, so that the host waits once for many weights."""

    def __init__(self) -> None:
        self._flags: dict[str, Tensor] = {}

    def add(self, name: str, flag: Tensor) -> None:
        """Look at this bool later."""
        self._flags[name] = flag

    def refuse(self) -> None:
        """Raise ConfigError that names the first weight whose score has a NaN; forget the flags."""
        flags, self._flags = self._flags, {}
        for name, found in on_host(flags).items():
            if found:
                raise ConfigError(nan_message(name))


def kernels_choose(score: Score) -> bool:
    """Whether kernels choose from the rows of this score: it is on a GPU, and they are not too long."""
    return score.dim() == 2 and score.numel() > 0 and takes_rows(score.device, score.dtype, score.shape[1])


def best_in_rows(name: str, score: Score, kept: int, flags: NanFlags | None = None) -> Tensor:
    """bool [rows, K]: the `kept` largest |score| of every row. `kernels_choose` must hold.

    Raises ConfigError: NaN in the score; with `flags`, when these are asked.
    """
    mask, flag = _by_parts(score, lambda first, last, part, flag: row_select(part, kept, flag))
    if flags is not None:
        flags.add(name, flag)
    elif bool(flag):
        raise ConfigError(nan_message(name))
    return mask


def shared_in_rows(
    score: Score, slots: int, wanted: int, old: Tensor, candidate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """bool [rows, K], `slots` coordinates of every row, of which `wanted` go to candidates (see `kernels.row_share`);
    and a bool on the device: the score has a NaN, or a coordinate is both old and candidate. `kernels_choose` must
    hold."""

    def choose(first: int, last: int, part: Tensor, flag: Tensor) -> Tensor:
        mine, others = (None if m is None else m[first:last].contiguous() for m in (old, candidate))
        assert mine is not None
        return row_share(part, slots, wanted, mine, others, flag)

    return _by_parts(score, choose)


def _by_parts(score: Score, choose: Callable[[int, int, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(mask, flag): a matrix in memory at once, another in the chunks of rows that it is computed in."""
    rows, cols = score.shape
    flag = torch.zeros((), dtype=torch.bool, device=score.device)
    if isinstance(score, Tensor):
        return choose(0, rows, score.detach(), flag), flag
    mask = torch.empty(rows, cols, dtype=torch.bool, device=score.device)
    for first, last in row_chunks(rows, cols):
        mask[first:last] = choose(first, last, score[first:last].detach().float(), flag)
    return mask, flag
