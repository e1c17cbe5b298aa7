"""The demo GPT, and models by their name on the command line."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fxresu.errors import ConfigError
from fxresu.models import GPT, ExampleInputs, GPTConfig, demo_config, load_model

TINY = GPTConfig(vocab_size=61, context=16, layers=2, heads=2, width=32)


def test_shapes_and_initial_loss() -> None:
    model = GPT(TINY)
    tokens = torch.randint(61, (3, 16))
    assert model(tokens).shape == (3, 16, 61)
    loss = model(tokens, torch.randint(61, (3, 16)))
    assert loss.shape == () and abs(loss.item() - math.log(61)) < 0.3
    assert model(tokens[:, :5]).shape == (3, 5, 61)


def test_attention_is_causal() -> None:
    model = GPT(TINY)
    tokens = torch.randint(61, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-4)


def test_tied_and_untied_heads() -> None:
    tied, untied = GPT(TINY), GPT(GPTConfig(61, 16, 2, 2, 32, tied=False))
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    count = {m: sum(p.numel() for p in m.parameters()) for m in (tied, untied)}
    assert count[untied] - count[tied] == 61 * 32
    assert set(tied.state_dict()) == set(untied.state_dict())


def test_initialisation_is_gpt2s() -> None:
    model = GPT(GPTConfig(512, 64, layers=8, heads=4, width=128))
    block = model.blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.attention.out, block.mlp.down):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert not projection.bias.any()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_every_parameter_gets_a_gradient_and_training_learns() -> None:
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(61, (4, 17))
    first = None
    for _ in range(40):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        first = first or loss.item()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3 * first


def test_loss_of_a_bfloat16_model_is_float32() -> None:
    tokens = torch.randint(61, (2, 16))
    assert GPT(TINY).bfloat16()(tokens, tokens).dtype == torch.float32


def test_one_graph_without_breaks() -> None:
    model, graphs = GPT(TINY), []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    tokens = torch.randint(61, (2, 16))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(tokens, tokens), model(tokens, tokens))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_demo_sizes() -> None:
    for device, low, high in (("cpu", 3e6, 5e6), ("cuda", 30e6, 40e6)):
        for vocab in (257, 2048):
            with torch.device("meta"):
                model = GPT(demo_config(vocab, device))
            assert low < sum(p.numel() for p in model.parameters()) < high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"width": 30, "heads": 4}, "width=30"), ({"layers": 0}, "layers=0"), ({"vocab_size": 0}, "vocab_size=0")],
)
def test_wrong_shapes(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**{"vocab_size": 61, **arguments})


def test_too_long_a_sequence() -> None:
    with pytest.raises(ConfigError, match="length 17: this model's context is 16"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.long))


# ------------------------------------------------------------------------------------------------- models by their name


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_factories")

    class Holder:
        @staticmethod
        def build() -> nn.Module:
            return nn.Linear(2, 2)

    def fails() -> nn.Module:
        raise RuntimeError("no licence file")

    x = torch.ones(5, 4)
    for name, value in {
        "plain": lambda: nn.Linear(4, 3),
        "tensor": lambda: (nn.Linear(4, 3), x),
        "tuple_": lambda: (nn.Bilinear(4, 4, 3), (x, x)),
        "keywords": lambda: (nn.Linear(4, 3), {"input": x}),
        "instance": nn.Linear(4, 3),
        "fails": fails,
        "wrong": lambda: 42,
        "number": 7,
        "Holder": Holder,
    }.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "my_factories", module)


@pytest.mark.parametrize("name", ["tensor", "tuple_", "keywords"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_with_inputs(factories: None, name: str, device: str) -> None:
    model, inputs = load_model(f"my_factories:{name}", device=device)
    assert isinstance(inputs, ExampleInputs)
    output = inputs.call(model)
    assert output.shape == (5, 3) and output.device.type == device
    assert all(p.device.type == device for p in model.parameters())


@pytest.mark.parametrize("name", ["plain", "instance", "Holder.build"])
def test_factory_without_inputs(factories: None, name: str) -> None:
    model, inputs = load_model(f"my_factories:{name}")
    assert isinstance(model, nn.Linear) and inputs is None


def test_factory_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_local_net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 3)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(load_model("my_local_net:make")[0], nn.Linear)
    assert sys.path == before
    sys.modules.pop("my_local_net")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_factories:fails", "factory 'my_factories:fails' raised RuntimeError: no licence file"),
        ("my_factories:wrong", "returned int; it must return an nn.Module"),
        ("my_factories:number", "is a int; name a function"),
        ("my_factories:plane", "has no 'plane'; did you mean plain"),
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("dmo", "'dmo': must be .* or 'demo'; did you mean demo"),
        ("hf:", "must be 'package.module:factory'"),
        (":make", "must be 'package.module:factory'"),
        ("", "must be 'package.module:factory'"),
    ],
)
def test_specs_that_name_nothing(factories: None, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(spec)


def test_cause_of_a_failing_factory_is_kept(factories: None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model("my_factories:fails")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_demo_by_name() -> None:
    model, inputs = load_model("demo", batch_size=2, seq_len=8)
    assert isinstance(model, GPT) and inputs is not None
    assert inputs.call(model).shape == ()
    meta, inputs = load_model("demo", device="meta")
    assert inputs.call(meta).is_meta


def test_timm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm cannot be imported .* pip install 'fxresu\[models\]'"):
        load_model("timm:resnet18")


def test_timm() -> None:
    pytest.importorskip("timm")
    model, inputs = load_model("timm:vit_tiny_patch16_224?img_size=64", batch_size=1)
    assert inputs.args[0].shape == (1, 3, 64, 64) and inputs.call(model).shape == (1, 1000)
    with pytest.raises(ConfigError, match="did you mean .*vit_tiny_patch16_224"):
        load_model("timm:vit_tny_patch16_224")


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers cannot be imported .* pip install 'fxresu\[models\]'"):
        load_model("hf:gpt2")


LAYERS = "num_hidden_layers=1&hidden_size=32&num_attention_heads=2&intermediate_size=64"
VISION = "image_size=32&patch_size=16"


@pytest.mark.parametrize(
    ("spec", "class_name", "output"),
    [
        ("gpt2?n_layer=1&n_embd=32&n_head=2&vocab_size=99", "GPT2LMHeadModel", ("logits", (2, 12, 99))),
        (f"llama?{LAYERS}&num_key_value_heads=2&vocab_size=99", "LlamaForCausalLM", ("logits", (2, 12, 99))),
        (f"bert?{LAYERS}&vocab_size=99", "BertForMaskedLM", ("logits", (2, 12, 99))),
        (f"roberta?{LAYERS}&max_position_embeddings=10&vocab_size=99", "RobertaForMaskedLM", ("logits", (2, 8, 99))),
        (
            "t5?num_layers=1&d_model=32&d_ff=64&num_heads=2&d_kv=16&vocab_size=99",
            "T5ForConditionalGeneration",
            ("logits", (2, 12, 99)),
        ),
        (
            "whisper?encoder_layers=1&decoder_layers=1&d_model=32&encoder_attention_heads=2&decoder_attention_heads=2"
            "&max_source_positions=20&vocab_size=99&encoder_ffn_dim=64&decoder_ffn_dim=64&pad_token_id=0",
            "WhisperForConditionalGeneration",
            ("logits", (2, 12, 99)),
        ),
        (f"vit?{LAYERS}&{VISION}", "ViTForImageClassification", ("logits", (2, 2))),
        (
            "resnet?depths=[1,1]&hidden_sizes=[32,64]&embedding_size=16",
            "ResNetForImageClassification",
            ("logits", (2, 2)),
        ),
        (
            f"wav2vec2?{LAYERS}&conv_dim=[32,32]&conv_stride=[20,16]&conv_kernel=[20,16]&num_feat_extract_layers=2",
            "Wav2Vec2ForCTC",
            ("logits", (2, 50, 32)),
        ),
        (
            "clip?text_config.num_hidden_layers=1&text_config.hidden_size=32&text_config.num_attention_heads=2"
            "&vision_config.num_hidden_layers=1&vision_config.hidden_size=32&vision_config.num_attention_heads=2"
            "&vision_config.image_size=32&vision_config.patch_size=16",
            "CLIPModel",
            ("logits_per_image", (2, 2)),
        ),
    ],
)
def test_hf_models_run_with_the_derived_inputs(spec: str, class_name: str, output: tuple[str, tuple[int, ...]]) -> None:
    pytest.importorskip("transformers")
    model, inputs = load_model(f"hf:{spec}", batch_size=2, seq_len=12)
    assert type(model).__name__ == class_name and model.training
    name, shape = output
    result = inputs.call(model)[name]
    assert result.shape == shape and result.requires_grad


def test_hf_values_reach_the_model_and_cache_is_off() -> None:
    pytest.importorskip("transformers")
    model, inputs = load_model("hf:llama?num_hidden_layers=3&hidden_size=64&num_attention_heads=4", device="meta")
    assert len(model.model.layers) == 3 and model.config.head_dim == 16
    assert not model.config.use_cache
    assert all(p.is_meta for p in model.parameters()) and inputs.kwargs["input_ids"].is_meta


def test_hf_big_model_on_meta_allocates_nothing() -> None:
    pytest.importorskip("transformers")
    model, _ = load_model("hf:llama", device="meta")
    assert sum(p.numel() for p in model.parameters()) > 6e9 and all(p.is_meta for p in model.parameters())


def test_hf_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, architectures=["GPT2Model"]).save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        model, inputs = load_model(f"hf:{name}?vocab_size=50", seq_len=6)
        assert type(model).__name__ == "GPT2Model" and model.wte.weight.shape == (50, 32)
        assert inputs.call(model).last_hidden_state.shape == (2, 6, 32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gtp2"}))
    with pytest.raises(ConfigError, match="model_type='gtp2'.*did you mean gpt2"):
        load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:llamma", "'llamma' is no model type .* did you mean llama"),
        ("hf:nobody/nothing-at-all", "not in the local cache"),
        ("hf:./nothing", "no folder or config.json at './nothing'"),
        ("hf:gpt2?n_layr=2", "GPT2Config has no 'n_layr'; did you mean n_layer"),
        ("hf:gpt2?n_layer", "'n_layer' is not KEY=VALUE"),
        ("hf:gpt2?n_embd=33&n_head=2", "hf:gpt2.n_embd=33&n_head=2' raised ValueError"),
        ("hf:llava?text_confg.vocab_size=3", "no nested configuration 'text_confg'; did you mean text_config"),
        ("hf:blip_text_model", "only as a part of a larger model"),
        ("hf:patchtst", r"inputs for 'past_values' .* a function that returns \(module, inputs\)"),
    ],
)
def test_hf_names_and_values_that_are_wrong(spec: str, message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=message):
        load_model(spec)
