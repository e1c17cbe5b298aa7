"""The argument `compile` of `transform`, and what a plan wants of the compiler, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fxresu.passes import Phase, PhasePlan
from fxresu.passes import _compat as compat

from .errors import ConfigError

_COMPILE_OPTIONS = ("backend", "mode", "fullgraph", "dynamic", "options", "keep_text")


def compile_options(compile: object) -> dict[str, Any] | None:
    """Arguments for `torch.compile`, checked as far as they can be before anything is compiled; None for eager."""
    if isinstance(compile, bool):
        return {} if compile else None
    if not isinstance(compile, Mapping):
        raise ConfigError(f"compile={compile!r}: use True, False, or a mapping of torch.compile arguments")
    unknown = [k for k in compile if k not in _COMPILE_OPTIONS]
    if unknown:
        raise ConfigError(f"compile[{unknown[0]!r}] is unknown; use {', '.join(_COMPILE_OPTIONS)}")
    options = dict(compile)
    for key, check in (("mode", compat.mode_options), ("backend", compat.lookup_compiler)):
        try:
            check(options.get(key))
        except Exception as error:
            raise ConfigError(f"compile[{key!r}]={options[key]!r}: {error}") from None
    return options


def with_precision(
    model: nn.Module, plans: Mapping[Phase, PhasePlan], overrides: object, options: Mapping[str, Any] | None
) -> dict[Phase, PhasePlan]:
    """The plans with overrides for all phases behind their own, every pattern checked against the model's names.

    Raises:
        ConfigError: a bad pattern or precision, a pattern that names nothing, or no compiled graph to cast in.
    """
    merged = dict(plans)
    if overrides is not None:
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"precision={overrides!r}: use a mapping of FQN patterns, such as {{'lm_head': 'fp32'}}")
        for phase, plan in plans.items():
            try:
                own = (*plan.precision_overrides, *overrides.items())
                merged[phase] = dataclasses.replace(plan, precision_overrides=own)
            except ValueError as error:
                raise ConfigError(f"precision: {error}") from None
    names = [*(n for n, _ in model.named_modules()), *(n for n, _ in model.named_parameters())]
    for plan in merged.values():
        for pattern, precision in plan.precision_overrides:
            if not any(fnmatchcase(n, pattern) for n in names):
                raise ConfigError(f"precision_overrides[{pattern!r}] of {plan.phase} matches no module or parameter")
            if options is None:
                raise ConfigError(
                    f"compile=False, but precision_overrides[{pattern!r}]={precision!r} of {plan.phase} is carried out"
                    " in the compiled graph"
                )
        if options is None and plan.precision == "fp8":
            raise ConfigError(f"compile=False, but precision='fp8' of {plan.phase} needs a compiled graph; use 'bf16'")
    return merged


def check_policies(plans: Mapping[Phase, PhasePlan], options: Mapping[str, Any] | None) -> None:
    """Refuse policies for activations that the compiler in question cannot carry out."""
    for plan in plans.values():
        if not plan.manages_activations or (options is None and plan.activations == "offload"):
            continue
        what = f"activations={plan.activations!r}, activation_budget={plan.activation_budget!r} of {plan.phase}"
        if options is None:
            raise ConfigError(f"compile=False, but {what} needs the compiled graph; use activations='offload'")
        backend = options.get("backend")
        if backend not in (None, "inductor", "aot_eager") and not getattr(backend, "takes_partition", False):
            raise ConfigError(f"compile['backend']={backend!r}, but {what} needs inductor (or aot_eager, for tests)")
