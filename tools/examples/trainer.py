"""RESU cycles inside `transformers.Trainer`: a small GPT-2 learns to count.

python tools/examples/trainer.py --out runs/trainer
python tools/examples/trainer.py --out runs/trainer --resume
"""

from __future__ import annotations

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fxresu import ResuTrainerCallback


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards from anywhere, modulo 32."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + 7 * i) % 32
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    callback = ResuTrainerCallback(
        {"cycles": 2, "sparsity_start": 0.5, "sparsity_end": 0.7, "rule": "adam"},
        transform={"compile": args.compile},
        log=f"{args.out}/log",
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            output_dir=args.out, max_steps=args.steps, per_device_train_batch_size=16, learning_rate=3e-3,
            logging_steps=20, save_steps=args.steps // 3, save_total_limit=2, eval_strategy="steps",
            eval_steps=args.steps // 3, report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Counting(512),
        eval_dataset=Counting(64),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume or None)
    for summary in callback.cycle.summaries:
        print(f"cycle {summary.cycle} {summary.stage}: {summary.sparsity:.0%} pruned, loss {summary.loss_last:.3f}")
    trainer.save_model(f"{args.out}/final")  # a plain GPT-2, with zeros


if __name__ == "__main__":
    main()
