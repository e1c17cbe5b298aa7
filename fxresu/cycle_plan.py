"""What a run of the cycle will do: the configuration that fits a model, and the steps of every stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxresu.passes import Phase

from .config import CycleConfig, phase_steps
from .errors import ConfigError, PhaseError
from .model_state import ModelState, state_of
from .streamed import StreamedAdamW

__all__ = [
    "autocast_of",
    "check_in_backward",
    "check_streamed",
    "matching_config",
    "phases_ahead",
    "scaler_for",
    "stage_steps",
]


def matching_config(model: nn.Module, config: CycleConfig | None = None) -> CycleConfig:
    """The configuration to run: the given one if it fits the transform, or one made from the transform."""
    record = state_of(model)
    if config is None:
        grain = record.granularity
        schedule: dict[str, Any] = {"schedule": "constant"} if grain.pattern_sparsity is not None else {}
        config = CycleConfig(
            sparsity_end=record.sparsity,
            granularity=str(grain),
            candidates=record.candidates,
            **{
                "optimizer_state": record.plans[Phase.RESU].optimizer_state,
                "restore_lookahead": record.plans[Phase.RESU].restore_lookahead,
                **schedule,
                **_planned(record),
            },
        )
    for name, have in _planned(record).items():
        if (value := getattr(config, name)) != have:
            raise ConfigError(
                f"config.{name}={value!r}, but the memory budget was planned with {name}={have!r}; give that, or"
                " transform without memory_budget"
            )
    for name, value, have in (
        ("granularity", config.granularity, str(record.granularity)),
        ("candidates", config.candidates, record.candidates),
    ):
        if value != have:
            raise ConfigError(
                f"config.{name}={value!r}, but the model was transformed with {name}={have!r}; give both the same"
            )
    if record.base == "resu":
        raise PhaseError("the model is in RESU already; commit or discard θ (set_phase) before a cycle takes over")
    return config


def _planned(record: ModelState) -> dict[str, Any]:
    """Options that a memory budget has settled."""
    plan = record.memory_plan
    if plan is None:
        return {}
    found = {"theta_moments": plan.theta_moments, "accumulation": plan.accumulation}
    found["optimizer_state"] = plan.optimizer_state
    # Of state that does not travel it says nothing.
    return {**found, "restore_lookahead": plan.restore_lookahead} if plan.plans[Phase.RESU].transfers else found


def autocast_of(model: nn.Module, autocast: str | None) -> contextlib.AbstractContextManager[Any]:
    """Context of `CycleConfig.autocast` on the model's device."""
    if autocast is None:
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if autocast == "bf16" else torch.float16
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def scaler_for(
    model: nn.Module, config: CycleConfig, scaler: torch.amp.GradScaler | None
) -> torch.amp.GradScaler | None:
    """The loss scaler of a cycle: the given one, or a new one where a phase computes in float16.

    Raises:
        ConfigError: float16 parameters, whose gradients no scaler can unscale.
    """
    plans = state_of(model).plans.values()
    if scaler is None and config.autocast != "fp16" and not any(p.trains and p.precision == "fp16" for p in plans):
        return None
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16:
            raise ConfigError(
                f"autocast={config.autocast!r} with loss scaling, but parameter {name!r} is float16 itself; keep"
                " parameters in float32 (autocast casts them), or use bfloat16"
            )
    return scaler or torch.amp.GradScaler(next(model.parameters()).device.type)


def check_streamed(
    model: nn.Module, optimizer: Optimizer, config: CycleConfig, scaler: torch.amp.GradScaler | None
) -> None:
    """What needs all gradients at once cannot be had with an optimizer that uses each as it comes.

    Raises:
        ConfigError: the cycle's clipping, or float16, with `StreamedAdamW`; weights in host memory with settings that
            need several of them at a time.
    """
    if not isinstance(optimizer, StreamedAdamW):
        return
    optimizer.check_phases(model)
    if config.grad_clip is not None:
        raise ConfigError(
            f"config.grad_clip={config.grad_clip!r} with StreamedAdamW, which never has all gradients: use its own"
            " max_norm= (for gradients of weights; those of θ are not clipped then)"
        )
    if scaler_for(model, config, scaler) is not None:
        raise ConfigError("float16 with StreamedAdamW: a scaled gradient cannot be unscaled in time; use bfloat16")


def check_in_backward(model: nn.Module, config: CycleConfig, scaler: torch.amp.GradScaler | None) -> None:
    """ConfigError for a loss scale with `theta_in_backward`; the configuration has refused what it knows itself."""
    if config.theta_in_backward and scaler_for(model, config, scaler) is not None:
        why = "scaler=" if scaler is not None else "precision='fp16' in a phase's plan"
        raise ConfigError(
            f"config.theta_in_backward=True with {why}: a scaled gradient cannot be unscaled in time; use bfloat16, or"
            " leave theta_in_backward out"
        )


def stage_steps(config: CycleConfig, cycle: int) -> dict[str, int]:
    """Steps of each stage of a cycle, all of them in "train" where nothing is pruned."""
    steps = phase_steps(config)
    if config.has_work(cycle):
        return steps
    return {"train": sum(steps.values()), "stabilize": 0, "resu": 0}


def phases_ahead(config: CycleConfig) -> Iterator[tuple[int, str, int, float]]:
    """(cycle, stage, steps, sparsity) of everything that a run will do; for displays and budgets."""
    for cycle in range(config.cycles):
        for stage, count in stage_steps(config, cycle).items():
            if stage == "train" or config.has_work(cycle):
                yield cycle, stage, count, config.sparsity(cycle)
