"""`predict_memory`: the bill of a model, before anything of it is allocated."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxresu.kernels.theta_rules import RULES
from fxresu.passes import Phase, PhasePlan

from .block_depth import Rehearsed, rehearse_short, rehearse_whole
from .errors import ConfigError
from .example_inputs import as_inputs
from .memory_bill import CACHE, WORKSPACE, MemoryBill, StageBill
from .memory_cache import PHASES, cached_bytes, traced_phases
from .memory_measure import measure as measured_stages
from .memory_overhead import device_overhead, host_overhead
from .memory_stages import Stages, is_transition, stage_names
from .memory_static import Standing, in_phase, optimizer_tensors, plan_of, standing, transition
from .model_state import is_transformed, state_of
from .models import ExampleInputs
from .optimizer_names import make_optimizer
from .rehearsal import Peak, Trace
from .rehearsed_step import StepOptions, rehearse
from .resurrection import DTYPES, MOMENTS, check_theta_dtype
from .shape_copy import empty_copy, meta_copy
from .sizes import parse_size
from .state_manager import check_strategy
from .streamed_blocks import KEPT, RECOMPUTED, find_blocks
from .streamed_shapes import Streamed, moments_on_their_way
from .transform import transform

# The phases on both sides of each transition.
AROUND = {
    "prune": ("dense", "sparse"),
    "start RESU": ("sparse", "resu"),
    "commit": ("resu", "sparse"),
    "drop masks": ("resu", "dense"),
}
# Options that decide the course of a step.
_COURSE = (
    "loss", "autocast", "accumulation", "compiled", "rule", "device", "theta_in_backward", "recompute", "kept",
    "recomputed",
)  # fmt: skip
_GRAD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def predict_memory(
    model: nn.Module,
    inputs: Any = None,
    *,
    phases: Iterable[str] | str | None = None,
    optimizer: Any = "adamw",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    autocast: str | None = None,
    accumulation: int = 1,
    compile: bool | None = None,
    rule: str = "selective",
    moments: str = "fp32",
    theta_dtype: str = "fp32",
    theta_in_backward: bool = False,
    recompute: float | None = None,
    kept: str = "all",
    recomputed: str = "inputs",
    grad_dtype: str | None = None,
    optimizer_state: str | None = None,
    train_rest: bool = False,
    sparsity: float | None = None,
    device: torch.device | str | None = None,
    budget: int | str | None = None,
    measure: bool = False,
    workers: int = 0,
    dataset: int | str = 0,
    overhead: Mapping[str, int | str] | None = None,
    _known: dict[Any, Any] | None = None,
    _cache: bool = True,
    **options: Any,
) -> MemoryBill:
    """Bytes by component at the highest point of every phase and transition.

    The real step (forward, backward, update) runs on tensors without memory, eager or through `torch.compile` as far as
    the code that allocates its buffers, and every storage that comes and goes is noted. Models that are rows of equal
    blocks are run with a few of them. The model itself stays as it is.

    Args:
        model: plain (then `options` go to `transform`) or transformed; on the meta device, or any other.
        inputs: of one micro-batch: a tensor, a tuple of arguments, a dict of keyword arguments, or `ExampleInputs`;
            None derives them for models of transformers and timm.
        phases: stages out of `memory_bill.STAGES`; None is all.
        optimizer: "adamw", "sgd?momentum=0.9" or any other of torch.optim, "module:factory", or a callable that makes
            one from parameters.
        loss: `(model, batch) -> scalar`. By default the loss that the model returns; the mean of its first result where
            it returns none.
        autocast: "bf16" or "fp16".
        accumulation: micro-batches of a step.
        compile: whole steps compiled, or eager; default is as the transform says.
        rule, moments: θ's update rule and the storage of its moments ("fp32", "bf16", "8bit").
        theta_dtype: storage of θ where it is apart from the weights ("fp32", "bf16").
        theta_in_backward: dθ of a weight is used as soon as it is there (`CycleConfig.theta_in_backward`).
        recompute: share of the model's blocks that are recomputed where `stream_blocks` runs them one by one; None: it
            runs whole.
        kept: of the other blocks, "all" or what is "costly" to compute again, as there.
        recomputed: of recomputed blocks, their "inputs" or what is "narrow" too, as there.
        grad_dtype: of dθ, "fp32" or "bf16"; default is bf16 under bf16 autocast without accumulation, as the cycle's.
        optimizer_state: what becomes in RESU of the managed weights' ("keep", "drop", "offload", "pinned",
            "compress"); default is the plan's.
        train_rest: biases, norms and embeddings train in RESU too.
        sparsity: of the masks; default as the transform's (0.5).
        device: to train on, "cpu" or "cuda"; default is the model's, and CUDA for one on the meta device if there is
            one. Without a CUDA device steps for CUDA are rehearsed as for a CPU, which differs in what is fused.
        budget: bytes or a size such as "14GB" that the bill is held against.
        measure: also run every stage on the device, with random weights if the model has none.
        workers: processes of the data loader; dataset: bytes (or a size) of it that are in memory.
        overhead: sizes on a GPU that replace the estimates of `memory_overhead`, by name, such as
            {"CUDA context and libraries": "600MB"}.

    Raises:
        ConfigError: a bad argument, or no inputs.
        InspectionError: the model does not run on shapes.
    """
    start = time.perf_counter()
    stages = stage_names(phases)
    limit = None if budget is None else parse_size(budget, "budget")
    base = _transformed_copy(model, sparsity, options)
    if optimizer_state is not None:
        _override(base, optimizer_state)
    record = state_of(base)
    kind = target_device(model, device)
    step = StepOptions(
        make_optimizer(optimizer, kind),
        loss,
        _choice("autocast", autocast, (None, "bf16", "fp16")),
        _positive("accumulation", accumulation),
        record.compile_options is not None if compile is None else bool(compile),
        _choice("rule", rule, tuple(RULES)),
        kind,
        _choice("theta_in_backward", theta_in_backward, (False, True)),
        None if recompute is None else _share_of_blocks(base, recompute),
        _choice("kept", kept, KEPT),
        _choice("recomputed", recomputed, RECOMPUTED),
    )
    if recompute is None and (kept, recomputed) != ("all", "inputs"):
        name, value = ("recomputed", recomputed) if kept == "all" else ("kept", kept)
        raise ConfigError(f"{name}={value!r} needs recompute=, the share of blocks that are recomputed")
    setting = Stages(
        stages,
        record.sparsity if sparsity is None else sparsity,
        _choice("moments", moments, tuple(MOMENTS)),
        _choice("theta_dtype", theta_dtype, tuple(DTYPES)),
        _grad_dtype(grad_dtype, autocast, accumulation),
        train_rest,
    )
    check_theta_dtype(base, theta_dtype)
    call = as_inputs(model, inputs)
    overheads = device_overhead(kind, measured=measure, given=overhead)
    if isinstance(step.optimizer, Streamed) and kind == "cpu":
        raise ConfigError(
            f"optimizer={optimizer!r} with device='cpu': only a GPU is predicted; on a CPU the references of the update"
            " take more than what they save. Give device='cuda'"
        )
    streamed = step.recompute is not None or isinstance(step.optimizer, Streamed)
    workspace = overheads[WORKSPACE] if _cache and kind == "cuda" and not streamed else None
    found = predict_stages(base, call, step, setting, _known, workspace)
    settings = _settings(base, call, step, setting, optimizer)
    if workspace is not None and not any(stage.cached for stage in found):
        settings[CACHE] = "not predicted: the steps do not follow from those of shorter models"
    bill = MemoryBill(
        model=type(model).__name__,
        device=kind,
        settings=settings,
        stages=found,
        overhead=overheads,
        host=host_overhead(compiled=step.compiled, workers=workers, dataset=parse_dataset(dataset)),
        budget=limit,
        seconds=round(time.perf_counter() - start, 2),
    )
    return _with_measured(bill, model, call, step, setting, record.plans, options) if measure else bill


def predict_stages(
    base: nn.Module,
    call: ExampleInputs,
    step: StepOptions,
    setting: Stages,
    known: dict[Any, Any] | None = None,
    workspace: int | None = None,
) -> tuple[StageBill, ...]:
    """Bills of the wanted stages of a transformed meta model.

    Args:
        known: what was found for the same model and optimizer already: peaks of steps by what they depend on, and the
            optimizer's state; new finds are added.
        workspace: bytes of cuBLAS's, on a GPU; None leaves out what its allocator holds beside tensors. Where a step's
            trace does not follow from short models, that is left out too.
    """
    known = {} if known is None else known
    if "state" not in known:  # of the plain weights, whatever the phases do with them
        known["state"] = optimizer_tensors(base, step.optimizer, step.device)
        known["slots"] = moments_on_their_way(base, step.optimizer, step.compiled, step.recompute is not None)
    state = known["state"]
    batch = sum(t.numel() * t.element_size() for t in _tensors(call))
    needed = {p for s in setting.wanted for p in (AROUND[s] if is_transition(s) else (s,))}
    traced = workspace is not None
    needed |= set(PHASES) if traced else set()
    standings: dict[str, Standing] = {}
    models: dict[str, nn.Module] = {}
    for phase in needed:
        models[phase] = in_phase(base, phase, step, setting)
        standings[phase] = _with_slots(standing(models[phase], phase, step, state, batch), known["slots"], step.device)
    bills = []
    for name in setting.wanted:
        if is_transition(name):
            before, after = (standings[p] for p in AROUND[name])
            parts = transition(name, before, after, step.device)
            host = {n: max(before.host.get(n, 0), after.host.get(n, 0)) for n in {**before.host, **after.host}}
            bills.append(StageBill(name, True, parts, "transition", host))
        else:
            peaks, _ = _steps(models[name], call, step, setting, known, traced)
            peak = max(peaks, key=lambda p: p.total)
            parts = dict(standings[name].parts)
            for part, size in peak.parts.items():
                parts[part] = parts.get(part, 0) + size
            if standings[name].ahead:
                parts["optimizer state, coming back"] = standings[name].host["optimizer state"]
            bills.append(StageBill(name, False, parts, peak.region, standings[name].host))
    if workspace is None:
        return tuple(bills)
    traces: dict[str, Trace] = {}
    for phase in traced_phases(setting.wanted):
        _, trace = _steps(models[phase], call, step, setting, known, traced)
        if trace is None:
            return tuple(bills)
        traces[phase] = trace
    cached = cached_bytes(standings, traces, workspace)
    return tuple(dataclasses.replace(bill, cached=cached[bill.name]) for bill in bills)


def _with_slots(found: Standing, sizes: tuple[int, int], device: str) -> Standing:
    """With the slots and the host's part of streamed moments; on a CPU both are the device's."""
    slots, moments = sizes
    parts = dict(found.parts)
    host = {**found.host, **({"moments": moments} if moments and device != "cpu" else {})}
    for name, size in (("moments on their way", slots), ("moments", moments if device == "cpu" else 0)):
        if size:
            parts[name] = size
    return dataclasses.replace(found, parts=parts, host=host)


def _share_of_blocks(model: nn.Module, share: float) -> float:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigError(f"recompute={share!r}: use the share of blocks that are recomputed, in [0, 1]")
    try:
        find_blocks(model)
    except ConfigError:
        raise ConfigError(
            f"recompute={share!r}: {type(model).__name__} has no list of equal blocks that could run one by one"
        ) from None
    return float(share)


def _steps(
    model: nn.Module, call: ExampleInputs, step: StepOptions, setting: Stages, known: dict[Any, Any], traced: bool
) -> tuple[tuple[Peak, ...], Trace | None]:
    """The peaks of a step, and, if it is `traced`, its trace, as far as that is known."""
    record = state_of(model)
    plan = record.state.plan
    # The optimizer's state and θ's moments are not part of a step, so that only these decide its course.
    stored = (record.storage, record.packed_values, record.candidates) if record.base == "resu" else ()
    key = (
        dataclasses.replace(plan, optimizer_state="keep"), record.base, stored, setting.theta_dtype,
        setting.grad_dtype, setting.train_rest,
        *_course(step), _shapes(call),
    )  # fmt: skip
    # A budget is for the graph as a whole: what it makes of a short model says nothing about a deep one. For the trace,
    # eager steps are fast to rehearse whole; compiled ones that only go forward nearly are, and there which buffer of a
    # block the next one takes changes from block to block.
    whole = plan.activation_budget is not None or step.recompute is not None
    whole = whole or traced and not (step.compiled and plan.trains)
    key = (traced, whole, *key)
    if key not in known:

        def run(copied: nn.Module) -> Rehearsed:
            return _rehearsed(copied, call, step)

        known[key] = rehearse_whole(model, run) if whole else rehearse_short(
            model, run, traced, known.setdefault(("alike", *_course(step), _shapes(call)), [])
        )
    return known[key]


def _course(step: StepOptions) -> tuple[Any, ...]:
    return tuple(getattr(step, f) for f in _COURSE)


def _rehearsed(model: nn.Module, call: ExampleInputs, step: StepOptions) -> Rehearsed:
    from .capture import InspectionError

    traces: list[Trace] = []
    try:
        return rehearse(model, call, step, traces), traces[-1]
    except (IndexError, AttributeError, KeyError, ConfigError):
        raise
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise InspectionError(
            f"a step of {type(model).__name__} cannot be rehearsed on shapes: {type(error).__name__}: {told}"
        ) from error


def _tensors(call: ExampleInputs) -> list[Tensor]:
    leaves = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    return list({id(t): t for t in leaves}.values())


def _shapes(call: ExampleInputs) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype) for t in _tensors(call))


def _transformed_copy(model: nn.Module, sparsity: float | None, options: Mapping[str, Any]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: expected a torch.nn.Module")
    if is_transformed(model):
        if options:
            name, value = next(iter(options.items()))
            raise ConfigError(f"{name}={value!r}: the model is transformed already and keeps its settings")
        return meta_copy(model)
    return transform(meta_copy(model), sparsity=0.5 if sparsity is None else sparsity, **options)


def _override(model: nn.Module, optimizer_state: str) -> None:
    """What becomes of the state in RESU, instead of what the model's plan says."""
    check_strategy(optimizer_state)
    record = state_of(model)
    resu = dataclasses.replace(record.plans[Phase.RESU], optimizer_state=optimizer_state)  # type: ignore[arg-type]
    record.plans = {**record.plans, Phase.RESU: resu}


def target_device(model: nn.Module, device: torch.device | str | None) -> str:
    """ "cpu" or "cuda": where a prediction for this model and this argument is about.

    Raises:
        ConfigError: another device.
    """
    if device is None:
        own = next((p.device.type for p in model.parameters()), "cpu")
        return own if own != "meta" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r}: use cpu or cuda")
    return kind


def _choice(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ConfigError(f"{name}={value!r}: use one of {', '.join(str(k) for k in known)}")
    return value


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: use an integer >= 1")
    return value


def _grad_dtype(name: str | None, autocast: str | None, accumulation: int) -> torch.dtype:
    if name is None:
        name = "bf16" if autocast == "bf16" and accumulation == 1 else "fp32"
    return _GRAD_DTYPES[_choice("grad_dtype", name, tuple(_GRAD_DTYPES))]


def parse_dataset(size: int | str) -> int:
    """Bytes; 0 is allowed."""
    return 0 if size in (0, "0") else parse_size(size, "dataset")


def _settings(
    model: nn.Module, call: ExampleInputs, step: StepOptions, setting: Stages, optimizer: Any
) -> dict[str, Any]:
    record = state_of(model)
    shapes = ", ".join("x".join(map(str, t.shape)) for t in _tensors(call)[:2])
    resu: PhasePlan = plan_of(model, Phase.RESU)
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "inputs": shapes,
        "optimizer": optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "own"),
        "autocast": step.autocast,
        "accumulation": step.accumulation if step.accumulation > 1 else None,
        "mode": "compiled" if step.compiled else "eager",
        "steps rehearsed": "as on a CPU" if step.rehearsed_on != step.device else None,
        "sparsity": setting.sparsity,
        "candidates": record.candidates if record.candidates < 1 else None,
        "storage": record.storage,
        "packed values": record.packed_values if record.storage == "packed" else None,
        "θ": setting.theta_dtype if setting.theta_dtype != "fp32" else None,
        "θ moments": setting.moments,
        "θ updated": "in the backward" if step.theta_in_backward else None,
        "blocks": None if step.recompute is None else f"one by one, {step.recompute:g} of them recomputed",
        "recomputed ones keep": None if step.recomputed == "inputs" else "what is narrow too",
        "the other blocks keep": None if step.kept == "all" else "what is costly to compute again",
        "state in RESU": resu.optimizer_state,
    }


def _with_measured(
    bill: MemoryBill,
    model: nn.Module,
    call: ExampleInputs,
    step: StepOptions,
    setting: Stages,
    plans: Mapping[Phase, PhasePlan],
    options: Mapping[str, Any],
) -> MemoryBill:
    there = step.device == "cuda" and torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if there else 0  # the caller's tensors are no part of a stage
    base = _transformed_copy(model, setting.sparsity, options)
    state_of(base).plans = dict(plans)
    real = ExampleInputs(*(_real(part, step.device) for part in (call.args, call.kwargs)))

    def build() -> nn.Module:
        copied = empty_copy(base, step.device)
        for parameter in copied.parameters():
            nn.init.normal_(parameter, std=0.02)
        for buffer in copied.buffers():
            buffer.zero_()
        return copied

    found = measured_stages(build, real, step, setting)
    done = []
    for stage in bill.stages:
        both = (found.peaks.get(stage.name), found.device.get(stage.name))
        peak, device = (None if size is None else size - held for size in both)
        cached = found.cached.get(stage.name)
        done.append(dataclasses.replace(stage, measured=peak, measured_device=device, measured_cached=cached))
    return dataclasses.replace(bill, stages=tuple(done))


def _real(nested: Any, device: str) -> Any:
    """The same inputs on the device, with zeros for tensors that have no values."""
    return pytree.tree_map_only(
        Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device) if t.is_meta else t.to(device), nested
    )
