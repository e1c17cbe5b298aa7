"""Inputs for models whose author gave none: derived from the configuration of known families, asked for otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .models import GPT, ExampleInputs


def inputs_for(
    model: nn.Module, given: ExampleInputs | None, *, batch_size: int = 2, seq_len: int = 64
) -> ExampleInputs:
    """`given`, or inputs derived from what the model says about itself: transformers, timm, and the demo's GPT.

    Args:
        batch_size, seq_len: of derived inputs; `seq_len` in tokens.

    Raises:
        ConfigError: nothing is given, and the model is of no such family, or its configuration does not tell.
    """
    if given is not None:
        return given
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with device:
        found = _derived(model, batch_size, seq_len)
    if found is None:
        raise ConfigError(
            f"inputs=None: capturing {type(model).__name__} takes one call of forward({_wanted(model)}); give example"
            " inputs (a tensor, a tuple of arguments or a dict of keyword arguments), or let the factory return"
            " (module, inputs)"
        )
    return found


def as_inputs(model: nn.Module, inputs: Any) -> ExampleInputs:
    """What a user may give as inputs (a tensor, a tuple of arguments, a dict of keyword arguments, `ExampleInputs`, or
    None for those derived from the model), as one form.

    Raises:
        ConfigError: None, and the model is of no known family.
    """
    if inputs is None or isinstance(inputs, ExampleInputs):
        return inputs_for(model, inputs)
    if isinstance(inputs, Mapping):
        return ExampleInputs(kwargs=dict(inputs))
    return ExampleInputs(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


def _derived(model: nn.Module, batch_size: int, seq_len: int) -> ExampleInputs | None:
    if hasattr(model, "main_input_name") and hasattr(getattr(model, "config", None), "to_dict"):
        from .model_hf import _inputs

        return _inputs(model, model.config, batch_size, seq_len, f"of class {type(model).__name__}")
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    if size is not None:
        return ExampleInputs((torch.randn(batch_size, *size),))
    if isinstance(model, GPT):
        tokens = torch.randint(model.config.vocab_size, (batch_size, min(seq_len, model.config.context)))
        return ExampleInputs((tokens, tokens))
    return None


def _wanted(model: nn.Module) -> str:
    """The parameters of the forward that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return "..."
    return ", ".join(p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in kinds)
