"""The models of `model.py`: shapes, random weights, and one module that maps tokens to a loss."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxresu.models import GPT, GPTConfig
from fxresu.streamed_loss import linear_cross_entropy

from .timing import device_type

VOCABULARY = 50304  # GPT-2's 50257, padded to a multiple of 64 as is usual


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
        kind: "gpt2" or "llama" (transformers), or "own" (fxresu.models.GPT, which has linears where GPT-2 has Conv1D).
        config: arguments of the configuration.
        batch, context: sequences of a step, and their tokens.
    """

    kind: str
    config: dict[str, Any]
    batch: int
    context: int


def _gpt2(layers: int, heads: int, width: int, context: int = 1024, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "n_positions": context, "n_embd": width, "n_layer": layers, "n_head": heads,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def _own(layers: int, heads: int, width: int, context: int = 1024, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    return {"vocab_size": vocabulary, "context": context, "layers": layers, "heads": heads, "width": width}


# Llama 3.2 1B's shape: 1.236 billion parameters with its tied head.
_LLAMA = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
# Llama 3.2 3B's shape (3.21 billion, tied), and Llama 2 7B's (6.74 billion, untied).
_LLAMA_3B = {**_LLAMA, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}
_LLAMA_7B = {
    **_LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
_TINY_LLAMA = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip

SIZES = {
    "124M": Size("gpt2", _gpt2(12, 12, 768), 16, 1024),
    "350M": Size("gpt2", _gpt2(24, 16, 1024), 16, 1024),
    "1.24B": Size("llama", _LLAMA, 4, 2048),
    "3.2B": Size("llama", _LLAMA_3B, 4, 1024),
    "6.7B": Size("llama", _LLAMA_7B, 4, 2048),
    "own-124M": Size("own", _own(12, 12, 768), 16, 1024),
    "own-350M": Size("own", _own(24, 16, 1024), 16, 1024),
    "tiny-gpt2": Size("gpt2", _gpt2(2, 2, 64, 32, 512), 2, 32),
    "tiny-llama": Size("llama", _TINY_LLAMA, 2, 32),
    "tiny": Size("own", _own(2, 2, 64, 32, 512), 2, 32),
}


class WithLoss(nn.Module):
    """tokens [B, T] to the mean cross-entropy of the next token, a scalar: logits are no output of the graph.

    With `tiled` (transformers' models) logits are never whole (`fxresu.streamed_loss`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tiled = False

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tiled:
            hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state
            return linear_cross_entropy(hidden, self.model.get_output_embeddings().weight, tokens.roll(-1, 1))
        logits = self.model(tokens) if isinstance(self.model, GPT) else self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, -2).float(), tokens.roll(-1, 1).flatten())


def build(size: Size, dtype: torch.dtype = torch.float32, seed: int = 0, device: str | None = None) -> WithLoss:
    """The model with random weights on the device, which may be "meta"."""
    torch.manual_seed(seed)
    with torch.device(device or device_type()):
        # transformers' own tables of positions stay in float32.
        model = GPT(GPTConfig(**size.config)).to(dtype) if size.kind == "own" else _transformers(size, dtype)
    return WithLoss(model).train()


def build_on_host(size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> WithLoss:
    """The model with random weights in host memory. They are drawn on the device, one tensor at a time: a processor
    would take minutes for billions of them."""
    made = build(size, dtype, device="meta")
    generator = torch.Generator(device_type()).manual_seed(seed)
    shared: dict[int, nn.Parameter] = {}
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in shared:
                drawn = torch.empty(parameter.shape, dtype=dtype, device=device_type())
                # Norms start at one, matrices small, as transformers has them.
                values = drawn.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else drawn.fill_(1)
                values = torch.zeros_like(values) if name == "bias" else values
                shared[id(parameter)] = nn.Parameter(values.cpu())
            module._parameters[name] = shared[id(parameter)]
    # Buffers are tables of positions, which do not depend on how wide or deep a model is.
    small = dataclasses.replace(size, config={**size.config, "num_hidden_layers": 1, "vocab_size": 16})
    known = dict(build(small, torch.float32, device="cpu").named_buffers())
    for fqn, buffer in list(made.named_buffers()):
        if buffer.is_meta:
            owner, _, name = fqn.rpartition(".")
            made.get_submodule(owner)._buffers[name] = known[fqn].to(buffer.dtype)
    return made


def _transformers(size: Size, dtype: torch.dtype) -> nn.Module:
    # transformers looks for a package called `kernels`, and would find the script of that name beside this package.
    scripts = str(Path(__file__).resolve().parents[1])
    path, sys.path[:] = sys.path[:], [entry for entry in sys.path if entry != scripts]
    try:
        from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, LlamaConfig

        AttentionInterface.register("fxresu_bench_causal", _causal_attention)
        config = {"gpt2": GPT2Config, "llama": LlamaConfig}[size.kind](**size.config)
        return AutoModelForCausalLM.from_config(config, attn_implementation="fxresu_bench_causal", dtype=dtype)
    finally:
        sys.path[:] = path


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention, [B, heads, T, d] to [B, T, heads, d]. transformers' own one builds a mask while it is compiled,
    which rules the flash kernels out for every variant."""
    grouped = query.shape[1] != key.shape[1]
    scale = options.get("scaling")
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def tokens(size: Size, batch: int | None = None) -> Tensor:
    """Random tokens of one step (seed 1)."""
    torch.manual_seed(1)
    return torch.randint(size.config["vocab_size"], (batch or size.batch, size.context), device=device_type())
