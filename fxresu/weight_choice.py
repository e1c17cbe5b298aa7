"""Which weights a transform manages, and why it leaves the others alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .errors import ConfigError

__all__ = ["Site", "choose_sites", "matches"]

# Names that output heads go by in the libraries people use.
_HEAD = re.compile(
    r"(^|\.)(lm_head|head|classifier|score|logits|output_projection|embed_out|cls|fc_out|proj_out)(\.|$)"
)
# Modules that hold the weights of several experts in one parameter [experts, rows, K].
_EXPERTS = re.compile(r"experts?|moe|mixture", re.IGNORECASE)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_IMAGE_CHANNELS = 4  # the layer that reads these is small, and the literature on sparse networks keeps it dense


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter as seen from one module that reads it."""

    module: nn.Module
    name: str
    fqn: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        weight = self.module._parameters[self.name]
        assert weight is not None
        return weight

    @property
    def columns(self) -> int:
        """K of the matrix that it is managed as."""
        if isinstance(self.module, nn.modules.conv._ConvNd):
            return self.weight.numel() // self.weight.shape[0]
        return self.weight.shape[-1]

    @property
    def is_conv1d(self) -> bool:
        """Whether the module is transformers' linear that multiplies from the right."""
        return type(self.module).__name__ == "Conv1D" and type(self.module).__module__.startswith("transformers")


def choose_sites(
    model: nn.Module, include: str | Iterable[str] | None, exclude: str | Iterable[str]
) -> tuple[list[Site], dict[str, str]]:
    """(what to manage, what was left alone and why); the arguments are those of `transform`.

    Raises:
        ConfigError: a pattern is no string or matches nothing, a parameter is uninitialized, or nothing is left.
    """
    included, excluded = _patterns(include), _patterns(exclude) or []
    sites = _sites(model)
    for kind, patterns in (("include", included or []), ("exclude", excluded)):
        for pattern in patterns:
            if not any(matches(s, pattern) for s in sites):
                names = ", ".join(s.fqn for s in sites[:4]) or "none at all"
                raise ConfigError(
                    f"{kind}={pattern!r} matches no parameter of two or more dimensions; the model has {names}"
                    f"{', …' if len(sites) > 4 else ''}"
                )
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    heads = _output_heads(model)
    readers: dict[int, list[Site]] = {}
    for site in sites:
        readers.setdefault(id(site.weight), []).append(site)
    skipped: dict[str, str] = {}
    for tied in readers.values():
        skipped |= _reasons(tied, included, excluded, heads, embeddings)
    chosen = [site for site in sites if site.fqn not in skipped]
    if not chosen:
        why = "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:4]) or "it has no parameter of two dimensions"
        raise ConfigError(f"model={type(model).__name__} has nothing to manage ({why}); name weights with include=")
    return chosen, skipped


def matches(site: Site, pattern: str) -> bool:
    """Whether a pattern names the parameter or its module."""
    owner = site.fqn.rpartition(".")[0]
    return fnmatchcase(site.fqn, pattern) or fnmatchcase(owner, pattern)


def _patterns(value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"pattern={pattern!r}: FQN patterns are strings such as 'h.*.mlp.*'")
    return patterns


def _sites(model: nn.Module) -> list[Site]:
    """Every parameter of two or more dimensions, once for every module that reads it."""
    for fqn, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(f"model: {fqn} is uninitialized; run the model once on an example before the transform")
    return [
        Site(module, name, f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules(remove_duplicate=True)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2
    ]


def _reason_against(site: Site, heads: set[int], embeddings: set[int]) -> str:
    """Why the default rules leave a parameter alone; "" if they manage it."""
    weight = site.weight
    if id(weight) in embeddings:
        return "embedding, or tied to one"
    if isinstance(site.module, nn.MultiheadAttention) and site.name.endswith("proj_weight"):
        return ""
    if _is_bank(site):
        return ""
    if isinstance(site.module, _CONVOLUTIONS):
        if why := _reason_against_convolution(site.module):
            return why
    elif not (isinstance(site.module, nn.Linear) or site.is_conv1d):
        return f"a parameter of {type(site.module).__name__}, not of a linear"
    if site.name != "weight":
        return f"parameter {site.name!r}, not the weight"
    if id(weight) in heads or _HEAD.search(site.fqn):
        return "output head"
    return ""


def _is_bank(site: Site) -> bool:
    """Whether a parameter holds one matrix for each of several experts."""
    weight = site.weight
    named = _EXPERTS.search(f"{type(site.module).__name__}.{site.fqn}") is not None
    return named and weight.dim() == 3 and min(weight.shape) > 1 and "bias" not in site.name


def _reason_against_convolution(module: nn.modules.conv._ConvNd) -> str:
    if module.groups > 1:
        return "a grouped convolution"
    if module.in_channels <= _IMAGE_CHANNELS:
        return f"a convolution of the input ({module.in_channels} channels)"
    return ""


def _reason_unmanageable(site: Site) -> str:
    """Why a parameter cannot be managed at all, by rule or by request."""
    weight = site.weight
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


def _reasons(
    tied: list[Site], include: list[str] | None, exclude: list[str], heads: set[int], embeddings: set[int]
) -> dict[str, str]:
    """Why one weight is left alone, for each of its readers; empty if all of them manage it."""

    def reason(site: Site) -> str:
        if any(matches(site, p) for p in exclude):
            return "excluded"
        if include is None and (why := _reason_against(site, heads, embeddings)):
            return why
        return _reason_unmanageable(site)

    if include is not None and not any(matches(s, p) for s in tied for p in include):
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
