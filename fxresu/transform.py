"""`transform`: choose the weights to manage and put their records in place; `untransform`: take them off again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from fxresu.kernels.choose import names as kernel_names
from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan, install_partitioner, install_pre_grad_pass

from .compile_options import check_policies, compile_options, with_precision
from .errors import ConfigError
from .granularity import Granularity, parse_granularity
from .managed import ManagedWeight, PhaseState
from .managed_module import managed_class
from .model_state import ModelState, attach, detach, managed_weights, state_of, thaw_rest
from .recurrent import RECURRENT
from .runner import install_runner

M = TypeVar("M", bound=nn.Module)
STORAGES = ("resident", "packed", "offload")
PACKED_VALUES = ("native", "bf16", "int8", "int4")

# Names that output heads go by in the libraries people use.
_HEAD = re.compile(
    r"(^|\.)(lm_head|head|classifier|score|logits|output_projection|embed_out|cls|fc_out|proj_out)(\.|$)"
)
# Modules that hold the weights of several experts in one parameter [experts, rows, K].
_EXPERTS = re.compile(r"experts?|moe|mixture", re.IGNORECASE)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_IMAGE_CHANNELS = 4  # the layer that reads these is small, and the literature on sparse networks keeps it dense


@dataclasses.dataclass(frozen=True)
class _Site:
    """A parameter as seen from one module that reads it."""

    module: nn.Module
    name: str
    fqn: str


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
            storage of the weights in RESU, that of θ's moments, and the micro-batches of a step are chosen from a
            prediction (see `plan_memory`); `fxresu.summary(model)` says what was chosen and what it costs.
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

        chosen = {
            "sparsity": sparsity, "granularity": granularity, "candidates": candidates, "include": include,
            "exclude": exclude, "plans": plans, "compile": compile is not False,
        }  # fmt: skip
        keep = None if storage == "resident" else storage
        planned = plan_memory(
            model, memory_budget, example_inputs, storage=keep, **chosen, **dict(budget_options or {})
        )
        storage = planned.storage
    elif example_inputs is not None or budget_options is not None:
        raise ConfigError("example_inputs and budget_options are for memory_budget; give that too")
    _check_arguments(model, sparsity, grain, candidates, storage)
    _check_packed_values(packed_values, storage)
    options = compile_options(compile)
    merged = with_precision(model, _merge_plans(plans), precision, options)
    check_policies(merged, options)
    sites, skipped = _choose(model, _patterns(include), _patterns(exclude) or [])
    forced = _forced_kernels(kernels, sites)
    for site in sites:
        k = _columns(site)
        grain.check(site.fqn, site.module._parameters[site.name].numel() // k, k, None)
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
            managed.entry.unpack_into(managed.parameter)
    for module in model.modules():
        module.__dict__.pop("_fxresu", None)
        cls = type(module)
        if "fxresu_base" in vars(cls):
            module.__class__ = cls.fxresu_base
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


def _forced_kernels(kernels: Mapping[str, str] | None, sites: list[_Site]) -> dict[str, str]:
    if kernels is None:
        return {}
    if not isinstance(kernels, Mapping):
        raise ConfigError(f"kernels={kernels!r}: use a mapping of FQN patterns to names, such as {{'h.*.mlp': 'mm'}}")
    for pattern, name in kernels.items():
        if name not in kernel_names():
            raise ConfigError(f"kernels[{pattern!r}]={name!r} is unknown; use one of {', '.join(kernel_names())}")
        if not any(_matches(s, pattern) for s in sites):
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


def _patterns(value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"pattern={pattern!r}: FQN patterns are strings such as 'h.*.mlp.*'")
    return patterns


def _matches(site: _Site, pattern: str) -> bool:
    owner = site.fqn.rpartition(".")[0]
    return fnmatchcase(site.fqn, pattern) or fnmatchcase(owner, pattern)


def _sites(model: nn.Module) -> list[_Site]:
    """Every parameter of two or more dimensions, once for every module that reads it."""
    for fqn, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(f"model: {fqn} is uninitialized; run the model once on an example before the transform")
    return [
        _Site(module, name, f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules(remove_duplicate=True)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2
    ]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _reason_against(site: _Site, heads: set[int], embeddings: set[int]) -> str:
    """Why the default rules leave a parameter alone; "" if they manage it."""
    weight = site.module._parameters[site.name]
    if id(weight) in embeddings:
        return "embedding, or tied to one"
    if isinstance(site.module, nn.MultiheadAttention) and site.name.endswith("proj_weight"):
        return ""
    if _is_bank(site):
        return ""
    convolution = isinstance(site.module, _CONVOLUTIONS)
    if convolution and (why := _reason_against_convolution(site.module)):
        return why
    if not (convolution or isinstance(site.module, nn.Linear) or _is_conv1d(site.module)):
        return f"a parameter of {type(site.module).__name__}, not of a linear"
    if site.name != "weight":
        return f"parameter {site.name!r}, not the weight"
    if id(weight) in heads or _HEAD.search(site.fqn):
        return "output head"
    return ""


def _is_bank(site: _Site) -> bool:
    """Whether a parameter holds one matrix for each of several experts."""
    weight = site.module._parameters[site.name]
    named = _EXPERTS.search(f"{type(site.module).__name__}.{site.fqn}") is not None
    return named and weight.dim() == 3 and min(weight.shape) > 1 and "bias" not in site.name


def _reason_against_convolution(module: nn.modules.conv._ConvNd) -> str:
    if module.groups > 1:
        return "a grouped convolution"
    if module.in_channels <= _IMAGE_CHANNELS:
        return f"a convolution of the input ({module.in_channels} channels)"
    return ""


def _columns(site: _Site) -> int:
    """K of the matrix that a weight is managed as."""
    weight = site.module._parameters[site.name]
    if isinstance(site.module, nn.modules.conv._ConvNd):
        return weight.numel() // weight.shape[0]
    return weight.shape[-1]


def _reason_unmanageable(site: _Site) -> str:
    """Why a parameter cannot be managed at all, by rule or by request."""
    weight = site.module._parameters[site.name]
    if nn.utils.parametrize.is_parametrized(site.module):
        return "its module is parametrized"
    if isinstance(site.module, nn.utils.parametrize.ParametrizationList):
        return "the original of a parametrized weight"
    if getattr(site.module, "sparse", False):
        return "its gradient is sparse"
    if getattr(site.module, "max_norm", None) is not None:
        return "max_norm writes it in the forward"
    if not weight.is_floating_point():
        return f"dtype {weight.dtype}"
    if not weight.is_contiguous():
        return "not contiguous"
    if type(weight) is not nn.Parameter:
        return f"a {type(weight).__name__}, not a plain Parameter"
    if isinstance(site.module, nn.RNNBase):
        return f"{type(site.module).__name__} hands its weights to one fused kernel"
    return ""


def _choose(model: nn.Module, include: list[str] | None, exclude: list[str]) -> tuple[list[_Site], dict[str, str]]:
    """(what to manage, what was left alone and why)."""
    sites = _sites(model)
    for kind, patterns in (("include", include or []), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(s, pattern) for s in sites):
                names = ", ".join(s.fqn for s in sites[:4]) or "none at all"
                raise ConfigError(
                    f"{kind}={pattern!r} matches no parameter of two or more dimensions; the model has {names}"
                    f"{', …' if len(sites) > 4 else ''}"
                )
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    heads = _output_heads(model)
    readers: dict[int, list[_Site]] = {}
    for site in sites:
        readers.setdefault(id(site.module._parameters[site.name]), []).append(site)
    skipped: dict[str, str] = {}
    for tied in readers.values():
        skipped |= _reasons(tied, include, exclude, heads, embeddings)
    chosen = [site for site in sites if site.fqn not in skipped]
    if not chosen:
        why = "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:4]) or "it has no parameter of two dimensions"
        raise ConfigError(f"model={type(model).__name__} has nothing to manage ({why}); name weights with include=")
    return chosen, skipped


def _reasons(
    tied: list[_Site], include: list[str] | None, exclude: list[str], heads: set[int], embeddings: set[int]
) -> dict[str, str]:
    """Why one weight is left alone, for each of its readers; empty if all of them manage it."""

    def reason(site: _Site) -> str:
        if any(_matches(site, p) for p in exclude):
            return "excluded"
        if include is None and (why := _reason_against(site, heads, embeddings)):
            return why
        return _reason_unmanageable(site)

    if include is not None and not any(_matches(s, p) for s in tied for p in include):
        return dict.fromkeys((s.fqn for s in tied), "not included")
    reasons = {s.fqn: reason(s) for s in tied}
    culprit = next((fqn for fqn, why in reasons.items() if why), None)
    if culprit is None:
        return {}
    return {fqn: why or f"tied to {culprit}: {reasons[culprit]}" for fqn, why in reasons.items()}


def _output_heads(model: nn.Module) -> set[int]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return set() if weight is None else {id(weight)}


def _install(model: nn.Module, sites: list[_Site], record: ModelState) -> None:
    entries: dict[int, ManagedWeight] = {}
    by_module: dict[int, list[_Site]] = {}
    for site in sites:
        weight = site.module._parameters[site.name]
        if id(weight) not in entries:
            entries[id(weight)] = ManagedWeight(
                site.fqn, weight, record.state, _columns(site), input_rows=_is_conv1d(site.module)
            )
            entries[id(weight)].packed_values = record.packed_values
        by_module.setdefault(id(site.module), []).append(site)
    for group in by_module.values():
        module = group[0].module
        module.__dict__["_fxresu"] = {s.name: entries[id(module._parameters[s.name])] for s in group}
    for module in model.modules():
        names = tuple(module.__dict__.get("_fxresu", ()))
        if names or module is model or isinstance(module, RECURRENT):
            module.__dict__.setdefault("_fxresu", {})
            module.__class__ = managed_class(type(module), names, module is model)
    attach(model, record)
    install_runner(model)
