"""What the compiled graphs of a phase may hold, read off AOTAutograd's forward and backward graphs."""

from collections import Counter

import pytest
import torch
from fxresu_testing import Net, Recorder, check_gradients, in_phase, saved, targets, values

import fxresu
from fxresu.model_state import managed_weights

# Sizes that no activation has: a tensor of WEIGHT elements is a weight, or of a weight's size.
WIDTH, HIDDEN, TOKENS = 24, 40, 3
WEIGHT = WIDTH * HIDDEN


def _graphs(phase: str, **kwargs) -> tuple[Recorder, torch.nn.Module]:
    recorder = Recorder()
    torch.manual_seed(0)
    model = fxresu.transform(Net(WIDTH, HIDDEN), compile={"backend": recorder}, **kwargs)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(TOKENS, WIDTH))
    assert len(recorder.forward) == len(recorder.backward) == 1
    assert not recorder.inference
    return recorder, model


def _weight_sized(graph: torch.fx.GraphModule) -> Counter:
    """Operations whose result has at least as many elements as a weight, views not counted."""
    views = ("aten.t.", "aten.view.", "aten.permute.", "aten.transpose.", "aten.detach", "aten.expand.", "aten.alias")
    return Counter(
        str(n.target)
        for n, v in values(graph).items()
        if v.numel() >= WEIGHT and not any(w in str(n.target) for w in views)
    )


@pytest.fixture(scope="module")
def dense() -> Recorder:
    return _graphs("dense")[0]


@pytest.mark.parametrize("phase", ["sparse", "resu"])
def test_the_forward_is_that_of_dense(phase: str, dense: Recorder) -> None:
    recorder, _ = _graphs(phase)
    assert _weight_sized(recorder.forward[0]) == _weight_sized(dense.forward[0]) == Counter()
    assert targets(recorder.forward[0]) == targets(dense.forward[0])


def test_sparse_backward_adds_only_the_mask_in_plain_aten(dense: Recorder) -> None:
    recorder, _ = _graphs("sparse")
    extra = _weight_sized(recorder.backward[0]) - _weight_sized(dense.backward[0])
    assert "aten.where.self" in extra or "aten.where.ScalarOther" in extra
    assert not any(t.startswith("fxresu.") for t in targets(recorder.backward[0])), "an opaque op would not fuse"
    assert not any("mul.Tensor" in t for t in extra), "inf * 0 is not 0"
    allowed = ("where", "bitwise", "__rshift__", "arange", "ne", "eq", "slice", "full", "clone", "_to_copy")
    assert all(any(a in t for a in allowed) for t in extra), extra
    assert extra["aten.mm.default"] == 0


def test_resu_backward_gathers_each_dense_gradient_once_and_keeps_none(dense: Recorder) -> None:
    recorder, model = _graphs("resu")
    (graph,) = recorder.backward
    gathers = [n for n in graph.graph.nodes if str(n.target) == "fxresu.gather.default"]
    assert len(gathers) == len(managed_weights(model)) == 4
    for node in gathers:
        source = node.args[0]
        while len(source.users) == 1 and any(v in str(source.target) for v in ("aten.t.", "aten.view.")):
            source = source.args[0]
        assert list(node.args[0].users) == [node], "nothing but the gather reads dW"
    assert _weight_sized(graph) <= _weight_sized(dense.backward[0]), "dense has the same dW and nothing else"
    out = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    given = [n.meta["val"] for n in out if n is not None]
    assert not any(v.numel() >= WEIGHT for v in given), "W gets no gradient output"
    assert sorted(n.name for n in out if n in gathers) == sorted(n.name for n in gathers)


def test_a_sparse_gradient_that_overflows_at_pruned_coordinates_stays_finite_there() -> None:
    model = in_phase(fxresu.transform(Net(WIDTH, HIDDEN), compile={"backend": Recorder()}), "sparse")
    (model(torch.randn(TOKENS, WIDTH)).sum() * float("inf")).backward()
    for m in managed_weights(model).values():
        pruned = ~m.entry.mask()
        assert (m.parameter.grad[pruned] == 0).all()
        assert not m.parameter.grad[~pruned].isfinite().all()


def test_no_dense_weight_is_saved_that_dense_does_not_save(dense: Recorder) -> None:
    for phase in ("sparse", "resu"):
        recorder, _ = _graphs(phase)
        assert sorted(t.numel() for t in saved(recorder.forward[0]) if t.numel() >= WEIGHT) == sorted(
            t.numel() for t in saved(dense.forward[0]) if t.numel() >= WEIGHT
        )


def test_packed_composes_in_both_directions_and_saves_no_dense_weight() -> None:
    recorder, model = _graphs("resu", storage="packed")
    forward, backward = recorder.forward[0], recorder.backward[0]
    managed = len(managed_weights(model))
    assert targets(forward).count("fxresu.compose.default") == managed
    # The first layer's dX is needed too: x does not, but its norm trains.
    assert targets(backward).count("fxresu.compose.default") == managed
    assert not any(t.shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)) for t in saved(forward))
    inputs = [n.meta["val"] for n in forward.graph.nodes if n.op == "placeholder"]
    assert not any(isinstance(v, torch.Tensor) and v.shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)) for v in inputs)
    uses = {n.args[7] for g in (forward, backward) for n in g.graph.nodes if str(n.target) == "fxresu.compose.default"}
    assert uses == {0, 1}, "distinct arguments keep the two apart"


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_frozen_weights_cost_no_gradient(phase: str) -> None:
    recorder = Recorder()
    model = fxresu.transform(Net(WIDTH, HIDDEN), compile={"backend": recorder})
    in_phase(model, phase)
    for m in managed_weights(model).values():
        m.parameter.requires_grad_(False)
    model(torch.randn(TOKENS, WIDTH)).sum().backward()
    assert _weight_sized(recorder.backward[0]) == Counter()
    assert not any("gather" in t for t in targets(recorder.backward[0]))
    assert all(m.parameter.grad is None and m.entry.grad_of_theta() is None for m in managed_weights(model).values())


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_frozen_weights_freeze_theta_in_eager_too(storage: str) -> None:
    model = in_phase(fxresu.transform(Net(WIDTH, HIDDEN), compile=False, storage=storage), "resu")
    for m in managed_weights(model).values():
        m.parameter.requires_grad_(False)
    model(torch.randn(TOKENS, WIDTH)).sum().backward()
    assert all(m.parameter.grad is None and m.entry.grad_of_theta() is None for m in managed_weights(model).values())
