"""Transfers in the graph: inserted where the plan asks, kept by compilers and caches, counted, with right results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fxresu_testing import Net, loss_of

import fxresu
from fxresu.kernels import transfers
from fxresu.model_state import managed_weights
from fxresu.passes import Phase, PhasePlan
from fxresu.phase_state import restore_ahead
from fxresu.runner import runner_of
from fxresu.state_manager import find_manager

RESU = PhasePlan(Phase.RESU, "resu", activations="needed", optimizer_state="pinned", restore_lookahead=3)


def make(plan: PhasePlan, compile: dict | bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = fxresu.transform(Net(blocks=1), compile=compile, plans={plan.phase: plan})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model._call_impl(torch.randn(6, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def inserted(model: torch.nn.Module) -> int:
    records = [r for e in runner_of(model).entries.values() for r in e.graphs]
    return sum(p.matches for r in records for p in r.passes if p.name == "insert_transfers")


@pytest.mark.parametrize("plan, count", [
    (RESU, 2),
    (PhasePlan(Phase.PREDICT, "effective", "bf16", "discard", "offload"), 2),
    (PhasePlan(Phase.PREDICT, "effective", "bf16", "discard", "offload", restore_lookahead=0), 0),
    (PhasePlan(Phase.RESU, "resu", optimizer_state="compress"), 0),
    (PhasePlan(Phase.RESU, "resu", optimizer_state="drop"), 0),
])  # fmt: skip
def test_only_where_the_plan_calls_back_ahead(plan: PhasePlan, count: int) -> None:
    model, optimizer = make(plan, {"backend": "aot_eager"})
    fxresu.set_phase(model, plan.phase, optimizer=optimizer)
    model(torch.randn(6, 16))
    assert inserted(model) == count
    assert PhasePlan.from_tag(plan.tag).transfers == bool(count)


def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    outputs = []
    fxresu.set_phase(model, "resu", optimizer=optimizer, rule="adam", betas=(0.9, 0.999))
    for i in range(steps):
        if i > 1:
            restore_ahead(model, steps - i)
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(i))
        out = model(x)
        loss_of(out).backward()
        fxresu.step_theta(managed_weights(model).values(), fxresu.CycleConfig(rule="adam"), 0.01, i + 1)
        outputs.append(out.detach())
    return outputs


def test_a_phase_whose_state_comes_back_in_the_graph(backend: str = "aot_eager") -> None:
    """Also run with Inductor, cold and from its cache, below."""
    model, optimizer = make(RESU, {"backend": backend})
    want = {k: v.clone() for p in model.parameters() for k, v in optimizer.state[p].items() if k != "step"}
    before = transfers.EXECUTED.copy()
    outputs = run(model, optimizer, 5)
    ran = transfers.EXECUTED - before
    assert ran["restore_begin"] == ran["restore_end"] == 5 and ran["idle"] == 0
    manager = find_manager(optimizer)
    counts = manager.read_counts()
    assert 0 < counts.ahead == counts.back == counts.out
    assert manager.owners().get("pinned", 0) == 0
    plain, other = make(RESU, False)
    for got, exact in zip(outputs, run(plain, other, 5)):
        torch.testing.assert_close(got, exact)
    fxresu.set_phase(model, "sparse", optimizer=optimizer, leave="discard")
    again = {k: v for p in model.parameters() for k, v in optimizer.state[p].items() if k != "step"}
    assert all(torch.equal(again[k], want[k]) for k in want)
    assert find_manager(other).read_counts().ahead == counts.ahead, "the same around an eager forward"


def test_what_cuda_graphs_replay_has_none() -> None:
    from fxresu.passes import configured_passes

    assert [p.name for p in configured_passes({}, graphed=False)].count("insert_transfers") == 1
    assert "insert_transfers" not in [p.name for p in configured_passes({}, graphed=True)]


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
from test_insert_transfers import test_a_phase_whose_state_comes_back_in_the_graph as check
from fxresu.kernels import transfers
from torch._dynamo.utils import counters
check("inductor")
c = counters["inductor"]
print(c["fxgraph_cache_bypass"], c["fxgraph_cache_miss"], c["fxgraph_cache_hit"], dict(transfers.EXECUTED))
"""


def test_a_warm_cache_runs_them_too(tmp_path: Path) -> None:
    """Effects are no reason to compile anew in every process."""
    here = Path(__file__).parent
    code = SCRIPT.format(paths=[str(here), str(here.parent / "support")])
    lines = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
            env={**__import__("os").environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append(done.stdout.splitlines()[-1].split(maxsplit=3))
    (bypass, miss, _, cold), (again, missed, hits, warm) = lines
    assert bypass == again == missed == "0" and int(miss) > 0 and int(hits) > 0
    assert cold == warm == "{'restore_begin': 5, 'restore_end': 5}"
