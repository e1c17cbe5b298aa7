"""RESU cycles in a loop under Accelerate: one line after `prepare`.

python tools/examples/accelerate_loop.py --out runs/accelerate --stop-at 250
python tools/examples/accelerate_loop.py --out runs/accelerate --resume
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxresu


def spirals(count: int) -> TensorDataset:
    """Points on three arms, and which arm each is on."""
    generator = torch.Generator().manual_seed(0)
    arm = torch.randint(3, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 4 * radius + 2 * torch.pi / 3 * arm + 0.1 * torch.randn(count, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/accelerate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stop-at", type=int, help="stop after this step, as if the machine went away")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    run = fxresu.attach(
        model, optimizer, {"cycles": 2, "sparsity_start": 0.5, "rule": "adam", "grad_clip": 1.0},
        total_steps=args.steps, transform={"compile": args.compile}, log=f"{args.out}/log",
    )  # fmt: skip
    accelerator.register_for_checkpointing(run)
    if args.resume:
        accelerator.load_state(f"{args.out}/state")
    data, first = spirals(2048), 2 * run.cycle.global_step
    sampler = fxresu.StepSampler(len(data), 64, start=first, stop=2 * args.steps)
    for points, arm in accelerator.prepare(DataLoader(data, batch_sampler=sampler)):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(points), arm)
            accelerator.backward(loss)
            run.loss(loss / 2)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and run.cycle.global_step % 100 == 0:
            accelerator.save_state(f"{args.out}/state")
        if accelerator.sync_gradients and run.cycle.global_step == args.stop_at:
            return
    run.detach()
    for summary in run.cycle.summaries:
        print(f"cycle {summary.cycle} {summary.stage}: {summary.sparsity:.0%} pruned, loss {summary.loss_last:.3f}")


if __name__ == "__main__":
    main()
