"""The largest magnitudes of every row of a matrix, exact, in one launch and without waiting for the device.

A program has a row. It keeps the row's keys (see `_radix`) in registers and finds the k-th largest bit by bit: a bit is
set in the threshold if k keys reach it then. One bit at a time needs sums only, where digits of several bits need
histograms; a row has few keys for a thread, so that a pass costs little more than its sum.
"""

import torch
from torch import Tensor

from ._check import check_device
from ._radix import magnitude_key
from ._registry import operation
from ._triton import HAS_TRITON, INTERPRET, jit, launch, power_of_two, tl
from .select import magnitude_keys

MAX_COLUMNS = 1 << 15
# Low bits of a float32 that are zero if it was one of these: they need no pass.
_ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
_NAN_KEY = 0x7F800000  # of infinity: keys of NaN are beyond


def takes_rows(device: torch.device, dtype: torch.dtype, columns: int) -> bool:
    """Whether kernels choose from the rows of a matrix: on a GPU (or in the interpreter), up to 32768 columns."""
    there = device.type == "cuda" or (INTERPRET and device.type == "cpu")
    return HAS_TRITON and there and dtype in _ZERO_BITS and columns <= MAX_COLUMNS


def _by_kernel(score: Tensor) -> bool:
    return takes_rows(score.device, score.dtype, score.shape[1])


# --- reference -------------------------------------------------------------------------------------------------------


def row_select_reference(
    score: Tensor, k: int, counts: Tensor | None, eligible: Tensor | None, complement: bool, flag: Tensor
) -> Tensor:
    keys = magnitude_keys(score)
    flag.logical_or_((keys > _NAN_KEY).any())
    wanted = torch.full((score.shape[0],), k, device=score.device) if counts is None else counts
    if eligible is None:
        return _largest_reference(keys, wanted)
    return _largest_reference(keys.masked_fill(eligible if complement else ~eligible, -1), wanted)


def _largest_reference(keys: Tensor, k: Tensor) -> Tensor:
    """In every row the k largest keys, ties to the lowest column; negative keys never."""
    rows, K = keys.shape
    order = keys.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(K, device=keys.device).expand(rows, K) < k[:, None]
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, order, first).logical_and_(keys >= 0)


def row_share_reference(
    score: Tensor, slots: int, wanted: int, old: Tensor, candidate: Tensor | None, flag: Tensor
) -> Tensor:
    other = ~old if candidate is None else candidate
    flag.logical_or_((old & other).any())
    n_old, n_candidate = old.sum(1), other.sum(1)
    from_old = torch.minimum(slots - n_candidate.clamp_max(wanted), n_old)
    from_candidate = torch.minimum(slots - from_old, n_candidate)
    mask = row_select_reference(score, 0, from_old, old, False, flag)
    mask |= row_select_reference(score, 0, from_candidate, other, False, flag)
    return mask.logical_or_(row_select_reference(score, 0, slots - from_old - from_candidate, old | other, True, flag))


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _row_keys(score, row, column, K, stride_row, stride_column):
    """int32 keys of a row, -1 beyond its end."""
    place = score + row * stride_row + column.to(tl.int64) * stride_column
    return tl.where(column < K, magnitude_key(tl.load(place, mask=column < K, other=0), False), -1)


@jit
def _largest(key, k, ZERO_BITS: tl.constexpr):
    """Which of the keys are the k largest, the first ones of equal ones; negative keys never."""
    threshold = tl.full([], 0, tl.int32)
    for step in range(31 - ZERO_BITS):
        higher = threshold | (1 << (30 - step))
        threshold = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= k, higher, threshold)
    chosen = key >= threshold
    surplus = tl.sum(chosen.to(tl.int32), axis=0) - k
    if surplus > 0:
        tied = key == threshold
        count = tied.to(tl.int32)
        chosen = (key > threshold) | (tied & (tl.cumsum(count, axis=0) <= tl.sum(count, axis=0) - surplus))
    return chosen


@jit
def _row_select_kernel(
    score,
    counts,
    eligible,
    mask,
    flag,
    k,
    K,
    stride_row,
    stride_column,
    HAS_COUNTS: tl.constexpr,
    HAS_ELIGIBLE: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    key = _row_keys(score, row, column, K, stride_row, stride_column)
    if tl.max(key, axis=0) > 0x7F800000:
        tl.store(flag, True)
    if HAS_ELIGIBLE:
        inside = tl.load(eligible + row * K + column, mask=column < K, other=0) != 0
        if COMPLEMENT:
            inside = ~inside
        key = tl.where(inside, key, -1)
    wanted = k
    if HAS_COUNTS:
        wanted = tl.load(counts + row).to(tl.int32)
    tl.store(mask + row * K + column, _largest(key, wanted, ZERO_BITS), mask=column < K)


@jit
def _row_share_kernel(
    score,
    old,
    candidate,
    mask,
    flag,
    slots,
    wanted,
    K,
    stride_row,
    stride_column,
    HAS_CANDIDATE: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    key = _row_keys(score, row, column, K, stride_row, stride_column)
    is_old = tl.load(old + row * K + column, mask=inside, other=0) != 0
    if HAS_CANDIDATE:
        is_candidate = tl.load(candidate + row * K + column, mask=inside, other=0) != 0
    else:
        is_candidate = inside & ~is_old
    both = tl.sum((is_old & is_candidate).to(tl.int32), axis=0)
    if (tl.max(key, axis=0) > 0x7F800000) | (both > 0):
        tl.store(flag, True)
    n_old = tl.sum(is_old.to(tl.int32), axis=0)
    n_candidate = tl.sum(is_candidate.to(tl.int32), axis=0)
    from_old = tl.minimum(slots - tl.minimum(n_candidate, wanted), n_old)
    from_candidate = tl.minimum(slots - from_old, n_candidate)
    from_dead = slots - from_old - from_candidate
    chosen = _largest(tl.where(is_old, key, -1), from_old, ZERO_BITS)
    if from_candidate > 0:
        chosen = chosen | _largest(tl.where(is_candidate, key, -1), from_candidate, ZERO_BITS)
    if from_dead > 0:
        chosen = chosen | _largest(tl.where(is_old | is_candidate, -1, key), from_dead, ZERO_BITS)
    tl.store(mask + row * K + column, chosen, mask=inside)


def _shape_of(score: Tensor) -> dict[str, int]:
    """Sixteen keys a thread, as many as registers hold beside what is chosen of them; more in the longest rows."""
    block = max(power_of_two(score.shape[1]), 32)
    return {"ZERO_BITS": _ZERO_BITS[score.dtype], "BLOCK": block, "num_warps": min(max(block // 512, 1), 32)}


def _row_select_triton(
    score: Tensor, k: int, counts: Tensor | None, eligible: Tensor | None, complement: bool, flag: Tensor
) -> Tensor:
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    launch(
        _row_select_kernel,
        score.shape[0] if mask.numel() else 0,
        score,
        score,
        mask if counts is None else counts,
        mask if eligible is None else eligible,
        mask,
        flag,
        k,
        score.shape[1],
        *score.stride(),
        HAS_COUNTS=counts is not None,
        HAS_ELIGIBLE=eligible is not None,
        COMPLEMENT=complement,
        **_shape_of(score),
    )
    return mask


def _row_share_triton(
    score: Tensor, slots: int, wanted: int, old: Tensor, candidate: Tensor | None, flag: Tensor
) -> Tensor:
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    launch(
        _row_share_kernel,
        score.shape[0] if mask.numel() else 0,
        score,
        score,
        old,
        old if candidate is None else candidate,
        mask,
        flag,
        slots,
        wanted,
        score.shape[1],
        *score.stride(),
        HAS_CANDIDATE=candidate is not None,
        **_shape_of(score),
    )
    return mask


# --- operations ------------------------------------------------------------------------------------------------------


def _check_score(score: Tensor, flag: Tensor) -> None:
    if score.dim() != 2 or score.dtype not in _ZERO_BITS:
        raise ValueError(
            f"score must be a float32, bfloat16 or float16 matrix, not {score.dtype} of shape {tuple(score.shape)}"
        )
    if flag.dtype != torch.bool or flag.numel() != 1:
        raise ValueError(f"flag must be one bool, not {flag.dtype} of shape {tuple(flag.shape)}")
    check_device("flag", flag, score)


def _check_mask(name: str, mask: Tensor | None, score: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != score.shape or not mask.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous bool of shape {tuple(score.shape)}, not {mask.dtype} of {tuple(mask.shape)} and"
            f" strides {mask.stride()}"
        )
    check_device(name, mask, score)


def _check_select(score: Tensor, counts: Tensor | None, eligible: Tensor | None, flag: Tensor) -> None:
    _check_score(score, flag)
    _check_mask("eligible", eligible, score)
    if counts is not None:
        if counts.shape != score.shape[:1] or counts.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"k must be an int, or an int32 or int64 vector of {score.shape[0]} rows, not {counts.dtype} of shape"
                f" {tuple(counts.shape)}"
            )
        check_device("k", counts, score)


def _row_select_fake(
    score: Tensor, k: int, counts: Tensor | None, eligible: Tensor | None, complement: bool, flag: Tensor
) -> Tensor:
    _check_select(score, counts, eligible, flag)
    return torch.empty(score.shape, dtype=torch.bool, device=score.device)


@operation("row_select", ("flag",), fake=_row_select_fake)
def _row_select_op(
    score: Tensor, k: int, counts: Tensor | None, eligible: Tensor | None, complement: bool, flag: Tensor
) -> Tensor:
    _check_select(score, counts, eligible, flag)
    function = _row_select_triton if _by_kernel(score) else row_select_reference
    return function(score, k, None if counts is None else counts.contiguous(), eligible, complement, flag)


def _check_share(score: Tensor, slots: int, wanted: int, old: Tensor, candidate: Tensor | None, flag: Tensor) -> None:
    _check_score(score, flag)
    _check_mask("old", old, score)
    _check_mask("candidate", candidate, score)
    if not 0 <= wanted <= slots <= score.shape[1]:
        raise ValueError(
            f"slots={slots} and wanted={wanted}; must be 0 <= wanted <= slots <= {score.shape[1]}, the columns"
        )


def _row_share_fake(
    score: Tensor, slots: int, wanted: int, old: Tensor, candidate: Tensor | None, flag: Tensor
) -> Tensor:
    _check_share(score, slots, wanted, old, candidate, flag)
    return torch.empty(score.shape, dtype=torch.bool, device=score.device)


@operation("row_share", ("flag",), fake=_row_share_fake)
def _row_share_op(
    score: Tensor, slots: int, wanted: int, old: Tensor, candidate: Tensor | None, flag: Tensor
) -> Tensor:
    _check_share(score, slots, wanted, old, candidate, flag)
    function = _row_share_triton if _by_kernel(score) else row_share_reference
    return function(score, slots, wanted, old, candidate, flag)


# --- public ----------------------------------------------------------------------------------------------------------


def row_select(
    score: Tensor, k: int | Tensor, flag: Tensor, eligible: Tensor | None = None, complement: bool = False
) -> Tensor:
    """bool [rows, K]: in every row the k largest |score|, compared in float32, ties to the lowest column.

    score: float32, bfloat16 or float16 [rows, K], any strides. k: int, or int32 or int64 [rows] on the same device (it
    is not read on the host). eligible: contiguous bool [rows, K], what may be chosen, or with `complement` what may
    not; where fewer than k are, all of them are chosen. flag: one bool on the device, set to True if the score has a
    NaN anywhere (which ranks above infinity here), else left as it is.

    Rows longer than 32768 columns are sorted, which takes 12 bytes of temporaries a coordinate and more.
    """
    counts = k if isinstance(k, Tensor) else None
    return _row_select_op(score, 0 if isinstance(k, Tensor) else k, counts, eligible, complement, flag)


def row_share(score: Tensor, slots: int, wanted: int, old: Tensor, candidate: Tensor | None, flag: Tensor) -> Tensor:
    """bool [rows, K]: `slots` coordinates of every row, by |score| as in `row_select`: `wanted` of them candidates and
    the others old ones.

    Where one side has fewer coordinates, the other fills its slots; where both have too few, coordinates that are
    neither do. old, candidate: contiguous bool [rows, K]; candidate None: all that are not old. 0 <= wanted <= slots <=
    K. flag: one bool on the device, set to True if the score has a NaN or a coordinate is both old and candidate.
    """
    return _row_share_op(score, slots, wanted, old, candidate, flag)
