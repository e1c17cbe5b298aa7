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
from ._registry import operation
from ._theta_kernels import theta_step_triton
from ._triton import use_triton
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
        return theta_step_triton(*args)
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
