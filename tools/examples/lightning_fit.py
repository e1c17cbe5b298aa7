"""RESU cycles inside Lightning's Trainer: a small classifier on points in the plane.

python tools/examples/lightning_fit.py --out runs/lightning --stop-at 10
python tools/examples/lightning_fit.py --out runs/lightning --resume
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxresu import ResuLightningCallback


def spirals(count: int, seed: int) -> TensorDataset:
    """Points on three arms, and which arm each is on."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(3, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 4 * radius + 2 * torch.pi / 3 * arm + 0.1 * torch.randn(count, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


class Classifier(pl.LightningModule):
    """An ordinary LightningModule: nothing in it knows of sparsity."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--stop-at", type=int, help="stop after this epoch, as if the machine went away")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.manual_seed(0)
    callback = ResuLightningCallback(
        {"cycles": 2, "sparsity_start": 0.5, "sparsity_end": 0.7, "rule": "adam"},
        transform={"compile": args.compile},
        log=f"{args.out}/log",
    )
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=args.out, save_last=True, every_n_epochs=args.epochs // 4, enable_version_counter=False
    )
    stop = pl.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, _: setattr(trainer, "should_stop", trainer.current_epoch + 1 == args.stop_at)
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs, accelerator="auto", devices=1, gradient_clip_val=1.0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, keep, stop],
    )  # fmt: skip
    trainer.fit(
        Classifier(),
        DataLoader(spirals(2048, 0), batch_size=128, shuffle=True),
        DataLoader(spirals(512, 1), batch_size=512),
        ckpt_path="last" if args.resume else None,
    )
    for summary in callback.cycle.summaries:
        print(f"cycle {summary.cycle} {summary.stage}: {summary.sparsity:.0%} pruned, loss {summary.loss_last:.3f}")


if __name__ == "__main__":
    main()
