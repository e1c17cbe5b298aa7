"""One training step of a phase, rehearsed on shapes: what it takes of memory beyond what is there before it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.passes._compat import honour_dynamic_marks, quiet_fakes
from fxresu.passes._compat_rehearsal import rehearsed_compilation

from .losses import default_loss, loss_in
from .managed import ManagedWeight
from .model_state import managed_weights, state_of
from .models import ExampleInputs
from .reference_costs import theta_step_bytes
from .rehearsal import GRADIENTS, SAVED, THETA_GRADIENT, Peak, Rehearsal, Trace, grads, tensors_of
from .shape_copy import Fakes
from .streamed import StreamedAdamW, accumulating
from .streamed_blocks import stream_blocks

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step is made.

    Attributes:
        optimizer: makes the optimizer from parameters.
        loss: `(model, batch) -> scalar`; None is `default_loss`, or the mean of a tensor that the model returns.
        autocast: "bf16" or "fp16"; None computes as the parameters are.
        accumulation: micro-batches of a step.
        compiled: compiled whole by `torch.compile`, or eager.
        rule: θ's update rule.
        device: "cpu" or "cuda".
        theta_in_backward: the last backward of a step updates θ weight by weight.
        recompute: share of the blocks that are recomputed where `stream_blocks` runs the model; None: it runs whole.
        kept, recomputed: what the others, and what these keep, as there.
    """

    optimizer: MakeOptimizer
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    autocast: str | None = None
    accumulation: int = 1
    compiled: bool = True
    rule: str = "selective"
    device: str = "cpu"
    theta_in_backward: bool = False
    recompute: float | None = None
    kept: str = "all"
    recomputed: str = "inputs"

    @property
    def rehearsed_on(self) -> str:
        """The device that fakes say they are on: autograd does not take them for CUDA's where there is none."""
        return self.device if self.device == "cpu" or torch.cuda.is_available() else "cpu"


def autocast(options: StepOptions, device: str | None = None) -> contextlib.AbstractContextManager[Any]:
    """The context that the loop computes losses in; on `options.device` if nothing else is said."""
    if options.autocast is None:
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.autocast]
    return torch.autocast(device or options.device, dtype=dtype)


def loss_of(model: nn.Module, inputs: ExampleInputs, options: StepOptions) -> Tensor:
    """The loss of one call. A model that returns no loss is trained on the mean of its first result, whose backward
    needs no more memory than the result itself."""
    if options.loss is not None:
        return options.loss(model, inputs.kwargs or inputs.args)
    out = inputs.call(model)
    loss = loss_in(out)
    if loss is not None:
        return loss
    first = _first_float(out)
    return default_loss(lambda: out, ()) if first is None else first.float().mean()  # type: ignore[arg-type]


def _first_float(out: Any) -> Tensor | None:
    leaves = torch.utils._pytree.tree_leaves(out.__dict__ if hasattr(out, "to_tuple") else out)
    return next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), None)


def rehearse(
    model: nn.Module, inputs: ExampleInputs, options: StepOptions, traces: list[Trace] | None = None
) -> tuple[Peak, ...]:
    """The peaks of one step of the model's phase, the second one: the first also makes the optimizer's state.

    Args:
        model: transformed, on the meta device, in its phase (see `shape_copy.enter_phase`). Its tensors are replaced
            by fakes, so give a copy.
        inputs: of one micro-batch.
        traces: takes the step's, after those of other steps.

    Raises:
        Exception: whatever the model raises on shapes, such as an operation that needs values.
    """
    record = state_of(model)
    trains = record.state.plan.trains
    record.compile_options = {} if options.compiled and options.recompute is None else None
    fakes = Fakes(options.rehearsed_on)
    mode = fakes.mode = Rehearsal(options.rehearsed_on, references=options.device == "cpu")
    fakes.replace_in(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_collections())
        stack.enter_context(mode)
        stack.enter_context(quiet_fakes())
        if options.compiled:
            stack.enter_context(rehearsed_compilation())
            stack.enter_context(honour_dynamic_marks())
        call = ExampleInputs(fakes.inputs(inputs.args), fakes.inputs(inputs.kwargs))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = options.optimizer(trained) if trained else None
        if options.recompute is not None:
            streamed = optimizer if isinstance(optimizer, StreamedAdamW) else None
            stream_blocks(model, compile=options.compiled, recompute=options.recompute, kept=options.kept,
                          recomputed=options.recomputed, optimizer=streamed)  # fmt: skip
        parts = options.accumulation if trains else 1
        for recorded in (False, True):
            for part in range(parts):
                if recorded and part == parts - 1:
                    _know(mode, model, optimizer, call)
                    mode.begin()
                    if options.theta_in_backward:
                        _update_in_backward(mode, model, options)
                with autocast(options, options.rehearsed_on):
                    loss = loss_of(model, call, options)
                if recorded and mode.recording:
                    mode.mark("forward")
                    mode.name_living(SAVED)
                if loss.requires_grad:
                    with accumulating(optimizer, part < parts - 1):
                        (loss / parts if parts > 1 else loss).backward()
                del loss
                if recorded and mode.recording:
                    mode.name(grads(model.parameters()), GRADIENTS)
                    mode.name(_theta_gradients(model), THETA_GRADIENT)
                    mode.mark("backward")
            _update(mode, model, optimizer, options)
        mode.mark("update")
        mode.recording = False
    if traces is not None:
        traces.append(mode.trace())
    return mode.peaks()


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Python looks for no cycles inside: a compiler's many objects make it look often, which takes a seventh of its
    time, and what it happens to find would be freed at moments of a step that no other step has."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _know(mode: Rehearsal, model: nn.Module, optimizer: Optimizer | None, call: ExampleInputs) -> None:
    """Everything that is there before the last micro-batch; of it only gradients belong to the step."""
    leaves = torch.utils._pytree.tree_leaves((call.args, call.kwargs))
    mode.known([*model.parameters(), *model.buffers(), *(t for t in leaves if isinstance(t, Tensor))])
    if optimizer is not None:
        mode.known(tensors_of(optimizer.state))
    for managed in managed_weights(model).values():
        mode.known([managed.parameter.data, *(getattr(managed.entry, n) for n in (*ManagedWeight.TENSORS, "anchor"))])
    mode.known(grads(model.parameters()), GRADIENTS)
    mode.known(_theta_gradients(model), THETA_GRADIENT)


def _theta_gradients(model: nn.Module) -> list[Tensor | None]:
    return [m.entry.grad_of_theta() for m in managed_weights(model).values()]


def _update_in_backward(mode: Rehearsal, model: nn.Module, options: StepOptions) -> None:
    """From now on a weight's θ is updated, and its gradient goes, as soon as that is there."""
    weights = {m.entry.fqn: m for m in managed_weights(model).values()}

    def arrived(entry: ManagedWeight) -> None:
        mode.name([entry.grad_of_theta()], THETA_GRADIENT)
        mode.transient(theta_step_bytes([weights[entry.fqn]], options.rule, options.device))
        if entry.anchor is not None:
            entry.anchor.grad = None

    for managed in weights.values():
        managed.entry.follow_theta(arrived)


def _update(mode: Rehearsal, model: nn.Module, optimizer: Optimizer | None, options: StepOptions) -> None:
    """The update of the phase. θ's own reads values, so only what it takes is noted."""
    record = state_of(model)
    if record.state.plan.weights == "resu":
        if mode.recording:
            waiting = [m for m in managed_weights(model).values() if m.entry.consume is None]
            mode.transient(theta_step_bytes(waiting, options.rule, options.device))
        for managed in managed_weights(model).values():
            if managed.entry.anchor is not None:
                managed.entry.anchor.grad = None
    if optimizer is not None and record.state.plan.trains and any(g is not None for g in grads(model.parameters())):
        optimizer.step()
    model.zero_grad(set_to_none=True)
