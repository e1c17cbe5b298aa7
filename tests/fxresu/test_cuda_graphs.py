"""`compile={"mode": "reduce-overhead"}`: replays in every phase, over phase changes and micro-batches."""

from __future__ import annotations

import pytest
import torch
from fxresu_cycles import Net, batch, make
from torch import nn

import fxresu
from fxresu.model_state import managed_weights
from fxresu.passes import Phase

GRAPHS = {"mode": "reduce-overhead"}


class Inputs:
    """A backend that notes which of the captured graph's inputs keep their address."""

    def __init__(self) -> None:
        self.static: dict[int, str | None] = {}

    def __call__(self, module, inputs):
        for node, value in zip((n for n in module.graph.nodes if n.op == "placeholder"), inputs):
            kind = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            if isinstance(value, torch.Tensor):
                self.static[value.data_ptr()] = kind
        return module.forward


@pytest.mark.parametrize("phase", ["sparse", "resu"])
def test_masks_and_copies_are_read_where_they_lie(phase: str) -> None:
    """Otherwise every replay would begin by copying them, the bfloat16 weights of the whole model among them."""
    backend = Inputs()
    model = fxresu.transform(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), compile={"backend": backend})
    fxresu.set_phase(model, "sparse")
    if phase == "resu":
        fxresu.set_phase(model, "resu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(4, 64))
    for managed in managed_weights(model).values():
        assert backend.static[managed.entry.bits.data_ptr()] == "unguarded"
        if phase == "resu" and managed.entry.low is not None:
            assert backend.static[managed.entry.low.data_ptr()] == "unguarded"


def _loss_and_gradients(model: nn.Module, step: int, backward: bool, low: bool = False) -> list[torch.Tensor]:
    if backward and torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()
    x, y = batch(step, device="cuda")
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=low):
        loss = model(x, y)
    if not backward:
        return [loss.detach().clone()]
    loss.backward()
    anchors = [m.entry.anchor for m in managed_weights(model).values() if m.entry.anchor is not None]
    leaves = [*model.parameters(), *anchors]
    found = [loss.detach().clone(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]
    for leaf in leaves:
        leaf.grad = None
    return found


ALL = ["warmup", "dense", "sparse", "resu", "predict", "correct", "resu", "sparse", "resu", "dense"]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"candidates": 0.5}, {"storage": "packed"}, {"storage": "offload"}],
                         ids=lambda o: next(iter(o.values()), "resident"))  # fmt: skip
def test_every_phase_replays_what_eager_computes(options: dict) -> None:
    """Through all phases, some twice: losses and gradients of the third replay are those of a model without graphs."""
    models = []
    for compile in (GRAPHS, False):
        torch.manual_seed(0)
        models.append(fxresu.transform(Net().cuda(), sparsity=0.5, compile=compile, **options))
    offloaded = options.get("storage") == "offload"  # computes with copies in bfloat16
    for phase in ALL:
        plan_trains = phase not in ("predict", "correct")
        for model in models:
            torch.manual_seed(1)
            fxresu.set_phase(model, phase)
            model.requires_grad_(True)
        for step in range(4):
            graphed, eager = (_loss_and_gradients(m, step, plan_trains, offloaded) for m in models)
        assert len(graphed) == len(eager), phase
        loose = 2e-2 if phase == "predict" or offloaded else 2e-3
        for a, b in zip(graphed, eager):
            torch.testing.assert_close(a.float(), b.float(), rtol=loose, atol=loose * float(b.float().abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("rule", ["adam", "selective"])
def test_a_cycle_on_cuda_graphs_gives_the_eager_curve(rule: str, accumulation: int) -> None:
    """Two cycles of every stage, with phase changes and several micro-batches for a step."""
    curves = {}
    for compile in (GRAPHS, False):
        cycle = make("cuda", transform={"compile": compile}, cycles=2, rule=rule, accumulation=accumulation)
        steps = cycle.total_steps * accumulation
        curves[bool(compile)] = torch.stack([cycle.step(batch(i, device="cuda")) for i in range(steps)]).cpu()
    off = (curves[True] - curves[False]).abs().max()
    assert off < 2e-3 * (1 + curves[False].abs().max()), off


@pytest.mark.gpu
def test_a_phase_change_records_each_phase_once_more_at_most() -> None:
    """New copies and masks lie elsewhere: one recording for a phase entered again, and none in the steps after."""
    from torch._inductor import cudagraph_trees

    torch.manual_seed(0)
    model = fxresu.transform(Net().cuda(), sparsity=0.5, compile=GRAPHS)

    def recordings() -> int:
        manager = cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
        return 0 if manager is None else int(manager.new_graph_id().id)  # ids count up by one a recording, and here

    seen: dict[str, list[int]] = {}
    for phase in ("sparse", "resu", "sparse", "resu"):
        fxresu.set_phase(model, phase)
        model.requires_grad_(True)
        before = recordings()
        for step in range(3):
            _loss_and_gradients(model, step, True)
        between = recordings()
        for step in range(3):
            _loss_and_gradients(model, step, True)
        assert recordings() - between <= 1, f"{phase} records on although nothing moved"
        seen.setdefault(phase, []).append(between - before)
    for phase, counts in seen.items():
        assert counts[1] <= counts[0] + 1, (phase, counts)


def test_phases_of_the_list_are_all_there_are() -> None:
    assert {Phase.parse(p) for p in ALL} == set(Phase)
