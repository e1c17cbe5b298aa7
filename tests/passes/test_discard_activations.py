"""What a phase does not need for its backward is not saved."""

import pytest
import torch
from fxresu_testing import EAGER, Net, Recorder, check_gradients, in_phase, saved
from torch import nn

import fxresu
from fxresu.model_state import managed_weights
from fxresu.passes import DEFAULT_PLANS, PassRecord, Phase, PhasePlan, PipelineRecord
from fxresu.runner import runner_of


def _discarding(record: PipelineRecord) -> PassRecord:
    return next(p for p in record.passes if p.name == "discard_activations")


@pytest.mark.parametrize("phase", ["predict", "correct"])
@pytest.mark.parametrize("before", ["dense", "sparse", "resu"])
def test_forward_only_phases_compile_an_inference_graph(phase: str, before: str) -> None:
    recorder = Recorder()
    model = fxresu.transform(Net(recompute="on"), compile={"backend": recorder})
    in_phase(model, before)
    in_phase(model, phase)
    out = model(torch.randn(4, 16))
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    assert len(recorder.inference) == 1
    assert recorder.forward == recorder.backward == []
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase(phase)].tag].graphs
    assert _discarding(record).matches > 4
    assert _discarding(record).after["_set_grad_enabled"] == 2


@pytest.mark.parametrize("recompute", ["", "on"])
def test_no_grad_regions_of_the_model_do_not_switch_tracking_on_again(recompute: str) -> None:
    class WithRegion(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = x.abs().amax()
            return super().forward(x / scale)

    recorder = Recorder()
    model = in_phase(fxresu.transform(WithRegion(recompute=recompute), compile={"backend": recorder}), "predict")
    assert not model(torch.randn(4, 16)).requires_grad
    assert torch.is_grad_enabled()
    assert len(recorder.inference) == 1 and recorder.forward == recorder.backward == []


def test_left_alone_where_nothing_is_tracked() -> None:
    model = fxresu.transform(Net(), compile=EAGER)
    model.requires_grad_(False)
    in_phase(model, "predict")
    model(torch.randn(4, 16))
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase.PREDICT].tag].graphs
    assert _discarding(record).matches == 0


def test_forward_only_phases_with_and_without_no_grad_do_not_recompile() -> None:
    model = in_phase(fxresu.transform(Net(), compile=EAGER), "predict")
    x = torch.randn(4, 16)
    with torch.no_grad():
        first = model(x)
    second = model(x)
    assert torch.equal(first, second)
    with torch.compiler.set_stance("fail_on_recompile"):
        model(x)
        with torch.no_grad():
            model(x)
    assert sum(e.recompiles for e in runner_of(model).entries.values()) == 0


class Broken(nn.Module):
    """A graph break in the middle; the second half reads no managed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.head(y)


@pytest.mark.parametrize("compile", [EAGER, False], ids=["aot_eager", "eager"])
def test_every_piece_of_a_broken_graph_is_forward_only_and_in_the_plans_precision(compile: object) -> None:
    model = Broken()
    x = torch.randn(4, 8)
    want = model(x).detach()
    fxresu.transform(model, compile=compile)
    in_phase(model, "predict")
    out = model(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, want, rtol=0.05, atol=0.05)
    if compile:
        tags = [r.plan_tag for e in runner_of(model).entries.values() for r in e.graphs]
        assert tags == [DEFAULT_PLANS[Phase.PREDICT].tag] * 2


def _resu(candidates: float, *, activations: str = "needed", **kwargs):
    """One block 192 -> 384 -> 192, without its norm, and an unmanaged head."""
    recorder = Recorder()
    plans = {"resu": PhasePlan(Phase.RESU, "resu", activations=activations, optimizer_state="drop")}
    model = Net(192, 384, blocks=1, **kwargs)
    model.blocks[0].norm = nn.Identity()
    fxresu.transform(model, candidates=candidates, plans=plans, compile={"backend": recorder})
    return in_phase(model, "resu"), recorder


def test_column_candidates_save_only_their_columns_of_the_input() -> None:
    model, recorder = _resu(1 / 3)
    check_gradients(model, "resu", torch.randn(7, 192))
    entries = {n: m.entry for n, m in managed_weights(model).items()}
    assert entries["blocks.0.up.weight"].columns.numel() == 64
    assert entries["blocks.0.down.weight"].columns.numel() == 128
    per_token = sorted(t.shape[1] for t in saved(recorder.forward[0]) if t.dim() == 2 and t.shape[0] == 7)
    # Two panels, the head's whole input, and gelu's. Neither x nor gelu's result.
    assert per_token == [64, 128, 192, 384]
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase.RESU].tag].graphs
    assert _discarding(record).matches == 2
    assert _discarding(record).after["fxresu.linear_columns"] == 2
    assert "fxresu.linear" not in _discarding(record).after


def test_saved_bytes_shrink_against_saving_everything() -> None:
    sizes = {}
    for activations in ("save", "needed"):
        model, recorder = _resu(1 / 3, activations=activations)
        model(torch.randn(64, 192)).sum().backward()
        kept = [t for t in saved(recorder.forward[0]) if t.shape[:1] == (64,)]
        sizes[activations] = sum(t.numel() * t.element_size() for t in kept)
    assert sizes["needed"] < sizes["save"]


def test_eager_autograd_of_linear_columns_saves_the_panel_and_not_the_input() -> None:
    model, _ = _resu(1 / 3)
    entry = managed_weights(model)["blocks.0.up.weight"].entry
    x = torch.randn(7, 192, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weight = model.blocks[0].up._parameters["weight"]
        theta = (entry.anchor, entry.bits, entry.row_start, entry.columns)
        torch.ops.fxresu.linear_columns(x, weight, None, *theta, "")
    assert (7, 64) in [tuple(t.shape) for t in kept]
    assert not any(t.shape == x.shape for t in kept)
    assert not any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in kept)


def test_every_pruned_coordinate_as_candidate_leaves_the_linear_alone() -> None:
    model, recorder = _resu(1.0)
    check_gradients(model, "resu", torch.randn(7, 192))
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase.RESU].tag].graphs
    assert _discarding(record).matches == 0


def test_a_transposed_linear_keeps_its_whole_input_and_the_right_gradient() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 128))

        def forward(self, x):
            return x @ self.weight

    model = fxresu.transform(Transposed(), include="weight", candidates=0.5, compile=EAGER)
    in_phase(model, "resu")
    check_gradients(model, "resu", torch.randn(5, 64))
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase.RESU].tag].graphs
    assert _discarding(record).matches == 0


class Conv1DBlock(nn.Module):
    """GPT-2's feed-forward: weights [in, out], with an unmanaged head behind it."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.up, self.down, self.head = conv1d(384, 192), conv1d(192, 384), nn.Linear(192, 4)

    def forward(self, x):
        return self.head(self.down(torch.nn.functional.gelu(self.up(x))))


def _conv1d(activations: str = "needed", compile: object = None):
    recorder = Recorder()
    plans = {"resu": PhasePlan(Phase.RESU, "resu", activations=activations, optimizer_state="drop")}
    model = fxresu.transform(
        Conv1DBlock(), candidates=1 / 3, plans=plans, exclude="head.*",
        compile={"backend": recorder} if compile is None else compile,
    )  # fmt: skip
    return in_phase(model, "resu"), recorder


def test_linears_of_one_input_keep_one_panel_of_it() -> None:
    """Queries, keys and values choose the same inputs, and select them by one operand."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(192, 96) for _ in range(3))

        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return torch.softmax(q @ k.t(), -1) @ v

    recorder = Recorder()
    model = fxresu.transform(Attention(), candidates=1 / 3, compile={"backend": recorder})
    in_phase(model, "resu")
    check_gradients(model, "resu", torch.randn(7, 192))
    assert _per_token(recorder).count(64) == 1
    (one,) = {m.entry.columns.data_ptr() for m in managed_weights(model).values()}
    assert one


def _per_token(recorder: Recorder) -> list[int]:
    """Features of what is saved for each of 7 tokens; a product may save its operand turned round."""
    kept = [t for t in saved(recorder.forward[0]) if t.dim() == 2 and 7 in t.shape]
    return sorted(t.numel() // 7 for t in kept)


def test_inputs_of_a_conv1d_are_rows_and_only_their_columns_of_the_input_are_saved() -> None:
    model, recorder = _conv1d()
    check_gradients(model, "resu", torch.randn(7, 192))
    entries = {n: m.entry for n, m in managed_weights(model).items()}
    assert entries["up.weight"].theta_shape == (64, 384) and entries["down.weight"].theta_shape == (128, 192)
    assert _per_token(recorder) == [64, 128, 192, 384]  # two panels, the head's whole input, and gelu's
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase.RESU].tag].graphs
    assert _discarding(record).after["fxresu.linear_columns"] == 2
    model, recorder = _conv1d("save")
    check_gradients(model, "resu", torch.randn(7, 192))
    assert _per_token(recorder) == [192, 192, 384, 384]


def test_a_conv1d_in_eager_and_under_autocast() -> None:
    model, _ = _conv1d(compile=False)
    check_gradients(model, "resu", torch.randn(7, 192))
    model, _ = _conv1d(compile=EAGER)
    x = torch.randn(7, 192)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()
    low = {n: m.entry.anchor.grad.clone() for n, m in managed_weights(model).items()}
    for m in managed_weights(model).values():
        m.entry.anchor.grad = None
    model(x).sum().backward()
    for name, m in managed_weights(model).items():
        exact = m.entry.anchor.grad
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name], exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))


def test_column_candidates_inside_a_checkpoint_region() -> None:
    model, _ = _resu(1 / 3, recompute="on")
    check_gradients(model, "resu", torch.randn(7, 192))


def test_frozen_theta_saves_no_panel() -> None:
    recorder = Recorder()
    model = fxresu.transform(Net(192, 384, blocks=1), candidates=1 / 3, compile={"backend": recorder})
    in_phase(model, "resu", train_theta=False)
    model(torch.randn(7, 192)).sum().backward()
    assert not any(t.shape == (7, 64) for t in saved(recorder.forward[0]))
    assert all(m.entry.anchor.grad is None for m in managed_weights(model).values())
