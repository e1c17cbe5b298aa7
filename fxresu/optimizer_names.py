"""Optimizers by name, for the command line and for predictions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import ConfigError
from .models import parse_overrides
from .options import import_callable, near

_LR = 1e-4


def make_optimizer(spec: Any, device: str) -> Callable[[Iterable[Tensor]], Optimizer]:
    """What `spec` names, as a function from parameters to an optimizer.

    Args:
        spec: a class of torch.optim in any case ("adamw"), with arguments ("sgd?momentum=0.9"); "streamed", which is
            `StreamedAdamW` ("streamed?moments=bf16"); "module:factory"; or a callable that takes parameters.
        device: "cuda" takes the fused implementation where there is one and nothing else is said.

    Raises:
        ConfigError: an unknown name, or arguments that it does not take.
    """
    if callable(spec):
        return spec
    if not isinstance(spec, str):
        raise ConfigError(f"optimizer={spec!r}: use a name of torch.optim, 'module:factory', or a callable")
    if ":" in spec.partition("?")[0]:
        return import_callable(spec, "optimizer")
    name, given = parse_overrides(spec, spec)
    if name.lower() == "streamed":
        from .streamed_shapes import Streamed

        return Streamed({"lr": _LR, **given})
    known = {n.lower(): n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)}
    known.pop("optimizer", None)
    if name.lower() not in known:
        names = ", ".join(sorted([*known, "streamed"]))
        raise ConfigError(f"optimizer={spec!r} is unknown{near(name.lower(), known)}; use one of {names}")
    cls = getattr(torch.optim, known[name.lower()])
    accepted = inspect.signature(cls).parameters
    for option in given:
        if option not in accepted:
            raise ConfigError(f"optimizer={spec!r}: {cls.__name__} has no {option!r}{near(option, accepted)}")
    if device == "cuda" and "fused" in accepted and not {"fused", "foreach", "capturable"} & set(given):
        given["fused"] = True
    return lambda parameters: cls(parameters, **{"lr": _LR, **given})
