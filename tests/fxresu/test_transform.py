"""What `transform` and `untransform` leave as it was, what they choose, and what they refuse."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Net, in_phase
from torch import nn

import fxresu
from fxresu.errors import ConfigError
from fxresu.model_state import NotTransformedError, managed_weights, state_of
from fxresu.passes import Phase, PhasePlan

PHASES = ["dense", "sparse", "resu", "predict", "correct"]


class Tied(nn.Module):
    """Embedding tied to the head; two linears that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, tokens, *, gain: float = 1.0):
        return self.out(self.norm(self.b(self.a(self.embed(tokens)).relu()))) * gain


def _fingerprint(model: nn.Module) -> dict:
    """Everything about a module tree that a transform could leave traces in."""
    found = {}
    for name, m in model.named_modules():
        plain = {k: v for k, v in m.__dict__.items() if not isinstance(v, dict)}
        sizes = {k: list(v) for k, v in m.__dict__.items() if isinstance(v, dict)}
        found[name] = (type(m), sorted(plain), sizes)
    for n, p in model.named_parameters():
        found[f"hooks of {n}"] = (bool(p._backward_hooks), bool(getattr(p, "_post_accumulate_grad_hooks", None)))
    return found


def _values(model: nn.Module) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What stays


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("phase", PHASES)
def test_names_keys_buffers_and_signature_stay(phase: str, storage: str) -> None:
    model = Tied()
    plain = copy.deepcopy(model)
    assert fxresu.transform(model, storage=storage, compile=False) is model
    in_phase(model, phase)
    assert isinstance(model, Tied)
    assert isinstance(model.a, nn.Linear)
    assert type(model).__name__ == "Tied"
    assert repr(model) == repr(plain)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("phase", PHASES)
def test_state_dicts_load_both_ways(phase: str, storage: str) -> None:
    model, tokens = Tied(), torch.randint(11, (2, 5))
    donor = Tied()
    fxresu.transform(model, storage=storage, compile=False)
    in_phase(model, phase)
    plain = Tied()
    plain.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens), model(tokens), rtol=0.05 if phase == "predict" else 1e-6, atol=0.02)
    model.load_state_dict(donor.state_dict(), strict=True)
    entry = managed_weights(model)["a.weight"].entry
    want = donor.a.weight.detach().clone()
    if phase == "sparse":
        want[~entry.mask()] = 0
    assert torch.equal(model.state_dict()["a.weight"], want)
    assert torch.equal(model.state_dict()["embed.weight"], donor.embed.weight)


def test_a_load_keeps_dead_coordinates_zero_with_column_candidates() -> None:
    model = in_phase(fxresu.transform(Net(128, 192), candidates=0.5, compile=False), "resu")
    model.load_state_dict(Net(128, 192).state_dict())
    entry = managed_weights(model)["blocks.0.up.weight"].entry
    alive = entry.mask()
    alive[:, entry.columns.long()] = True
    weight = model.blocks[0].up.weight
    assert (weight[~alive] == 0).all()
    assert (weight[alive] != 0).all()


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_a_load_in_resu_reaches_theta(storage: str) -> None:
    model = in_phase(fxresu.transform(Net().bfloat16(), storage=storage, compile=False), "resu")
    donor = Net().bfloat16()
    model.load_state_dict(donor.state_dict())
    x = torch.randn(3, 16).bfloat16()
    torch.testing.assert_close(model(x), donor(x))
    entry = managed_weights(model)["blocks.0.up.weight"].entry
    from fxresu_testing import gathered

    torch.testing.assert_close(entry.theta.detach().double(), gathered(entry, donor.blocks[0].up.weight))


def test_tied_weights_are_managed_once() -> None:
    model = fxresu.transform(Tied(), compile=False)
    assert list(managed_weights(model)) == ["a.weight"]
    (managed,) = managed_weights(model).values()
    assert managed.parameter is model.b.weight is model.a.weight
    assert len(managed.owners) == 2


# What is chosen


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8))
        self.up_bias = nn.Parameter(torch.randn(3, 6))


class Zoo(nn.Module):
    """Everything the default rules decide about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.bag = nn.EmbeddingBag(7, 8)
        self.norm = nn.LayerNorm((3, 8))
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 4, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.upsample = nn.ConvTranspose2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.crossed = nn.MultiheadAttention(8, 2, kdim=4)
        self.lstm = nn.LSTM(8, 8)
        self.body = nn.Linear(8, 8)
        self.experts = Experts()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.lm_head = nn.Linear(8, 7)
        self.decoder = nn.Linear(8, 7)
        self.projection = nn.Linear(8, 7)
        self.projection.weight = self.embed.weight
        self.bilinear = nn.Bilinear(4, 4, 4)

    def get_output_embeddings(self):
        return self.decoder


def test_default_rules() -> None:
    model = fxresu.transform(Zoo(), compile=False)
    weights = managed_weights(model)
    attention = ["in_proj_weight", "out_proj.weight"]
    crossed = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert list(weights) == [
        "conv.weight",
        *(f"attention.{n}" for n in attention),
        *(f"crossed.{n}" for n in crossed),
        "body.weight",
        "experts.up",
    ]
    entries = {name: m.entry for name, m in weights.items()}
    assert (entries["conv.weight"].rows, entries["conv.weight"].k) == (4, 72)
    assert (entries["experts.up"].rows, entries["experts.up"].k) == (3 * 6, 8)
    skipped = state_of(model).skipped
    assert skipped["stem.weight"] == "a convolution of the input (3 channels)"
    assert skipped["depthwise.weight"] == "a grouped convolution"
    assert "ConvTranspose2d" in skipped["upsample.weight"]
    assert "LSTM" in skipped["lstm.weight_ih_l0"]
    assert "Experts" in skipped["experts.up_bias"]
    assert "embedding" in skipped["embed.weight"]
    assert "embedding" in skipped["bag.weight"]
    assert "embedding" in skipped["projection.weight"]
    assert skipped["lm_head.weight"] == skipped["decoder.weight"] == "output head"
    assert "LayerNorm" in skipped["norm.weight"]
    assert "Bilinear" in skipped["bilinear.weight"]
    assert "table" in skipped


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out", "fc_out", "proj_out"])
def test_heads_by_name(name: str) -> None:
    model = nn.Module()
    model.add_module("body", nn.Linear(4, 4))
    model.add_module(name, nn.Linear(4, 4))
    model.add_module("headline", nn.Linear(4, 4))
    fxresu.transform(model, compile=False)
    assert list(managed_weights(model)) == ["body.weight", "headline.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "managed"),
    [
        ("*", (), [f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")] + ["head.weight"]),
        ("blocks.0.*", (), ["blocks.0.up.weight", "blocks.0.down.weight"]),
        (["*.up", "head"], (), ["blocks.0.up.weight", "blocks.1.up.weight", "head.weight"]),
        ("*.weight", "blocks.*", ["head.weight"]),
        (None, "*.up.weight", ["blocks.0.down.weight", "blocks.1.down.weight"]),
        (None, ["blocks.1.up", "*.down"], ["blocks.0.up.weight"]),
        (None, "blocks.1.*", ["blocks.0.up.weight", "blocks.0.down.weight"]),
    ],
)
def test_patterns(include, exclude, managed: list[str]) -> None:
    model = fxresu.transform(Net(), include=include, exclude=exclude, compile=False)
    assert list(managed_weights(model)) == managed


def test_a_tied_weight_is_managed_at_all_its_readers_or_at_none() -> None:
    model = fxresu.transform(Tied(), include="out", compile=False)
    (managed,) = managed_weights(model).values()
    assert {(type(o).__name__, n) for o, n in managed.owners} == {("Embedding", "weight"), ("Linear", "weight")}
    other = Tied()
    with pytest.raises(ConfigError, match="nothing to manage"):
        fxresu.transform(other, include=["b", "out"], exclude=["a", "embed"], compile=False)
    third = Net(blocks=1)
    third.blocks[0].twin = nn.Linear(16, 5, bias=False)
    third.blocks[0].twin.weight = third.head.weight
    fxresu.transform(third, compile=False)
    assert "blocks.0.twin.weight" not in managed_weights(third), "it is the output head's"


@pytest.mark.parametrize("phase", ["sparse", "resu"])
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
def test_an_embedding_managed_by_request_trains_right(phase: str, compile) -> None:
    from fxresu_testing import check_gradients

    model = fxresu.transform(Tied(), include=["embed", "a"], compile=compile)
    in_phase(model, phase)
    check_gradients(model, phase, torch.randint(11, (2, 5)))


def test_what_cannot_be_managed_is_left_alone_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Linear(4, 4)
            self.lstm = nn.LSTM(4, 4)
            self.strided = nn.Linear(4, 4)
            self.strided.weight = nn.Parameter(torch.randn(4, 4).t())
            self.parametrized = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
            self.sparse_grad = nn.Embedding(4, 4, sparse=True)
            self.renormed = nn.Embedding(4, 4, max_norm=1.0)
            self.complex = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    model = fxresu.transform(Odd(), include="*", compile=False)
    assert list(managed_weights(model)) == ["fine.weight"]
    skipped = state_of(model).skipped
    assert "LSTM" in skipped["lstm.weight_ih_l0"]
    assert skipped["strided.weight"] == "not contiguous"
    assert "parametrized" in skipped["parametrized.parametrizations.weight.original"]
    assert "sparse" in skipped["sparse_grad.weight"]
    assert "max_norm" in skipped["renormed.weight"]
    assert "complex" in skipped["complex"]


# What is refused


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)


BAD = {
    "sparsity 1": (Net, {"sparsity": 1.0}, ["sparsity=1.0", r"\[0, 1\)"]),
    "sparsity negative": (Net, {"sparsity": -0.1}, ["sparsity=-0.1"]),
    "sparsity nan": (Net, {"sparsity": float("nan")}, ["sparsity=nan"]),
    "sparsity text": (Net, {"sparsity": "half"}, ["sparsity='half'"]),
    "sparsity bool": (Net, {"sparsity": True}, ["sparsity=True"]),
    "granularity unknown": (Net, {"granularity": "column"}, ["column", "row"]),
    "granularity type": (Net, {"granularity": 7}, ["granularity", "7"]),
    "n:m does not divide K": (Net, {"granularity": "2:5", "sparsity": 0.6}, ["2:5", "16"]),
    "n:m against sparsity": (Net, {"granularity": "2:4", "sparsity": 0.7}, ["sparsity=0.7", "2:4"]),
    "n over m": (Net, {"granularity": "5:4"}, ["5:4"]),
    "candidates 0": (Net, {"candidates": 0}, ["candidates=0", r"\(0, 1\]"]),
    "candidates 2": (Net, {"candidates": 2}, ["candidates=2"]),
    "storage": (Net, {"storage": "paged"}, ["storage='paged'", "resident, packed"]),
    "compile": (Net, {"compile": "fast"}, ["compile='fast'"]),
    "compile option": (Net, {"compile": {"bakend": "inductor"}}, ["bakend"]),
    "compile backend": (Net, {"compile": {"backend": "no_such_backend"}}, ["no_such_backend"]),
    "compile mode": (Net, {"compile": {"mode": "fastest"}}, ["fastest"]),
    "plans unknown phase": (Net, {"plans": {"resting": PhasePlan(Phase.DENSE, "dense")}}, ["resting", "warmup"]),
    "plans wrong phase": (Net, {"plans": {"resu": PhasePlan(Phase.DENSE, "dense")}}, ["plans\\['resu'\\]"]),
    "plans not a plan": (Net, {"plans": {"resu": "bf16"}}, ["plans\\['resu'\\]", "PhasePlan"]),
    "include nothing": (Net, {"include": "layers.*"}, ["include='layers.*'", "blocks.0.up.weight"]),
    "include one of two": (Net, {"include": ["blocks.0.*", "heads"]}, ["include='heads'"]),
    "include empty": (Net, {"include": []}, ["nothing to manage", "include"]),
    "include not text": (Net, {"include": [3]}, ["pattern=3"]),
    "exclude nothing": (Net, {"exclude": "layers.*"}, ["exclude='layers.*'"]),
    "exclude all": (Net, {"exclude": "*"}, ["nothing to manage", "excluded"]),
    "nothing manageable": (Conv, {}, ["Conv", "nothing to manage", "include="]),
    "no parameter": (nn.ReLU, {}, ["ReLU", "nothing to manage"]),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), {}, ["0.weight", "uninitialized"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_value_and_remedy_and_changes_nothing(name: str) -> None:
    make, kwargs, words = BAD[name]
    model = make()
    before = _fingerprint(model)
    with pytest.raises(ConfigError) as info:
        fxresu.transform(model, **kwargs)
    for word in words:
        assert info.match(word)
    assert _fingerprint(model) == before


@pytest.mark.parametrize("what", [None, "model", nn.Linear, {"a": 1}])
def test_only_modules(what) -> None:
    with pytest.raises(ConfigError, match="torch.nn.Module"):
        fxresu.transform(what)


def test_a_model_is_transformed_once() -> None:
    model = fxresu.transform(Net(), compile=False)
    before = _fingerprint(model)
    with pytest.raises(ConfigError, match="transformed already"):
        fxresu.transform(model)
    with pytest.raises(ConfigError, match="transformed already"):
        fxresu.transform(nn.Sequential(model))
    with pytest.raises(ConfigError, match="transformed already"):
        fxresu.transform(model.blocks[0])
    assert _fingerprint(model) == before


def test_untransform_refuses_what_is_not_transformed() -> None:
    model = fxresu.transform(Net(), compile=False)
    for other in (Net(), model.blocks[0], nn.Sequential(model)):
        with pytest.raises(NotTransformedError, match="fxresu.transform"):
            fxresu.untransform(other)


# The way back


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("compile", [EAGER, False], ids=["compiled", "eager"])
def test_untransform_leaves_the_plain_model(phase: str, storage: str, compile) -> None:
    model, x = Net(), torch.randn(3, 16)
    before = _fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fxresu.transform(model, storage=storage, compile=compile)
    in_phase(model, "sparse", optimizer)
    if phase == "dense":
        fxresu.phases.set_phase(model, "dense", optimizer=optimizer)
    elif phase != "sparse":
        in_phase(model, "resu", optimizer)
        in_phase(model, phase, optimizer) if phase != "resu" else None
    out = model(x)
    if out.requires_grad:
        out.sum().backward()
    weights = _values(model)
    assert fxresu.untransform(model) is model
    assert type(model) is Net
    assert _fingerprint(model) == before
    assert _equal(_values(model), weights)
    rtol = 0.05 if phase == "predict" else 1e-5
    torch.testing.assert_close(model(x), out, rtol=rtol, atol=rtol)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    pickle.loads(pickle.dumps(model))
    fxresu.transform(model, compile=False)


def test_a_transform_compiles_nothing_and_leaves_outputs_alone() -> None:
    model, tokens = Tied(), torch.randint(11, (2, 5))
    want = model(tokens, gain=2.0)
    fxresu.transform(model, compile=EAGER)
    torch.testing.assert_close(model(tokens, gain=2.0), want)
    assert F.linear(torch.ones(16), model.a.weight).shape == (16,)


def test_untransform_keeps_parametrizations_of_managed_modules() -> None:
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, x = fxresu.transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), compile=False), torch.ones(1, 4)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
    want = model(x)
    fxresu.untransform(model)
    assert torch.equal(model(x), want)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), want)


def test_a_parametrized_root_is_copied_with_a_runner_of_its_own() -> None:
    model = fxresu.transform(nn.Linear(4, 4), compile=EAGER)
    nn.utils.parametrizations.orthogonal(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.bias += 1
    x = torch.ones(1, 4)
    torch.testing.assert_close(twin(x), model(x) + 1)
