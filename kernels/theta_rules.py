"""The rules by which theta moves after a backward pass: what they compute, and their reference.

g: the scaled gradient; every rule first decays theta by (1 - lr * weight_decay), as AdamW does.

- "selective" (RESU): m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) |g|; C = |m| / (v + eps).
  P_mag = the `top` share of the p candidates with the largest |g|; P_con = {C > consistency};
  P_sel = the `select` * p largest |g| in both. theta <- theta - lr C g on P_sel. Shares round to the nearest count, at
  least 1. Ties at a threshold are all taken. |g| is compared as it came, before grad_scale. C uses m and v as stored
  (rounded to their dtype).
- "sgd": theta <- theta - lr g.
- "momentum": m <- beta1 m + g; theta <- theta - lr m.
- "adam": AdamW with bias correction by `step`, counted from 1. With 8-bit moments it is sqrt(v) that is stored.

A theta of its own in bfloat16 is rounded stochastically (`philox`), because an update below half of its last bit would
be lost under rounding to nearest. The noise of an entry is a function of the weight's key, the step and the entry's
place in theta: however weights share launches, and whichever kernel takes them, the bits are the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._check import math_dtype
from .blockwise8 import block_of, decode_reference, encode_reference, hash_reference
from .layout import positions
from .philox import philox_reference, round_reference
from .select import budget, fraction_units, magnitude_keys

RULES = ("selective", "sgd", "momentum", "adam")
ROUNDED = 2**14  # entries that the reference rounds together
MOMENTS_OF = {"selective": ("m", "v"), "sgd": (), "momentum": ("m",), "adam": ("m", "v")}


class Rule(NamedTuple):
    """One update's rule and numbers (see the module)."""

    name: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    consistency: float
    select: float
    top: float


@dataclass(frozen=True, slots=True, eq=False)
class ThetaOperands:
    """The tensors of one weight that an update of theta reads and writes.

    grad: theta-like, any float dtype. bits, row_start, columns, K: its layout. weight: [rows, K] whose candidate slots
    hold Phi(theta), or None. low: a copy of the effective weight in lower precision, [rows, K], or None. theta: the
    master, theta-like, or None where the weight's slots are the master. m, v: moments, of a float dtype, or uint8 with
    float32 scales m_scale and v_scale (see `blockwise8`); None where the rule has no use for them. key: of the rounding
    of a theta in bfloat16, in [0, 2**63): another one for each weight.
    """

    grad: Tensor
    bits: Tensor
    row_start: Tensor | None
    columns: Tensor | None
    K: int
    weight: Tensor | None = None
    low: Tensor | None = None
    theta: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None
    m_scale: Tensor | None = None
    v_scale: Tensor | None = None
    key: int = 0

    @property
    def written(self) -> list[Tensor]:
        """The tensors that an update writes."""
        fields = (self.weight, self.low, self.theta, self.m, self.v, self.m_scale, self.v_scale)
        return [t for t in fields if t is not None]


def theta_step_reference(operands: ThetaOperands, rule: Rule, grad_scale: float) -> Tensor:
    """One update in place; (selected, sum of C, candidates, sum of |change|) as float32 [4]."""
    o = operands
    target, slot = positions(o.bits, o.row_start, o.columns, o.K, shape=o.grad.shape)
    p = target.numel()
    values = o.theta if o.theta is not None else o.weight if o.weight is not None else o.low
    where = target if o.theta is None else slot
    assert values is not None
    before = values.view(-1)[where].clone() if isinstance(where, slice) else values.view(-1)[where]
    wide = math_dtype(o.grad.dtype, before.dtype)
    raw = o.grad.view(-1)[slot]
    g = raw.to(wide) if grad_scale == 1 else raw.to(wide) * grad_scale
    value = before.to(wide) * (1 - rule.lr * rule.weight_decay)
    moments = _Moments(o, target, slot, rule, wide)
    selected, consistency_sum = p, 0.0

    if rule.name == "selective":
        first = moments.store("m", moments.load("m").mul_(rule.beta1).add_(g, alpha=1 - rule.beta1))
        second = moments.store("v", moments.load("v").mul_(rule.beta2).add_(g.abs(), alpha=1 - rule.beta2))
        c = first.abs() / (second + rule.eps)
        keys = magnitude_keys(raw)
        pool = _reaches_kth(keys, budget(p, fraction_units(rule.top)), torch.ones_like(keys, dtype=torch.bool))
        chosen = _reaches_kth(keys, budget(p, fraction_units(rule.select)), pool & (c > rule.consistency))
        selected, consistency_sum = int(chosen.sum()), float(c.sum(dtype=torch.float64))
        value = torch.where(chosen, torch.addcmul(value, c, g, value=-rule.lr), value)
    elif rule.name == "sgd":
        value.sub_(g, alpha=rule.lr)
    elif rule.name == "momentum":
        first = moments.load("m").mul_(rule.beta1).add_(g)
        moments.store("m", first)
        value.sub_(first, alpha=rule.lr)
    else:
        first = moments.load("m").mul_(rule.beta1).add_(g, alpha=1 - rule.beta1)
        second = moments.load("v").mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
        moments.store("m", first)
        moments.store("v", second)
        denominator = (second / (1 - rule.beta2**rule.step)).sqrt_().add_(rule.eps)
        value.addcdiv_(first, denominator, value=-rule.lr / (1 - rule.beta1**rule.step))

    if o.theta is not None and o.theta.dtype == torch.bfloat16:
        value = rounded(value, slot, o.key, rule.step)
    after = _store(values, where, value)
    for dense in (o.weight, o.low):
        if dense is not None and dense is not values:
            _store(dense, target, after)
    moved = float(after.to(wide).sub(before).abs_().sum(dtype=torch.float64))
    return torch.tensor([selected, consistency_sum, p, moved], dtype=torch.float32, device=o.grad.device)


def rounded(values: Tensor, slot: Tensor | slice, key: int, step: int) -> Tensor:
    """Values for the places `slot` of a flat theta as bfloat16, rounded stochastically."""
    result, seed = values.new_empty(values.shape, dtype=torch.bfloat16), (key + (step << 32)) & (2**64 - 1)
    for first in range(0, values.numel(), ROUNDED):  # Philox takes a hundred bytes an entry here
        piece = slice(first, min(first + ROUNDED, values.numel()))
        every = torch.arange(piece.start, piece.stop, device=values.device)
        places = slot[piece] if isinstance(slot, Tensor) else every
        result[piece] = round_reference(values[piece], philox_reference(seed, places)[0])
    return result


class _Moments:
    """m and v at the candidates, in whatever they are stored."""

    def __init__(
        self, operands: ThetaOperands, target: Tensor, slot: Tensor | slice, rule: Rule, wide: torch.dtype
    ) -> None:
        self.operands, self.slot, self.rule, self.wide = operands, slot, rule, wide
        self.squared = rule.name == "adam"
        if operands.m_scale is not None:
            self._blocks(target, operands.m_scale)

    def _blocks(self, target: Tensor, scale: Tensor) -> None:
        """The block of every candidate, and the noise that rounds it."""
        o, slot = self.operands, self.slot
        if isinstance(slot, slice):
            slot = torch.arange(slot.stop, device=target.device)
        self.block = block_of(target, slot, o.grad.shape, o.K, o.columns is not None, scale.shape)
        self.noise = hash_reference(slot, self.rule.step)

    def load(self, name: str) -> Tensor:
        """A copy of the moment's values."""
        moment, scale = getattr(self.operands, name), getattr(self.operands, f"{name}_scale")
        values = moment.view(-1)[self.slot]
        if scale is None:
            return values.to(self.wide, copy=isinstance(self.slot, slice))
        values = decode_reference(values, scale.view(-1)[self.block], name)
        return (values.square() if self.squared and name == "v" else values).to(self.wide)

    def store(self, name: str, values: Tensor) -> Tensor:
        """Store new values and return them as stored."""
        moment, scale = getattr(self.operands, name), getattr(self.operands, f"{name}_scale")
        if scale is None:
            return _store(moment, self.slot, values).to(self.wide)
        values = values.sqrt() if self.squared and name == "v" else values
        noise = self.noise if name == "m" else self.noise >> 13
        codes, scales = encode_reference(values, self.block, scale.numel(), noise, name)
        scale.view(-1).copy_(scales)
        _store(moment, self.slot, codes)
        return self.load(name)


def _reaches_kth(keys: Tensor, k: int, pool: Tensor) -> Tensor:
    """bool: in `pool` and at least its k-th largest key; all of the pool when it has fewer, none when k is 0."""
    inside = keys[pool]
    if k == 0:
        return torch.zeros_like(pool)
    if k > inside.numel():
        return pool
    return pool & (keys >= inside.kthvalue(inside.numel() - k + 1).values)


def _store(tensor: Tensor, slot: Tensor | slice, values: Tensor) -> Tensor:
    """Store `values` at `slot` and return them as stored (rounded to the tensor's dtype)."""
    stored = values.to(tensor.dtype)
    if isinstance(slot, slice):
        tensor.view(-1)[slot] = stored
    else:
        tensor.view(-1).index_copy_(0, slot, stored)
    return stored
