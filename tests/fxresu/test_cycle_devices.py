"""The cycle's options where the kernels differ: on each device, compiled, in every storage."""

from __future__ import annotations

import pytest
import torch
from fxresu_cycles import DEVICES, Net, batch, make, run

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.calibration import Calibration
from fxresu.mask_change import total_sparsity
from fxresu.model_state import managed_weights
from fxresu.runner import runner_of
from fxresu.saliency import score_of

OPTIONS = {
    "wanda++": {"prune_score": "wanda++", "commit": "wanda", "stabilizer": "dsnot"},
    "snip": {"prune_score": "gradient", "commit_score": "snip", "granularity": "global", "calibration_device": "cpu"},
    "threshold": {"prune_score": "random", "commit": "threshold", "commit_threshold": 0.1, "granularity": "layer"},
    "erk": {"distribution": "erk", "commit": "compare", "commit_score": "wanda", "theta_schedule": "cosine"},
}


def compiled(device: str) -> dict:
    return {"compile": True if device == "cuda" else {"backend": "aot_eager"}}


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_options_on_a_device(device: str, name: str, storage: str) -> None:
    if storage == "packed" and device == "cpu" and name != "snip":
        pytest.skip("the storage does not change how masks are chosen")
    cycle = make(device, transform={"storage": storage, **compiled(device)}, steps_per_cycle=15, schedule="constant",
                 sparsity_end=0.5, calibration_batches=3, **OPTIONS[name])  # fmt: skip
    run(cycle, device=device)
    assert cycle.finished and cycle.summaries[-1].resurrected > 0
    if name != "threshold":
        assert total_sparsity(cycle.model) == pytest.approx(0.5, abs=0.02)
    for managed in managed_weights(cycle.model).values():
        assert managed.parameter[~managed.entry.mask()].eq(0).all()
    assert all(entry.recompiles == 0 for entry in runner_of(cycle.model).entries.values())
    assert not runner_of(cycle.model).eager_calls


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_float16_compiled(device: str, rest: bool) -> None:
    cycle = make(device, transform=compiled(device), autocast="fp16", train_rest=rest, grad_clip=1.0, rule="adam")
    losses = run(cycle, device=device)
    assert cycle.finished and cycle.scaler is not None and losses[-1] < losses[0]
    cycle.scaler.update(2.0**60)
    before = [m.parameter.clone() for m in managed_weights(cycle.model).values()]
    cycle.step(batch(0, device=device))
    assert cycle.meter.skipped_updates == 1
    assert all(torch.equal(m.parameter, b) for m, b in zip(managed_weights(cycle.model).values(), before))


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_weights_compiled(device: str) -> None:
    torch.manual_seed(0)
    model = fxresu.transform(Net().to(device, torch.bfloat16), sparsity=0.5, **compiled(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = CycleConfig(cycles=1, train_steps=3, stabilize_steps=2, resu_steps=4, schedule="constant",
                         sparsity_end=0.5, prune_score="wanda", commit_score="snip", rule="adam")  # fmt: skip
    cycle = ResuCycle(model, optimizer, config, loss=lambda m, b: m(b[0].bfloat16(), b[1]).float())
    run(cycle, device=device)
    assert cycle.finished and all(m.parameter.dtype == torch.bfloat16 for m in managed_weights(model).values())


@pytest.mark.gpu
def test_random_scores_are_the_same_on_every_device() -> None:
    weight = torch.zeros(300, 500)
    a = score_of("random", "w", weight, seed=4)[0:300]
    assert torch.equal(a, score_of("random", "w", weight.cuda(), seed=4)[0:300].cpu())


@pytest.mark.gpu
def test_gradients_on_the_host_do_not_stay_on_the_device() -> None:
    layers = (torch.nn.Linear(1024, 1024) for _ in range(8))
    model = fxresu.transform(torch.nn.Sequential(*layers).cuda(), compile=False)
    x = torch.randn(4, 1024, device="cuda")
    calibration = Calibration(model, ["gradients", "squares"], "cpu")
    calibration.observe(lambda: model(x).square().mean())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calibration.observe(lambda: model(x).square().mean())
    weight = 1024 * 1024 * 4
    assert torch.cuda.memory_allocated() - before < weight
    assert torch.cuda.max_memory_allocated() - before < 5 * weight, "one weight's gradient, and its square, at a time"
    assert all(s.gradient_sums.device.type == "cpu" for s in calibration.weights.values())
