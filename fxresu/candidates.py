"""Candidates of a RESU phase: which inputs theta covers, and theta's initial value."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxresu.errors import ConfigError
from fxresu.kernels import active_sums
from fxresu.topk import count_true, row_chunks

if TYPE_CHECKING:
    from fxresu.managed import ManagedWeight

__all__ = [
    "THETA_INITS",
    "active_spread",
    "active_std",
    "candidate_column_count",
    "candidate_columns",
    "panel_shape",
    "seeded",
    "share_columns",
    "std_of",
    "theta_init",
]

THETA_INITS = ("normal", "zero", "uniform")


def candidate_column_count(k: int, share: float, block: int = 64) -> int:
    """Columns that `candidate_columns` returns for K = `k` inputs: ceil(share * k / block) blocks, but at most k
    columns."""
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"candidates={share!r}; the share of input columns that theta covers must be in (0, 1]")
    if block < 1:
        raise ConfigError(f"block={block!r}; a block of input columns has at least 1 column")
    return min(math.ceil(Fraction(repr(float(share))) * k / block) * block, k)


def panel_shape(entry: ManagedWeight, share: float) -> tuple[int, int]:
    """Shape of θ where it covers a share of the inputs: chosen columns of the weight, or chosen rows."""
    if entry.input_rows:
        return candidate_column_count(entry.rows, share), entry.k
    return entry.rows, candidate_column_count(entry.k, share)


@torch.no_grad()
def candidate_columns(score: Tensor | None, mask: Tensor, share: float, block: int = 64, rotation: int = 0) -> Tensor:
    """Input columns that theta covers: int32 [n_cols], ascending and distinct, n_cols = candidate_column_count(K,
    share, block).

    mask: bool [rows, K], True = active. score: floating point [rows, K] or None. Columns come in whole blocks of
    `block`; the blocks with the largest sum of |score| over their pruned coordinates win. Ties go round-robin: rotation
    r starts r whole selections further on, so without a score (or where W_eff is zero at all pruned coordinates)
    successive rotations sweep all columns. The length depends on K, share and block only. Where `block` does not divide
    K, the last block is short; when it wins, the columns that it lacks are the first ones of the best block that lost.
    """
    k = mask.shape[1]
    n_cols = candidate_column_count(k, share, block)
    if score is not None and (score.shape != mask.shape or not score.is_floating_point()):
        raise ConfigError(
            f"score is {score.dtype} {list(score.shape)}; must be floating point {list(mask.shape)} like the mask"
        )
    n_blocks = math.ceil(k / block)
    start = rotation * math.ceil(n_cols / block) % max(n_blocks, 1)
    order = torch.arange(n_blocks).roll(-start)
    if score is not None:
        sums = _pruned_sums(score, mask, n_blocks, block).cpu()
        if bool(sums.isnan().any()):
            raise ConfigError("score contains NaN at pruned coordinates, which has no rank")
        order = order[sums[order].sort(descending=True, stable=True).indices]
    columns = (order[:, None] * block + torch.arange(block)).flatten()
    return columns[columns < k][:n_cols].sort().values.to(mask.device, torch.int32)


def share_columns(entries: Iterable[ManagedWeight]) -> None:
    """One tensor for all equal choices of inputs: linears that read the same input (queries, keys and values; gate and
    up) then keep one panel of it, because their graphs select it by the same operand."""
    seen: dict[tuple[torch.device, int, bytes], tuple[Tensor, Tensor | None]] = {}
    for entry in entries:
        if entry.columns is not None:
            inputs = entry.rows if entry.input_rows else entry.k
            values = b"" if entry.columns.is_meta else entry.columns.cpu().numpy().tobytes()
            key = entry.columns.device, -inputs if entry.input_rows else inputs, values
            entry.columns, entry.panel = seen.setdefault(key, (entry.columns, entry.panel))


def _pruned_sums(score: Tensor, mask: Tensor, n_blocks: int, block: int) -> Tensor:
    """fp32 [n_blocks]: sum of |score| over the pruned coordinates of every block of columns."""
    rows, k = mask.shape
    sums = torch.zeros(n_blocks * block, dtype=torch.float32, device=score.device)
    for first, last in row_chunks(rows, k):
        sums[:k] += score[first:last].detach().float().abs().masked_fill_(mask[first:last], 0.0).sum(0)
    return sums.view(n_blocks, block).sum(1)


@torch.no_grad()
def active_std(weight: Tensor, mask: Tensor) -> float:
    """Standard deviation (fp32, n - 1 in the denominator; 0.0 for fewer than 2) of weight [rows, K] where mask is True.

    Reads rows in chunks, so the active values are never gathered into one tensor; on a GPU in two launches, and the
    host waits once.
    """
    if weight.is_cuda:
        return std_of(*active_spread(weight, mask).tolist())
    count = count_true(mask)
    if count < 2:
        return 0.0
    chunks = list(row_chunks(*mask.shape))
    mean = sum(float(_active(weight, mask, a, b, 0.0).sum()) for a, b in chunks) / count
    squares = sum(float(_active(weight, mask, a, b, mean).square_().sum()) for a, b in chunks)
    return math.sqrt(squares / (count - 1))


@torch.no_grad()
def active_spread(weight: Tensor, mask: Tensor) -> Tensor:
    """float64 [2] on the device: how many values are active, and the sum of their squared distances from their mean.
    `std_of` makes the standard deviation of them."""
    mask = mask.contiguous()
    n, total = active_sums(weight, mask).sum(1)
    return torch.stack((n, active_sums(weight, mask, total / n)[1].sum()))


def std_of(count: float, squares: float) -> float:
    """Standard deviation of `count` values, n - 1 in the denominator; 0.0 for fewer than 2."""
    return math.sqrt(squares / (count - 1)) if count >= 2 else 0.0


def _active(weight: Tensor, mask: Tensor, first: int, last: int, mean: float) -> Tensor:
    """weight - mean at active coordinates, 0 elsewhere."""
    return (weight[first:last].detach().float() - mean).masked_fill_(~mask[first:last], 0.0)


@torch.no_grad()
def seeded(device: torch.device, *parts: object) -> torch.Generator:
    """A generator whose stream is a pure function of `parts`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def theta_init(
    kind: str,
    shape_or_values: Sequence[int] | Tensor,
    active_values: Tensor | float,
    epsilon: float = 0.1,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Initial theta of one weight.

    kind: "normal", epsilon * sigma * N(0, 1) (the published start); "uniform", U(-a, a) with a = sqrt(3) * epsilon *
    sigma, which has the same standard deviation; "zero". sigma is the standard deviation of the weight's active values:
    `active_values` is these values (any floating dtype, computed in fp32) or sigma itself (`active_std` computes it
    without gathering them). shape_or_values: theta's shape, or a tensor whose shape and device theta gets. Returns a
    tensor of `dtype`.

    Every element is drawn, padding included: the caller zeroes padding. Numbers are drawn in fp32 on the generator's
    device, so a CPU generator gives the same theta on every device.
    """
    if kind not in THETA_INITS:
        raise ConfigError(f"theta_init={kind!r} is unknown; use one of {', '.join(THETA_INITS)}")
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise ConfigError(f"theta_epsilon={epsilon!r}; must be a finite number >= 0")
    if isinstance(shape_or_values, Tensor):
        shape, device = shape_or_values.shape, device or shape_or_values.device
    else:
        shape = torch.Size(shape_or_values)
        if device is None and isinstance(active_values, Tensor):
            device = active_values.device
    if kind == "zero":
        return torch.zeros(shape, dtype=dtype, device=device)
    scale = epsilon * _std(active_values)
    source = generator.device if generator is not None else device
    if kind == "normal":
        theta = torch.randn(shape, generator=generator, device=source).mul_(scale)
    else:
        theta = torch.rand(shape, generator=generator, device=source).mul_(2.0).sub_(1.0).mul_(scale * math.sqrt(3.0))
    return theta.to(device=device or source, dtype=dtype)


def _std(active_values: Tensor | float) -> float:
    if isinstance(active_values, Tensor):
        sigma = float(active_values.detach().float().std()) if active_values.numel() > 1 else 0.0
    else:
        sigma = float(active_values)
    if not (math.isfinite(sigma) and sigma >= 0.0):
        raise ConfigError(f"the active weights' standard deviation is {sigma!r}; theta needs a finite one")
    return sigma
