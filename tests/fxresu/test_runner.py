"""One graph a phase for the whole run, at least one for every kind of model, and the same gradients throughout."""

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Attention, Net, check_gradients, in_phase, loss_of
from torch import nn

import fxresu
from fxresu.config import CycleConfig
from fxresu.errors import ConfigError, NothingCompiledError
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import set_phase
from fxresu.runner import runner_of
from fxresu.theta import step_theta

FULL = {**EAGER, "fullgraph": True}


def _cycles(model: nn.Module, schedule: list[float], after_cycle=lambda cycle: None) -> None:
    """dense, sparse, RESU (with θ steps) and commit, once for every sparsity; an evaluation in every phase."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    record, config = state_of(model), CycleConfig(rule="adam")
    record.capacity_sparsity = max(schedule)
    kwargs = {"optimizer": optimizer, "rule": "adam", "betas": (0.9, 0.999)}

    def steps() -> None:
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model(torch.randn(4, 16, generator=torch.Generator().manual_seed(i)))).backward()
            optimizer.step()
            if record.state.mode == "resu":
                record.theta_steps += 1
                step_theta(managed_weights(model).values(), config, 0.01, record.theta_steps)
        with torch.no_grad():
            model(torch.randn(4, 16))

    for cycle, sparsity in enumerate(schedule):
        set_phase(model, "dense", **kwargs)
        steps()
        set_phase(model, "sparse", sparsity=sparsity, **kwargs)
        steps()
        set_phase(model, "resu", **kwargs)
        steps()
        for phase in ("predict", "correct"):
            set_phase(model, phase, **kwargs)
            model(torch.randn(4, 16))
            with torch.no_grad():
                model(torch.randn(4, 16))
        set_phase(model, "sparse", **kwargs)
        steps()
        after_cycle(cycle)


@pytest.mark.parametrize(
    ("kwargs", "recompute"),
    [
        ({}, ""),
        ({}, "on"),
        ({"storage": "packed"}, "on"),
        ({"granularity": "layer"}, ""),
        ({"granularity": "global", "storage": "packed"}, ""),
        ({"candidates": 0.5}, "on"),
    ],
    ids=str,
)
def test_one_graph_a_phase_over_three_cycles_of_changing_sparsity(kwargs: dict, recompute: str) -> None:
    model = fxresu.transform(Net(recompute=recompute), compile=FULL, **kwargs)
    stance = []

    def after_cycle(cycle: int) -> None:
        if cycle == 0:
            stance.append(torch.compiler.set_stance("fail_on_recompile"))

    try:
        _cycles(model, [0.3, 0.5, 0.7], after_cycle)
    finally:
        torch.compiler.set_stance("default")
    entries = runner_of(model).entries
    assert {tag.partition("/")[0] for tag in entries} == {"dense", "sparse", "resu", "predict", "correct"}
    inference = [e for tag, e in entries.items() if "effective/inherit" in tag]
    # Calls without gradients share one function in every phase; while W is packed they read other tensors.
    assert len(inference) == (2 if kwargs.get("storage") == "packed" else 1)
    assert sum(e.calls for e in inference) == 12
    for e in entries.values():
        assert len(e.graphs) == 1
        assert e.breaks == e.recompiles == 0
    assert runner_of(model).eager_calls == {}


def test_evaluation_is_not_compiled_again_when_resu_freezes_the_rest() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(4, 16)
    fxresu.transform(model, compile=EAGER)
    config = fxresu.CycleConfig(cycles=2, steps_per_cycle=10, sparsity_end=0.5, schedule="constant", train_rest=False)
    optimizer = torch.optim.AdamW(model.parameters())
    cycle = fxresu.ResuCycle(model, optimizer, config, loss=lambda m, b: m(b).square().mean())
    for _ in range(cycle.total_steps):
        cycle.step(x)
        with torch.no_grad():
            model(x)
    entries = runner_of(model).entries.values()
    assert [e.recompiles for e in entries] == [0] * 5 and [len(e.graphs) for e in entries] == [1] * 5


def test_changing_sparsity_compiled_and_eager_train_alike() -> None:
    models = []
    for compile in (FULL, False):
        torch.manual_seed(0)
        models.append(fxresu.transform(Net(), compile=compile))
        _cycles(models[-1], [0.3, 0.5])
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# Every class of model that torch ships


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def _layer(kind: type, **kwargs) -> nn.Module:
    return kind(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True, **kwargs)


X = (3, 5, 16)
MODELS = {
    "Linear": (lambda: nn.Linear(16, 16), [X]),
    "Sequential": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), [X]),
    "EncoderLayer": (lambda: _layer(nn.TransformerEncoderLayer), [X]),
    "EncoderLayer norm first": (lambda: _layer(nn.TransformerEncoderLayer, norm_first=True), [X]),
    "Encoder": (lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2), [X]),
    "DecoderLayer": (lambda: _layer(nn.TransformerDecoderLayer), [X, X]),
    "Decoder": (lambda: nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 2), [X, X]),
    "Transformer": (lambda: nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True), [X, X]),
    "SelfAttention": (SelfAttention, [X]),
    "LSTM and Linear": (Recurrent, [X]),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("name", MODELS)
def test_at_least_one_graph_and_the_right_gradients(name: str, phase: str) -> None:
    make, shapes = MODELS[name]
    model = in_phase(fxresu.transform(make(), compile=EAGER), phase)
    check_gradients(model, phase, *(torch.randn(s) for s in shapes))
    (entry,) = runner_of(model).entries.values()
    assert not entry.eager_reads
    assert len(entry.graphs) >= 1
    assert bool(entry.breaks) == name.startswith("LSTM")  # at the LSTM itself
    assert any(r.rewrites for r in entry.graphs)
    model.eval()
    with torch.no_grad():
        out = model(*(torch.randn(s) for s in shapes))
    assert out.isfinite().all()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
def test_the_packed_projection_of_multihead_attention_by_request(phase: str, storage: str, compile: object) -> None:
    model = fxresu.transform(SelfAttention(), include="*in_proj_weight", compile=compile, storage=storage)
    in_phase(model, phase)
    assert list(managed_weights(model)) == ["attention.in_proj_weight"]
    check_gradients(model, phase, torch.randn(X))
    if compile:
        (rewrite,) = next(iter(runner_of(model).entries.values())).graphs[0].rewrites
        assert rewrite.weight == "attention.in_proj_weight"


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("phase", ["dense", "sparse", "resu", "predict"])
@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
def test_the_encoders_fast_path_sees_the_effective_weight(phase: str, storage: str, compile: object) -> None:
    model = nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2).eval()
    fxresu.transform(model, compile=compile, storage=storage)
    in_phase(model, phase)
    plain = nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(X)
    with torch.no_grad():
        tol = 0.05 if phase == "predict" else 1e-5
        torch.testing.assert_close(model(x), plain(x), rtol=tol, atol=tol)


@pytest.mark.parametrize(
    "make", [lambda: nn.Bilinear(4, 4, 4), lambda: nn.LSTM(4, 4), lambda: nn.Conv2d(2, 2, 3), nn.ReLU]
)
def test_nothing_manageable_by_default(make) -> None:
    with pytest.raises(ConfigError, match="nothing to manage.*include="):
        fxresu.transform(make())


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_bilinear_by_request(phase: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(4, 6, 5)

        def forward(self, a, b):
            return self.bilinear(a, b)

    model = in_phase(fxresu.transform(Pair(), include="*", compile=EAGER), phase)
    check_gradients(model, phase, torch.randn(3, 4), torch.randn(3, 6))


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_attention(phase: str) -> None:
    model = in_phase(fxresu.transform(Attention(), compile=FULL), phase)
    check_gradients(model, phase, torch.randn(X))


# Graph breaks


class Breaking(nn.Module):
    """Breaks between layers, inside a child, and on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def inner(self, x):
        y = self.b(x)
        torch._dynamo.graph_break()
        return y + self.b(y.relu())

    def forward(self, x):
        y = self.a(x)
        torch._dynamo.graph_break()
        y = self.inner(y.tanh())
        if y.detach().sum() > 1e9:
            y = y * 2
        return self.c(y)


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("candidates", [1.0, 0.5])
def test_graph_breaks_give_right_gradients_in_every_phase(storage: str, candidates: float) -> None:
    if storage == "packed" and candidates != 1:
        pytest.skip("refused by transform")
    model = fxresu.transform(Breaking(), compile=EAGER, storage=storage, candidates=candidates)
    for phase in ("dense", "sparse", "resu", "dense", "sparse", "resu"):
        set_phase(model, phase)
        for _ in range(2):
            check_gradients(model, phase, torch.randn(4, 16))
    set_phase(model, "predict")
    assert not model(torch.randn(4, 16)).requires_grad
    entries = runner_of(model).entries
    assert all(e.breaks >= 2 and len(e.graphs) >= 3 for e in entries.values())
    assert [e.recompiles for e in entries.values()] == [0] * len(entries)


class Disabled(nn.Module):
    """A part that Dynamo must not trace runs eager in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    @torch.compiler.disable
    def skipped(self, x):
        return self.b(x)

    def forward(self, x):
        return self.skipped(self.a(x)).relu() @ self.a.weight


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_a_weight_read_in_compiled_and_in_eager_code_of_one_call(phase: str) -> None:
    model = in_phase(fxresu.transform(Disabled(), compile=EAGER), phase)
    check_gradients(model, phase, torch.randn(4, 16))


# How a call is run


def test_calls_under_torch_func_run_eager_and_are_counted() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "sparse")
    x = torch.randn(4, 16)
    out = torch.func.vmap(model)(torch.stack([x, x]))
    torch.testing.assert_close(out[0], model(x))
    torch.func.grad(lambda v: loss_of(model(v)))(x)
    assert runner_of(model).eager_calls == {"torch.func transform": 2}
    assert [e.calls for e in runner_of(model).entries.values()] == [1]


def test_torch_jit_trace() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "sparse")
    x = torch.randn(4, 16)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    assert runner_of(model).eager_calls["torch.jit"] >= 1


def test_compiling_nothing_is_an_error_that_says_what_to_do() -> None:
    class Skipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        @torch.compiler.disable
        def forward(self, x):
            return self.a(x)

    model = fxresu.transform(Skipped(), compile=EAGER)
    with pytest.raises(NothingCompiledError, match="Skipped for phase dense gave no graph.*compile=False"):
        model(torch.randn(2, 4))


def test_force_eager_is_the_users_choice() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "resu")
    with torch.compiler.set_stance("force_eager"):
        check_gradients(model, "resu", torch.randn(4, 16))
    assert runner_of(model).eager_calls == {"torch.compile switched off": 1}
    check_gradients(model, "resu", torch.randn(4, 16))
    (entry,) = runner_of(model).entries.values()
    assert len(entry.graphs) == 1


def test_many_phases_and_modes_do_not_reach_the_recompile_limit() -> None:
    model = fxresu.transform(Net(), compile=EAGER)
    x = torch.randn(4, 16)
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for phase in ("warmup", "dense", "sparse", "resu", "predict", "correct"):
            set_phase(model, phase)
            for training in (True, False):
                model.train(training)
                model(x)
                with torch.no_grad():
                    model(x)
    assert runner_of(model).eager_calls == {}


def test_compile_options_reach_torch_compile() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.a(x)

    with pytest.raises(Exception, match="graph_break"):
        fxresu.transform(Counting(), compile=FULL)(torch.randn(2, 4))
    model = fxresu.transform(nn.Sequential(nn.Linear(4, 4)), compile={**EAGER, "dynamic": True})
    for n in (2, 3, 5, 7):
        model(torch.randn(n, 4))
    (entry,) = runner_of(model).entries.values()
    assert len(entry.graphs) == 1


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_dynamic_sizes_that_equal_a_masks_are_no_constants(storage: str) -> None:
    model = fxresu.transform(Net(64, 64), storage=storage, compile={**EAGER, "dynamic": True})
    in_phase(model, "resu")
    for batch in (2, 64, 32, 5):  # words of a row, rows, candidates
        check_gradients(model, "resu", torch.randn(batch, 64))
    (entry,) = (e for e in runner_of(model).entries.values() if "resu" in e.plan.tag)
    assert len(entry.graphs) == 1


def test_inference_mode() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "predict")
    x = torch.randn(4, 16)
    want = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), want)


def test_keyword_arguments_and_structured_results() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x, *, scale: float = 1.0, pair: tuple = ()):
            return {"y": self.a(x) * scale, "pair": [F.relu(p) for p in pair]}

    model = fxresu.transform(Shaped(), compile=FULL)
    x = torch.randn(2, 4)
    out = model(x, scale=2.0, pair=(x, -x))
    torch.testing.assert_close(out["y"], F.linear(x, model.a.weight, model.a.bias) * 2)
    assert len(out["pair"]) == 2
