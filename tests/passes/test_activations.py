"""What the backward keeps: saved, computed again, or waiting on the host."""

import functools
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxresu_testing import EAGER, Attention, Net, check_gradients, in_phase, loss_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fxresu
from fxresu.errors import ConfigError
from fxresu.kernels import host_copies
from fxresu.kernels.host_copies import can_wait, from_host, to_host, transfers
from fxresu.model_state import managed_weights
from fxresu.passes import ActivationRecord, Phase, PhasePlan
from fxresu.passes._compat_partition import _draws_again, traced_by_aot
from fxresu.passes.backend import user_records
from fxresu.passes.measured_cost import measured_bytes
from fxresu.passes.tag_activations import cost_per_byte
from fxresu.runner import runner_of

_WEIGHTS = {"dense": "dense", "sparse": "sparse", "resu": "resu"}
TRAINING = list(_WEIGHTS)


def plans(phase: str, activations: str, budget: float | int | None = None, **more: object) -> dict:
    return {phase: PhasePlan(Phase(phase), _WEIGHTS[phase], activations=activations, activation_budget=budget, **more)}


def transformed(model: nn.Module, phase: str, *policy: object, compile: object = EAGER, **options: object) -> nn.Module:
    made = fxresu.transform(model, plans=plans(phase, *policy), compile=compile, **options)
    return in_phase(made, phase)


def record_of(model: nn.Module) -> ActivationRecord:
    (graph,) = (g for e in runner_of(model).entries.values() for g in e.graphs)
    (found,) = graph.activations
    return found


def kept_in(model: nn.Module, *args: torch.Tensor, run=None) -> int:
    """Bytes that the compiled forward hands to autograd, every storage once, that it did not get from outside."""
    given = {t.untyped_storage().data_ptr() for t in (*args, *model.parameters(), *model.buffers())}
    for managed in managed_weights(model).values():
        for name in (*managed.entry.TENSORS, "anchor"):
            if (tensor := getattr(managed.entry, name)) is not None:
                given.add(tensor.untyped_storage().data_ptr())
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = (model if run is None else run)(*args)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del out
    return total


def net(**options: object) -> Net:
    return Net(64, 128, blocks=3, **options)


# --- recompute -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", TRAINING)
@pytest.mark.parametrize("candidates", [1.0, 0.5])
def test_cheap_results_are_computed_again(phase: str, candidates: float) -> None:
    x = torch.randn(32, 64)
    model = transformed(net(), phase, "recompute", candidates=candidates)
    measured = kept_in(model, x)
    record = record_of(model)
    # The residual stream enters each norm, and each activation function keeps what it gets.
    tokens = 32 * 4
    assert record.total("save") == 3 * tokens * (64 + 128)
    assert {r.op for r in record.rows if r.decision == "recompute"} <= {
        "aten.gelu", "aten.native_layer_norm[0]", "aten.native_layer_norm[1]", "aten.native_layer_norm[2]",
        "aten.index_select", "aten.view", "aten._unsafe_view", "aten.add.Tensor",
    }  # fmt: skip
    assert record.repeated >= 6
    assert record.total("save") < record.by_default
    assert measured == record.total("save")
    check_gradients(model, phase, x)


def test_left_alone_where_nothing_is_cheap() -> None:
    model = transformed(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "dense", "recompute")
    x = torch.randn(32, 64)
    kept_in(model, x)
    record = record_of(model)
    assert record.total("save") == record.by_default == 32 * 64 * 4
    assert record.repeated == record.total("recompute") == 0
    check_gradients(model, "dense", x)


def test_without_a_policy_the_partitioner_is_left_alone() -> None:
    model = in_phase(fxresu.transform(net(), compile=EAGER), "resu")
    kept_in(model, torch.randn(32, 64))
    (graph,) = (g for e in runner_of(model).entries.values() for g in e.graphs)
    assert graph.activations == []


def test_column_candidates_keep_their_columns_or_compute_them_again() -> None:
    x = torch.randn(32, 64)
    needed = in_phase(fxresu.transform(net(), candidates=0.5, compile=EAGER), "resu")
    again = transformed(net(), "resu", "recompute", candidates=0.5)
    assert kept_in(again, x) < kept_in(needed, x)
    (record,) = (g for e in runner_of(again).entries.values() for g in e.graphs)
    discarding = next(p for p in record.passes if p.name == "discard_activations")
    assert discarding.matches == 6


# --- what is repeated is near to what was saved -----------------------------------------------------------------------


class Split:
    """A compiler that keeps the parts of the joint graph and runs them operation by operation."""

    takes_partition = True

    def __call__(self, module: torch.fx.GraphModule, inputs: list, partition=None):
        def keep(*args, **kwargs):
            self.forward, self.backward = partition(*args, **kwargs)
            return self.forward, self.backward

        return traced_by_aot(module, inputs, keep, decompose=True)

    def sums_in_a_row(self, shape: tuple[int, ...]) -> int:
        """The longest chain of sums of this shape that the backward repeats: all are alive before the last is used."""
        names = {n.name for n in self.forward.graph.nodes if n.op == "call_function"}
        length: dict[torch.fx.Node, int] = {}
        for node in self.backward.graph.nodes:
            if node.op == "call_function" and node.name in names:
                operands = [getattr(n.meta["val"], "shape", ()) for n in node.all_input_nodes]  # a norm's bias is small
                repeated = node.target is torch.ops.aten.add.Tensor and operands == [shape, shape]
                length[node] = repeated + max((length.get(n, 0) for n in node.all_input_nodes), default=0)
        return max(length.values(), default=0)


def _stream(blocks: int, *policy: object, autocast: bool = True) -> tuple[Split, ActivationRecord]:
    split = Split()
    model = transformed(Net(64, 128, blocks=blocks), "dense", *policy, compile={"backend": split})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_of(model(torch.randn(32, 64)).float()).backward()
    return split, record_of(model)


@pytest.mark.parametrize("policy", [("recompute",), ("save", 0.5), ("recompute", 0.6)], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_residual_stream_is_not_repeated_whole(policy: tuple, autocast: bool) -> None:
    split, record = _stream(8, *policy, autocast=autocast)
    assert split.sums_in_a_row((32, 64)) <= 1
    assert record.repeated > 0 and record.total("save") < 0.7 * record.by_default


def test_every_other_sum_of_a_stream_is_saved_in_its_addends_place() -> None:
    kept = [_stream(blocks, "recompute")[1].total("save") for blocks in (4, 6, 8)]
    # For two blocks: what the activation functions get, a sum, and an addend; four statistics for each of the rows.
    assert kept[2] - kept[1] == kept[1] - kept[0] == 32 * (2 * 128 * 2 + 64 * 4 + 64 * 2 + 4 * 4)
    full = [_stream(blocks, "recompute", autocast=False)[1].total("save") for blocks in (4, 6)]
    assert full[1] - full[0] == 32 * (2 * 128 * 4 + 64 * 4 + 64 * 4 + 4 * 4)


def test_a_budget_too_small_for_short_chains_gets_longer_ones() -> None:
    shorter = _stream(8, "save", 0.5)[0].sums_in_a_row((32, 64))
    split, record = _stream(8, "save", 0.02)
    assert record.total("save") <= 0.02 * record.by_default
    assert split.sums_in_a_row((32, 64)) > shorter


@pytest.mark.parametrize("phase", TRAINING)
def test_gradients_of_a_deep_stream(phase: str) -> None:
    check_gradients(transformed(Net(64, 128, blocks=8), phase, "recompute"), phase, torch.randn(32, 64))


def test_only_what_is_used_across_a_product_ends_a_chain() -> None:
    """Without a stream every activation function is repeated, however long the row of them."""
    layers = [m for _ in range(6) for m in (nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))]
    model = transformed(nn.Sequential(*layers), "dense", "recompute")
    kept_in(model, torch.randn(32, 64))
    record = record_of(model)
    # What each activation function gets; the last norm has its input repeated too.
    assert record.total("save") == 6 * 32 * 64 * 4 and record.repeated == 17


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", TRAINING)
@pytest.mark.parametrize("budget", [0.7, 0.4, 100_000])
def test_a_budget_is_kept(phase: str, budget: float | int) -> None:
    x = torch.randn(32, 64)
    model = transformed(net(), phase, "save", budget)
    measured = kept_in(model, x)
    record = record_of(model)
    limit = budget if isinstance(budget, int) else budget * record.by_default
    assert measured == record.total("save") <= limit
    check_gradients(model, phase, x)


def test_less_budget_repeats_more() -> None:
    x = torch.randn(32, 64)
    found = []
    for budget in (1.0, 0.6, 0.3):
        model = transformed(net(), "dense", "save", budget)
        kept_in(model, x)
        found.append(record_of(model))
    assert found[0].repeated == 0
    assert found[0].repeated < found[1].repeated < found[2].repeated
    assert found[0].total("save") > found[1].total("save") > found[2].total("save")


def _joint(function, *args: torch.Tensor) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake")(*args)


def test_costs_tell_products_from_cheap_operations() -> None:
    x, w = torch.randn(512, 4096), torch.randn(4096, 4096)
    graph = _joint(lambda x, w: F.gelu(x @ w), x, w).graph
    product, gelu = (n for n in graph.nodes if n.op == "call_function")
    # 2 * 4096 FLOPs an element, of 4 bytes; gelu reads and writes.
    assert cost_per_byte(product) == pytest.approx(2 * 4096 / 4 / 200)
    assert cost_per_byte(gelu) == pytest.approx(2)


def test_costs_can_be_measured() -> None:
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    graph = _joint(lambda x, w: F.gelu(x @ w), x, w).graph
    product, gelu = (n for n in graph.nodes if n.op == "call_function")
    assert measured_bytes(product) > 0 and measured_bytes(gelu) > 0
    assert measured_bytes(product) == measured_bytes(product), "once"


def test_a_budget_that_cannot_be_kept_names_the_smallest() -> None:
    # Convolutions' results behind an in-place-free random operation cannot be repeated.
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.gelu(F.dropout(self.up(x), 0.5))

    model = transformed(Noisy(), "dense", "save", 1000)
    with pytest.raises(Exception, match=r"activation_budget=1000 in the plan of dense: 1,000 bytes are less than the"):
        model(torch.randn(32, 64))


# --- offload ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", TRAINING)
def test_saved_values_wait_on_the_host(phase: str) -> None:
    x = torch.randn(32, 64)
    model = transformed(net(), phase, "offload", candidates=0.5)
    transfers.clear()
    measured = kept_in(model, x)
    record = record_of(model)
    sent = [r for r in record.rows if r.decision == "offload"]
    small = [r for r in record.rows if r.decision == "save"]
    assert sent and all(r.bytes >= 1 << 14 for r in sent)
    assert all(r.reason for r in small)
    assert transfers["to_host"] == len(sent) and transfers["to_host_bytes"] == record.total("offload")
    assert transfers["from_host"] == 0
    assert measured == record.total("offload") + record.total("save")  # the host's tensors, on this machine
    transfers.clear()
    check_gradients(model, phase, x)
    assert transfers["from_host"] == transfers["to_host"] == len(sent)
    assert transfers["sent"] == transfers["arrived"] == len(sent), "every transfer is waited for"


def test_the_earliest_leave_first() -> None:
    x = torch.randn(64, 64)
    model = transformed(net(), "dense", "offload", 0.5)
    kept_in(model, x)
    record = record_of(model)
    assert record.total("save") <= 0.5 * record.by_default < record.total("save") + max(r.bytes for r in record.rows)
    blocks = {d: {r.module.split(".")[1] for r in record.rows if r.decision == d and r.module.startswith("blocks")}
              for d in ("save", "offload")}  # fmt: skip
    assert "0" in blocks["offload"] and "2" not in blocks["offload"] and "2" in blocks["save"]


def test_an_offload_budget_below_what_must_stay_is_refused() -> None:
    model = transformed(net(), "dense", "offload", 1000)
    with pytest.raises(Exception, match=r"activation_budget=1000 in the plan of dense: .* cannot wait on the host"):
        model(torch.randn(32, 64))


def test_views_of_one_result_leave_once() -> None:
    x = torch.randn(4, 32, 64)
    model = transformed(Attention(64, 4), "dense", "offload")
    transfers.clear()
    kept_in(model, x)
    qkv = [r for r in record_of(model).rows if r.module == "qkv"]
    assert [r.decision for r in qkv] == ["offload"] and qkv[0].bytes == 4 * 32 * 192 * 4
    check_gradients(model, "dense", x)


def test_the_reloaded_values_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison on the host reaches the gradients: nothing of the forward is kept beside it."""
    model = transformed(net(), "dense", "offload")
    loss = loss_of(model(torch.randn(32, 64)))
    kept = [t for t in _saved_of(loss.grad_fn) if isinstance(t, torch.Tensor)]
    assert kept
    with torch.no_grad():
        for tensor in kept:
            if tensor.numel() == 32 * 128:
                tensor.data.fill_(float("nan"))
    loss.backward()
    assert model.blocks[0].up.weight.grad.isnan().any()


def _saved_of(node) -> list:
    found, seen, stack = [], set(), [node]
    while stack:
        current = stack.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if hasattr(current, "saved_tensors") and "Compiled" in type(current).__name__:
            found += list(current.saved_tensors)
        stack += [n for n, _ in current.next_functions]
    return found


@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (2, 3, 4), ()])
def test_what_can_wait(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert can_wait(x)
    assert torch.equal(from_host(to_host(x), x.device), x)
    if x.dim() >= 2:
        turned = x.transpose(0, 1)
        back = from_host(to_host(turned), x.device)
        assert can_wait(turned) and torch.equal(back, turned) and back.stride() == turned.stride()
        assert shape[0] == 1 or not can_wait(x[:, ::2] if shape[1] > 2 else x[:, :1])
    assert not can_wait(torch.randn(1).expand(3))


def test_the_operations_are_registered_soundly() -> None:
    x = torch.randn(4, 5)
    for op, args in (
        (torch.ops.fxresu.to_host.default, (x,)),
        (torch.ops.fxresu.to_host_after.default, (x, torch.randn(3), torch.randn(3))),
        (torch.ops.fxresu.sent.default, (torch.randn(3), torch.randn(3))),
        (torch.ops.fxresu.from_host.default, (x, x.device)),
        (torch.ops.fxresu.arrive.default, (x,)),
        (torch.ops.fxresu.arrive_and_fetch.default, (x, torch.randn(3), x.device, None)),
        (torch.ops.fxresu.arrive_and_fetch.default, (x, torch.randn(3), x.device, torch.randn(2))),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# --- beside the user's own checkpointing -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [("recompute",), ("offload",), ("save", 0.9)], ids=str)
@pytest.mark.parametrize("phase", ["dense", "resu"])
def test_checkpoint_regions_inside_the_model(phase: str, policy: tuple) -> None:
    x = torch.randn(32, 64)
    plain = in_phase(fxresu.transform(net(recompute="on"), compile=EAGER), phase)
    model = transformed(net(recompute="on"), phase, *policy)
    assert kept_in(model, x) <= kept_in(plain, x)
    record = record_of(model)
    # What the user recomputes is neither saved nor sent away, and not counted as saved by the policy either.
    assert sum(r.bytes for r in record.rows) <= record.by_default
    assert not [r for r in record.rows if r.module.endswith((".up", ".down", ".norm")) and r.bytes > 32 * 64 * 4]
    check_gradients(model, phase, x)


@pytest.mark.parametrize("policy", [("recompute",), ("offload",)], ids=str)
def test_a_model_inside_a_checkpoint_region(policy: tuple) -> None:
    x = torch.randn(32, 64)
    model = transformed(net(), "resu", *policy, candidates=0.5)
    check_gradients(model, "resu", x, run=lambda x: checkpoint(model, x, use_reentrant=False))


def test_what_the_user_must_save_is_saved() -> None:
    def policy(ctx, op, *args, **kwargs):
        save = op in (torch.ops.aten.gelu.default,)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            return self.head(x)

    x = torch.randn(32, 64)
    model = transformed(Selective(64, 128), "dense", "recompute")
    kept_in(model, x)
    assert {r.op for r in record_of(model).rows if r.decision == "save" and r.bytes == 32 * 128 * 4} == {"aten.gelu"}
    check_gradients(model, "dense", x)


def test_dropout_is_not_drawn_again() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 256)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            dropped = F.dropout(F.gelu(self.up(x)), 0.5)
            return self.down(dropped), dropped.detach()

    model = transformed(Dropping(), "dense", "save", 0.6)
    out, dropped = model(torch.randn(32, 64))
    grad = torch.randn_like(out)
    out.backward(grad)
    assert record_of(model).repeated > 0
    assert 0.4 < float((dropped == 0).float().mean()) < 0.6
    torch.testing.assert_close(model.down.weight.grad, grad.t() @ dropped)


# --- caches and other compilers --------------------------------------------------------------------------------------


def test_a_change_of_policy_is_compiled_anew() -> None:
    """The same model under three policies in one process, with torch's caches on."""
    x = torch.randn(32, 64)
    kept = []
    for policy in (("save",), ("save", 0.4), ("offload",)):
        torch._dynamo.reset()
        model = transformed(Net(64, 128, blocks=2), "dense", *policy, compile=True)
        transfers.clear()
        measured = kept_in(model, x)
        (graph,) = (g for e in runner_of(model).entries.values() for g in e.graphs)
        assert bool(graph.activations) == (policy != ("save",))
        assert (transfers["to_host"] > 0) == (policy == ("offload",))
        kept.append(measured)
        check_gradients(model, "dense", x)
        # The first forward had no backward.
        assert transfers["to_host"] == transfers["sent"] == 2 * transfers["from_host"] == 2 * transfers["arrived"]
    assert kept[1] < 0.5 * kept[0]


def test_the_users_own_compile_follows_the_policy() -> None:
    x = torch.randn(32, 64)
    model = in_phase(fxresu.transform(Net(64, 128, blocks=1), plans=plans("resu", "offload"), compile=False), "resu")
    user_records.clear()
    transfers.clear()
    check_gradients(model, "resu", x, run=torch.compile(model))
    (record,) = user_records[-1].activations
    sent = sum(r.decision == "offload" for r in record.rows)
    assert transfers["to_host"] == transfers["from_host"] == sent > 0


@pytest.mark.parametrize(
    ("policy", "compile", "said"),
    [
        (("recompute",), False, "compile=False, but activations='recompute'"),
        (("save", 0.5), False, "activation_budget=0.5 of dense"),
        (("offload",), {"backend": "eager"}, r"compile\['backend'\]='eager', but activations='offload'"),
    ],
    ids=str,
)
def test_a_compiler_without_a_partitioner_is_refused(policy: tuple, compile: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        transformed(net(), "dense", *policy, compile=compile)


# --- without compilation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", TRAINING)
@pytest.mark.parametrize("budget", [None, 0.5, 40_000])
def test_eager_tensors_wait_on_the_host(phase: str, budget: float | int | None) -> None:
    x = torch.randn(32, 64)
    model = transformed(net(), phase, "offload", budget, compile=False)
    model(x).sum().backward()  # a share is one of the forward before
    transfers.clear()
    check_gradients(model, phase, x)
    # Of each block: the norm's input and result, the activation function's; of the head its input, which is small.
    everything = transfers["to_host_bytes"] if budget is None else None
    assert transfers["to_host"] == transfers["from_host"] > 0
    if budget is None:
        assert everything == 3 * 32 * 4 * (2 * 64 * 0 + 128 * 2)
    else:
        assert 0 < transfers["to_host_bytes"] < 3 * 32 * 4 * 128 * 2


def test_eager_backward_twice_and_a_dropped_graph() -> None:
    x = torch.randn(32, 64)
    model = transformed(net(), "dense", "offload", compile=False)
    model(x)  # its backward never comes
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = model.blocks[0].up.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.blocks[0].up.weight.grad, 2 * once)


# --- what inspect shows ----------------------------------------------------------------------------------------------


def test_inspect_shows_every_decision() -> None:
    model = net()
    found = fxresu.inspect(model, torch.randn(64, 64), phase="dense", plans=plans("dense", "offload", 0.5))
    (record,) = found.activations
    decisions = {r.decision for r in record.rows}
    assert {"save", "offload"} <= decisions
    kept = next(r for r in found.memory if r.component == "activations kept for the backward")
    assert kept.phase == record.total("save") < kept.plain
    text = str(found)
    assert re.search(r"offload +blocks\.\{0..1\}\.up +x2 +aten.addmm +float32 64x128", text)
    assert "waiting on the host" in text and "budget 0.5" in text
    assert found.to_dict()["activations"][0]["rows"][0]["decision"] in decisions
    assert fxresu.inspect(model, torch.randn(32, 64), phase="dense").activations == ()


@pytest.mark.parametrize("phase", ["dense", "resu"])
def test_a_compiled_backward_fetches_little_ahead(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed(Net(64, 256, blocks=6), phase, "offload", compile=True)
    x = torch.randn(2048, 64)
    model(x).square().mean().backward()
    transfers.clear()
    loss = model(x).square().mean()
    waiting = transfers["to_host_bytes"]
    fetched: list[tuple[StorageWeakRef, int]] = []
    held: list[int] = []

    def like(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        out = empty_like(x, *args, **kwargs)
        fetched.append((StorageWeakRef(out.untyped_storage()), out.nbytes))
        held.append(sum(size for storage, size in fetched if not storage.expired()))
        return out

    empty_like = host_copies._like
    monkeypatch.setattr(host_copies, "_like", like)
    loss.backward()
    assert sum(size for _, size in fetched) == waiting > 0
    assert max(held) < 0.4 * waiting


def peak_beside_the_host(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that one step of a compiled model takes at most, without what waits on the host."""

    def send(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        transfers["to_host"] += 1
        memory = torch.from_numpy(np.empty(x.untyped_storage().nbytes(), np.uint8))  # not from torch's allocator
        return memory.view(x.dtype).as_strided(x.shape, x.stride()).copy_(x), None

    for _ in range(2):
        model(x).square().mean().backward()
        model.zero_grad()
    monkeypatch.setattr(host_copies, "send", send)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(x).square().mean().backward()
    monkeypatch.undo()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("phase", ["dense", "resu"])
def test_compiled_offload_lowers_the_peak_as_much_as_it_says(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, peaks = torch.randn(2048, 128), {}
    for policy in (("save", 1.0), ("offload",)):
        model = transformed(Net(128, 512, blocks=6), phase, *policy, compile=True)
        transfers.clear()
        peaks[policy[0]] = peak_beside_the_host(model, x, monkeypatch)
    assert transfers["to_host"] == transfers["from_host"] > 0
    # Two blocks' at a time of six, where none is kept.
    assert peaks["offload"] < 0.45 * peaks["save"]


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["dense", "resu"])
def test_offload_uses_pinned_memory_and_lowers_the_peak(phase: str) -> None:
    x = torch.randn(4096, 512, device="cuda")
    peaks = {}
    for policy in (("save", 1.0), ("recompute",), ("offload",)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        made = Net(512, 2048, blocks=6).cuda()
        model = transformed(made, phase, *policy, compile=True)
        transfers.clear()
        for _ in range(3):
            model(x).square().mean().backward()
            model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).square().mean().backward()
        torch.cuda.synchronize()
        peaks[policy[0]] = torch.cuda.max_memory_allocated() - before
        assert transfers["pageable"] == 0
        assert transfers["to_host"] == transfers["from_host"]
        assert (transfers["to_host"] > 0) == (policy[0] == "offload")
        check_gradients(model, phase, x[:64], tol=2e-3)
        del model, made
    assert peaks["recompute"] < peaks["save"] and peaks["offload"] < 0.7 * peaks["save"]


@pytest.mark.gpu
def test_a_thousand_transfers_lose_nothing() -> None:
    x = torch.randn(1 << 20, device="cuda")
    for step in range(1000):
        host = to_host(x)
        y = x + 1.0
        torch.ops.fxresu.sent(host, x)
        x.fill_(float("nan"))  # its memory is anybody's now
        x = y
        back = from_host(host, x.device)
        torch.ops.fxresu.arrive(back)
        assert step % 100 or torch.equal(back + 1.0, x)
        del host, back


@pytest.mark.gpu
def test_eager_offload_on_a_gpu() -> None:
    x = torch.randn(512, 64, device="cuda")
    model = transformed(net().cuda(), "resu", "offload", compile=False)
    transfers.clear()
    check_gradients(model, "resu", x, tol=2e-3)
    assert transfers["to_host"] == transfers["from_host"] > 0 and transfers["pageable"] == 0


@pytest.mark.parametrize(("operation", "arguments", "draws"), [
    ("_scaled_dot_product_flash_attention", (0.0, True), False),
    ("_scaled_dot_product_flash_attention", (), False),
    ("_scaled_dot_product_flash_attention", (0.1, True), True),
    ("_scaled_dot_product_cudnn_attention", (None, True, 0.0), False),
    ("_scaled_dot_product_cudnn_attention", (None, True, 0.2), True),
    ("bernoulli", (), True),
    ("relu", (), False),
])  # fmt: skip
def test_what_draws_random_numbers_when_computed_again(operation: str, arguments: tuple, draws: bool) -> None:
    graph = torch.fx.Graph()
    tensors = [graph.placeholder(name) for name in "qkv"[: 3 if "attention" in operation else 1]]
    node = graph.call_function(getattr(torch.ops.aten, operation).default, (*tensors, *arguments))
    graph.output(node)
    module = torch.fx.GraphModule({}, graph)
    assert not _draws_again(module)  # computed once
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    assert _draws_again(module) == draws
