"""`untransform` after any phase: a plain model with the same outputs, and nothing of ours left on it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from fxresu_cycles import Net, batch, make, run, until
from torch import nn

import fxresu
from fxresu.managed import ManagedWeight
from fxresu.managed_module import ManagedModule
from fxresu.model_state import managed_weights

STAGES = ["start", "train", "stabilize", "resu", "predict", "correct", "committed", "finished", "dense again"]


def brought_to(stage: str, storage: str, compile: object, **options):
    options = {"cycles": 1 if stage == "finished" else 2, "schedule": "constant", "sparsity_end": 0.5} | options
    if stage == "dense again":
        options |= {"schedule": [0.5, 0.0]}
    cycle = make(transform={"storage": storage, "compile": compile}, **options)
    if stage in ("train", "stabilize", "resu"):
        until(cycle, stage)
        for _ in range(2):
            cycle.step(batch(cycle.global_step))
    elif stage in ("predict", "correct"):
        until(cycle, "resu")
        cycle.step(batch(0))
        fxresu.set_phase(cycle.model, stage, optimizer=cycle.optimizer)
    elif stage == "committed":
        until(cycle, "train", 1)
    elif stage != "start":
        run(cycle)
    return cycle


def plain_output(model: nn.Module) -> torch.Tensor:
    """The effective weights in a model that was never transformed."""
    other = Net()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(*batch(77))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("storage", ["resident", "packed", "offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_left(stage: str, storage: str, compile: object) -> None:
    if storage == "offload" and (stage not in ("resu", "correct", "finished") or compile):
        pytest.skip("weights are away in RESU only")
    if compile and (storage == "packed") != (stage in ("resu", "correct", "finished")):
        pytest.skip("one storage for each compiled stage")
    autocast = "bf16" if storage == "offload" else None  # the copy that stays computes in it
    scores = {"prune_score": "wanda", "commit_score": "snip"}
    cycle = brought_to(stage, storage, compile, autocast=autocast, grad_clip=1.0, **scores)
    model, optimizer = cycle.model, cycle.optimizer
    want, keys = plain_output(model), list(model.state_dict())
    entries = [weakref.ref(m.entry) for m in managed_weights(model).values()]
    names = dict(Net().named_modules())
    assert fxresu.untransform(model) is model
    assert torch.equal(model(*batch(77)).detach(), want) and list(model.state_dict()) == keys
    fresh = Net()
    for name, module in model.named_modules():
        assert type(module) is type(names[name]) and not isinstance(module, ManagedModule)
        assert set(module.__dict__) == set(names[name].__dict__), name
        assert module._compiled_call_impl is None
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks",
                      "_load_state_dict_pre_hooks", "_state_dict_pre_hooks"):  # fmt: skip
            assert not getattr(module, hooks), (name, hooks)
    for (name, parameter), other in zip(model.named_parameters(), fresh.parameters()):
        assert type(parameter) is nn.Parameter and parameter.requires_grad, name
        assert parameter.is_contiguous() and parameter.shape == other.shape and parameter.dtype == other.dtype
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks, name
        own = {k for k in parameter.__dict__ if not k.startswith("_dynamo")}  # torch.compile marks what it has seen
        assert own == set(other.__dict__)
    for table in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        assert not getattr(optimizer, table)
    del cycle
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert all(r() is None for r in entries), "the records of managed weights are gone"
    # It is an ordinary model: it trains, is copied, and can be transformed again.
    loss = copy.deepcopy(model)(*batch(1))
    assert torch.isfinite(loss)
    again = fxresu.transform(model, compile=False)
    assert all(isinstance(m.entry, ManagedWeight) for m in managed_weights(again).values())


def test_the_optimizer_goes_on_with_the_plain_model() -> None:
    for stage in ("train", "stabilize", "resu", "committed"):
        cycle = brought_to(stage, "resident", False)
        model = fxresu.untransform(cycle.model)
        cycle.optimizer.zero_grad()
        before = copy.deepcopy(model.state_dict())
        model(*batch(3)).backward()
        cycle.optimizer.step()
        moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
        assert len(moved) == len(before), stage
