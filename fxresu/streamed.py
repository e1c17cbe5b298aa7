"""`StreamedAdamW`: AdamW inside the backward pass, for models whose gradients and moments never fit.

A gradient is used as soon as autograd has accumulated it and freed at once; the moments come from host memory just
before and go back just after, while the backward goes on. What the device holds is the weights, a few slots of moments,
and the gradients of whatever becomes ready together: one block, if blocks are compiled one by one (see
`streamed_blocks`), or one weight in eager code.

The arithmetic that decides the form, for 6.7e9 weights and 8192 tokens a step on an H100: forward, backward and a
recomputation are 8 * 6.7e9 * 8192 = 0.44 PFLOP, some 0.7 s, of which 0.5 s are backward. Moments in 8 bits are 13.6 GB
each way, 0.25 s at 55 GB/s, hidden twice over; in bfloat16 they are 26.8 GB and 0.49 s, just hidden; in float32 0.98 s,
not. Where host memory is slower than that, a factored second moment halves the first: 6.8 GB and 0.12 s. The update
itself moves 10 bytes a weight on the device: 0.03 s at 3 TB/s.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import AdamW, adamw_step_, adamw_steps_
from fxresu.passes._compat import FakeTensor

from .errors import CheckpointError, ConfigError, PhaseError
from .gradient_sums import GradientSums
from .model_state import is_transformed, managed_weights, state_of
from .moment_stream import MomentStream, Parcel
from .streamed_checks import check_arguments, check_group, check_parameter
from .streamed_groups import Arrivals, factor_moments, operands_of, update_parcels
from .streamed_moments import StreamedMoments
from .streamed_norm import GradientNorm
from .streamed_state import StreamedState
from .theta_layout import refuse_together
from .weight_stream import WeightStream

__all__ = ["StreamedAdamW", "accumulating"]


class StreamedAdamW(Optimizer):
    """AdamW whose update of a weight happens in the backward, with moments streamed from host memory.

    Use it as any optimizer: `loss.backward()` updates, `step()` ends the step (it updates what still has a gradient,
    and counts), schedulers set `param_groups[i]["lr"]` between steps. A gradient accumulated over N micro-batches needs
    to be announced, because the update cannot wait: run all but the last backward inside `with optimizer.accumulate():`
    and divide each loss by the number of micro-batches of its window (a last, shorter window by its own number).

    Weights in bfloat16 are rounded stochastically (see `fxresu.kernels.adamw_step_`) and need no copy in float32.

    =========  =======================  ====================================================================
    clip       factor                   cost
    =========  =======================  ====================================================================
    "running"  from this step's norm,   one small launch for every group of tensors. Gradients that have come count
               as far as it is known    as they are; the others are taken to have changed since the last step as these
                                        have (`fxresu.kernels.running_clip`).
    "exact"    from this step's norm    all gradients stay until `step()`, in the weights' precision, and the update
                                        is not hidden behind the backward.
    =========  =======================  ====================================================================

    Exact clipping without room for the gradients takes a second backward of the same batch: `with optimizer.measure():`
    around the first one takes the norm and drops the gradients; the next backward uses it. It costs one more forward
    and backward.

    A gradient that is not finite cannot stop the step, because parts of it are done: the tensor in question is skipped
    and counted (`statistics`). With an exact norm nothing has been updated, and the whole step is skipped. Step counts
    go on in both cases.

    Args:
        params: as for every optimizer; float32 or bfloat16, contiguous, all on one device.
        lr, betas, eps, weight_decay, maximize: AdamW's.
        moments: "8bit" (blockwise, 2.03 bytes a weight), "factored" (1.016), "bf16" (4) or "fp32" (8). "factored" has
            the first moment in 8 bits, and of the second one of a weight with two dimensions or more only means by rows
            and columns, as Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): 4 bytes for each row and column, which
            do not travel. The first dimension makes the rows. Other weights are as with "8bit". Unlike Adafactor's,
            means are over gradients that are not zero, since pruned weights have none.
        max_norm: largest 2-norm of all gradients together; None does not clip.
        clip: "running" or "exact", see above.
        lookahead: parcels brought ahead of the one in use. None: as many as the largest group of `update_together`
            takes (2 at least), so that a compiled block's update does not wait for its moments.
        chunk: entries of a parcel, a multiple of 4096. The device holds lookahead + 2 parcels.
        device_bytes: of moments that stay on the device, so that less is streamed: 0 streams all but small ones.
        sums: where gradients of micro-batches are added up: "device" (in `.grad`, 2 bytes a weight in bfloat16) or
            "host" (nothing on the device, and 2 to 4 bytes a weight over the bus for every micro-batch).
        seed: of the stochastic rounding, with the step count.

    Attributes:
        weights: brings weights that are in host memory themselves (see `stream_blocks`), or None.
        skipped: tensors whose update was left out because a gradient was not finite (a tensor on the device).

    Raises:
        ConfigError: an argument is out of range, a parameter has another dtype or layout, parameters are on several
            devices.
        HostMemoryError: not enough host memory for the moments, or not enough that can be pinned.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        moments: str = "8bit",
        max_norm: float | None = None,
        clip: str = "running",
        lookahead: int | None = None,
        chunk: int = 2**24,
        device_bytes: int = 0,
        sums: str = "device",
        seed: int = 0,
    ) -> None:
        check_arguments(moments, max_norm, clip, lookahead, chunk, device_bytes, sums)
        self.moments, self.max_norm, self.clip = moments, max_norm, clip
        self.lookahead, self.chunk, self.device_bytes, self.seed = lookahead, chunk, device_bytes, seed
        self.sums = sums
        self._accumulating = self._measuring = False
        self._updated: dict[int, Tensor] = {}  # parameters that this step has updated
        self._hooked: dict[int, Any] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._entries: dict[int, Any] = {}
        self._sums: GradientSums | None = None
        self._waiting = Arrivals()
        self.weights: WeightStream | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_group(defaults)
        super().__init__(params, defaults)
        home = next(iter(self._parameters())).device  # weights may be away later
        self._moments = StreamedMoments(moments, lookahead, chunk, device_bytes, home)
        self._norm = GradientNorm(sum(len(g["params"]) for g in self.param_groups), home, max_norm)

    # Parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the parameters' moments are made, and their gradients followed from now on."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            for parameter in group["params"]:
                check_parameter(parameter, next(iter(self._parameters())).device)
        except ConfigError:
            self.param_groups.pop()
            raise
        if hasattr(self, "_norm"):  # a group that is added later
            self._norm.grow(len(group["params"]))
        self._index()
        self._follow_gradients()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _follow_gradients(self) -> None:
        """Hooks on parameters that train and have none yet."""
        me = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            if (live := me()) is not None:
                live._arrived(parameter)

        for parameter in self._parameters():
            if parameter.requires_grad and id(parameter) not in self._hooked:
                handle = parameter.register_post_accumulate_grad_hook(arrived)
                self._hooked[id(parameter)] = handle
                weakref.finalize(self, handle.remove)

    def follow(self, model: nn.Module) -> None:
        """Know the masks of a transformed model. Phase changes call this; it need not be called by hand."""
        if is_transformed(model):
            self._model = weakref.ref(model)
            self._entries = {id(m.parameter): m.entry for m in managed_weights(model).values()}

    def check_phases(self, model: nn.Module) -> None:
        """ConfigError if weights are in host memory, and a change of masks would need several of them at a time, or
        they would be somewhere else as well."""
        if self.weights is None:
            return
        record = state_of(model)
        refuse_together(record, managed_weights(model))
        if record.storage == "offload":
            raise ConfigError(
                "storage='offload' with stream_blocks(weights=...): both keep weights in host memory; use 'packed' or"
                " 'resident', leave weights= out, or remove() the blocks"
            )

    def compute_on(self, device: torch.device) -> None:
        """Have norms, and moments that do not travel, on this device; for `stream_blocks`, before the first step."""
        if device != self._moments.device:
            self._moments.move(device)
            self._norm = GradientNorm(sum(len(g["params"]) for g in self.param_groups), device, self.max_norm)

    # State

    def _state_of(self, parameter: Tensor) -> StreamedState:
        """The parameter's state; made, or made from a plain one that somebody put there."""
        state = self.state.get(parameter)
        if isinstance(state, StreamedState):
            return state
        return self._moments.make_state(parameter, self.state, list(self._parameters()))

    def settle(self) -> None:
        """Wait until all moments are at home. Needed before the host reads or writes them; `state_dict` does it."""
        self._moments.settle()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of device memory for moments, and sums of gradients, on their way."""
        return self._moments.workspace_bytes + (0 if self._sums is None else self._sums.device_bytes)

    # The backward

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add their gradients up and update nothing: all micro-batches of a step but the last.

        Sums are in the weights' own precision, as torch's are; `sums=` says where.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before
            if self._sums is not None:
                self._sums.end_pass(more=True)

    @property
    def gathers(self) -> bool:
        """Whether the present backward updates nothing: inside `accumulate` or `measure`."""
        return self._accumulating or self._measuring

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Backward passes inside only measure: their gradients are dropped, and the next step is clipped by exactly
        their norm."""
        sums = self._sums is not None and self._sums.pending
        theta = any(entry.grad_of_theta() is not None for entry in self._entries.values())
        if sums or theta or any(p.grad is not None for p in self._parameters()):
            raise PhaseError("measure(): accumulated gradients would be lost; use clip='exact' for them")
        before, self._measuring = self._measuring, True
        try:
            yield
        finally:
            self._measuring = before
            for entry in self._entries.values():
                if entry.anchor is not None:
                    entry.anchor.grad = None
        self._norm.use_measured()

    def _arrived(self, parameter: Tensor) -> None:
        """Autograd has accumulated a gradient."""
        if torch.is_grad_enabled():  # a backward that is itself recorded; others have switched it off
            with torch.no_grad():
                return self._arrived(parameter)
        entry = self._entries.get(id(parameter))
        if entry is not None:
            entry.on_gradient(parameter)  # masked, or gathered into dθ: its own hook may come after this one
        if parameter.grad is None:
            return
        if self._accumulating:
            if self.sums == "host":
                self._sums_on_host().add(parameter)
            return
        if self._measuring:
            self._norm.measure(self._place(parameter), parameter.grad)
            parameter.grad = None
        elif not (self.max_norm is not None and self.clip == "exact" and not self._norm.exact):
            group = self._moments.groups.get(id(parameter))
            if group is None:
                self._update(parameter)
            else:
                for parameters in self._waiting.add(group, parameter):
                    self._update_many(parameters)

    def update_together(self, groups: Sequence[Iterable[Tensor]]) -> None:
        """Update these parameters together, as soon as the last one of a group has its gradient: a compiled block gives
        all of its gradients at once, and tens of launches become a few. `stream_blocks` calls it."""
        self._flush()
        self._moments.group([p for p in group if id(p) in self._places] for group in groups)

    def _flush(self) -> None:
        """Update the parameters that wait for others of their group."""
        for parameters in self._waiting.rest():
            self._update_many(parameters)

    def _sums_on_host(self) -> GradientSums:
        if self._sums is None:
            entries = min(self.chunk, max(p.numel() for p in self._parameters()))
            ahead = 2 if self.lookahead is None else self.lookahead
            self._sums = GradientSums(self._moments.lanes, ahead + 2, entries)
        return self._sums

    def _place(self, parameter: Tensor) -> int:
        return self._places[id(parameter)][0]

    def _index(self) -> None:
        """Number and group of every parameter."""
        pairs = ((p, g) for g in self.param_groups for p in g["params"])
        self._places: dict[int, tuple[int, int]] = {}
        for number, (parameter, group) in enumerate(pairs):
            self._places[id(parameter)] = (number, next(i for i, g in enumerate(self.param_groups) if g is group))

    def _prepared(self, parameter: Tensor) -> tuple[StreamedState, Tensor]:
        """Its state, and its whole gradient, checked; the parameter is on the device."""
        if isinstance(parameter, FakeTensor):
            raise ConfigError("params have no memory, as in a prediction: name the optimizer there, 'streamed'")
        if id(parameter) in self._updated:
            raise PhaseError(
                f"a weight of shape {tuple(parameter.shape)} got a second gradient after this step had updated it: call"
                " step() after each backward, run all but the last micro-batch inside optimizer.accumulate(), and use"
                " checkpoint(..., use_reentrant=False) for weights that are used more than once"
            )
        if self._sums is not None:
            self._sums.fold(parameter)
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise ConfigError(f"a weight of shape {tuple(parameter.shape)} has a sparse gradient; use sparse=False")
        if self.weights is not None:
            self.weights.bring(parameter)
        return self._state_of(parameter), grad.contiguous()  # what can fail, before anything is written

    def _next_rule(self, parameter: Tensor, state: StreamedState) -> AdamW:
        """The numbers of its next update."""
        place, number = self._places[id(parameter)]
        group = self.param_groups[number]
        self._updated[id(parameter)] = parameter
        state["step"] = step = state["step"] + 1
        return AdamW(
            float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"], step, group["maximize"],
            self.seed * 1_000_003 + place,
        )  # fmt: skip

    def _update(self, parameter: Tensor, factor: Tensor | None = None) -> None:
        """Update a parameter with its gradient and free that."""
        (state, grad), norm = self._prepared(parameter), None
        if factor is None:
            factor, norm = self._norm.factor(self._place(parameter), grad)
        rule = self._next_rule(parameter, state)
        factor_moments([(grad, state, rule, norm)], factor)
        if not state.pieces:
            adamw_step_(operands_of(parameter, grad, state), rule, factor, norm)
        for piece in state.pieces:
            stream = self._ready_stream()
            operands = operands_of(parameter, grad, state, piece, stream.take(piece.parcel))
            adamw_step_(operands, rule, factor, norm)
            stream.give_back(piece.parcel)
        parameter.grad = None

    def _update_many(self, parameters: Sequence[Tensor]) -> None:
        """The same for several: a few parcels at a time, each time with one launch."""
        if len(parameters) == 1:
            return self._update(parameters[0])
        prepared = [self._prepared(p) for p in parameters]
        own = self.max_norm is None  # factored moments know the norm, once they are added up
        measured = [None if own and state.factored else grad for state, grad in prepared]
        factor, norms = self._norm.factors([self._place(p) for p in parameters], measured)
        here, parcels, factored = list[Any](), dict[Parcel, list[Any]](), list[Any]()
        for parameter, (state, grad), norm in zip(parameters, prepared, norms, strict=True):
            rule = self._next_rule(parameter, state)
            factored.append((grad, state, rule, norm))
            if not state.pieces:
                here.append((operands_of(parameter, grad, state), rule, norm))
            for piece in state.pieces:
                parcels.setdefault(piece.parcel, []).append((parameter, grad, state, piece, rule, norm))
        factor_moments(factored, factor, measure=own)
        if parcels:
            update_parcels(self._ready_stream(), parcels, here, factor)
        else:
            adamw_steps_(here, factor)
        for parameter in parameters:
            parameter.grad = None

    def _ready_stream(self) -> MomentStream:
        stream = self._moments.stream  # this is asked for at every parcel
        return stream or self._moments.ready_stream(self.state.values(), list(self._parameters()))

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """End the step: update what still has a gradient (accumulated without a last backward, or kept for the exact
        norm), take the norm, and bring the first moments of the next step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._flush()
        summed = {} if self._sums is None else self._sums.pending
        waiting = [p for p in self._parameters() if p.grad is not None or id(p) in summed]
        if waiting:
            kept = self.max_norm is not None and self.clip == "exact" and not self._norm.exact and not self._updated
            factor = None
            if kept:
                factor = self._norm.over({self._place(p): p.grad for p in waiting if p.grad is not None})
            for parameter in reversed(waiting):
                self._update(parameter, factor)
        self._updated.clear()
        self._norm.end_step()
        if self._moments.stream is not None:
            self._moments.stream.end_step()
        if self._sums is not None:
            self._sums.end_pass(more=False)
        self._follow_gradients()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that are not used yet; those of a step that is under way are gone already."""
        self._waiting.clear()
        super().zero_grad(set_to_none=True)
        if self._sums is not None and self._sums.pending:
            self._sums.clear()
        self._follow_gradients()

    @property
    def skipped(self) -> Tensor:
        """Tensors whose update was left out because a gradient was not finite, since the beginning."""
        return self._norm.skipped

    def statistics(self) -> dict[str, float]:
        """`gradient_norm` of the last step (before clipping, finite tensors); since the beginning: `skipped` tensors,
        `fetched` parcels, `misses`, those that nobody had brought ahead, and `stalled`, the seconds for which the
        computation stood still for copies. Waits for the device."""
        stream = self._moments.stream
        return {
            "gradient_norm": float(self._norm.last),
            "skipped": int(self._norm.skipped),
            "fetched": 0 if stream is None else stream.fetched,
            "misses": 0 if stream is None else stream.misses,
            "stalled": 0.0 if stream is None else stream.lanes.stalled(),
        }

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the moments are those in host memory themselves, and in their own form."""
        if self._updated or self._waiting:
            raise CheckpointError(f"a step has updated {len(self._updated)} weights and is not complete; call step()")
        self.settle()
        result = super().state_dict()
        result["state"] = {k: dict(v) for k, v in result["state"].items()}
        result["param_groups"][0] = {**result["param_groups"][0], "streamed": self._norm.state_dict()}
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict`, or (with float moments) one of torch's AdamW.

        Raises:
            CheckpointError: it does not fit; nothing has changed then.
        """
        groups = [dict(g) for g in state_dict["param_groups"]]
        norm = groups[0].pop("streamed", None)
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise CheckpointError("state_dict: its parameter groups differ from the optimizer's in number or size")
        self._norm.check(norm)
        places = [i for g in groups for i in g["params"]]
        saved = {p: state_dict["state"].get(i) for i, p in zip(places, self._parameters(), strict=True)}
        for parameter, state in saved.items():
            if state:
                self._state_of(parameter).check(f"parameter {self._place(parameter)}", state)
        self.settle()
        kept = {}
        for parameter, state in saved.items():
            if state:
                kept[parameter] = self._state_of(parameter)
                kept[parameter].assign(state)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(kept)
        self._updated.clear()
        self._norm.load_state_dict(norm)


@contextlib.contextmanager
def accumulating(optimizer: Optimizer | None, more: bool) -> Iterator[None]:
    """Around a backward: `more` of the same step follow it. Other optimizers need not know."""
    if more and isinstance(optimizer, StreamedAdamW):
        with optimizer.accumulate():
            yield
    else:
        yield
