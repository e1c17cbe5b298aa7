"""Under Accelerate: prepared model and optimizer, accumulation, bf16 autocast, and `save_state`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fxresu_cycles import Net, batch

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'fxresu[integrations]'")

import fxresu  # noqa: E402
from fxresu import CycleConfig, ResuCycle  # noqa: E402

SHORT = {"cycles": 2, "train_steps": 4, "stabilize_steps": 2, "resu_steps": 4, "sparsity_start": 0.5, "grad_clip": 0.05}
STEPS = 20


def prepared(micro: int = 1, precision: str = "no", options: dict | None = None):
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro, mixed_precision=precision)
    torch.manual_seed(0)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=3e-3))
    run = fxresu.attach(model, optimizer, options or SHORT, transform={"compile": False})
    accelerator.register_for_checkpointing(run)
    return accelerator, model, optimizer, run


def go(accelerator, model, optimizer, first: int, last: int) -> None:
    for i in range(first, last):
        with accelerator.accumulate(model):
            loss = model(*batch(i))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("micro", [1, 2])
def test_same_bits_as_the_cycles_own_step(micro: int) -> None:
    accelerator, model, optimizer, run = prepared(micro)
    go(accelerator, model, optimizer, 0, STEPS * micro)
    torch.manual_seed(0)
    reference = Net()
    fxresu.transform(reference, sparsity=0.7, compile=False)
    config = CycleConfig(**SHORT, accumulation=micro)
    cycle = ResuCycle(reference, torch.optim.AdamW(reference.parameters(), lr=3e-3), config)
    for i in range(STEPS * micro):
        cycle.step(batch(i))
    assert run.cycle.finished and run.cycle.global_step == STEPS
    trained = accelerator.unwrap_model(model).state_dict()
    for a, b in zip(reference.state_dict().values(), trained.values(), strict=True):
        assert torch.equal(a, b)
    assert run.cycle.summaries[2].loss_last == pytest.approx(cycle.summaries[2].loss_last)


@pytest.mark.parametrize("micro", [1, 3])
def test_theta_inside_the_backward(micro: int) -> None:
    """Accelerate says which micro-batch is the last of a step: the same bits."""
    ends = []
    for now in (False, True):
        parts = prepared(micro, options=SHORT | {"grad_clip": None, "theta_in_backward": now})
        go(*parts[:3], 0, STEPS * micro)
        assert parts[3].cycle.finished and parts[3].cycle.theta_optimizer.abandoned == 0
        ends.append(parts[0].unwrap_model(parts[1]).state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_bf16_autocast() -> None:
    parts = prepared(precision="bf16")
    go(*parts[:3], 0, STEPS)
    assert parts[3].cycle.finished and sum(s.theta_updates for s in parts[3].cycle.summaries) == 8


@pytest.mark.parametrize("at", [5, 8, 10])
def test_save_state_resumes_bit_exact(tmp_path: Path, at: int) -> None:
    accelerator, model, optimizer, _ = prepared()
    go(accelerator, model, optimizer, 0, at)
    accelerator.save_state(str(tmp_path / "c"))
    go(accelerator, model, optimizer, at, STEPS)
    end = {k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()}
    accelerator, model, optimizer, run = prepared()
    accelerator.load_state(str(tmp_path / "c"))
    assert run.cycle.global_step == at
    go(accelerator, model, optimizer, at, STEPS)
    assert all(torch.equal(end[k], v) for k, v in accelerator.unwrap_model(model).state_dict().items())
