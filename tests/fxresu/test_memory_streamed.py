"""Predictions of streamed training: moments on their way, gradients that go, blocks that are recomputed."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from torch import nn

import fxresu
from fxresu import StreamedAdamW, memory_measure, memory_predict, streamed, streamed_groups
from fxresu.cli import main
from fxresu.example_inputs import as_inputs
from fxresu.memory_stages import Stages
from fxresu.memory_static import optimizer_tensors
from fxresu.models import GPT, GPTConfig
from fxresu.rehearsed_step import StepOptions
from fxresu.shape_copy import empty_copy, meta_copy
from fxresu.streamed_shapes import Streamed, moments_on_their_way

_CONFIG = GPTConfig(256, context=32, layers=3, heads=4, width=128)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return GPT(_CONFIG)


def _tokens(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (batch, 32))
    return tokens, tokens


def _bill(**options) -> fxresu.MemoryBill:
    return fxresu.predict_memory(meta_copy(_model()), _tokens(), device="cuda", **options)


@pytest.fixture
def everything_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 200)


@pytest.mark.parametrize("blocks, moments", [
    (None, "8bit"), (0.0, "8bit"), (0.67, "8bit"), (1.0, "8bit"), (1.0, "factored"),
])  # fmt: skip
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_as_predicted_but_for_the_update(
    blocks: float | None, moments: str, accumulation: int, monkeypatch: pytest.MonkeyPatch, everything_travels: None
) -> None:
    """On a CPU, where the update itself runs as a reference with memory of its own: it is left out here."""
    monkeypatch.setattr(streamed, "adamw_step_", lambda *args, **kwargs: None)
    monkeypatch.setattr(streamed, "adamw_steps_", lambda *args, **kwargs: None)
    monkeypatch.setattr(streamed_groups, "adamw_steps_", lambda *args, **kwargs: None)
    monkeypatch.setattr(streamed_groups, "factored_moments_", lambda *args, **kwargs: None)
    made = Streamed({"chunk": 16384, "moments": moments})
    options = StepOptions(made, accumulation=accumulation, compiled=False, recompute=blocks)
    setting = Stages(("dense", "sparse", "resu"), 0.5, "fp32", "fp32", torch.float32, False)
    model = fxresu.transform(_model(), compile=False)
    call = as_inputs(model, _tokens(16))
    predicted = memory_predict.predict_stages(meta_copy(model), call, options, setting)

    def build() -> nn.Module:
        copied = empty_copy(model, "cpu")
        for parameter in copied.parameters():
            nn.init.normal_(parameter, std=0.02)
        return copied

    found = memory_measure.measure(build, call, options, setting)
    for stage in predicted:
        assert stage.parts["moments"] > 0 and stage.parts["moments on their way"] > 0
        assert abs(found.peaks[stage.name] - stage.tensors) <= 0.03 * stage.tensors, (stage, found.peaks)


@pytest.mark.parametrize("options", [
    {}, {"moments": "bf16", "lookahead": 1}, {"device_bytes": 300_000}, {"moments": "factored"},
    {"moments": "factored", "device_bytes": 150_000},
])  # fmt: skip
@pytest.mark.parametrize("grouped", [False, True])
def test_slots_and_moments_are_the_optimizers(options: dict, grouped: bool, everything_travels: None) -> None:
    model, tokens = _model(), _tokens()
    optimizer = StreamedAdamW(model.parameters(), chunk=16384, **options)
    if grouped:
        fxresu.stream_blocks(model, optimizer=optimizer, compile={"backend": "eager"})
    model(*tokens).backward()
    optimizer.step()
    make = Streamed({"chunk": 16384, **options})
    slots, moments = moments_on_their_way(_model(), make, grouped, grouped)
    travelling = [s for s in optimizer.state.values() if s.pieces]
    assert slots == optimizer.workspace_bytes > 0
    real = sum(t.nbytes for s in travelling for t in s.operands)
    assert real <= moments <= 1.02 * real


@pytest.mark.parametrize("options", [{}, {"device_bytes": 150_000}])
def test_what_a_factored_state_has_on_the_device(options: dict, everything_travels: None) -> None:
    """Rows and columns of all, and the moments that stay: to the byte, weight by weight."""
    model = _model()
    optimizer = StreamedAdamW(model.parameters(), chunk=16384, moments="factored", **options)
    model(*_tokens()).backward()
    optimizer.step()
    make = Streamed({"chunk": 16384, "moments": "factored", **options})
    predicted = optimizer_tensors(meta_copy(_model()), make, "cuda")
    stay = 0
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        here = () if state.pieces else state.operands
        stay += bool(here) and parameter.dim() == 2
        assert sum(predicted[name]) == sum(t.nbytes for t in (*here, *state.factors)), name
    assert bool(stay) == bool(options)


def test_a_bill_says_what_streaming_saves(everything_travels: None) -> None:
    plain, whole, blocks = (_bill(**o, phases="dense", compile=False)["dense"] for o in (
        {}, {"optimizer": "streamed?chunk=8192"}, {"optimizer": "streamed?chunk=8192", "recompute": 1.0}
    ))  # fmt: skip
    assert "moments on their way" not in plain.parts and "moments" not in plain.host
    for stage in (whole, blocks):
        assert stage.parts["moments on their way"] < stage.host["moments"]
        assert stage.parts["optimizer state, managed"] < 0.6 * plain.parts["optimizer state, managed"]
    assert blocks.parts["activations"] < 0.5 * whole.parts["activations"]
    assert blocks.tensors < whole.tensors < plain.tensors


def test_compiled_blocks_are_rehearsed() -> None:
    whole, recomputed = (_bill(optimizer="streamed", recompute=b, phases="dense")["dense"] for b in (0.0, 1.0))
    assert recomputed.parts["activations"] < whole.parts["activations"]


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_that_keep_what_is_costly(compiled: bool) -> None:
    found = {
        (kept, share, again): _bill(
            optimizer="streamed", recompute=share, kept=kept, recomputed=again, phases="dense", compile=compiled
        )
        for kept, share, again in (
            ("all", 0.0, "inputs"), ("costly", 0.0, "inputs"), ("all", 1.0, "narrow"), ("all", 1.0, "inputs")
        )
    }  # fmt: skip
    every, costly, narrow, none = (bill["dense"].parts["activations"] for bill in found.values())
    assert none < narrow < 0.8 * costly < 0.8 * 0.8 * every


def test_blocks_that_are_compiled_one_by_one_read_the_weights_themselves() -> None:
    bill = _bill(optimizer="streamed", recompute=1.0, phases="resu", autocast="bf16", compile=True)
    assert not bill["resu"].parts.get("compute copies")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["memory", "demo", "--device", "cuda", "--no-compile", "--phase", "dense", "--optimizer", "streamed"]
    assert main([*argv, "--recompute", "1"]) == 0
    shown = capsys.readouterr().out
    assert "one by one, 1 of them recomputed" in shown


@pytest.mark.parametrize(("options", "message"), [
    ({"optimizer": "streamed", "device": "cpu"}, "only a GPU is predicted"),
    ({"optimizer": "streamed?momints=8bit"}, "momints"),
    ({"optimizer": "streamed?moments=4bit"}, "moments='4bit'"),
    ({"optimizer": "streamed?sums=host"}, "sums='host'"),
    ({"optimizer": lambda ps: StreamedAdamW(ps)}, "name the optimizer there, 'streamed'"),
    ({"recompute": 1.5}, "recompute=1.5"),
    ({"recompute": True}, "recompute=True"), ({"recompute": 0.5, "kept": "some"}, "kept='some'"),
    ({"kept": "costly"}, "kept='costly' needs recompute="),
    ({"recomputed": "narrow"}, "recomputed='narrow' needs recompute="),
    ({"recompute": 0.5, "recomputed": "some"}, "recomputed='some'"),
    ({"optimizer": "streamed?lookahead=-1"}, "lookahead=-1"),
])  # fmt: skip
def test_what_cannot_be_predicted_is_said(options: dict, message: str) -> None:
    with pytest.raises(fxresu.ConfigError, match=message):
        _bill(**{"compile": False, "phases": "dense", **options}) if "device" not in options else fxresu.predict_memory(
            _model(), _tokens(), compile=False, phases="dense", **options
        )


def test_models_without_blocks_or_without_anything_to_train() -> None:
    x = (torch.randn(2, 8),)
    with pytest.raises(fxresu.ConfigError, match="recompute=0.5: Linear has no list of equal blocks"):
        fxresu.predict_memory(nn.Linear(8, 8), x, compile=False, phases="dense", recompute=0.5)
    frozen = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    bill = fxresu.predict_memory(
        frozen, x, compile=False, phases="predict", device="cuda", optimizer="streamed?moments=fp32"
    )
    assert "moments on their way" not in bill["predict"].parts


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_streamed_steps_are_predicted_on_a_gpu(compiled: bool) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(8192, context=512, layers=10, heads=12, width=768))
        tokens = torch.empty(8, 512, dtype=torch.int64)
    gc.collect()
    torch.cuda.empty_cache()
    bill = fxresu.predict_memory(
        model, (tokens, tokens), autocast="bf16", compile=compiled, device="cuda", measure=True, recompute=0.7,
        optimizer="streamed", phases=["dense", "sparse", "resu"],
    )  # fmt: skip
    for stage in bill.stages:
        assert abs(bill.unaccounted(stage)) <= 0.05 * stage.measured, f"{stage.name}\n{bill}"
    assert "PYTEST_XDIST_WORKER" in os.environ or all(stage.measured_device for stage in bill.stages)
