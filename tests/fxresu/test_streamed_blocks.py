"""Blocks one by one: results, one compilation, one block's gradients, and weights and inputs in host memory."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from fxresu_faults import poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fxresu
from fxresu import ConfigError, CycleConfig, ResuCycle, StreamedAdamW, stream_blocks
from fxresu.errors import NothingCompiledError
from fxresu.lanes import HostLanes
from fxresu.streamed_blocks import find_blocks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _stream_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)
    monkeypatch.setattr("fxresu.activation_stream._SMALL", 0)


class Block(nn.Module):
    def __init__(self, number: int, width: int = 96) -> None:
        super().__init__()
        self.number = number  # as transformers' layer_idx: nothing to compile for
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.down(torch.nn.functional.silu(self.up(self.norm(x))))
        return x + (y if scale is None else y * scale)


class Net(nn.Module):
    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(8, 96), nn.ModuleList(Block(i) for i in range(blocks))
        self.head = nn.Linear(96, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, scale=torch.ones((), device=h.device, dtype=h.dtype))
        return nn.functional.mse_loss(self.head(h).float(), y.float())


def net(blocks: int = 5) -> Net:
    torch.manual_seed(0)
    return Net(blocks)


def data(count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    xs = [torch.randn(16, 8, device=device) for _ in range(count)]
    return [(x, x[:, :3].sin()) for x in xs]


def adamw(model: nn.Module, **options) -> StreamedAdamW:
    return StreamedAdamW(model.parameters(), lr=0.01, chunk=4096, moments="fp32", **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [
    {"compile": False}, {"compile": False, "offload": True}, {"compile": False, "recompute": 0.4},
    {"compile": False, "weights": 5}, {"compile": False, "weights": 5, "slots": 2, "offload": True},
    {"compile": False, "weights": 2}, {"compile": {"backend": "aot_eager"}, "weights": 4, "offload": True},
    {"compile": {"backend": "aot_eager"}, "weights": {"dense": 2, "resu": 5}, "offload": True},
    {"compile": False, "recompute": 0.4, "kept": "costly"},
    {"compile": {"backend": "aot_eager"}, "recompute": 0.6, "kept": "costly", "weights": 2},
    {"compile": False, "recompute": 0.6, "recomputed": "narrow"},
    {"compile": {"backend": "aot_eager"}, "recompute": 0.6, "recomputed": "narrow", "kept": "costly"},
    {"compile": {"backend": "aot_eager"}, "recomputed": "narrow", "offload": True},
    {"compile": False, "recomputed": "narrow", "offload": True},
])  # fmt: skip
def test_training_is_what_it_was(device: str, options: dict) -> None:
    model = net().to(device)
    twin = copy.deepcopy(model)
    optimizer = adamw(model)
    blocks = stream_blocks(model, optimizer=optimizer, **options)
    batches = data(6, device)
    losses = train(model, optimizer, batches)
    assert losses == pytest.approx(train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), batches), rel=1e-4)
    if blocks.activations is not None:
        assert blocks.activations.sent == 30
    if blocks.weights is not None:
        assert blocks.weights.fetched > 6 * (blocks.weights.away - 3) and blocks.weights.misses <= 6
        blocks.weights.send_home()
    assert model.state_dict().keys() == twin.state_dict().keys()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.to(device), b, rtol=1e-4, atol=1e-5)
    blocks.remove()
    assert all(p.device.type == device for p in model.parameters())
    assert train(model, optimizer, batches[:1]) and "forward" not in model.layers[0].__dict__


@pytest.mark.gpu
@pytest.mark.parametrize("kept", ["all", "costly"])
def test_blocks_as_cuda_graphs_train_as_they_did(kept: str) -> None:
    """Gradients lie in the graphs' own memory, and updates come between the graphs of two blocks."""
    model = net().to("cuda")
    twin, batches = copy.deepcopy(model), data(8, "cuda")
    optimizer, other = adamw(model), adamw(twin)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    stream_blocks(model, optimizer=optimizer, compile={"mode": "reduce-overhead"}, recompute=0.4, kept=kept)
    losses = train(model, optimizer, batches)
    # Of the same kernels: Adam makes a step of any difference in a gradient that is nearly zero.
    stream_blocks(twin, optimizer=other, compile=True, recompute=0.4, kept=kept)
    assert losses == pytest.approx(train(twin, other, batches), rel=1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"weights": 5}, {"weights": 2, "slots": 2, "offload": True}, {}])
def test_a_model_in_host_memory_trains_on_the_device(options: dict) -> None:
    """Blocks that are away never are on the device all at a time; values are those of a model that began there."""
    model, batches = net(), data(5, "cuda")
    twin = copy.deepcopy(model).to("cuda")
    optimizer, other = adamw(model, max_norm=0.5), adamw(twin, max_norm=0.5)
    blocks = stream_blocks(model, optimizer=optimizer, compile=False, device="cuda", **options)
    stream_blocks(twin, optimizer=other, compile=False, **options)
    assert train(model, optimizer, batches) == train(twin, other, batches)
    blocks.remove()
    assert all(t.is_cuda for t in [*model.parameters(), *model.buffers()])
    assert all(torch.equal(a.cuda(), b.cuda()) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.gpu
def test_packing_needs_two_blocks_on_the_device() -> None:
    """From host memory into packed RESU with less device memory than the dense weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(i, 2048) for i in range(16))).to(torch.bfloat16)
    whole = sum(p.nbytes for p in model.parameters())
    fxresu.transform(model, sparsity=0.5, candidates=0.1, storage="packed", packed_values="int4", compile=False)
    optimizer = StreamedAdamW(model.parameters())
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    blocks = stream_blocks(model, list(model), optimizer=optimizer, compile=False, device="cuda", slots=2, weights=16)
    fxresu.set_phase(model, "resu", optimizer=optimizer, rule="adam", moments="8bit", theta_dtype="bf16")
    blocks.remove()
    assert torch.cuda.max_memory_allocated() - before < 0.75 * whole
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    assert model(x).float().square().mean().isfinite()


def test_devices_that_cannot_be_used_are_named_and_change_nothing() -> None:
    model = net()
    optimizer = adamw(model)
    for name in ("nowhere", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device='{name}'"):
            stream_blocks(model, optimizer=optimizer, compile=False, weights=2, device=name)
    train(model, optimizer, data(1))
    with pytest.raises(ConfigError, match="moments on cpu"):
        stream_blocks(model, optimizer=optimizer, compile=False, weights=2, device="meta")
    assert "forward" not in model.layers[0].__dict__ and optimizer.weights is None
    stream_blocks(model, optimizer=optimizer, compile=False, weights=2, device="cpu")
    train(model, optimizer, data(1))


@pytest.mark.parametrize(("options", "graphs"), [
    ({"weights": 5}, 1), ({"recompute": 1.0}, 1), ({"recompute": 0.0}, 1),
    ({"weights": 4}, 2), ({"recompute": 0.4}, 2), ({"recompute": 0.4, "weights": 2}, 1),
    ({"recompute": 0.4, "kept": "costly"}, 2), ({"recompute": 0.4, "kept": "costly", "recomputed": "narrow"}, 2),
])  # fmt: skip
def test_one_compilation_serves_all_blocks(options: dict, graphs: int) -> None:
    """A second one those that their own graphs recompute, beside others."""
    model = net()
    optimizer = adamw(model)
    counter = CompileCounterWithBackend("aot_eager")
    stream_blocks(model, optimizer=optimizer, compile={"backend": counter, "fullgraph": True}, **options)
    train(model, optimizer, data(3))
    assert counter.frame_count == graphs
    with torch.no_grad():
        model(*data(1)[0])
    assert counter.frame_count == graphs + 1  # without autograd it is another graph


def test_no_memory_for_a_block_that_would_stay_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(6)
    twin = copy.deepcopy(model)
    optimizer, other = adamw(model), adamw(twin)
    blocks = stream_blocks(model, optimizer=optimizer, compile=False, weights={"dense": 1, "resu": 6}, slots=2)
    batches, real, left = data(3), torch.empty, [3]

    def empty(*args, **kwargs) -> Tensor:
        if kwargs.get("dtype") == torch.uint8:
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("no more")
        return real(*args, **kwargs)

    monkeypatch.setattr("fxresu.weight_stream.torch.empty", empty)
    with pytest.raises(torch.OutOfMemoryError):
        model(*batches[0])
    monkeypatch.undo()
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)
    assert train(model, optimizer, batches) == train(twin, other, batches)
    blocks.remove()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_backward_does_not_compute_the_result_of_a_block_again() -> None:
    products = list[int]()

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        products.append(
            sum(n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for n in graph.graph.nodes)
        )
        return graph

    torch.compiler.reset()
    model = net()
    stream_blocks(model, compile={"backend": aot_autograd(fw_compiler=count, bw_compiler=count)})
    model(*data(1)[0]).backward()
    assert products == [2, 5]  # forward: up, down; backward: up again, and the gradients of both


@pytest.mark.parametrize("phase", ["plain", "dense", "sparse", "resu"])
def test_blocks_may_keep_only_what_is_costly(phase: str) -> None:
    """Of three results between the products, and the products' own: the norm's input, and what the activation gets; or
    the norm's input alone, where the product that widens is computed again."""
    kept = {}
    choices = {"all": {"kept": "all"}, "costly": {"kept": "costly"}, "narrow": {"recomputed": "narrow"}}
    for choice, options in choices.items():
        torch.compiler.reset()
        model = net(2) if phase == "plain" else fxresu.transform(net(2), include=["layers.*"], compile=False)
        if phase != "plain":
            fxresu.set_phase(model, phase)
        stream_blocks(model, compile={"backend": "inductor"}, recompute=float(choice == "narrow"), **options)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, own: set = own, saved: dict = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own and tensor.numel() % (4096 * 96) == 0:
                saved[tensor.untyped_storage().data_ptr()] = tensor.numel() // (4096 * 96)
            return tensor

        h = torch.randn(4096, 96, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model.layers[0](h)
        out.square().mean().backward()
        kept[choice] = sum(saved.values()), h.grad
    assert kept["narrow"][0] == 1 and kept["costly"][0] == 3 < kept["all"][0]
    torch.testing.assert_close(kept["costly"][1], kept["all"][1])
    torch.testing.assert_close(kept["narrow"][1], kept["all"][1])


def test_blocks_that_stay_in_a_phase_are_spread_among_those_that_come_and_go() -> None:
    model = net(8)
    optimizer = adamw(model)
    blocks = stream_blocks(model, optimizer=optimizer, compile=False, weights={"dense": 2, "resu": 8}, slots=2)
    stream = blocks.weights
    assert stream is not None
    held = stream.device_bytes
    train(model, optimizer, data(2))
    assert [stream.comes_and_goes(b) for b in blocks.blocks] == [False, False, True, False, False, False, True, False]
    assert stream.device_bytes == held + 3 * held  # six beside two slots
    values = {n: t.clone() for n, t in model.state_dict().items()}
    assert stream.device_bytes == held  # everything is at home for it
    train(model, optimizer, data(1))
    assert not any(torch.equal(t, values[n]) for n, t in model.named_parameters())
    blocks.remove()
    assert stream.device_bytes == 0


def test_how_many_are_recomputed_may_change_with_the_phase() -> None:
    model, plain = fxresu.transform(net(), compile=False), fxresu.transform(net(), compile=False)
    optimizers = adamw(model), adamw(plain)
    stream_blocks(model, optimizer=optimizers[0], compile=False, recompute={"dense": 0.2, "resu": 1.0})
    calls: list[int] = []
    for block in model.layers:
        block.norm.register_forward_hook(lambda module, *_: calls.append(0))
    for phase, recomputed in (("dense", 1), ("sparse", 5), ("resu", 5), ("dense", 1)):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            fxresu.set_phase(one, phase, optimizer=optimizer)
        calls.clear()
        losses = [one(*data(1)[0]) for one in (model, plain)]
        for loss in losses:
            loss.backward()
        assert len(calls) == 5 + recomputed, phase  # the largest share where it is not named
        assert torch.equal(*losses)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_a_block_is_updated_before_the_one_in_front_of_it_has_gradients() -> None:
    torch.compiler.reset()
    model = net(6)
    optimizer = adamw(model)
    stream_blocks(model, optimizer=optimizer, compile={"backend": "aot_eager"})
    place = {id(p): i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    late, alive = [], []

    def arrived(parameter: Tensor) -> None:
        behind = [p for p in model.layers.parameters() if place[id(p)] > place[id(parameter)]]
        late.extend(p for p in behind if id(p) not in optimizer._updated)
        alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for parameter in model.layers.parameters():
        parameter.register_hook(lambda grad, parameter=parameter: arrived(parameter))
    train(model, optimizer, data(2))
    assert len(alive) == 2 * 6 * 6 and not late
    assert max(alive) <= max(sum(p.nbytes for p in layer.parameters()) for layer in model.layers)


@pytest.mark.gpu
def test_peak_on_the_device() -> None:
    """Sixteen blocks of 33.6 MB: with everything streamed the peak stays below a third of weights, gradients and
    moments in bfloat16; with the weights away as well below a sixth. (cuBLAS' workspaces, up to 70 MB, count.)"""
    for weights, share in ((0, 3), (16, 6)):
        torch.compiler.reset()
        gc.collect()  # the first model: its blocks refer to themselves
        torch.manual_seed(0)
        model = nn.Sequential(*(Block(i, 2048) for i in range(16))).to("cuda", torch.bfloat16)
        whole = 4 * sum(p.nbytes for p in model.parameters())
        optimizer = StreamedAdamW(model.parameters(), chunk=2**20)
        stream_blocks(model, list(model), optimizer=optimizer, weights=weights)
        x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
        for step in range(3):
            if step == 2:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            model(x).float().square().mean().backward()
            optimizer.step()
        assert torch.cuda.max_memory_allocated() < whole / share
        del model, optimizer


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.integers(2, 4), st.booleans())
def test_order_of_copies_does_not_matter(seed: int, slots: int, evaluate: bool) -> None:
    """Weights and inputs away, copies early or late, vacant slots poisoned, a forward in between: the same bits."""
    import random

    results = []
    for eager in (None, random.Random(seed)):
        model = net()
        optimizer = adamw(model)
        blocks = stream_blocks(model, optimizer=optimizer, compile=False, offload=True, weights=4, slots=slots)
        for part in (blocks.weights, blocks.activations):
            part.lanes = HostLanes(lambda eager=eager: 0 if eager is None else eager.randrange(3))
        for batch in data(4):
            if evaluate:
                with torch.no_grad():
                    model(*batch)
            train(model, optimizer, [batch])
            for slot in blocks.weights._vacant:
                poison(blocks.weights.lanes, slot)
        blocks.weights.send_home()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", [
    {"compile": False, "offload": True}, {"compile": {"backend": "aot_eager"}, "offload": True},
    {"compile": {"backend": "aot_eager"}, "recompute": 0.4, "kept": "costly"},
    {"compile": {"backend": "aot_eager"}, "recompute": 0.4, "kept": "costly", "recomputed": "narrow"},
])  # fmt: skip
def test_a_transformed_model_goes_through_all_phases(options: dict) -> None:
    torch.compiler.reset()
    results = []
    for streamed in (True, False):
        model = fxresu.transform(net(3), sparsity=0.5, include=["layers.*"], compile=False)
        optimizer = adamw(model)
        if streamed:
            stream_blocks(model, optimizer=optimizer, **options)
        config = CycleConfig(cycles=2, train_steps=2, stabilize_steps=2, resu_steps=2, sparsity_end=0.5,
                             schedule="constant")  # fmt: skip
        cycle = ResuCycle(model, optimizer, config)
        results.append([float(cycle.step(batch)) for batch in data(14)])
        assert cycle.finished
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_exact_clipping_brings_weights_that_are_away() -> None:
    model = net()
    twin = copy.deepcopy(model)
    optimizer = adamw(model, max_norm=0.1, clip="exact")
    stream_blocks(model, optimizer=optimizer, compile=False, weights=5)
    other = adamw(twin, max_norm=0.1, clip="exact")
    assert train(model, optimizer, data(4)) == pytest.approx(train(twin, other, data(4)), rel=1e-5)


def test_state_dicts_are_right_while_weights_are_away() -> None:
    model = net()
    twin = copy.deepcopy(model)
    optimizer = adamw(model)
    stream_blocks(model, optimizer=optimizer, compile=False, weights=5)
    other = adamw(twin)
    train(model, optimizer, data(2))
    train(twin, other, data(2))
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    train(model, optimizer, data(3))
    model.load_state_dict(state)
    optimizer.load_state_dict(other.state_dict())
    assert train(model, optimizer, data(2)) == train(twin, other, data(2))


@pytest.mark.parametrize("options, message", [
    ({"recompute": 1.5}, "recompute="), ({"recompute": {}}, "recompute={}"), ({"recompute": True}, "recompute=True"),
    ({"recompute": {"dense": 0.5, "rest": 1.0}}, r"recompute\['rest'\]: there is no such phase"),
    ({"recompute": {"dense": 2}}, r"recompute\['dense'\]=2"), ({"weights": 9}, "weights=9"),
    ({"weights": 2}, "optimizer="),
    ({"weights": {"dense": 2, "rest": 3}}, "there is no such phase"),
    ({"weights": {"resu": 9}}, r"weights\['resu'\]=9"),
    ({"weights": {"dense": "2", "resu": 3}}, r"weights\['dense'\]='2'"),
    ({"kept": "some"}, "kept=.some.: use .all. or .costly."),
    ({"recomputed": "some"}, "recomputed=.some.: use .inputs. or .narrow."),
    ({"recomputed": "narrow", "weights": 2, "optimizer": ...}, "recomputed=.narrow. with weights=2"),
    ({"compile": "max"}, "compile="), ({"blocks": [nn.Linear(2, 2)]}, "no part"),
])  # fmt: skip
def test_bad_arguments_are_named_and_change_nothing(options: dict, message: str) -> None:
    model = net()
    if "optimizer" in options:
        options = {**options, "optimizer": adamw(model)}
    with pytest.raises(ConfigError, match=message):
        stream_blocks(model, **options)
    assert "forward" not in model.layers[0].__dict__
    with pytest.raises(ConfigError, match="recomputed"):
        stream_blocks(model, weights=2, recompute=0.2, optimizer=adamw(model))
    with pytest.raises(ConfigError, match="slots=1"):
        stream_blocks(model, weights=2, slots=1, optimizer=adamw(model))
    with pytest.raises(ConfigError, match="equal blocks"):
        find_blocks(nn.Linear(2, 2))
    stream_blocks(model, compile=False)
    with pytest.raises(ConfigError, match="already"):
        stream_blocks(model, compile=False)


def test_blocks_that_are_not_compiled_are_told() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=16,
    )  # fmt: skip
    model, tokens = transformers.LlamaForCausalLM(config), torch.arange(16).view(2, 8)
    blocks = stream_blocks(model, compile={"backend": "eager"}, recompute=1.0)
    with pytest.raises(NothingCompiledError, match="LlamaDecoderLayer gave no graph: .*use_cache = False"):
        model(input_ids=tokens, labels=tokens)
    blocks.remove()
    model.config.use_cache = False
    stream_blocks(model, compile={"backend": "eager"}, recompute=1.0)
    model(input_ids=tokens, labels=tokens).loss.backward()
