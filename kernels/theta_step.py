"""The update of theta after a backward pass, written through to the weight's candidate slots.

Rules (g: the scaled gradient; every rule first decays theta by (1 - lr * weight_decay), as AdamW does):

- "selective" (RESU): m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) |g|; C = |m| / (v + eps).
  P_mag = the `top` share of the p candidates with the largest |g|; P_con = {C > consistency};
  P_sel = the `select` * p largest |g| in both. theta <- theta - lr C g on P_sel. Shares round to the nearest count, at
  least 1. Ties at a threshold are all taken. |g| is compared as it came, before grad_scale. C uses m and v as stored
  (rounded to their dtype).
- "sgd": theta <- theta - lr g.
- "momentum": m <- beta1 m + g; theta <- theta - lr m.
- "adam": AdamW with bias correction by `step`, counted from 1.
"""

import torch
from torch import Tensor

from ._check import check_bits, check_device, check_matrix, check_theta, math_dtype
from ._radix import BINS, DIGITS, budget_of, decided_digits, digit_counts, magnitude_key, threshold_key
from ._registry import operation
from ._tiles import candidate_tile, theta_grid
from ._triton import jit, launch, processors, tl, use_triton
from .layout import positions
from .select import budget, fraction_units, magnitude_keys

RULES = ("selective", "sgd", "momentum", "adam")
_NEEDS = {"selective": ("m", "v"), "sgd": (), "momentum": ("m",), "adam": ("m", "v")}

# --- reference -------------------------------------------------------------------------------------------------------


def theta_step_reference(weight: Tensor | None, theta: Tensor | None, m: Tensor | None, v: Tensor | None, grad: Tensor,
                         bits: Tensor, row_start: Tensor | None, columns: Tensor | None, K: int, rule: str, lr: float,
                         beta1: float, beta2: float, eps: float, weight_decay: float, step: int, consistency: float,
                         select: float, top: float, grad_scale: float) -> Tensor:
    target, slot = positions(bits, row_start, columns, K)
    p = target.numel()
    master = weight if theta is None else theta
    where = target if theta is None else slot
    assert master is not None
    before = master.view(-1)[where].clone() if isinstance(where, slice) else master.view(-1)[where]
    wide = math_dtype(grad.dtype, before.dtype)
    raw = grad.view(-1)[slot]
    g = raw.to(wide) if grad_scale == 1 else raw.to(wide) * grad_scale
    value = before.to(wide) * (1 - lr * weight_decay)
    selected, consistency_sum = p, 0.0

    if rule == "selective":
        assert m is not None and v is not None
        first = _store(m, slot, _load(m, slot, wide).mul_(beta1).add_(g, alpha=1 - beta1)).to(wide)
        second = _store(v, slot, _load(v, slot, wide).mul_(beta2).add_(g.abs(), alpha=1 - beta2)).to(wide)
        c = first.abs() / (second + eps)
        keys = magnitude_keys(raw)
        pool = _reaches_kth(keys, budget(p, fraction_units(top)), torch.ones_like(keys, dtype=torch.bool))
        chosen = _reaches_kth(keys, budget(p, fraction_units(select)), pool & (c > consistency))
        selected, consistency_sum = int(chosen.sum()), float(c.sum(dtype=torch.float64))
        value = torch.where(chosen, torch.addcmul(value, c, g, value=-lr), value)
    elif rule == "sgd":
        value.sub_(g, alpha=lr)
    elif rule == "momentum":
        assert m is not None
        first = _load(m, slot, wide).mul_(beta1).add_(g)
        _store(m, slot, first)
        value.sub_(first, alpha=lr)
    else:
        assert m is not None and v is not None
        first = _load(m, slot, wide).mul_(beta1).add_(g, alpha=1 - beta1)
        second = _load(v, slot, wide).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        _store(m, slot, first)
        _store(v, slot, second)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(eps)
        value.addcdiv_(first, denominator, value=-lr / (1 - beta1**step))

    after = _store(master, where, value)
    if theta is not None and weight is not None:
        _store(weight, target, after)
    moved = float(after.to(wide).sub(before).abs_().sum(dtype=torch.float64))
    return torch.tensor([selected, consistency_sum, p, moved], dtype=torch.float32, device=grad.device)


def _reaches_kth(keys: Tensor, k: int, pool: Tensor) -> Tensor:
    """bool: in `pool` and at least its k-th largest key; all of the pool when it has fewer, none when k is 0."""
    inside = keys[pool]
    if k == 0:
        return torch.zeros_like(pool)
    if k > inside.numel():
        return pool
    return pool & (keys >= inside.kthvalue(inside.numel() - k + 1).values)


def _load(tensor: Tensor, slot: Tensor | slice, wide: torch.dtype) -> Tensor:
    """A copy of the values at `slot`, in `wide`."""
    values = tensor.view(-1)[slot]
    return values.to(wide, copy=isinstance(slot, slice))


def _store(tensor: Tensor, slot: Tensor | slice, values: Tensor) -> Tensor:
    """Store `values` at `slot` and return them as stored (rounded to the tensor's dtype)."""
    stored = values.to(tensor.dtype)
    if isinstance(slot, slice):
        tensor.view(-1)[slot] = stored
    else:
        tensor.view(-1).index_copy_(0, slot, stored)
    return stored


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _load_slots(weight, theta, row, column, slot, keep, K, HAS_WEIGHT: tl.constexpr, HAS_THETA: tl.constexpr,
                PANEL: tl.constexpr):
    """(the weight's values around the slots, theta), both as stored."""
    if HAS_WEIGHT:
        # Whole rows in the compact layout: vector accesses, and every sector is touched either way.
        around = tl.load(weight + row * K + column, mask=keep if PANEL else column < K, other=0)
    if HAS_THETA:
        value = tl.load(theta + slot, mask=keep, other=0)
        if not HAS_WEIGHT:
            around = value
    else:
        value = around
    return around, value


@jit
def _store_slots(weight, theta, around, value, row, column, slot, keep, K, HAS_WEIGHT: tl.constexpr,
                 HAS_THETA: tl.constexpr, PANEL: tl.constexpr):
    """Store theta to its master, and its cast to the weight's slots; returns it as stored, in float32."""
    if HAS_THETA:
        stored = value.to(theta.dtype.element_ty)
        tl.store(theta + slot, stored, mask=keep)
    else:
        stored = value.to(weight.dtype.element_ty)
    if HAS_WEIGHT:
        written = tl.where(keep, stored.to(weight.dtype.element_ty), around)
        tl.store(weight + row * K + column, written, mask=keep if PANEL else column < K)
    return stored.to(tl.float32)


@jit
def _store_stats(stats, program, selected, consistency, candidates, moved):
    tl.store(stats + program * 4, selected)
    tl.store(stats + program * 4 + 1, consistency)
    tl.store(stats + program * 4 + 2, candidates)
    tl.store(stats + program * 4 + 3, moved)


@jit
def _simple_kernel(weight, theta, m, v, grad, stats, bits, row_start, columns, K, W, n_cols, capacity, chunks, decay,
                   rate, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, correction2, grad_scale,
                   RULE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_THETA: tl.constexpr, PANEL: tl.constexpr,
                   BLOCK_W: tl.constexpr):
    """sgd, momentum and adam: read everything once, write everything once."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column, keep, slot, _ = candidate_tile(bits, row_start, columns, row, tl.program_id(0) % chunks, K, W, n_cols,
                                           capacity, PANEL, False, BLOCK_W)
    g = tl.load(grad + slot, mask=keep, other=0).to(tl.float32) * grad_scale
    around, value = _load_slots(weight, theta, row, column, slot, keep, K, HAS_WEIGHT, HAS_THETA, PANEL)
    before = value.to(tl.float32)
    change = g
    if RULE != "sgd":
        first = tl.load(m + slot, mask=keep, other=0).to(tl.float32) * beta1 + g * one_minus_beta1
        tl.store(m + slot, first.to(m.dtype.element_ty), mask=keep)
        change = first
    if RULE == "adam":
        second = tl.load(v + slot, mask=keep, other=0).to(tl.float32) * beta2 + g * g * one_minus_beta2
        tl.store(v + slot, second.to(v.dtype.element_ty), mask=keep)
        change = tl.div_rn(first, tl.sqrt_rn(second * correction2) + eps)
    after = _store_slots(weight, theta, around, before * decay - rate * change, row, column, slot, keep, K,
                         HAS_WEIGHT, HAS_THETA, PANEL)
    count = tl.sum(tl.sum(keep.to(tl.float32), axis=1), axis=0)
    moved = tl.sum(tl.sum(tl.where(keep, tl.abs(after - before), 0.0), axis=1), axis=0)
    _store_stats(stats, tl.program_id(0), count, 0.0, count, moved)


@jit
def _consistency(m, v, slot, keep, eps):
    first = tl.load(m + slot, mask=keep, other=0).to(tl.float32)
    second = tl.load(v + slot, mask=keep, other=0).to(tl.float32)
    return tl.div_rn(tl.abs(first), second + eps)


@jit
def _digit_counts(key, keep, SHIFT: tl.constexpr, BLOCK_W: tl.constexpr):
    digit = tl.reshape((key >> SHIFT) & 255, [BLOCK_W * 32])
    return digit_counts(digit, tl.reshape(keep, [BLOCK_W * 32]))


@jit
def _moments_kernel(m, v, grad, consistent, counts, stats, bits, row_start, columns, K, W, n_cols, capacity, tiles,
                    chunks, tile_words, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, limit, grad_scale,
                    PANEL: tl.constexpr, BLOCK_W: tl.constexpr):
    """Update m and v, mark what is consistent (one bit each), count the first digit of |g| of all and of those."""
    index = tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    found = tl.zeros([256], tl.int32)
    found_consistent = tl.zeros([256], tl.int32)
    count = tl.zeros([BLOCK_W], tl.float32)
    c_sum = tl.zeros([BLOCK_W], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile // chunks).to(tl.int64)
        chunk = tile % chunks
        _, keep, slot, _ = candidate_tile(bits, row_start, columns, row, chunk, K, W, n_cols, capacity, PANEL, False,
                                          BLOCK_W)
        raw = tl.load(grad + slot, mask=keep, other=0).to(tl.float32)
        g = raw * grad_scale
        first = tl.load(m + slot, mask=keep, other=0).to(tl.float32) * beta1 + g * one_minus_beta1
        second = tl.load(v + slot, mask=keep, other=0).to(tl.float32) * beta2 + tl.abs(g) * one_minus_beta2
        stored_m = first.to(m.dtype.element_ty)
        stored_v = second.to(v.dtype.element_ty)
        tl.store(m + slot, stored_m, mask=keep)
        tl.store(v + slot, stored_v, mask=keep)
        c = tl.div_rn(tl.abs(stored_m.to(tl.float32)), stored_v.to(tl.float32) + eps)
        good = keep & (c > limit)
        word = chunk * BLOCK_W + index
        tl.store(consistent + row * tile_words + word, tl.sum(good.to(tl.int32) << lane[None, :], axis=1),
                 mask=word < tile_words)
        key = magnitude_key(raw, False)
        found += _digit_counts(key, keep, 24, BLOCK_W)
        found_consistent += _digit_counts(key, good, 24, BLOCK_W)
        count += tl.sum(keep.to(tl.float32), axis=1)
        c_sum += tl.sum(tl.where(keep, c, 0.0), axis=1)
    tl.atomic_add(counts + tl.arange(0, 256), found.to(tl.int64))
    tl.atomic_add(counts + 1024 + tl.arange(0, 256), found_consistent.to(tl.int64))
    _store_stats(stats, tl.program_id(0), 0.0, tl.sum(c_sum, axis=0), tl.sum(count, axis=0), 0.0)


@jit
def _candidates_of(counts):
    """Their number: every candidate was counted by its first digit."""
    return tl.sum(tl.load(counts + tl.arange(0, 256)), axis=0)


@jit
def _digits_kernel(grad, consistent, counts, bits, row_start, columns, K, W, n_cols, capacity, tiles, chunks,
                   tile_words, top_units, select_units, DIGIT: tl.constexpr, PANEL: tl.constexpr,
                   BLOCK_W: tl.constexpr):
    """Count digit number DIGIT of |g| for both thresholds."""
    SHIFT: tl.constexpr = 24 - 8 * DIGIT
    index = tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    p = _candidates_of(counts)
    prefix = decided_digits(counts, budget_of(p, top_units), DIGIT).to(tl.int32)
    prefix_consistent = decided_digits(counts + 1024, budget_of(p, select_units), DIGIT).to(tl.int32)
    found = tl.zeros([256], tl.int32)
    found_consistent = tl.zeros([256], tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile // chunks).to(tl.int64)
        chunk = tile % chunks
        _, keep, slot, _ = candidate_tile(bits, row_start, columns, row, chunk, K, W, n_cols, capacity, PANEL, False,
                                          BLOCK_W)
        key = magnitude_key(tl.load(grad + slot, mask=keep, other=0), False)
        word = chunk * BLOCK_W + index
        good = tl.load(consistent + row * tile_words + word, mask=word < tile_words, other=0)
        good = ((good[:, None] >> lane[None, :]) & 1) != 0
        decided = key >> (SHIFT + 8)
        found += _digit_counts(key, keep & (decided == prefix), SHIFT, BLOCK_W)
        found_consistent += _digit_counts(key, good & (decided == prefix_consistent), SHIFT, BLOCK_W)
    tl.atomic_add(counts + DIGIT * 256 + tl.arange(0, 256), found.to(tl.int64))
    tl.atomic_add(counts + 1024 + DIGIT * 256 + tl.arange(0, 256), found_consistent.to(tl.int64))


@jit
def _apply_kernel(weight, theta, m, v, grad, consistent, counts, stats, bits, row_start, columns, K, W, n_cols,
                  capacity, chunks, tile_words, top_units, select_units, decay, lr, eps, grad_scale,
                  DIGITS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_THETA: tl.constexpr, PANEL: tl.constexpr,
                  BLOCK_W: tl.constexpr):
    """Decay every candidate and step the selected ones.

    Of the consistent candidates the select * p largest are wanted, but only above the magnitude threshold: taking the
    larger of both thresholds is the same as selecting inside the intersection.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    p = _candidates_of(counts)
    threshold = tl.maximum(threshold_key(counts, budget_of(p, top_units), DIGITS, False),
                           threshold_key(counts + 1024, budget_of(p, select_units), DIGITS, False))
    column, keep, slot, _ = candidate_tile(bits, row_start, columns, row, chunk, K, W, n_cols, capacity, PANEL, False,
                                           BLOCK_W)
    word = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    good = tl.load(consistent + row * tile_words + word, mask=word < tile_words, other=0)
    raw = tl.load(grad + slot, mask=keep, other=0).to(tl.float32)
    chosen = keep & (((good[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0)
    chosen = chosen & (magnitude_key(raw, False).to(tl.int64) >= threshold)
    around, value = _load_slots(weight, theta, row, column, slot, keep, K, HAS_WEIGHT, HAS_THETA, PANEL)
    before = value.to(tl.float32)
    change = tl.where(chosen, _consistency(m, v, slot, chosen, eps) * (raw * grad_scale), 0.0)
    after = _store_slots(weight, theta, around, before * decay - lr * change, row, column, slot, keep, K, HAS_WEIGHT,
                         HAS_THETA, PANEL)
    moved = tl.sum(tl.sum(tl.where(keep, tl.abs(after - before), 0.0), axis=1), axis=0)
    _store_stats(stats, tl.program_id(0), tl.sum(tl.sum(chosen.to(tl.float32), axis=1), axis=0), 0.0, 0.0, moved)


def _theta_step_triton(weight: Tensor | None, theta: Tensor | None, m: Tensor | None, v: Tensor | None, grad: Tensor,
                       bits: Tensor, row_start: Tensor | None, columns: Tensor | None, K: int, rule: str, lr: float,
                       beta1: float, beta2: float, eps: float, weight_decay: float, step: int, consistency: float,
                       select: float, top: float, grad_scale: float) -> Tensor:
    if any(t is not None and t.dtype == torch.float64 for t in (weight, theta, m, v, grad)):
        raise ValueError("theta_step_ takes float64 on the CPU only; its GPU kernel computes in float32")
    grid = theta_grid(bits, columns, K)
    where = (bits, bits if row_start is None else row_start, bits if columns is None else columns, K, bits.shape[1],
             grad.shape[1], grad.numel())
    holds = {"HAS_WEIGHT": weight is not None, "HAS_THETA": theta is not None}
    shape = {"PANEL": columns is not None, "BLOCK_W": grid.BLOCK_W, "num_warps": grid.num_warps}
    # A missing operand is never touched; any pointer stands in for it.
    weight, theta, m, v = (grad if t is None else t for t in (weight, theta, m, v))
    decay = 1 - lr * weight_decay

    if rule != "selective":
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if rule == "adam" else (1.0, 1.0)
        blend = 1.0 if rule == "momentum" else 1 - beta1
        stats = grad.new_empty((grid.tiles, 4), dtype=torch.float32)
        launch(_simple_kernel, grid.tiles, grad, weight, theta, m, v, grad, stats, *where, grid.chunks, decay,
               lr / correction1, beta1, blend, beta2, 1 - beta2, eps, 1 / correction2, grad_scale, RULE=rule, **holds,
               **shape)
        return stats.sum(0, dtype=torch.float64).to(torch.float32)

    digits = DIGITS[grad.dtype]
    programs = min(grid.tiles, 8 * processors(grad))
    tile_words = ((K if columns is None else columns.shape[0]) + 31) // 32
    consistent = grad.new_empty((bits.shape[0], tile_words), dtype=torch.int32)
    counts = grad.new_zeros((2, 4, BINS), dtype=torch.int64)
    stats = grad.new_empty((programs + grid.tiles, 4), dtype=torch.float32)
    units = (fraction_units(top), fraction_units(select))
    launch(_moments_kernel, programs, grad, m, v, grad, consistent, counts, stats, *where, grid.tiles, grid.chunks,
           tile_words, beta1, 1 - beta1, beta2, 1 - beta2, eps, consistency, grad_scale, **shape)
    for digit in range(1, digits):
        launch(_digits_kernel, programs, grad, grad, consistent, counts, *where, grid.tiles, grid.chunks, tile_words,
               *units, DIGIT=digit, **shape)
    launch(_apply_kernel, grid.tiles, grad, weight, theta, m, v, grad, consistent, counts, stats[programs:], *where,
           grid.chunks, tile_words, *units, decay, lr, eps, grad_scale, DIGITS=digits, **holds, **shape)
    return stats.sum(0, dtype=torch.float64).to(torch.float32)


# --- operation -------------------------------------------------------------------------------------------------------


def _check(weight: Tensor | None, theta: Tensor | None, m: Tensor | None, v: Tensor | None, grad: Tensor, bits: Tensor,
           row_start: Tensor | None, columns: Tensor | None, K: int, rule: str, lr: float, beta1: float, beta2: float,
           eps: float, weight_decay: float, step: int, consistency: float, select: float, top: float,
           grad_scale: float) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if weight is None and theta is None:
        raise ValueError("weight and theta are both None: one of them has to hold the values")
    rows = bits.shape[0]
    if weight is not None:
        check_matrix("weight", weight)
        check_device("weight", weight, grad)
        if weight.shape[1] != K:
            raise ValueError(f"K must be the {weight.shape[1]} columns of weight, not {K}")
        rows = weight.shape[0]
    check_bits("bits", bits, rows, K, grad)
    moments = {"m": m, "v": v}
    for name in _NEEDS[rule]:
        if moments[name] is None:
            raise ValueError(f"{name} is required by rule {rule!r}")
    for name, tensor in {"grad": grad, "theta": theta, **moments}.items():
        if tensor is not None:
            check_theta(name, tensor, rows, row_start, columns, grad)
            if tensor.shape != grad.shape:
                raise ValueError(f"{name} must have the shape {tuple(grad.shape)} of grad, not {tuple(tensor.shape)}")
    if rule == "adam" and step < 1:
        raise ValueError(f"step must be at least 1 for rule 'adam' (it counts updates, this one included), not {step}")
    for name, share in {"select": select, "top": top}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share between 0 and 1, not {share}")
    for name, beta in {"betas[0]": beta1, "betas[1]": beta2}.items():
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1), not {beta}")


def _theta_step_fake(weight: Tensor | None, theta: Tensor | None, m: Tensor | None, v: Tensor | None, grad: Tensor,
                     bits: Tensor, row_start: Tensor | None, columns: Tensor | None, K: int, rule: str, lr: float,
                     beta1: float, beta2: float, eps: float, weight_decay: float, step: int, consistency: float,
                     select: float, top: float, grad_scale: float) -> Tensor:
    _check(weight, theta, m, v, grad, bits, row_start, columns, K, rule, lr, beta1, beta2, eps, weight_decay, step,
           consistency, select, top, grad_scale)
    return grad.new_empty((4,), dtype=torch.float32)


@operation("theta_step_", ("weight", "theta", "m", "v"), fake=_theta_step_fake)
def _theta_step_op(weight: Tensor | None, theta: Tensor | None, m: Tensor | None, v: Tensor | None, grad: Tensor,
                   bits: Tensor, row_start: Tensor | None, columns: Tensor | None, K: int, rule: str, lr: float,
                   beta1: float, beta2: float, eps: float, weight_decay: float, step: int, consistency: float,
                   select: float, top: float, grad_scale: float) -> Tensor:
    args = (weight, theta, m, v, grad, bits, row_start, columns, K, rule, lr, beta1, beta2, eps, weight_decay, step,
            consistency, select, top, grad_scale)
    _check(*args)
    if use_triton(grad):
        return _theta_step_triton(*args)
    return theta_step_reference(*args)


def theta_step_(weight: Tensor | None, theta: Tensor | None, m: Tensor | None, v: Tensor | None, grad: Tensor,
                bits: Tensor, row_start: Tensor | None, columns: Tensor | None, *, rule: str, lr: float,
                betas: tuple[float, float], eps: float, weight_decay: float, step: int, consistency: float = 0.5,
                select: float = 0.2, top: float = 0.5, grad_scale: float = 1.0, K: int | None = None) -> Tensor:
    """One update of theta in place; returns float32 [4] on the device without waiting for it.

    weight: [rows, K] whose candidate slots hold Phi(theta), or None (packed storage; then pass K). theta: theta-like
    master, or None where the slots are the master; with both, theta is the master and the slots get its cast.
    m, v: theta-like moments of any float dtype; None where the rule (see the module) has no use for them. grad:
    theta-like, any float dtype, multiplied by grad_scale. Padding is neither read nor written. A non-finite gradient
    propagates: check before or after.

    Returns (entries selected, sum of C over the candidates, candidates, sum of |change of theta| as stored). Rules
    other than "selective" select every candidate and have no C (0). Raises ValueError for arguments that do not fit.
    """
    if K is None:
        if weight is None:
            raise ValueError("K (columns of the dense matrix) is required where weight is None")
        K = weight.shape[1]
    with torch.no_grad():
        return torch.ops.fxresu.theta_step_(weight, theta, m, v, grad, bits, row_start, columns, K, rule, lr, *betas,
                                            eps, weight_decay, step, consistency, select, top, grad_scale)
