"""Nothing falls back in silence: each kind is planted here, and its warning found, once and with its cause."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Net, in_phase, loss_of
from torch import nn

import fxresu
from fxresu import EagerFallbackWarning, FxresuWarning, RecompileWarning, RewriteWarning
from fxresu.model_state import managed_weights
from fxresu.phases import set_phase
from fxresu.runner import runner_of


def _warnings(run, times: int = 3) -> list[tuple[type, str]]:
    """fxresu's warnings while `run` is called a few times."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(times):
            run(i)
    return [(w.category, str(w.message)) for w in caught if issubclass(w.category, FxresuWarning)]


def x(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 16)


def test_what_is_right_gives_none() -> None:
    model = fxresu.transform(Net(), compile=EAGER)

    def phases(i: int) -> None:
        for phase in ("dense", "sparse", "resu", "predict", "correct"):
            set_phase(model, phase)
            out = model(x())
            if out.requires_grad:
                loss_of(out).backward()
            with torch.no_grad():
                model(x())

    assert _warnings(phases) == []


def test_a_model_that_is_meant_to_run_eager_gives_none() -> None:
    model = fxresu.transform(Unknown(), compile=False)
    assert _warnings(lambda i: model(x())) == []


class Unknown(nn.Module):
    """One weight goes into an operation that no pass knows, one is never read."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.unknown, self.unread = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return torch.einsum("nk,ok->no", self.known(x), self.unknown.weight)


def test_weights_that_no_pass_rewrote_in_each_phase() -> None:
    model = fxresu.transform(Unknown(), compile=EAGER)
    for phase in ("dense", "sparse", "resu"):
        set_phase(model, phase)
        ((category, text),) = _warnings(lambda i: model(x()))
        assert category is RewriteWarning
        assert text.startswith(f"phase {phase}: 2 managed weights were not rewritten: ")
        assert "unknown.weight (no pass rewrites einsum)" in text
        assert "unread.weight (not read by the phase's first call)" in text
        assert "known.weight (no" not in text.replace("unknown", "")


def test_weights_that_no_pass_rewrote_in_the_users_own_compile() -> None:
    model = fxresu.transform(Unknown(), compile=False)
    compiled = torch.compile(model)
    found = _warnings(lambda i: compiled(x()))
    again = _warnings(lambda i: torch.compile(copy.deepcopy(model))(x()))
    ((category, text),) = found
    assert category is RewriteWarning and "not rewritten: no pass rewrites einsum" in text
    assert again == []


class Disabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    @torch.compiler.disable
    def left_to_python(self, x):
        return self.b(x)

    def forward(self, x):
        return self.left_to_python(self.a(x)).relu()


def test_code_that_dynamo_leaves_to_python() -> None:
    model = in_phase(fxresu.transform(Disabled(), compile=EAGER), "sparse")
    ((category, text),) = _warnings(lambda i: loss_of(model(x())).backward())
    assert category is EagerFallbackWarning
    assert "phase sparse: eager code read 1 of 2 managed weights (b.weight)" in text
    assert "torch.compiler.disable" in text and __file__ in text
    (entry,) = runner_of(model).entries.values()
    assert entry.eager_reads == {"b.weight": 3}


def test_code_that_the_users_own_compile_leaves_to_python() -> None:
    model = in_phase(fxresu.transform(Skipped(), compile=False), "sparse")
    compiled = torch.compile(model, backend="aot_eager")
    ((category, text),) = _warnings(lambda i: loss_of(compiled(x())).backward())
    assert category is EagerFallbackWarning
    assert "phase sparse: eager code read b.weight" in text and "your own torch.compile" in text
    assert _warnings(lambda i: model(x())) == []


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm = nn.Linear(16, 16), nn.LSTM(16, 16)

    def forward(self, x):
        return self.lstm(self.a(x))[0]


def test_a_recurrent_module_leaves_only_itself_to_python() -> None:
    model = fxresu.transform(Recurrent(), compile=EAGER)
    assert _warnings(lambda i: model(x())) == []
    (entry,) = runner_of(model).entries.values()
    assert [r.weight for g in entry.graphs for r in g.rewrites] == ["a.weight"] and not entry.eager_reads
    assert "left to Python" in str(torch._dynamo.utils.counters["graph_break"])


class Skipped(nn.Module):
    """A graph break in a `try`, which Dynamo cannot leave and enter again: it gives up the frame."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def inner(self, x):
        try:
            x = self.b(x)
            torch._dynamo.graph_break()
        finally:
            x = x * 2
        return x

    def forward(self, x):
        return self.a(self.inner(x))


def test_a_frame_that_dynamo_skips() -> None:
    model = fxresu.transform(Skipped(), compile=EAGER)
    ((category, text),) = _warnings(lambda i: model(x()))
    assert category is EagerFallbackWarning
    assert "eager code read 1 of 2 managed weights (b.weight)" in text
    assert "Call to `torch._dynamo.graph_break()`" in text


class Counting(nn.Module):
    """A number that changes with every call, and that graphs hold as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.calls = 0

    def forward(self, x):
        return self.a(x) * self.calls


def test_a_recompile_is_told_with_the_guard_that_failed() -> None:
    model = fxresu.transform(Counting(), compile=EAGER)

    def call(i: int) -> None:
        model.calls = i // 2
        model(x())

    ((category, text),) = _warnings(call)
    assert category is RecompileWarning
    assert text.startswith("phase dense compiled again at call 3 (graph 2): module.calls == 0")
    (entry,) = runner_of(model).entries.values()
    assert entry.recompiles == 1


def test_inputs_of_another_size_say_how_to_share_a_graph() -> None:
    model = fxresu.transform(Net(), compile=EAGER)
    ((category, text),) = _warnings(lambda i: model(x(4 + i)))
    assert category is RecompileWarning
    assert "size mismatch" in text and "compile={'dynamic': True}" in text
    assert "expected 4, actual 5" in text
    dynamic = fxresu.transform(Net(), compile={**EAGER, "dynamic": True})
    assert _warnings(lambda i: dynamic(x(4 + i))) == []


def test_a_model_beyond_the_recompile_limit_runs_eager() -> None:
    model = fxresu.transform(Counting(), compile=EAGER)

    def call(i: int) -> None:
        model.calls = i
        model(x())

    with torch._dynamo.config.patch(recompile_limit=2):
        found = _warnings(call, times=6)
    assert [category for category, _ in found] == [RecompileWarning, EagerFallbackWarning]
    assert "eager code read 1 of 1 managed weights (a.weight): Dynamo recompile limit exceeded" in found[1][1]
    (entry,) = runner_of(model).entries.values()
    assert entry.eager_reads == {"a.weight": 4} and len(entry.graphs) == 2


def test_transforms_of_torch_func() -> None:
    model = fxresu.transform(Net(), compile=EAGER)
    ((category, text),) = _warnings(lambda i: torch.func.vmap(model)(x()[None]))
    assert category is EagerFallbackWarning and "Net runs eager, not compiled: torch.func transform" in text
    assert runner_of(model).eager_calls == {"torch.func transform": 3}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torch_jit() -> None:
    model = fxresu.transform(Net(), compile=EAGER)
    ((category, text),) = _warnings(lambda i: torch.jit.trace(model, x(), check_trace=False))
    assert category is EagerFallbackWarning and "torch.jit" in text


def test_compilation_switched_off() -> None:
    model = fxresu.transform(Net(), compile=EAGER)

    def call(i: int) -> None:
        with torch.compiler.set_stance("force_eager"):
            model(x())

    ((category, text),) = _warnings(call)
    assert category is EagerFallbackWarning and "torch.compile switched off" in text


def test_a_compiler_whose_failure_torch_is_told_to_suppress_is_an_error() -> None:
    def failing(module, inputs):
        raise RuntimeError("no such instruction")

    model = fxresu.transform(Net(), compile={"backend": failing})
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(RuntimeError, match="gave no graph"):
        model(x())


def test_reading_a_weight_between_calls_is_no_fallback() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "sparse")

    def call(i: int) -> None:
        penalty = model.blocks[0].up.weight.square().sum()
        (F.mse_loss(model(x()), torch.zeros(4, 5)) + penalty).backward()

    assert _warnings(call) == []
    (entry,) = runner_of(model).entries.values()
    assert entry.eager_reads == {}


def test_categories_can_be_filtered() -> None:
    model = fxresu.transform(Unknown(), compile=EAGER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=RewriteWarning)
        model(x())
        set_phase(model, "sparse")
        warnings.filterwarnings("error", category=RewriteWarning)
        with pytest.raises(RewriteWarning, match="phase sparse"):
            model(x())


class Layer(nn.Module):
    """Broken inside, so that Dynamo compiles it by itself, once for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.up(x).relu()
        torch._dynamo.graph_break()
        return self.down(x)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = self.through(layer, x)
        return x

    def through(self, layer, x):
        try:
            return layer(x)
        finally:
            torch._dynamo.graph_break()


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_a_graph_that_serves_several_layers_has_rewritten_the_weights_of_all(storage: str) -> None:
    model = in_phase(fxresu.transform(Layers(), compile=EAGER, storage=storage), "resu")
    assert _warnings(lambda i: loss_of(model(x())).backward()) == []
    entry = next(e for e in runner_of(model).entries.values() if "resu" in e.plan.tag)
    assert {r.weight for g in entry.graphs for r in g.rewrites} == set(dict(managed_weights(model)))
    assert len(entry.graphs) < 6 and not entry.eager_reads
