"""Statistics for scores: right for every way of multiplying by a weight, and nothing else of the model changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Net, in_phase, loss_of
from torch import Tensor, nn

import fxresu
from fxresu.calibration import Calibration, calibrate
from fxresu.errors import ConfigError
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import set_phase
from fxresu.runner import runner_of

ALL = ("inputs", "gradients", "squares")


def batches(n: int = 3, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*(shape or (6, 16)), generator=generator) + 0.3 for _ in range(n)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return loss_of(model(x)) / 100


def observed(model: nn.Module, data: list[Tensor], needs=ALL, **kwargs) -> Calibration:
    calibration = Calibration(model, needs, **kwargs)
    for x in data:
        calibration.observe(lambda x=x: loss(model, x))
    return calibration


def reference_inputs(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """float64 [vectors, features] by weight, from forward hooks on linears of the plain model."""
    plain = fxresu.untransform(copy.deepcopy(model)).eval().double()
    seen: dict[str, list[Tensor]] = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, inputs, out, n=f"{name}.weight": seen.setdefault(n, []).append(inputs[0].flatten(0, -2))
            )
    for x in data:
        plain(x.double())
    return {n: torch.cat(xs) for n, xs in seen.items()}


@pytest.mark.parametrize("compile", [False, EAGER], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("phase", "storage"),
    [("dense", "resident"), ("sparse", "resident"), ("resu", "resident"), ("resu", "packed"), ("resu", "offload")],
)
def test_inputs_and_gradients_are_those_of_the_effective_model(phase: str, storage: str, compile: object) -> None:
    model = in_phase(fxresu.transform(Net(recompute="plain"), compile=compile, storage=storage), phase)
    data = batches(3, 4, 6, 16)
    found = observed(model, data)
    inputs = reference_inputs(model, data)
    plain = fxresu.untransform(copy.deepcopy(model)).double()
    gradients = []
    for x in data:
        plain.zero_grad()
        loss(plain, x.double()).backward()
        gradients.append({n: p.grad.clone() for n, p in plain.named_parameters()})
    assert len(found.weights) == 4
    for name, statistics in found.weights.items():
        x = inputs[name]
        assert (statistics.side, statistics.batches) == ("columns", 3)
        assert statistics.input_counts is not None and statistics.input_counts.eq(72).all()
        torch.testing.assert_close(statistics.input_norm()[0].double(), x.norm(dim=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.input_mean()[0].double(), x.mean(0), rtol=1e-4, atol=1e-5)
        variance = statistics.input_variance()[0].double()
        torch.testing.assert_close(variance, x.var(0, correction=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            statistics.input_mean_square()[0].double(), x.square().sum(0) / 3, rtol=1e-4, atol=1e-5
        )
        g = torch.stack([grads[name] for grads in gradients])
        assert statistics.gradient_sums is not None and statistics.gradient_squares is not None
        torch.testing.assert_close(statistics.gradient_sums.double() / 3, g.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.gradient_squares.double() / 3, g.square().mean(0), rtol=1e-4, atol=1e-6)


class Zoo(nn.Module):
    """One weight read in many ways; `how` says which."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(12, 16))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        y = {
            "linear": lambda: F.linear(x, w),
            "matmul": lambda: x @ w.t(),
            "left": lambda: (w @ x.t()).t(),
            "einsum": lambda: torch.einsum("bk,rk->br", x, w),
            "batched": lambda: torch.einsum("bsk,rk->bsr", x[None], w)[0],
            "sliced": lambda: torch.cat([F.linear(x, w[:6]), F.linear(x, w[6:])], -1),
            "columns": lambda: x[:, :8] @ w[:, :8].t() + x[:, 8:] @ w[:, 8:].t(),
            "vector": lambda: torch.stack([torch.mv(w, row) for row in x]),
            "cast": lambda: F.linear(x.double(), w.double()).float(),
        }[self.how]()
        return self.head(y)


@pytest.mark.parametrize(
    "how", ["linear", "matmul", "left", "einsum", "batched", "sliced", "columns", "vector", "cast"]
)
def test_inputs_are_seen_however_the_weight_is_multiplied(how: str) -> None:
    model = fxresu.transform(Zoo(how), include="weight", compile=False)
    data = batches()
    statistics = observed(model, data, ["inputs"]).weights["weight"]
    x = torch.cat(data)
    times = 2 if how == "sliced" else 1  # both slices of the rows read the same input
    torch.testing.assert_close(statistics.input_norm()[0], x.norm(dim=0) * times**0.5, rtol=1e-5, atol=1e-5)
    assert statistics.side == "columns"
    torch.testing.assert_close(statistics.input_mean()[0], x.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["loop", "bmm", "grouped"])
def test_every_expert_of_a_bank_has_its_own_inputs(how: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            parts = [x[:2], x[2:5], x[5:]]
            if how == "loop":
                return torch.cat([F.linear(p, self.up[e]) for e, p in enumerate(parts)])
            if how == "bmm":
                padded = torch.stack([F.pad(p, (0, 0, 0, 3 - len(p))) for p in parts])
                return torch.bmm(padded, self.up.transpose(1, 2))
            ends = torch.tensor([2, 5, 6], dtype=torch.int32)
            return F.grouped_mm(x, self.up.transpose(1, 2), offs=ends)

    if how == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("torch has no grouped product")
    model = fxresu.transform(nn.Sequential(Experts()), compile=False)
    x = batches(1)[0]
    statistics = Calibration(model, ["inputs"])
    statistics.observe(lambda: model(x).square().mean())
    found = statistics.weights["0.up"]
    want = torch.stack([p.norm(dim=0) for p in (x[:2], x[2:5], x[5:])])
    torch.testing.assert_close(found.input_norm(), want, rtol=1e-5, atol=1e-5)
    weight = torch.ones(24, 16)
    assert torch.equal(found.along(found.input_norm(), weight), want.repeat_interleave(8, 0).to(weight))
    assert torch.equal(found.along(found.input_norm(), weight, 7, 9), found.input_norm()[[0, 1]])


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 2), "stride": 2, "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
])  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_a_convolutions_inputs_are_what_its_taps_read(options: dict, autocast: bool) -> None:
    model = fxresu.transform(nn.Sequential(nn.Conv2d(6, 10, **options)), compile=False)
    data = [torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    calibration = Calibration(model, ["inputs"])
    for x in data:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            calibration.observe(lambda x=x: model(x).square().mean())
    found = calibration.weights["0.weight"]
    conv = model[0]
    patches = []
    for x in data:
        x = x.bfloat16().float() if autocast else x
        if isinstance(conv.padding, str):
            x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        padding = 0 if isinstance(conv.padding, str) else conv.padding
        patches.append(F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride))  # [N, in * k1 * k2, L]
    vectors = torch.cat([p.transpose(1, 2).flatten(0, 1) for p in patches])
    torch.testing.assert_close(found.input_norm()[0], vectors.norm(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.input_mean()[0], vectors.mean(0), rtol=1e-4, atol=1e-4)
    assert found.input_counts.eq(len(vectors)).all()


def test_conv1d_has_its_inputs_along_the_rows() -> None:
    from transformers.pytorch_utils import Conv1D

    model = fxresu.transform(nn.Sequential(Conv1D(24, 16), nn.GELU(), Conv1D(5, 24)), compile=False)
    data = batches(2, 3, 7, 16)
    found = observed(model, data).weights
    assert {s.side for s in found.values()} == {"rows"}
    x = torch.cat([d.flatten(0, 1) for d in data])
    torch.testing.assert_close(found["0.weight"].input_norm()[0], x.norm(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_transformer_layers_do_not_take_their_fused_path(autocast: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    model = fxresu.transform(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), compile=False)
    calibration = Calibration(model, ["inputs"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        calibration.observe(lambda: model(batches(1, 2, 5, 16)[0]).square().mean())
    assert torch.backends.mha.get_fastpath_enabled()
    missing = [n for n, s in calibration.weights.items() if s.input_squares is None]
    assert len(calibration.weights) >= 6 and not missing


def test_a_pass_changes_nothing_of_the_model() -> None:
    model = fxresu.transform(
        nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 5)),
        compile=EAGER,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = batches()
    for phase in ("dense", "sparse", "resu"):
        if phase != "dense":
            set_phase(model, phase, optimizer=optimizer)
        loss(model, data[0]).backward()
        model[3].eval()
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        theta = {n: m.entry.grad_of_theta() for n, m in managed_weights(model).items()}
        before, state, record = copy.deepcopy(model.state_dict()), torch.get_rng_state(), state_of(model)
        plan, options = record.state.plan, record.compile_options
        observed(model, data)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert [m.training for m in model] == [True, True, True, False, True]
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (grads[name] is None)
            assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
        assert all(m.entry.grad_of_theta() is theta[n] for n, m in managed_weights(model).items())
        assert record.state.plan is plan and record.compile_options is options
        assert not runner_of(model).backward_pending
        loss(model, data[0]).backward()
    assert not runner_of(model).eager_calls
    assert all(entry.recompiles == 0 for entry in runner_of(model).entries.values())


def test_no_activation_outlives_its_operation() -> None:
    """Streaming: what a pass leaves has the size of the features, however long the batch is."""
    model = fxresu.transform(Net(), compile=False)
    kept = []
    for tokens in (8, 800):
        statistics = observed(model, [torch.randn(tokens, 16)], ["inputs"])
        kept.append(sum(t.untyped_storage().nbytes() for t in statistics.tensors().values()))
    assert kept[0] == kept[1] == 3 * 8 * sum(m.entry.k for m in managed_weights(model).values())


def test_one_weights_gradient_is_alive_at_a_time() -> None:
    model = fxresu.transform(Net(blocks=3), compile=False)
    alive = []
    calibration = Calibration(model, ["squares"])
    for managed in managed_weights(model).values():
        managed.parameter.register_post_accumulate_grad_hook(
            lambda p: alive.append(sum(m.parameter.grad is not None for m in managed_weights(model).values()))
        )
    calibration.observe(lambda: loss(model, batches()[0]))
    assert max(alive) == 1 and len(alive) == 6


def test_statistics_of_gradients_can_be_kept_on_the_host() -> None:
    model = fxresu.transform(Net(), compile=False)
    calibration = observed(model, batches(), ALL, device="cpu")
    assert all(s.gradient_sums is not None and s.gradient_sums.device.type == "cpu"
               for s in calibration.weights.values())  # fmt: skip


def test_refusals() -> None:
    model = fxresu.transform(Net(), compile=False)
    with pytest.raises(ConfigError, match="batches is empty"):
        calibrate(model, [])
    with pytest.raises(ConfigError, match=r"score='wandaa' is unknown \(did you mean 'wanda"):
        calibrate(model, batches(), score="wandaa", loss=loss)
    with pytest.raises(ConfigError, match=r"needs='activations' is unknown; use inputs"):
        Calibration(model, ["activations"])
    with pytest.raises(ArithmeticError, match="loss=nan on a calibration batch"):
        calibrate(model, [torch.full((2, 16), torch.nan)], score="snip", loss=loss)
    assert model.training and state_of(model).compile_options is None
    unused = fxresu.transform(nn.ModuleDict({"used": nn.Linear(16, 8), "idle": nn.Linear(16, 8)}), compile=False)
    statistics = Calibration(unused, ["inputs"])
    statistics.observe(lambda: unused["used"](batches()[0]).sum())
    with pytest.raises(ConfigError, match=r"score='wanda': no input of a matrix product of weight 'idle.weight'"):
        fxresu.prune(unused, score="wanda", statistics=statistics)
    with pytest.raises(ConfigError, match=r"score='snip' needs statistics.*fxresu.calibrate"):
        fxresu.prune(unused, score="snip")
    assert state_of(unused).base == "dense"
