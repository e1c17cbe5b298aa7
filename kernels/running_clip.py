"""`fxresu::running_clip`: the factor that clips gradients by their global norm while only some of them are known.

A backward gives gradients tensor by tensor, and an update inside it cannot wait for the last. What has come is exact;
what is missing is taken to have changed since the last step as what has come has: with n the norms of this step, b
those of the last one, S the tensors that have come,

    r = sum_S n^2 / sum_S b^2;    norm^2 ~ sum_S n^2 + r * sum_not_S b^2;    factor = min(1, max_norm / (norm + 1e-6))

Gradients grow and shrink together more than they change shape, so that a batch with large ones is clipped in the step
that it is in. Without a last step the norm is that of what has come.
"""

import torch
from torch import Tensor

from ._check import check_device
from ._registry import operation, unobserved
from ._triton import jit, launch, tl, use_triton

_BLOCK = 1024
_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_

# --- reference -------------------------------------------------------------------------------------------------------


def running_clip_reference(norms: Tensor, before: Tensor, max_norm: float) -> Tensor:
    """The factor, float32 scalar; sums in float64, because squares of float32 norms overflow."""
    now, last = norms.double().square(), before.double().square()
    come = norms.isfinite() & (norms > 0)
    known, then, missing = now[come].sum(), last[come].sum(), last[norms == 0].sum()
    ratio = torch.where(then > 0, known / then, 1.0)
    return (max_norm / ((known + ratio * missing).sqrt() + _EPS)).clamp(max=1.0).float()


# --- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _running_clip_kernel(norms, before, factor, n, max_norm, eps, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    known = tl.zeros([BLOCK], tl.float64)
    then = tl.zeros([BLOCK], tl.float64)
    missing = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        inside = first + lane < n
        now = tl.load(norms + first + lane, mask=inside, other=0)
        last = tl.load(before + first + lane, mask=inside, other=0).to(tl.float64)
        come = (now > 0) & (now < float("inf"))
        wide = tl.where(come, now, 0).to(tl.float64)
        known += wide * wide
        then += tl.where(come, last * last, 0.0)
        missing += tl.where(now == 0, last * last, 0.0)
    all_known = tl.sum(known, axis=0)
    all_then = tl.sum(then, axis=0)
    ratio = tl.where(all_then > 0, all_known / tl.where(all_then > 0, all_then, 1.0), 1.0)
    norm = tl.sqrt(all_known + ratio * tl.sum(missing, axis=0))
    tl.store(factor, tl.minimum(max_norm / (norm + eps), 1.0).to(tl.float32))


# --- operation -------------------------------------------------------------------------------------------------------


def _check(norms: Tensor, before: Tensor, max_norm: float) -> None:
    if norms.dim() != 1:
        raise ValueError(f"norms must be a vector, not of shape {tuple(norms.shape)}")
    for name, tensor in {"norms": norms, "before": before}.items():
        if tensor.dtype != torch.float32 or tensor.shape != norms.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 {tuple(norms.shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        check_device(name, tensor, norms)
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, not {max_norm}")


def _fake(norms: Tensor, before: Tensor, max_norm: float) -> Tensor:
    _check(norms, before, max_norm)
    return norms.new_empty(())


def _run(norms: Tensor, before: Tensor, max_norm: float) -> Tensor:
    _check(norms, before, max_norm)
    if not use_triton(norms):
        return running_clip_reference(norms, before, max_norm)
    factor = norms.new_empty(())
    launch(
        _running_clip_kernel, 1, norms, norms, before, factor, norms.numel(), float(max_norm), _EPS, BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return factor


@operation("running_clip", fake=_fake)
def _running_clip_op(norms: Tensor, before: Tensor, max_norm: float) -> Tensor:
    return _run(norms, before, max_norm)


def running_clip(norms: Tensor, before: Tensor, max_norm: float) -> Tensor:
    """The factor of the gradients that are known, as the operation `fxresu::running_clip`.

    Args:
        norms: 2-norms of this step's gradients, float32 [tensors]; 0 for what has not come. One that is not finite does
            not count.
        before: those of the last step, float32 [tensors], finite; 0 for all without one.
        max_norm: largest norm of all together.

    Returns:
        float32 scalar in [0, 1], on the norms' device, not waited for.

    Raises ValueError for arguments that do not fit.
    """
    with torch.no_grad():
        if unobserved(norms):
            return _run(norms, before, max_norm)
        return torch.ops.fxresu.running_clip(norms, before, max_norm)
