"""The demo GPT, and `load_model`, which turns a model's name on the command line into a module with example inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import nn

from .errors import ConfigError

__all__ = ["GPT", "ExampleInputs", "GPTConfig", "demo_config", "load_model"]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT. `context` is the longest sequence in tokens; `tied`: the head shares the token embedding."""

    vocab_size: int
    context: int = 128
    layers: int = 4
    heads: int = 8
    width: int = 256
    mlp_ratio: int = 4
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive integer")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width}: must be a multiple of heads={self.heads}")


class Attention(nn.Module):
    """Causal multi-head self-attention on [B, T, width], with one linear for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear on [B, T, width]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.down = nn.Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions (GPT-2, Radford et al. 2019), without dropout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tied:
            self.head.weight = self.token_embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), zero biases, projections onto the residual stream / sqrt(2 * layers)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("attention.out", "mlp.down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @overload
    def forward(self, tokens: torch.Tensor, targets: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...
    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, vocab_size] for `tokens` (int64 [B, T], T <= context); with `targets` (int64 [B, T]) the mean
        cross-entropy in nats instead, a float32 scalar whatever the dtype of the weights."""
        if tokens.shape[-1] > self.config.context:
            raise ConfigError(f"tokens of length {tokens.shape[-1]}: this model's context is {self.config.context}")
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def demo_config(vocab_size: int, device: torch.device | str = "cpu") -> GPTConfig:
    """Shape of the demo's model: about 3.5 M parameters on a CPU, about 33 M on an accelerator."""
    if torch.device(device).type == "cpu":
        return GPTConfig(vocab_size, context=128, layers=4, heads=8, width=256)
    return GPTConfig(vocab_size, context=512, layers=10, heads=8, width=512)


# ------------------------------------------------------------------------------------------------- models by their name


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments for one forward: `model(*inputs.args, **inputs.kwargs)`, or `inputs.call(model)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


def load_model(
    spec: str, *, device: torch.device | str = "cpu", batch_size: int = 2, seq_len: int = 64
) -> tuple[nn.Module, ExampleInputs | None]:
    """The model that `spec` names, built on `device` ("meta" allocates nothing), in training mode, and example inputs.

    - `package.module:factory`: imported (the working directory counts) and called without arguments; it returns a
      module or (module, inputs), where inputs are a tensor, a tuple of arguments or a dict of keyword arguments. The
      example inputs are None when it returns none.
    - `hf:NAME`: a transformers model from its configuration, without weights. NAME is a model type (`hf:llama`), a
      folder or config.json, or the name of a cached model; `hf:llama?num_hidden_layers=2&hidden_size=256` changes
      values, `hf:llava?text_config.num_hidden_layers=2` nested ones.
    - `timm:NAME`: a timm model without weights; `timm:NAME?img_size=96` passes arguments.
    - `demo`: the demo's GPT; `demo?layers=6&width=256` changes values of its `GPTConfig`.

    `batch_size` and `seq_len` (tokens) shape derived inputs. Raises ConfigError, with near matches for unknown names.
    """
    device = torch.device(device)
    kind, _, rest = spec.partition(":")
    if spec.partition("?")[0] == "demo":
        return _load_demo(spec, device, batch_size, seq_len)
    if kind == "hf" and rest:
        from .model_hf import load_hf

        return load_hf(rest, device, batch_size, seq_len)
    if kind == "timm" and rest:
        return _load_timm(rest, device, batch_size)
    if kind and rest:
        return _load_factory(spec, device)
    hint = near_matches(spec, ["demo"])
    raise ConfigError(f"model {spec!r}: must be 'package.module:factory', 'hf:NAME', 'timm:NAME' or 'demo'{hint}")


def near_matches(name: str, known: Iterable[str]) -> str:
    """'; did you mean a, b?' for the known names closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""


def parse_overrides(text: str, spec: str) -> tuple[str, dict[str, Any]]:
    """'NAME?a=1&b.c=x' as ('NAME', {'a': 1, 'b.c': 'x'}); values are JSON where they parse as JSON, else text."""
    name, _, query = text.partition("?")
    overrides: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ConfigError(f"model {spec!r}: {item!r} is not KEY=VALUE")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return name, overrides


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turns an error of foreign building code into a ConfigError that names the model and keeps the cause."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # code that was written to be run as a program may exit
        raise ConfigError(f"{what} raised {type(error).__name__}: {error}") from error


def _load_demo(spec: str, device: torch.device, batch_size: int, seq_len: int) -> tuple[nn.Module, ExampleInputs]:
    from .text_tokenizers import ByteTokenizer

    config, (_, given) = demo_config(ByteTokenizer.vocab_size, device), parse_overrides(spec, spec)
    known = [f.name for f in dataclasses.fields(GPTConfig)]
    for name in given:
        if name not in known:
            raise ConfigError(f"model {spec!r}: a GPT has no {name!r}{near_matches(name, known)}")
    config = dataclasses.replace(config, **given)
    with device:
        tokens = torch.randint(config.vocab_size, (batch_size, min(seq_len, config.context)))
        return GPT(config), ExampleInputs((tokens, tokens))


def _load_factory(spec: str, device: torch.device) -> tuple[nn.Module, ExampleInputs | None]:
    factory = _import_factory(spec)
    if isinstance(factory, nn.Module):
        return factory.to(device), None
    if not callable(factory):
        raise ConfigError(f"model {spec!r}: is a {type(factory).__name__}; name a function that returns an nn.Module")
    with named_errors(f"factory {spec!r}"), device:
        made = factory()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"factory {spec!r}: returned {type(made).__name__}; it must return an nn.Module or (nn.Module, inputs)"
        )
    return model.to(device), None if inputs is None else _as_inputs(inputs, device)


def _import_factory(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    # A console script does not have the working directory, and `python -m` does. In a clone of this project its folder
    # `kernels` would be taken for the package of that name which transformers looks for.
    added = Path(here).resolve() != Path(__file__).resolve().parents[1]
    if added:
        sys.path.insert(0, here)
    try:
        with named_errors(f"model {spec!r}: importing {module_name!r}"):
            root = module_name.partition(".")[0]
            if root not in sys.modules and importlib.util.find_spec(root) is None:
                local = [m.name for m in pkgutil.iter_modules([here])]
                hint = near_matches(module_name, local) if local else ""
                raise ConfigError(f"model {spec!r}: there is no module {module_name!r} here or installed{hint}")
            found: Any = importlib.import_module(module_name)
    finally:
        if added:
            with contextlib.suppress(ValueError):
                sys.path.remove(here)
    for name in attribute.split("."):
        if not hasattr(found, name):
            hint = near_matches(name, (n for n in dir(found) if not n.startswith("_")))
            raise ConfigError(f"model {spec!r}: {getattr(found, '__name__', found)!r} has no {name!r}{hint}")
        found = getattr(found, name)
    return found


def _as_inputs(inputs: Any, device: torch.device) -> ExampleInputs:
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), inputs)
    if isinstance(moved, dict):
        return ExampleInputs(kwargs=moved)
    return ExampleInputs(tuple(moved) if isinstance(moved, tuple | list) else (moved,))


def _load_timm(text: str, device: torch.device, batch_size: int) -> tuple[nn.Module, ExampleInputs]:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model 'timm:{text}': timm cannot be imported ({error}); pip install 'fxresu[models]'"
        ) from error
    name, overrides = parse_overrides(text, f"timm:{text}")
    if not timm.is_model(name):
        hint = near_matches(name, timm.list_models())
        raise ConfigError(f"model 'timm:{text}': timm {timm.__version__} has no {name!r}{hint}")
    create: Callable[..., nn.Module] = timm.create_model
    with named_errors(f"model 'timm:{text}'"), device:
        model = create(name, pretrained=False, **overrides)
        pretrained: Any = model.pretrained_cfg
        channels, *size = pretrained["input_size"]
        # timm keeps the configuration of the pretrained weights even when these arguments change the shape
        channels, image = overrides.get("in_chans", channels), overrides.get("img_size", size)
        size = [image, image] if isinstance(image, int) else image
        return model.train(), ExampleInputs((torch.randn(batch_size, channels, *size),))
