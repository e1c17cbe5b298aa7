"""500 cycles in a row: nothing grows. Not memory, not graphs, not hooks, not what Python holds."""

from __future__ import annotations

import gc

import pytest
import torch
from fxresu_cycles import DEVICES, Net, batch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.ledger import current_rss
from fxresu.runner import runner_of

WARM = 50
SUMMARIES = 3  # a cycle keeps: one a stage
BASE = {"train_steps": 1, "stabilize_steps": 1, "resu_steps": 1, "schedule": "constant"}


def counts(cycle: ResuCycle) -> dict[str, int]:
    """Everything that must not grow, exactly."""
    gc.collect()
    model, optimizer = cycle.model, cycle.optimizer
    tables = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    tables += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    for module in model.modules():
        tables += [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    hooks = [p._post_accumulate_grad_hooks or () for p in model.parameters()]
    hooks += [p._backward_hooks or () for p in model.parameters()]
    entries = runner_of(model).entries.values()
    return {
        "hooks": sum(map(len, tables)) + sum(map(len, hooks)),
        "graphs": sum(len(e.graphs) for e in entries),
        "recompilations": sum(e.recompiles for e in entries),
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
        "optimizer tensors": sum(len(s) for s in optimizer.state.values()),
    }


def through(options: dict, device: str, kind: str) -> list[tuple[dict[str, int], int, int, int]]:
    """(counts, Python objects, resident bytes, device bytes) after `WARM` cycles and after all."""
    torch.manual_seed(0)
    config = CycleConfig(**BASE | {"sparsity_end": 0.5} | options)
    model = Net().to(device)
    fxresu.transform(model, sparsity=0.5, compile={"backend": "aot_eager"} if device == "cpu" else True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    part, seen = batch(0, 16, device), []
    cycle = ResuCycle(model, optimizer, config)
    run = fxresu.Attached(cycle) if kind == "attach" else None
    if run is not None:
        run.start()
    while not cycle.finished:
        if run is None:
            cycle.step(part)
        else:
            loop(model, optimizer, part)
        if cycle.global_step in (3 * WARM, 3 * config.cycles):
            held = torch.cuda.memory_allocated() if device == "cuda" else 0
            seen.append((counts(cycle), len(gc.get_objects()), current_rss(), held))
    return seen


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, part: tuple) -> None:
    optimizer.zero_grad()
    model(*part).backward()
    optimizer.step()


CASES = [
    ("step", {"cycles": 500}),
    ("attach", {"cycles": 120, "rule": "adam", "train_rest": True, "optimizer_state": "keep"}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, options", CASES, ids=str)
def test_nothing_grows(device: str, kind: str, options: dict) -> None:
    (before, objects, resident, held), (after, more_objects, more_resident, more_held) = through(options, device, kind)
    # Of all tensors in the process: what an earlier test left may go meanwhile.
    assert after.pop("tensors") <= before.pop("tensors")
    assert after == before
    assert before["recompilations"] == 0 and before["graphs"] == 3
    kept = SUMMARIES * (options["cycles"] - WARM)
    assert more_objects - objects < 3 * kept, "Python objects grow by more than the summaries"
    assert more_resident - resident < 8_000_000
    assert more_held == held
