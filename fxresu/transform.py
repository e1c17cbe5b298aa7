"""`transform`: choose the weights to manage and put their records in place; `untransform`: take them off again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from fxresu.kernels.choose import names as kernel_names
from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan, install_partitioner, install_pre_grad_pass

from . import weight_storage
from .compile_options import check_policies, compile_options, with_precision
from .current_plan import PhaseState
from .errors import ConfigError
from .granularity import Granularity, parse_granularity
from .managed import ManagedWeight
from .managed_module import managed_class
from .model_state import (
    ModelState,
    attach,
    detach,
    link_stream,
    managed_weights,
    state_of,
    stream_of,
    thaw_rest,
)
from .recurrent import RECURRENT
from .runner import install_runner
from .weight_choice import Site, choose_sites, matches

M = TypeVar("M", bound=nn.Module)
STORAGES = ("resident", "packed", "offload")
PACKED_VALUES = ("native", "bf16", "int8", "int4")


def transform(
    model: M,
    *,
    sparsity: float = 0.5,
    granularity: str | Granularity = "row",
    candidates: float = 1.0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    storage: str = "resident",
    packed_values: str = "native",
    plans: Mapping[Phase | str, PhasePlan] | None = None,
    compile: bool | Mapping[str, Any] = True,
    kernels: Mapping[str, str] | None = None,
    precision: Mapping[str, str] | None = None,
    memory_budget: int | str | None = None,
    example_inputs: Any = None,
    budget_options: Mapping[str, Any] | None = None,
) -> M:
    """Manage the model's large weights, in place. Names, `state_dict()` keys and the forward's signature stay.

    By default these are managed: the weights of `nn.Linear` and of transformers' `Conv1D`, the input projections of
    `nn.MultiheadAttention`, banks of experts (parameters of three dimensions of modules named so), and kernels of
    ungrouped convolutions with more than 4 input channels, as matrices [out, in * k1 * k2 ...]. Output heads (by
    `get_output_embeddings()`, by being tied to an embedding, by name), embeddings, norms and the first convolution of
    an image are left alone. Tied weights are managed once. Nothing is pruned yet: see `set_phase` and `ResuCycle`.

    Args:
        model: any module; it is returned.
        sparsity: share of pruned coordinates in [0, 1) that pruning aims at when nothing else is said.
        granularity: "row", "layer", "global", "n:m" (n kept of m), or "block:HxW".
        candidates: share α in (0, 1] of the input columns that θ covers; 1 makes every pruned coordinate a candidate.
        include: FQN patterns (`fnmatch`; of parameters or of their modules). If given, exactly the matching parameters
            of two or more dimensions are managed.
        exclude: FQN patterns of what to leave alone. A tied weight is managed by every module that reads it or by
            none: one name that is included includes it, one that is excluded or ruled out leaves it alone.
        storage: "resident" (the weight holds the effective weight at every moment), "packed" (in RESU only the
            active values, their mask and θ are kept; with candidates < 1 what is pruned elsewhere is zero and takes no
            memory) or "offload" (in RESU the float32 weight waits in host memory and
            a bfloat16 copy computes; for float32 models trained under bfloat16 autocast).
        packed_values: how packed storage keeps the active values, which are frozen in RESU: "native" (in the weight's
            dtype, exactly), "bf16", "int8" or "int4" (8.5 and 4.5 bits a value with their scales). These round: by at
            most 2^-9 of the value itself, 1/254 and 1/14 of the largest of its block of 64, respectively. The rounded
            values are what the model computes with in RESU and what a commit gives back.
        plans: replaces the default plan of a phase. A policy for activations (`PhasePlan.activations` "recompute" or
            "offload", `activation_budget`) needs Inductor; "offload" works without compilation too.
        compile: True compiles one function a phase; a mapping gives arguments for `torch.compile` ("mode",
            "fullgraph", "dynamic", "options", and "backend" for another compiler behind the passes; "keep_text" keeps
            the graphs' code before and after every pass); False runs eager.
        kernels: forces what the chooser would pick by measurement (with FXRESU_MEASURE=1): candidate by FQN pattern
            (of weights or of their
            modules), such as {"h.*.mlp": "mm"}. Compiling refuses one that cannot run, with the reason. Where nothing
            here matches a weight, the environment's FXRESU_KERNELS ("pattern=name,…" or "name") counts.
        precision: casts in all phases by FQN pattern of modules or weights, such as {"lm_head": "fp32"}; behind the
            overrides of each plan (`PhasePlan.precision_overrides`).
        memory_budget: bytes, or a size such as "14GB", that no phase and no transition may exceed on the device. The
            storage of the weights in RESU, that of θ's moments, the optimizer's state, activations and precision of
            each phase, and the micro-batches of a step are chosen from a prediction (see `plan_memory`);
            `fxresu.summary(model)` says what was chosen and what it costs.
        example_inputs: of one whole step, for the prediction.
        budget_options: how the model will be trained, as for `predict_memory`: optimizer, autocast, rule, device ...

    Returns:
        `model`.

    Raises:
        ConfigError: an argument is out of range, a pattern matches nothing, nothing is left to manage, the granularity
            does not fit a weight, or the model is transformed already. The model is unchanged then.
    """
    if not isinstance(granularity, (str, Granularity)):
        raise ConfigError(f"granularity={granularity!r}: use 'row', 'layer', 'global', '2:4' (n:m) or 'block:16x16'")
    grain = parse_granularity(granularity)
    planned = None
    if memory_budget is not None:
        from .memory_budget import plan_memory

        chosen: dict[str, Any] = {
            "sparsity": sparsity, "granularity": granularity, "candidates": candidates, "include": include,
            "exclude": exclude, "plans": plans, "compile": compile is not False, "precision": precision,
            "packed_values": packed_values,
        }  # fmt: skip
        backend = compile.get("backend") if isinstance(compile, Mapping) else None
        keep = None if storage == "resident" else storage
        planned = plan_memory(
            model, memory_budget, example_inputs, storage=keep, policies=backend in (None, "inductor"), **chosen,
            **dict(budget_options or {}),
        )  # fmt: skip
        storage, plans = planned.storage, planned.plans
    elif example_inputs is not None or budget_options is not None:
        raise ConfigError("example_inputs and budget_options are for memory_budget; give that too")
    _check_arguments(model, sparsity, grain, candidates, storage)
    _check_packed_values(packed_values, storage)
    options = compile_options(compile)
    merged = with_precision(model, _merge_plans(plans), precision, options)
    check_policies(merged, options)
    sites, skipped = choose_sites(model, include, exclude)
    forced = _forced_kernels(kernels, sites)
    for site in sites:
        grain.check(site.fqn, site.weight.numel() // site.columns, site.columns, None)
    record = ModelState(
        state=PhaseState(),
        plans=merged,
        sparsity=sparsity,
        granularity=grain,
        candidates=candidates,
        storage=storage,
        compile_options=options,
        skipped=skipped,
        packed_values=packed_values,
        kernels=forced,
        memory_plan=planned,
    )
    record.state.set(merged[Phase.DENSE])
    _install(model, sites, record)
    link_stream(model, stream_of(model))
    install_pre_grad_pass()
    if any(plan.manages_activations for plan in merged.values()):
        install_partitioner()
    return model


def untransform(model: M) -> M:
    """Give the plain model back, in place: effective weights in its parameters, no class, hook or attribute left.

    Raises:
        NotTransformedError: if the model is not transformed.
    """
    record = state_of(model)
    if record.watch is not None:
        record.watch.remove()
    thaw_rest(model)
    for managed in managed_weights(model).values():
        managed.entry.remove_hook()
        if managed.entry.packed:
            weight_storage.unpack_into(managed.entry, managed.parameter)
    for module in model.modules():
        module.__dict__.pop("_fxresu", None)
        cls = type(module)
        if "fxresu_base" in vars(cls):
            module.__class__ = vars(cls)["fxresu_base"]
        elif hasattr(cls, "fxresu_base"):  # parametrized since: its class, made for it alone, is a subclass of ours
            cls.__bases__ = tuple(getattr(base, "fxresu_base", base) for base in cls.__bases__)
    detach(model)
    model.__dict__.pop("_compiled_call_impl", None)
    return model


def _check_arguments(model: nn.Module, sparsity: float, grain: Granularity, candidates: float, storage: str) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: expected a torch.nn.Module")
    if any("_fxresu" in m.__dict__ for m in model.modules()):
        raise ConfigError("model is transformed already (or holds a transformed part); fxresu.untransform it first")
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity={sparsity!r}: use a number in [0, 1), the share of pruned coordinates")
    if not grain.allows(sparsity):
        raise ConfigError(
            f"sparsity={sparsity!r} contradicts granularity={str(grain)!r}, which means {grain.pattern_sparsity}"
        )
    if isinstance(candidates, bool) or not isinstance(candidates, (int, float)) or not 0 < candidates <= 1:
        raise ConfigError(f"candidates={candidates!r}: use a number in (0, 1], the share of input columns θ covers")
    if storage not in STORAGES:
        raise ConfigError(f"storage={storage!r}: use one of {', '.join(STORAGES)}")


def _check_packed_values(packed_values: str, storage: str) -> None:
    if packed_values not in PACKED_VALUES:
        raise ConfigError(f"packed_values={packed_values!r}: use one of {', '.join(PACKED_VALUES)}")
    if packed_values != "native" and storage != "packed":
        raise ConfigError(f"packed_values={packed_values!r} needs storage='packed', not {storage!r}")


def _forced_kernels(kernels: Mapping[str, str] | None, sites: list[Site]) -> dict[str, str]:
    if kernels is None:
        return {}
    if not isinstance(kernels, Mapping):
        raise ConfigError(f"kernels={kernels!r}: use a mapping of FQN patterns to names, such as {{'h.*.mlp': 'mm'}}")
    for pattern, name in kernels.items():
        if name not in kernel_names():
            raise ConfigError(f"kernels[{pattern!r}]={name!r} is unknown; use one of {', '.join(kernel_names())}")
        if not any(matches(s, pattern) for s in sites):
            raise ConfigError(f"kernels[{pattern!r}]: the pattern matches no managed weight, such as {sites[0].fqn!r}")
    return dict(kernels)


def _merge_plans(plans: Mapping[Phase | str, PhasePlan] | None) -> dict[Phase, PhasePlan]:
    merged = dict(DEFAULT_PLANS)
    for key, plan in (plans or {}).items():
        try:
            phase = Phase.parse(key)
        except ValueError as error:
            raise ConfigError(f"plans: {error}") from None
        if not isinstance(plan, PhasePlan) or plan.phase is not phase:
            raise ConfigError(f"plans[{str(phase)!r}]={plan!r}: expected a PhasePlan for that phase")
        merged[phase] = plan
    return merged


def _install(model: nn.Module, sites: list[Site], record: ModelState) -> None:
    entries: dict[int, ManagedWeight] = {}
    by_module: dict[int, list[Site]] = {}
    for site in sites:
        weight = site.weight
        if id(weight) not in entries:
            entry = ManagedWeight(site.fqn, weight, record.state, site.columns, input_rows=site.is_conv1d)
            entry.packed_values = record.packed_values
            entries[id(weight)] = entry
        by_module.setdefault(id(site.module), []).append(site)
    for group in by_module.values():
        module = group[0].module
        module.__dict__["_fxresu"] = {s.name: entries[id(s.weight)] for s in group}
    for module in model.modules():
        names = tuple(module.__dict__.get("_fxresu", ()))
        if names or module is model or isinstance(module, RECURRENT):
            module.__dict__.setdefault("_fxresu", {})
            cls = managed_class(type(module), names, module is model)  # type: ignore[arg-type]  # mypy: not hashable
            module.__class__ = cls
    attach(model, record)
    install_runner(model)
