"""The norm of gradients that are never all there at once, and the factor that clips them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxresu.kernels import running_clip

from .errors import CheckpointError

__all__ = ["CLIPS", "GradientNorm"]

CLIPS = ("running", "exact")


class GradientNorm:
    """2-norms tensor by tensor, and over all of them at the end of a step; nothing here waits for the device.

    Args:
        tensors: how many there are.
        max_norm: largest norm of all together; None leaves them.

    Attributes:
        last: norm over all finite tensors of the last step, before clipping.
        before: those tensors' own norms then, 0 for the others.
        exact: whether the norm of the coming step is known.
        skipped: tensors with a gradient that was not finite, so far.
    """

    def __init__(self, tensors: int, device: torch.device, max_norm: float | None) -> None:
        self.max_norm = max_norm
        self._norms = torch.zeros(tensors, device=device)
        self._places = self._norms.unbind()
        self.before = torch.zeros_like(self._norms)
        self.exact = self._counted = False
        self._seen = 0  # tensors with a norm, of this step
        self._common: Tensor | None = None  # the factor of all of them, where their norm is known
        self.last = torch.zeros((), device=device)
        self._measured = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._nan = torch.full((), float("nan"), device=device)

    def grow(self, tensors: int) -> None:
        """Make room for more tensors."""
        more = self._norms.new_zeros(tensors)
        self._norms, self.before = torch.cat([self._norms, more]), torch.cat([self.before, more])
        self._places = self._norms.unbind()

    def _clip(self, norm: Tensor) -> Tensor:
        """min(1, max_norm / norm), as `torch.nn.utils.clip_grad_norm_` has it; NaN if the norm is not finite."""
        factor = torch.ones_like(norm) if self.max_norm is None else (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return torch.where(norm.isfinite(), factor, self._nan)

    def factor(self, place: int, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        """What multiplies the gradient of a tensor that is updated before the others' are known (None: 1; NaN skips
        it), and its norm, which skips it too unless it is finite."""
        norm = self._places[place]
        torch.linalg.vector_norm(grad, dtype=torch.float32, out=norm)
        self._seen += 1
        return self._factor(), norm

    def factors(self, places: list[int], grads: list[Tensor | None]) -> tuple[Tensor | None, list[Tensor]]:
        """`factor` of several tensors at a time. Without a gradient a norm is not taken but given back for the caller
        to fill in; only where nothing clips, so that no factor depends on it."""
        norms = [self._places[place] for place in places]
        known = [(norm, grad) for norm, grad in zip(norms, grads, strict=True) if grad is not None]
        if known:
            measured = torch._foreach_norm([grad for _, grad in known], 2, dtype=torch.float32)
            torch._foreach_copy_([norm for norm, _ in known], measured)
        self._seen += len(norms)
        return self._factor(), norms

    def _factor(self) -> Tensor | None:
        """The factor of what has just come; None: 1."""
        if self.max_norm is None:
            return None
        if not self.exact:
            return running_clip(self._norms, self.before, self.max_norm)
        if self._common is None:
            self._common = self._clip(self._measured)
        return self._common

    def over(self, grads: Mapping[int, Tensor]) -> Tensor:
        """The factor of gradients that are all there."""
        for place, grad in grads.items():
            self._norms[place] = _norm(grad)
        self._seen += len(grads)
        factor = self._clip(torch.linalg.vector_norm(self._norms))
        self.skipped += factor.isnan() * len(grads)
        self._counted = True
        return factor

    def measure(self, place: int, grad: Tensor) -> None:
        """Note a norm for `use_measured`."""
        self._norms[place] = _norm(grad)

    def use_measured(self) -> None:
        """The coming step's norm is that of what was measured."""
        self._measured, self.exact = torch.linalg.vector_norm(self._norms), True
        self._norms.zero_()

    def end_step(self) -> None:
        """The step's norm becomes the last one; a step without gradients leaves that as it is."""
        if self._seen:
            finite = self._norms.isfinite()
            if not self._counted:
                bad = (~finite).sum()
                self.skipped += bad if self._common is None else torch.where(self._common.isnan(), self._seen, bad)
            self.before.copy_(torch.where(finite, self._norms, 0))
            self.last = torch.linalg.vector_norm(self.before)
            self._norms.zero_()
        self._common, self._seen = None, 0
        self.exact = self._counted = False

    def state_dict(self) -> dict[str, Any]:
        """What the next step's factor needs."""
        return {"norms": self.before.clone(), "skipped": self.skipped.clone()}

    def check(self, state: Mapping[str, Any] | None) -> None:
        """CheckpointError if `load_state_dict` could not take it."""
        if state is None:
            return
        norms = state.get("norms")
        if norms is None:
            raise CheckpointError("state_dict: it has no norms of gradients, as one of another version; save it anew")
        if len(norms) != len(self.before):
            raise CheckpointError(f"state_dict: norms of {len(norms)} gradients; the optimizer has {len(self.before)}")

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`; None: as if nothing had been stepped."""
        self._norms.zero_()
        self._common, self._seen = None, 0
        self.exact = self._counted = False
        norms = torch.zeros_like(self.before) if state is None else torch.as_tensor(state["norms"]).to(self.before)
        self.before.copy_(norms)
        self.last = torch.linalg.vector_norm(self.before)
        self.skipped = torch.as_tensor(0 if state is None else state["skipped"]).to(self.skipped)


def _norm(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad, dtype=torch.float32)
