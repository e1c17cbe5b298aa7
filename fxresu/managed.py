"""A managed weight: its mask, θ and moments beside the Parameter, and what reading it gives.

Eager code gets the Parameter itself; under compilation a read emits the marker op that passes look for
(`fxresu.kernels.managed`). How the values come to be packed or offloaded, which a read finds, is `weight_storage`'s.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxresu.kernels import apply_mask_, gather, gather_add_, scatter_, unpack
from fxresu.kernels.packed import composed
from fxresu.passes._compat import compiling, inside_compiled_call, mark_dynamic, only_inlined, tracing

from .current_plan import PhaseState

if TYPE_CHECKING:
    from .weight_stream import WeightStream


class ManagedWeight:
    """Mask, θ and θ's moments of one weight, seen as a matrix [rows, K] with leading dimensions flattened.

    Attributes:
        fqn: name of the parameter in the model (the first, if it is tied).
        shape: shape of the parameter.
        k: columns of the matrix: the last dimension, or all but the first of a convolution's kernel.
        bits: int32 [rows, ceil(K/32)], bit 1 = active; None while dense.
        pattern: "2:4" while the mask keeps two of four along rows and columns, else "".
        theta_shape: shape of every theta-like tensor; a capacity that holds for the whole run.
        row_start: int64 [rows], where a row's first candidate lies in a flat theta-like tensor.
        columns: int32 [n] of the candidate columns (rows, if `input_rows`), or None if every pruned coordinate is one.
        panel, panel_bits, panel_start: of packed storage with candidates. θ is compact over the panel of the chosen
            inputs, a matrix [rows, n] ([n, K], if `input_rows`) of its own: its mask, where its lines start in θ, and
            where it lies in the weight (see `fxresu.kernels.compose`). If the panel is the whole weight there is only
            `panel_start`.
        input_rows: the module computes input @ weight, so that inputs lie along rows.
        anchor: leaf of shape `theta_shape` whose `.grad` receives dθ. In packed storage it is `theta`; otherwise its
            storage is one element, and its dtype is that of dθ.
        theta: master of θ where W cannot be it (W away, or in lower precision), in float32 or `theta_dtype`; else None.
        m, v: moments of θ, allocated while in RESU: of a float dtype, or uint8 codes with their scales.
        m_scale, v_scale: float32 scales of 8-bit moments, else None (see `fxresu.kernels.blockwise8`).
        low: bfloat16 copy of the effective weight that products read in RESU under bfloat16; else None.
        low_of, low_version: the tensor that `low` was made from, and its version and memory at that time.
        host: the weight's frozen values in pinned host memory while the storage is "offload"; else None.
        stream: brings the weight to the device where it waits in host memory (`stream_blocks`), else None.
        consume: called with this record when a backward has added all that it has to dθ (`follow_theta`), or None.
        dropped: what is needed to rebuild the optimizer state that RESU dropped.
        active, active_start: the active values, packed, while the storage is packed; else None.
        active_scale: float32 scales of active values in 8 or 4 bits, else None (see `fxresu.kernels.quantized`).
        packed_values: how packed storage keeps active values: "native" (the weight's dtype), "bf16", "int8" or "int4".
    """

    # Tensors that follow the module to another device; `anchor` is rebuilt.
    TENSORS = (
        "bits", "row_start", "columns", "theta", "m", "v", "m_scale", "v_scale", "low", "active", "active_start",
        "active_scale", "panel", "panel_bits", "panel_start",
    )  # fmt: skip

    def __init__(
        self, fqn: str, weight: Tensor, state: PhaseState, k: int | None = None, input_rows: bool = False
    ) -> None:
        self.fqn = fqn
        self.shape = tuple(weight.shape)
        self.k = self.shape[-1] if k is None else k
        self.input_rows = input_rows
        self.state = state
        self.bits: Tensor | None = None
        self.pattern = ""
        self.theta_shape: tuple[int, int] = (0, 0)
        self.row_start: Tensor | None = None
        self.columns: Tensor | None = None
        self.panel: Tensor | None = None
        self.panel_bits: Tensor | None = None
        self.panel_start: Tensor | None = None
        self.anchor: Tensor | None = None
        self.theta: Tensor | None = None
        self.m: Tensor | None = None
        self.v: Tensor | None = None
        self.m_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        self.low: Tensor | None = None
        self.low_version = (-1, 0)
        self.low_of: weakref.ref[Tensor] | None = None
        self.host: Tensor | None = None
        self.grad_dtype = self.theta_dtype = torch.float32
        self.active: Tensor | None = None
        self.active_start: Tensor | None = None
        self.active_scale: Tensor | None = None
        self.packed_values = "native"
        self.dropped: Any = None
        self.stream: WeightStream | None = None
        self.consume: Callable[[ManagedWeight], None] | None = None
        self._followed: weakref.ref[Tensor] | None = None
        self._hook: Any = None

    def bring(self, weight: Tensor) -> None:
        """Have the weight on the device for what is done with it next, and until another one is brought."""
        if self.stream is not None:
            self.stream.bring(weight)

    def device(self, weight: Tensor) -> torch.device:
        """Where the weight is computed with."""
        return weight.device if self.stream is None else self.stream.device

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.numel // self.k

    @property
    def numel(self) -> int:
        """Coordinates of the weight."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def packed(self) -> bool:
        """Whether the full-precision dense weight has left the device's memory."""
        return self.active is not None or self.host is not None

    def matrix(self, tensor: Tensor) -> Tensor:
        """`tensor` (the weight, or a state of its shape) as [rows, K], sharing memory."""
        return tensor.detach().view(self.rows, self.k)

    def mask(self) -> Tensor | None:
        """bool [rows, K], True = active; None while dense."""
        return None if self.bits is None else unpack(self.bits, self.k)

    def covered(self) -> Tensor:
        """Which coordinates θ may cover by its choice of inputs: bool, broadcasts with [rows, K]."""
        assert self.bits is not None
        shape = (self.rows, 1) if self.input_rows else (1, self.k)
        inside = torch.full(shape, self.columns is None, device=self.bits.device)
        if self.columns is not None:
            inside.view(-1)[self.columns.long()] = True
        return inside

    def grad_of_theta(self) -> Tensor | None:
        """dθ accumulated so far, of shape `theta_shape`, or None."""
        return None if self.anchor is None else self.anchor.grad

    @property
    def theta_layout(self) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """(bits, row_start, columns, K) by which theta-like tensors are laid out, in the weight or in its panel."""
        assert self.bits is not None
        if self.panel_start is None:
            return self.bits, self.row_start, self.columns, self.k
        if self.panel is None:
            return self.bits, self.panel_start, None, self.k
        assert self.panel_bits is not None and self.columns is not None
        return self.panel_bits, self.panel_start, None, self.k if self.input_rows else self.columns.numel()

    def from_panel(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Φᵀ of a panel (or the whole weight, where it is the panel), theta-like, of its dtype or another."""
        bits, start, _, _ = self.theta_layout
        return gather(values, bits, start, None, self.theta_shape, dtype or values.dtype)

    def gather_theta(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Φᵀ of the weight's matrix [rows, K], or of its gradient's."""
        if self.panel_start is None:
            return gather(matrix, self.bits, self.row_start, self.columns, self.theta_shape, dtype)
        if self.panel is not None:
            assert self.columns is not None
            matrix = matrix.index_select(0 if self.input_rows else 1, self.columns.long())
        return self.from_panel(matrix).to(dtype)

    def twin(self, fqn: str) -> ManagedWeight:
        """A record of the same contents for another Parameter, which was tied to this one's."""
        other = copy.copy(self)
        other.fqn, other._hook, other.dropped = fqn, None, copy.deepcopy(self.dropped)
        other.host = None if self.host is None else self.host.clone()
        for name in self.TENSORS:
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.detach().clone())
        if self.anchor is not None:
            anchor = other.set_anchor(self.anchor.device, self.anchor.requires_grad)
            anchor.grad = None if self.anchor.grad is None else self.anchor.grad.clone()
        return other

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow `Module._apply` to another device; dtypes and values of this record do not change."""
        for name in self.TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, _moved(tensor, fn))
        if self.anchor is not None:
            grad, trains = self.anchor.grad, self.anchor.requires_grad
            assert self.bits is not None
            anchor = self.set_anchor(self.bits.device, trains)
            if grad is not None:
                anchor.grad = _moved(grad, fn)

    def set_anchor(self, device: torch.device, trains: bool = True) -> Tensor:
        """(Re)build the leaf that receives dθ, and return it."""
        if self.active is not None:  # the composed weight is differentiable in θ itself
            assert self.theta is not None
            anchor = self.theta = self.theta.detach().requires_grad_(trains)
            if self.panel_start is not None:  # as long as the candidates are many: they are others in every phase
                mark_dynamic(anchor, 1)
        else:
            base = torch.zeros(1, dtype=self.grad_dtype, device=device)
            anchor = base.expand(self.theta_shape).detach().requires_grad_(trains)
        self.anchor = anchor
        self._follow_anchor()
        return anchor

    def follow_theta(self, consume: Callable[[ManagedWeight], None] | None) -> None:
        """Have `consume` called whenever a backward has added all that it has to dθ; None: nothing is, any more."""
        self.consume = consume
        self._follow_anchor()

    def _follow_anchor(self) -> None:
        """Where dθ comes through autograd (compiled, or packed), the anchor says when it is whole; where eager code
        gathers it, `accumulate` does."""
        anchor = self.anchor
        if self.consume is None or anchor is None or not anchor.requires_grad:
            return
        if self._followed is not None and self._followed() is anchor:
            return
        me = weakref.ref(self)  # the anchor's hook must not keep the record, which keeps the anchor

        def arrived(_: Tensor) -> None:
            if (live := me()) is not None:
                live._arrived()

        anchor.register_post_accumulate_grad_hook(arrived)
        self._followed = weakref.ref(anchor)

    def _arrived(self) -> None:
        if self.consume is not None:
            self.consume(self)

    def dense(self, weight: Tensor) -> Tensor:
        """The effective weight as a dense detached tensor: a new one if packed, the Parameter's own data otherwise."""
        if not self.packed:
            return weight.detach()
        with torch.no_grad():
            if self.host is None:
                return self._compose(weight)
            dense = self.host.to(weight.device, copy=True)
            scatter_(self.matrix(dense), self.theta, self.bits, self.row_start, self.columns)
            return dense

    def _compose(self, weight: Tensor) -> Tensor:
        return self.compose(self.operand(weight), weight.dtype).view(self.shape)

    def compose(self, theta: Tensor, dtype: torch.dtype) -> Tensor:
        """M∘W + Φ(θ) of packed storage, [rows, K]."""
        start, covered = self.theta_layout[1], {} if self.panel is None else self._covered()
        return composed(
            self.active, self.active_scale, theta, self.bits, self.active_start, start, self.k, dtype, **covered
        )

    def composes(self, weight: Tensor) -> bool:
        """Whether reading `weight`, this record's or what stands in its place, composes it."""
        return self.active is not None and _is_stand_in(weight)

    def _covered(self) -> dict[str, Tensor | None]:
        """What composing needs where θ covers some inputs only."""
        return {"columns": self.columns, "panel": self.panel, "panel_bits": self.panel_bits}

    def operand(self, weight: Tensor) -> Tensor:
        """The operand that receives dθ, unless the user has frozen the weight."""
        theta = self.theta
        assert theta is not None
        return theta if weight.requires_grad else theta.detach()

    def read(self, weight: Tensor) -> Tensor:
        """What `module.weight` is: the Parameter in eager code, the marker's value under compilation."""
        if compiling():
            return self._read_compiled(weight)
        self.note_read()
        if self.packed and not _is_stand_in(weight):
            return weight
        if self.active is not None:
            return self._compose(weight)
        if self.host is not None:
            assert self.low is not None
            return self._marked(self.low, weight.requires_grad)
        if self.state.mode in ("sparse", "resu") and torch.is_grad_enabled():
            self.ensure_hook(weight)
        return weight

    def note_read(self) -> None:
        """Eager code reads the weight."""
        if self.state.eager_reads is not None:
            self.state.eager_reads.add(self.fqn)
        elif not tracing() and inside_compiled_call():
            self.state.tell_left(self.fqn)
        if self.state.tracked and self.state.mode == "resu" and not torch.is_grad_enabled():
            self.state.untracked.add(self.fqn)

    def _read_compiled(self, weight: Tensor) -> Tensor:
        if self.packed and not _is_stand_in(weight):
            return weight
        if self.active is not None:
            theta = self.operand(weight)
            kernel = self.k != self.shape[-1]
            dense = torch.ops.fxresu.managed_packed(
                self.active,
                theta,
                self.bits,
                self.active_start,
                self.row_start if self.panel_start is None else self.panel_start,
                (self.rows, self.k) if kernel else self.shape,
                weight.dtype,
                self.state.current()[1],
                **({"pattern": self.pattern} if self.pattern else {}),
                **({} if self.active_scale is None else {"scale": self.active_scale}),
                **({} if self.panel is None else self._covered()),
            )
            return dense.view(self.shape) if kernel else dense
        value = weight
        if self.low is not None and (self.host is not None or self.state.reads_copies):
            value = self.low
        return self._marked(value, weight.requires_grad)

    def _marked(self, value: Tensor, trains: bool) -> Tensor:
        """Marked as the matrix that it is managed as, where that has another last dimension (convolutions)."""
        if self.k == self.shape[-1]:
            return self._marker(value, trains)
        return self._marker(value.flatten(1), trains).view(self.shape)

    def _marker(self, value: Tensor, trains: bool) -> Tensor:
        mode, tag = self.state.current()
        if not trains:
            mode = "frozen"
        # In RESU, and wherever θ is, the pruned slots hold values.
        zeros = {"pattern": self.pattern} if self.pattern and self.anchor is None else {}
        if mode == "sparse":
            return torch.ops.fxresu.managed(value, None, self.bits, None, None, mode, tag, **zeros)
        if mode == "resu":
            return torch.ops.fxresu.managed(value, self.anchor, self.bits, self.row_start, self.columns, mode, tag)
        if not self.state.forward_only:  # one graph serves calls without autograd in all phases that train
            zeros = {}
        bits = self.bits if zeros else None  # where the zeros are, for products that skip them
        return torch.ops.fxresu.managed(value, None, bits, None, None, mode, tag, **zeros)

    def ensure_hook(self, weight: Tensor) -> None:
        """Eager autograd delivers the dense gradient: turn it into the phase's as soon as it is accumulated.

        Installed at the first eager read of the phase, so that compiled training never pays for it, and copies and
        reloaded models get their own.
        """
        if self.hooked(weight):
            return
        # A stand-in (torch.func.functional_call) takes no hook, and must not cost the Parameter its own.
        if isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad:
            self.remove_hook()
            handle = weight.register_post_accumulate_grad_hook(self.on_gradient)
            self._hook = (weakref.ref(weight), handle)

    def hooked(self, weight: Tensor) -> bool:
        """Whether this record's hook follows the gradient of `weight`."""
        return self._hook is not None and self._hook[0]() is weight

    def remove_hook(self) -> None:
        """Take the gradient hook off again."""
        if self._hook is not None:
            self._hook[1].remove()
            self._hook = None

    def on_gradient(self, weight: Tensor) -> None:
        """Turn `weight.grad`, dense, into the phase's: masked, or gathered into dθ. Once more changes nothing."""
        grad = weight.grad
        if grad is None or self.bits is None:
            return
        if self.state.mode == "sparse":
            matrix = grad.view(self.rows, self.k)
            if matrix.is_contiguous() and not grad.requires_grad:  # one launch for three
                apply_mask_(matrix, self.bits)
            else:
                matrix.masked_fill_(~unpack(self.bits, self.k), 0)
        elif self.state.mode == "resu":
            weight.grad = None
            self.accumulate(grad)

    def accumulate(self, grad: Tensor) -> None:
        """Gather a dense gradient of the weight into dθ."""
        if self.anchor is None or not self.anchor.requires_grad:
            return
        matrix = grad.reshape(self.rows, self.k)
        if self.anchor.grad is None:
            self.anchor.grad = self.gather_theta(matrix, self.anchor.dtype)
        elif self.panel_start is not None:
            self.anchor.grad += self.gather_theta(matrix, self.anchor.dtype)
        else:
            gather_add_(self.anchor.grad, matrix, self.bits, self.row_start, self.columns)
        self._arrived()

    def __getstate__(self) -> dict[str, Any]:
        own = dict.fromkeys(("_hook", "low_of", "stream", "consume", "_followed"))
        return {**self.__dict__, **own}


only_inlined(ManagedWeight.read, ManagedWeight.note_read)


def _is_stand_in(weight: Tensor) -> bool:
    """Whether the values are elsewhere: not those of a tensor in the Parameter's place for one call, which has its own
    (torch.func.functional_call; torch.export puts stand-ins of stand-ins there)."""
    return isinstance(weight, nn.Parameter) or 0 in weight.stride()


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` where `fn` puts tensors; a change of dtype is not followed, nor its rounding."""
    moved = fn(tensor.detach())
    return moved if moved.dtype == tensor.dtype else tensor.detach().to(moved.device)


__all__ = ["ManagedWeight"]
