"""The architectures of the coverage table, all of them tiny: two layers, 32 to 64 wide."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxresu.models import ExampleInputs, load_model

_L = "num_hidden_layers=2&hidden_size=32&num_attention_heads=2"
_V = f"{_L}&vocab_size=99"
_I = f"{_V}&intermediate_size=64"
_KV = f"{_I}&num_key_value_heads=2"
_IMAGE = f"{_L}&image_size=16&patch_size=8"
_TOWERS = "&".join(
    f"{part}_config.{key}"
    for part in ("text", "vision")
    for key in ("num_hidden_layers=1", "hidden_size=32", "num_attention_heads=2", "intermediate_size=64")
)
_TOWERS += "&text_config.vocab_size=99&vision_config.image_size=32&vision_config.patch_size=16"
_SEQ2SEQ = (
    "encoder_layers=2&decoder_layers=2&d_model=32&encoder_attention_heads=2&decoder_attention_heads=2"
    "&encoder_ffn_dim=64&decoder_ffn_dim=64&vocab_size=99"
)

_HF = {
    "Llama": f"llama?{_KV}",
    "Llama 4": f"llama4_text?{_KV}&num_local_experts=4&head_dim=16&intermediate_size_mlp=64",
    "Qwen2": f"qwen2?{_KV}",
    "Qwen3": f"qwen3?{_KV}&head_dim=16",
    "Mistral": f"mistral?{_KV}",
    "Gemma": f"gemma?{_KV}&head_dim=16",
    "Gemma 2": f"gemma2?{_KV}&head_dim=16&query_pre_attn_scalar=16",
    "Gemma 3": f"gemma3_text?{_KV}&head_dim=16&query_pre_attn_scalar=16",
    "Phi": f"phi?{_KV}",
    "Phi-3": f"phi3?{_KV}&pad_token_id=0",
    "GPT-2": "gpt2?n_layer=2&n_embd=32&n_head=2&vocab_size=99",
    "GPT-NeoX": f"gpt_neox?{_I}",
    "GPT-J": "gptj?n_layer=2&n_embd=32&n_head=2&vocab_size=99&rotary_dim=8",
    "OPT": f"opt?{_V}&ffn_dim=64&word_embed_proj_dim=32",
    "BLOOM": "bloom?n_layer=2&hidden_size=32&n_head=2&vocab_size=99",
    "Falcon": f"falcon?{_V}",
    "MPT": "mpt?n_layers=2&d_model=32&n_heads=2&vocab_size=99",
    "OLMo 2": f"olmo2?{_KV}",
    "SmolLM3": f"smollm3?{_KV}&pad_token_id=0",
    "Granite": f"granite?{_KV}",
    "Cohere": f"cohere?{_KV}",
    "StarCoder2": f"starcoder2?{_KV}",
    "GLM-4": f"glm4?{_KV}&pad_token_id=0&head_dim=16",
    "BERT": f"bert?{_I}",
    "RoBERTa": f"roberta?{_I}",
    "DistilBERT": "distilbert?n_layers=2&dim=32&n_heads=2&hidden_dim=64&vocab_size=99",
    "ELECTRA": f"electra?{_I}&embedding_size=32",
    "DeBERTa-v2": f"deberta-v2?{_I}",
    "ALBERT (layers share weights)": f"albert?{_I}&embedding_size=32",
    "ModernBERT": f"modernbert?{_I}&pad_token_id=0&bos_token_id=1&eos_token_id=2&cls_token_id=1&sep_token_id=2",
    "T5": "t5?num_layers=2&d_model=32&d_ff=64&num_heads=2&d_kv=16&vocab_size=99",
    "BART": f"bart?{_SEQ2SEQ}",
    "Whisper": f"whisper?{_SEQ2SEQ}&max_source_positions=20&pad_token_id=0",
    "ViT": f"vit?{_IMAGE}&intermediate_size=64",
    "DINOv2": f"dinov2?{_IMAGE}",
    "CLIP": f"clip?{_TOWERS}",
    "SigLIP": f"siglip?{_TOWERS}",
    "Swin": "swin?image_size=16&patch_size=2&embed_dim=16&depths=[2,2]&num_heads=[2,2]&window_size=2",
    "ConvNeXt": "convnext?depths=[1,1]&hidden_sizes=[32,64]&num_stages=2&image_size=32",
    "ResNet": "resnet?depths=[1,1]&hidden_sizes=[32,64]&embedding_size=16",
    "Wav2Vec2": f"wav2vec2?{_L}&intermediate_size=64&conv_dim=[32,32]&conv_stride=[20,16]&conv_kernel=[20,16]"
    "&num_feat_extract_layers=2&num_conv_pos_embeddings=8&num_conv_pos_embedding_groups=2&layerdrop=0"
    "&mask_time_prob=0",
    "Mixtral": f"mixtral?{_KV}&num_local_experts=4",
    "Qwen2-MoE": f"qwen2_moe?{_KV}&num_experts=4&moe_intermediate_size=32&shared_expert_intermediate_size=32"
    "&num_experts_per_tok=2",
    "Qwen3-MoE": f"qwen3_moe?{_KV}&num_experts=4&moe_intermediate_size=32&num_experts_per_tok=2",
    "OLMoE": f"olmoe?{_KV}&num_experts=4&num_experts_per_tok=2",
    "GPT-OSS": f"gpt_oss?{_KV}&num_local_experts=4&num_experts_per_tok=2&head_dim=16",
    "DeepSeek-V3": f"deepseek_v3?{_KV}&n_routed_experts=4&n_group=1&topk_group=1&num_experts_per_tok=2"
    "&moe_intermediate_size=32&q_lora_rank=16&kv_lora_rank=16&qk_rope_head_dim=8&qk_nope_head_dim=8&v_head_dim=16"
    "&first_k_dense_replace=1",
    "Mamba": "mamba?num_hidden_layers=2&hidden_size=32&vocab_size=99&state_size=4",
    "Mamba-2": "mamba2?num_hidden_layers=2&hidden_size=32&vocab_size=99&state_size=4&num_heads=4&head_dim=16"
    "&n_groups=1&chunk_size=4",
    "Jamba": f"jamba?{_KV}&num_experts=4&attn_layer_period=2&attn_layer_offset=1&expert_layer_period=2"
    "&expert_layer_offset=1&use_mamba_kernels=false&mamba_dt_rank=4&mamba_d_state=4",
}

_TIMM = {
    "ViT (timm)": "vit_tiny_patch16_224?img_size=32&embed_dim=32&depth=2&num_heads=2",
    "Swin (timm)": "swin_tiny_patch4_window7_224?img_size=32&window_size=2&embed_dim=16&depths=[2,2]&num_heads=[2,2]",
    "ConvNeXt (timm)": "convnext_atto?in_chans=3&depths=[1,1,1,1]&dims=[16,32,32,64]",
    "ResNet-18 (timm)": "resnet18?layers=[1,1,1,1]&channels=[16,16,32,32]",
    "ResNet-50 (timm)": "resnet50?layers=[1,1,1,1]&channels=[16,16,32,32]",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: of the row.
        make: builds the model in training mode, without dropout, and the arguments of a call.
        group: "transformers", "timm" or "torch": where the model comes from.
        fullgraph: whether the model is one graph; False where Dynamo breaks it.
        inductor: compiled by Inductor; others stop at AOTAutograd, which costs a tenth.
        dtype: of the model's weights.
        compile: further arguments for `torch.compile`.
        represents: a family, with which everything is tried that people do with models.
        by_values: the graphs follow from the values in the model, and from what Dynamo saw in earlier phases: their
            number is measured, and no test expects it.
    """

    name: str
    make: Callable[[], tuple[nn.Module, ExampleInputs]]
    group: str
    fullgraph: bool = True
    inductor: bool = False
    dtype: torch.dtype = torch.float32
    compile: dict[str, Any] = dataclasses.field(default_factory=dict)
    represents: bool = False
    by_values: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot be built here; "" if it can."""
        if self.group == "timm":
            return _timm_missing()
        try:
            importlib.import_module("peft" if "LoRA" in self.name else self.group)
        except ImportError as error:
            return f"{error.name} is not installed"
        return ""


def _timm_missing() -> str:
    """timm needs torchvision, and torchvision a build for this very torch.

    FXRESU_VISION names a folder with both, for machines whose torch must not meet torchvision: beside a torch without
    CUDA, torchvision's operators (which no model here uses) do not load, and declaring them is enough.
    """
    folder = os.environ.get("FXRESU_VISION")
    if folder and folder not in sys.path:
        sys.path.append(folder)
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    try:
        importlib.import_module("timm")
    except Exception as error:
        return f"timm cannot be imported ({str(error).partition(chr(10))[0]})"
    return ""


def _without_dropout(model: nn.Module) -> nn.Module:
    """No randomness, so that gradients can be compared; the model stays in training mode."""
    owners = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    for owner in owners:
        for key, value in list(vars(owner).items()):
            is_layer = key == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)
            if type(value) is float and ("drop" in key or is_layer):
                setattr(owner, key, 0.0)
    return model


def _loaded(spec: str) -> Callable[[], tuple[nn.Module, ExampleInputs]]:
    def make() -> tuple[nn.Module, ExampleInputs]:
        model, inputs = load_model(spec, batch_size=2, seq_len=8)
        assert inputs is not None
        return _without_dropout(model), inputs

    return make


# ------------------------------------------------------------------------------------------------------- torch's own


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` to a memory of another width, with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, kdim=16, vdim=16, batch_first=True)

    def forward(self, x, memory):
        out, weights = self.attention(x, memory, memory)
        return out * weights.sum()


class Recurrent(nn.Module):
    """An LSTM, whose weights are left alone; Dynamo leaves the linears around it to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.lstm, self.out = nn.Linear(32, 32), nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 32)

    def forward(self, x):
        return self.out(self.lstm(self.into(x))[0])


class Shared(nn.Module):
    """A module called twice, and a weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.tied, self.twin = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.twin.weight = self.tied.weight

    def forward(self, x):
        return self.twin(self.tied(self.shared(self.shared(x).tanh()).tanh()).tanh())


class Breaking(nn.Module):
    """Graph breaks between layers, and on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = self.a(x)
        torch._dynamo.graph_break()
        y = self.b(y.tanh())
        if y.detach().sum() > 1e9:
            y = y * 2
        return self.c(y)


class Experts(nn.Module):
    """A bank of experts as three-dimensional parameters, all of them used: `baddbmm` and `bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 32, 64) / 6)
        self.down = nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.bias = nn.Parameter(torch.zeros(4, 1, 64))

    def forward(self, x):
        return torch.bmm(F.gelu(torch.baddbmm(self.bias, x, self.up)), self.down)


class Mixed(nn.Module):
    """Experts inside a model, so that their name says what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = Experts(), nn.Linear(32, 32)

    def forward(self, x):
        return self.out(self.experts(x))


def _layer(kind: type) -> nn.Module:
    return kind(32, 2, dim_feedforward=64, dropout=0.0, batch_first=True)


def _made(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], tuple[nn.Module, ExampleInputs]]:
    return lambda: (make().train(), ExampleInputs(tuple(torch.randn(s) for s in shapes)))


_X, _M = (2, 5, 32), (2, 7, 32)
_TORCH = {
    "nn.MultiheadAttention": (SelfAttention, _X),
    "nn.MultiheadAttention, cross": (CrossAttention, _X, (2, 7, 16)),
    "nn.TransformerEncoder": (lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2), _X),
    "nn.TransformerDecoder": (lambda: nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 2), _X, _M),
    "nn.Transformer": (lambda: nn.Transformer(32, 2, 2, 2, 64, 0.0, batch_first=True), _X, _M),
    "nn.LSTM between linears": (Recurrent, _X),
    "Shared and tied weights": (Shared, _X),
    "Graph breaks": (Breaking, _X),
    "Experts by bmm and baddbmm": (Mixed, (4, 5, 32)),
}


# ---------------------------------------------------------------------------------------------------------- situations


def _checkpointed(reentrant: bool) -> Callable[[], tuple[nn.Module, ExampleInputs]]:
    def make() -> tuple[nn.Module, ExampleInputs]:
        model, inputs = _loaded(f"hf:{_HF['Llama']}")()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model, inputs

    return make


def _lora() -> tuple[nn.Module, ExampleInputs]:
    from peft import LoraConfig, get_peft_model

    model, inputs = _loaded(f"hf:{_HF['Llama']}")()
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config).train(), inputs


def _experts(implementation: str) -> Callable[[], tuple[nn.Module, ExampleInputs]]:
    def make() -> tuple[nn.Module, ExampleInputs]:
        model, inputs = _loaded(f"hf:{_HF['Mixtral']}")()
        model.set_experts_implementation(implementation)
        return model, inputs

    return make


def _situations() -> list[Architecture]:
    llama = _loaded(f"hf:{_HF['Llama']}")
    hf = "transformers"
    return [
        Architecture("Llama under LoRA (peft)", _lora, hf),
        Architecture("Llama, checkpoint", _checkpointed(False), hf),
        Architecture("Llama, checkpoint, reentrant", _checkpointed(True), hf),
        Architecture("Llama in bfloat16", llama, hf, dtype=torch.bfloat16),
        Architecture("Llama in float16", llama, hf, dtype=torch.float16),
        Architecture("Llama, dynamic sizes", llama, hf, compile={"dynamic": True}),
        Architecture("Mixtral, batched_mm", _experts("batched_mm"), hf),
        Architecture("Mixtral, experts in a loop", _experts("eager"), hf, fullgraph=False, by_values=True),
        Architecture("Mixtral in bfloat16 (grouped_mm)", _loaded(f"hf:{_HF['Mixtral']}"), hf, dtype=torch.bfloat16),
    ]


_INDUCTOR = {"GPT (the demo's)", "Llama", "GPT-2", "Mixtral", "ResNet", "nn.MultiheadAttention"}
_BREAKS = {"Graph breaks", "nn.LSTM between linears", "Wav2Vec2"}
# One of each family: whose modules, attention, masks or caches are of its own kind.
_REPRESENTS = {
    "GPT (the demo's)", "Llama", "Gemma 2", "Phi-3", "GPT-2", "GPT-NeoX", "OPT", "BLOOM", "Falcon", "BERT",
    "DeBERTa-v2", "ALBERT (layers share weights)", "ModernBERT", "T5", "BART", "Whisper", "ViT", "CLIP", "Swin",
    "ConvNeXt", "ResNet", "Wav2Vec2", "Mixtral", "Qwen3-MoE", "GPT-OSS", "DeepSeek-V3", "Mamba", "Mamba-2", "Jamba",
    "ViT (timm)", "Swin (timm)", "ConvNeXt (timm)", "ResNet-50 (timm)", "nn.MultiheadAttention",
    "nn.TransformerEncoder", "nn.TransformerDecoder", "nn.LSTM between linears", "Shared and tied weights",
    "Graph breaks", "Experts by bmm and baddbmm",
}  # fmt: skip


def architectures() -> list[Architecture]:
    """All rows of the table."""
    rows = [Architecture("GPT (the demo's)", _demo, "torch")]
    rows += [Architecture(name, _loaded(f"hf:{spec}"), "transformers") for name, spec in _HF.items()]
    rows += [Architecture(name, _loaded(f"timm:{spec}"), "timm") for name, spec in _TIMM.items()]
    rows += [Architecture("MLP-Mixer (timm)", _mixer, "timm")]
    rows += [Architecture(name, _made(*what), "torch") for name, what in _TORCH.items()]
    rows += _situations()
    return [
        dataclasses.replace(
            r,
            inductor=r.name in _INDUCTOR,
            fullgraph=r.fullgraph and r.name not in _BREAKS,
            represents=r.name in _REPRESENTS,
        )
        for r in rows
    ]


def _mixer() -> tuple[nn.Module, ExampleInputs]:
    """By its class: timm's own names fix how large it is."""
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(num_classes=10, img_size=16, patch_size=8, num_blocks=2, embed_dim=32)
    return _without_dropout(model.train()), ExampleInputs((torch.randn(2, 3, 16, 16),))


def _demo() -> tuple[nn.Module, ExampleInputs]:
    from fxresu.models import GPT, GPTConfig

    tokens = torch.randint(99, (2, 8))
    return GPT(GPTConfig(99, 16, layers=2, heads=2, width=32)).train(), ExampleInputs((tokens, tokens))
