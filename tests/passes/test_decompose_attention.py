"""`nn.MultiheadAttention` in the graph: decomposed into what it stands for, the same numbers, one graph."""

import copy

import pytest
import torch
from fxresu_testing import EAGER, Recorder, check_gradients, in_phase
from torch import nn

import fxresu
from fxresu.model_state import managed_weights
from fxresu.passes.pipeline import op_counts
from fxresu.runner import runner_of

FULL = {**EAGER, "fullgraph": True}
L, N, S, E = 5, 3, 4, 16


class Attention(nn.Module):
    """Attention of x to itself, or to a memory made of it, with a call's keyword arguments."""

    def __init__(self, call: dict | None = None, memory: str = "self", **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, **options)
        self.call, self.memory = call or {}, memory

    def forward(self, x):
        key = x if self.memory == "self" else x[..., :S, :] if self.attention.batch_first else x[:S]
        value = key * 2 if self.memory == "other value" else key
        if self.attention.kdim != E:
            key = key[..., : self.attention.kdim]
        out, weights = self.attention(x, key, value, **self.call)
        return out if weights is None else out + weights.sum() * weights.square().sum()


def _mask(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.7
    mask[..., 0] = False
    return mask


CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
CASES = {
    "weights": (lambda: Attention(), 2),
    "no weights": (lambda: Attention({"need_weights": False}), 2),
    "batch first": (lambda: Attention({"need_weights": False}, batch_first=True), 2),
    "weights of every head": (lambda: Attention({"average_attn_weights": False}), 2),
    "without bias": (lambda: Attention({"need_weights": False}, bias=False), 2),
    "causal hint": (lambda: Attention({"need_weights": False, "attn_mask": CAUSAL, "is_causal": True}), 2),
    "causal hint and weights": (lambda: Attention({"attn_mask": CAUSAL, "is_causal": True}), 2),
    "bool mask": (lambda: Attention({"need_weights": False, "attn_mask": _mask(L, L)}), 2),
    "mask of every head": (lambda: Attention({"attn_mask": _mask(2 * N, L, L)}), 2),
    "padding": (lambda: Attention({"need_weights": False, "key_padding_mask": _mask(N, L)}), 2),
    "padding and mask": (lambda: Attention({"key_padding_mask": _mask(N, L), "attn_mask": _mask(L, L)}), 2),
    "memory": (lambda: Attention({"need_weights": False}, "memory"), 3),
    "memory with other values": (lambda: Attention({}, "other value"), 4),
    "widths of their own": (lambda: Attention({}, "other value", kdim=8), 4),
    "key bias and zeros": (
        lambda: Attention({"attn_mask": _mask(L, L), "key_padding_mask": _mask(N, L)}, add_bias_kv=True,
                          add_zero_attn=True), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
@pytest.mark.parametrize("name", CASES)
def test_every_form_with_the_same_numbers(name: str, phase: str) -> None:
    make, products = CASES[name]
    model = in_phase(fxresu.transform(make(), compile=FULL), phase)
    x = torch.randn((N, L, E) if model.attention.batch_first else (L, N, E))
    _in_double(model, phase, x)
    (record,) = next(iter(runner_of(model).entries.values())).graphs
    assert [r.reason for r in record.rewrites] == [""] * products
    assert {r.weight for r in record.rewrites} == set(managed_weights(model))
    assert record.passes[0].name == "decompose_attention" and record.passes[0].matches == 1
    assert "multi_head_attention_forward" not in record.passes[0].after


def _in_double(model: nn.Module, phase: str, x: torch.Tensor) -> None:
    """Masks of the call have a dtype; in double, those of the reference fit too."""
    calls = model.call
    model.call = {k: v.to(torch.float64) if k == "attn_mask" and v.is_floating_point() else v for k, v in calls.items()}
    reference = copy.deepcopy(model)
    model.call = calls
    fxresu.untransform(reference).double()
    want = reference(x.double())
    (want * torch.linspace(-1, 1, E, dtype=torch.float64)).square().sum().backward()
    got = model(x)
    (got * torch.linspace(-1, 1, E)).square().sum().backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    from fxresu_testing import gathered

    for name, managed in managed_weights(model).items():
        grad = reference.get_parameter(name).grad
        if phase == "resu":
            found, grad = managed.entry.anchor.grad, gathered(managed.entry, grad)
        else:
            found = managed.parameter.grad
            grad = grad if phase == "dense" else grad * managed.entry.mask()
        torch.testing.assert_close(found.double(), grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("need_weights", [True, False])
def test_without_a_batch(need_weights: bool) -> None:
    model = in_phase(fxresu.transform(Attention({"need_weights": need_weights}), compile=FULL), "resu")
    check_gradients(model, "resu", torch.randn(L, E), tol=1e-4)
    assert not any(r.reason for r in next(iter(runner_of(model).entries.values())).graphs[0].rewrites)


def test_dropout_draws_as_without_the_decomposition() -> None:
    torch.manual_seed(0)
    plain = Attention({"need_weights": False}, dropout=0.5)
    model = fxresu.transform(copy.deepcopy(plain), compile=FULL)
    x = torch.randn(L, N, E)
    outs = []
    for module in (plain, model):
        torch.manual_seed(1)
        outs.append(module(x))
    torch.testing.assert_close(*outs)
    assert not torch.allclose(outs[0], model(x))


def test_lengths_and_batches_of_any_size_share_a_graph() -> None:
    model = fxresu.transform(Attention({"need_weights": False}), compile={**FULL, "dynamic": True})
    for length, batch in ((5, 3), (7, 2), (9, 4)):
        x = torch.randn(length, batch, E)
        torch.testing.assert_close(model(x), fxresu.untransform(copy.deepcopy(model))(x))
    (entry,) = runner_of(model).entries.values()
    assert len(entry.graphs) == 1


def test_attention_without_managed_weights_is_left_as_it_is() -> None:
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(E, E), Attention({"need_weights": False}))
    fxresu.transform(model, include="0.weight", compile={"backend": recorder})
    model(torch.randn(L, N, E))
    assert op_counts(recorder.captured[0])["multi_head_attention_forward"] == 1


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("phase", ["sparse", "resu"])
@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_all_weights_of_a_transformer_are_rewritten(phase: str, storage: str) -> None:
    make = nn.Transformer(E, 2, 2, 2, 32, 0.0, batch_first=True)
    model = in_phase(fxresu.transform(make, compile=FULL, storage=storage), phase)
    check_gradients(model, phase, torch.randn(N, L, E), torch.randn(N, S, E), tol=1e-4)
    (record,) = next(iter(runner_of(model).entries.values())).graphs
    left = {r.weight for r in record.rewrites if r.reason}
    # Packed weights are composed whole; cross-attention reads a piece for the queries and one for the memory.
    pieces = {f"decoder.layers.{i}.multihead_attn.in_proj_weight" for i in range(2)}
    assert left == (pieces if (phase, storage) == ("resu", "packed") else set())
    assert {r.weight for r in record.rewrites} == set(managed_weights(model))
