"""What phases and transitions really take, run one after another on the device that is there.

On a GPU the figures are its allocator's. On a CPU they are the live bytes of tensors, as the allocator reports them to
the profiler: what a resident set would show is mixed with the heap's habits and the compiler's tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from .config import CycleConfig
from .errors import ConfigError
from .ledger import memory_bill
from .memory_stages import Stages
from .model_state import freeze_rest, state_of, thaw_rest
from .models import ExampleInputs
from .phases import set_phase
from .rehearsed_step import StepOptions, autocast, loss_of
from .sparsify import drop_masks
from .streamed import StreamedAdamW, accumulating
from .streamed_blocks import stream_blocks
from .theta import ThetaOptimizer

_MARK = "fxresu memory stage "
WARM = 1  # steps of a phase before the one that is looked at: they compile, and make the optimizer's state


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes at the highest point of each stage, by name.

    Attributes:
        peaks: of tensors; on a GPU as its allocator counts them.
        device: of the whole device while the stage ran, on a GPU: what the process holds there, context included.
        cached: of these, what the allocator held beside the tensors of its highest point. With PyTorch's defaults that
            may be a gigabyte: a segment that was taken for logits is not given back as long as anything is left in it.
            With `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` it is little.
    """

    peaks: dict[str, int]
    device: dict[str, int] = dataclasses.field(default_factory=dict)
    cached: dict[str, int] = dataclasses.field(default_factory=dict)


class _Tape:
    """Live bytes of CPU tensors from its start on, by stage."""

    def __init__(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> _Tape:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)

    def stage(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return torch.profiler.record_function(f"{_MARK}{name}")

    def peaks(self) -> dict[str, int]:
        """Highest level within each stage, above that at the start of the tape."""
        profiler: Any = self._profile.profiler
        events = profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        found: dict[str, int] = {}
        for event in events:
            if not event.name().startswith(_MARK):
                continue
            begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
            level = highest = sum(size for when, size in changes if when < begin)
            for _, size in (c for c in changes if begin <= c[0] <= end):
                level += size
                highest = max(highest, level)
            found[event.name().removeprefix(_MARK)] = highest
        return found


@dataclasses.dataclass
class _Session:
    """A model, its optimizer and its batch, and how to make a step."""

    model: nn.Module
    optimizer: Optimizer
    inputs: ExampleInputs
    options: StepOptions
    stages: Stages
    theta: ThetaOptimizer | None = None

    def step(self) -> None:
        model, parts, options = self.model, self.options.accumulation, self.options
        record = state_of(model)
        resu = record.state.plan.weights == "resu"
        for left in reversed(range(parts if record.state.plan.trains else 1)):
            with autocast(options):
                loss = loss_of(model, self.inputs, options)
            if loss.requires_grad:
                theta = self._theta().accumulate(left > 0) if resu else contextlib.nullcontext()
                with theta, accumulating(self.optimizer, left > 0):
                    (loss / parts if parts > 1 else loss).backward()
            del loss
        if resu:
            self._theta().step()
        streamed = isinstance(self.optimizer, StreamedAdamW)  # which has used its gradients already
        if record.state.plan.trains and (streamed or any(p.grad is not None for p in model.parameters())):
            self.optimizer.step()
        model.zero_grad(set_to_none=True)

    def _theta(self) -> ThetaOptimizer:
        if self.theta is None:
            own = self.options.theta_in_backward
            config = CycleConfig(rule=self.options.rule, theta_lr=1e-4, theta_in_backward=own)
            self.theta = ThetaOptimizer(self.model, config)
        return self.theta

    def enter(self, phase: str, **more: Any) -> None:
        stages = self.stages
        set_phase(
            self.model, phase, optimizer=self.optimizer, sparsity=more.pop("sparsity", None), rule=self.options.rule,
            moments=stages.moments, grad_dtype=stages.grad_dtype, theta_dtype=stages.theta_dtype, **more,
        )  # fmt: skip
        if phase == "resu" and not stages.train_rest:
            freeze_rest(self.model)

    def prune(self) -> None:
        self.enter("sparse", sparsity=self.stages.sparsity)

    def start_resu(self) -> None:
        self.enter("resu")

    def commit(self) -> None:
        thaw_rest(self.model)
        self.enter("sparse")

    def drop_masks(self) -> None:
        thaw_rest(self.model)
        drop_masks(self.model, self.optimizer, rule=self.options.rule)

    def static(self) -> int:
        """Bytes of tensors that are there between steps."""
        leaves = {id(t): t for t in pytree.tree_leaves((self.inputs.args, self.inputs.kwargs))}.values()
        batch = sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
        return sum(memory_bill(self.model, self.optimizer, self.options.device).values()) + batch


def _course(session: _Session) -> Iterator[tuple[str, bool, Callable[[], None]]]:
    """(stage, whether it is a phase, what it does), in the order in which a run meets them."""
    yield "dense", True, session.step
    yield "prune", False, session.prune
    yield "sparse", True, session.step
    yield "start RESU", False, session.start_resu
    yield "resu", True, session.step
    yield "commit", False, session.commit
    session.start_resu()
    session.step()  # in a run no other phase follows RESU before it, and it makes the copies that compiled steps read
    for phase in ("predict", "correct"):
        session.enter(phase)
        yield phase, True, session.step
    session.enter("resu")
    yield "drop masks", False, session.drop_masks


def measure(build: Callable[[], nn.Module], inputs: ExampleInputs, options: StepOptions, stages: Stages) -> Measured:
    """Run all stages on `options.device`.

    Args:
        build: makes the transformed model on the device. It is called twice for a compiled model on a CPU: phases are
            measured compiled, transitions, which are never compiled, on an eager one.

    Raises:
        ConfigError: the device is not there.
    """
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("measure=True: there is no CUDA device here; leave it out, or measure on the CPU")
        return _on_gpu(_session(build, inputs, options, stages))
    peaks = _whole_tape(build, inputs, options, stages)
    if options.compiled:
        peaks |= _steps_alone(_session(build, inputs, options, stages))
    return Measured({n: peaks[n] for n in stages.wanted if n in peaks})


def _session(build: Callable[[], nn.Module], inputs: ExampleInputs, options: StepOptions, stages: Stages) -> _Session:
    model = build()
    state_of(model).compile_options = {} if options.compiled and options.recompute is None else None
    optimizer = options.optimizer(model.parameters())
    if options.recompute is not None:
        streamed = optimizer if isinstance(optimizer, StreamedAdamW) else None
        stream_blocks(model, compile=options.compiled, recompute=options.recompute, kept=options.kept,
                      recomputed=options.recomputed, optimizer=streamed)  # fmt: skip
    return _Session(model, optimizer, inputs, options, stages)


def _whole_tape(
    build: Callable[[], nn.Module], inputs: ExampleInputs, options: StepOptions, stages: Stages
) -> dict[str, int]:
    gc.collect()  # what goes while the tape runs must have come with it
    with _Tape() as tape:
        eager = dataclasses.replace(options, compiled=False)
        session = _session(build, inputs, eager, stages)
        for name, phase, act in _course(session):
            for _ in range(WARM if phase else 0):
                act()
            gc.collect()
            with tape.stage(name):
                act()
    leaves = [t for t in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(t, torch.Tensor)]
    batch = sum(t.numel() * t.element_size() for t in {id(t): t for t in leaves}.values())
    return {name: peak + batch for name, peak in tape.peaks().items()}


def _steps_alone(session: _Session) -> dict[str, int]:
    """Peaks of the phases: what a step takes, on top of what is there before it."""
    found: dict[str, int] = {}
    for name, phase, act in _course(session):
        for _ in range(WARM if phase else 0):
            act()
        if not phase:
            act()
            continue
        gc.collect()
        static = session.static()
        with _Tape() as tape, tape.stage(name):
            act()
        found |= {n: static + peak for n, peak in tape.peaks().items()}
    return found


def _on_gpu(session: _Session) -> Measured:
    peaks: dict[str, int] = {}
    device: dict[str, int] = {}
    cached: dict[str, int] = {}
    for name, phase, act in _course(session):
        for _ in range(WARM if phase else 0):
            act()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        act()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        # The allocator keeps what it took, so that what is not free now includes the highest point of the stage.
        device[name] = total - free
        cached[name] = torch.cuda.max_memory_reserved() - peaks[name]
    return Measured(*({n: found[n] for n in session.stages.wanted if n in found} for found in (peaks, device, cached)))
