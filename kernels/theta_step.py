"""The update of theta after a backward pass, written through to the weight's candidate slots (rules: `theta_rules`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import check_bits, check_device, check_matrix, check_theta
from ._registry import operation
from ._triton import use_triton
from .blockwise8 import scale_shape
from .theta_launch import theta_steps_triton
from .theta_rules import MOMENTS_OF, RULES, Rule, ThetaOperands, theta_step_reference

# --- operation -------------------------------------------------------------------------------------------------------


def _check_rule(rule: Rule) -> None:
    if rule.name not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule.name!r}")
    if rule.name == "adam" and rule.step < 1:
        raise ValueError(
            f"step must be at least 1 for rule 'adam' (it counts updates, this one included), not {rule.step}"
        )
    for name, share in {"select": rule.select, "top": rule.top}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share between 0 and 1, not {share}")
    for name, beta in {"betas[0]": rule.beta1, "betas[1]": rule.beta2}.items():
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1), not {beta}")


def _check(o: ThetaOperands, rule: Rule) -> None:
    if o.weight is None and o.theta is None and o.low is None:
        raise ValueError("weight, low and theta are all None: one of them has to hold the values")
    rows = o.bits.shape[0]
    for name, dense in {"weight": o.weight, "low": o.low}.items():
        if dense is None:
            continue
        check_matrix(name, dense)
        check_device(name, dense, o.grad)
        if dense.shape[1] != o.K:
            raise ValueError(f"K must be the {dense.shape[1]} columns of {name}, not {o.K}")
        rows = dense.shape[0]
    check_bits("bits", o.bits, rows, o.K, o.grad)
    check_theta("grad", o.grad, rows, o.row_start, o.columns, o.grad, o.K)
    if o.theta is not None:
        _check_like("theta", o.theta, o.grad)
    for name in MOMENTS_OF[rule.name]:
        if getattr(o, name) is None:
            raise ValueError(f"{name} is required by rule {rule.name!r}")
        _check_moment(o, name, rows)
    if not 0 <= o.key < 2**63:
        raise ValueError(f"key must be in [0, 2**63), not {o.key}")


def _check_moment(o: ThetaOperands, name: str, rows: int) -> None:
    moment, scale = getattr(o, name), getattr(o, f"{name}_scale")
    if moment.dtype != torch.uint8:
        if scale is not None:
            raise ValueError(f"{name}_scale belongs to 8-bit moments; {name} is {moment.dtype}")
        _check_like(name, moment, o.grad)
        return
    _check_shape(name, moment, o.grad)
    check_device(name, moment, o.grad)
    want = scale_shape((o.grad.shape[0], o.grad.shape[1]), rows, o.K)
    if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != want or not scale.is_contiguous():
        got = "None" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
        raise ValueError(f"{name}_scale must be contiguous float32 of shape {want} for 8-bit moments, not {got}")
    if o.m_scale is None or not moment.is_contiguous():
        raise ValueError(f"{name} must be contiguous, and both moments 8-bit or neither")


def _check_like(name: str, tensor: Tensor, grad: Tensor) -> None:
    """A theta-like tensor in the layout of grad, which is a matter of its shape and has been checked."""
    _check_shape(name, tensor, grad)
    check_device(name, tensor, grad)
    check_matrix(name, tensor)


def _check_shape(name: str, tensor: Tensor, grad: Tensor) -> None:
    if tensor.shape != grad.shape:
        raise ValueError(f"{name} must have the shape {tuple(grad.shape)} of grad, not {tuple(tensor.shape)}")


def theta_steps_(
    operands: Sequence[ThetaOperands], rule: Rule, grad_scale: float = 1.0, scale: Tensor | None = None
) -> Tensor:
    """One update of theta of many weights in place; weights of one shape share a launch.

    grad_scale multiplies the gradients, and so does `scale`, a float32 tensor of one element on the device, where
    given. Padding is neither read nor written. A non-finite gradient propagates: check before or after.

    Returns float32 [weights, 4] on the device without waiting for it: (entries selected, sum of C over the candidates,
    candidates, sum of |change of theta| as stored). Rules other than "selective" select every candidate and have no C
    (0). Raises ValueError for arguments that do not fit, before anything is written.
    """
    _check_rule(rule)
    for o in operands:
        _check(o, rule)
    if not operands:
        return torch.empty((0, 4))
    with torch.no_grad():
        if not use_triton(operands[0].grad):
            factor = grad_scale if scale is None else grad_scale * float(scale)
            stats = torch.stack([theta_step_reference(o, rule, factor) for o in operands])
        else:
            for o in operands:
                if any(t.dtype == torch.float64 for t in (o.grad, *o.written)):
                    raise ValueError("theta_step_ takes float64 on the CPU only; its GPU kernel computes in float32")
            stats = theta_steps_triton(operands, rule, grad_scale, scale)
        written = [t for o in operands for t in o.written if not t.is_inference()]
        torch.autograd.graph.increment_version(written)
    return stats


def _theta_step_fake(
    weight: Tensor | None,
    low: Tensor | None,
    theta: Tensor | None,
    m: Tensor | None,
    v: Tensor | None,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    grad: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    rule: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    consistency: float,
    select: float,
    top: float,
    grad_scale: float,
    key: int = 0,
) -> Tensor:
    numbers = Rule(rule, lr, beta1, beta2, eps, weight_decay, step, consistency, select, top)
    _check_rule(numbers)
    _check(ThetaOperands(grad, bits, row_start, columns, K, weight, low, theta, m, v, m_scale, v_scale, key), numbers)
    return grad.new_empty((4,), dtype=torch.float32)


@operation("theta_step_", ("weight", "low", "theta", "m", "v", "m_scale", "v_scale"), fake=_theta_step_fake)
def _theta_step_op(
    weight: Tensor | None,
    low: Tensor | None,
    theta: Tensor | None,
    m: Tensor | None,
    v: Tensor | None,
    m_scale: Tensor | None,
    v_scale: Tensor | None,
    grad: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    K: int,
    rule: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    consistency: float,
    select: float,
    top: float,
    grad_scale: float,
    key: int = 0,
) -> Tensor:
    return theta_steps_(
        [ThetaOperands(grad, bits, row_start, columns, K, weight, low, theta, m, v, m_scale, v_scale, key)],
        Rule(rule, lr, beta1, beta2, eps, weight_decay, step, consistency, select, top),
        grad_scale,
    )[0]


def theta_step_(
    weight: Tensor | None,
    theta: Tensor | None,
    m: Tensor | None,
    v: Tensor | None,
    grad: Tensor,
    bits: Tensor,
    row_start: Tensor | None,
    columns: Tensor | None,
    *,
    rule: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    consistency: float = 0.5,
    select: float = 0.2,
    top: float = 0.5,
    grad_scale: float = 1.0,
    K: int | None = None,
    low: Tensor | None = None,
    m_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    key: int = 0,
) -> Tensor:
    """`theta_steps_` for one weight, as an operation that graphs may hold; returns float32 [4].

    The tensors are those of `ThetaOperands`; K is required where neither weight nor low is given (packed storage).
    """
    if K is None:
        dense = weight if weight is not None else low
        if dense is None:
            raise ValueError("K (columns of the dense matrix) is required where weight is None")
        K = dense.shape[1]
    with torch.no_grad():
        return torch.ops.fxresu.theta_step_(
            weight,
            low,
            theta,
            m,
            v,
            m_scale,
            v_scale,
            grad,
            bits,
            row_start,
            columns,
            K,
            rule,
            lr,
            *betas,
            eps,
            weight_decay,
            step,
            consistency,
            select,
            top,
            grad_scale,
            key,
        )
