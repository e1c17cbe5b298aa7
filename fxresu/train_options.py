"""Options of `fxresu train`, and the run's configuration made from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .config import PRESETS, CycleConfig
from .errors import ConfigError
from .host_budget import budget_bytes
from .options import add_option_arguments, given_options, read_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fxresu train`."""
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/train"), help="folder for log, checkpoint, report, picture")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    run.add_argument(
        "--save-every", type=int, default=100, metavar="N", help="steps between checkpoints; 0: only at the end"
    )
    run.add_argument("--keep-last", type=int, default=1, metavar="N", help="checkpoints to keep")
    run.add_argument(
        "--log", action="append", choices=("tensorboard", "wandb"),
        help="also log there (default: TensorBoard if installed, W&B if installed and configured)",
    )  # fmt: skip
    run.add_argument("--device", help="cpu, cuda, cuda:N (default: cuda if there is one)")
    run.add_argument(
        "--host-budget", type=budget_bytes, metavar="SIZE",
        help="most memory that the process may hold on a CPU, such as 472MB: splits batches, keeps libraries out",
    )  # fmt: skip
    run.add_argument(
        "--memory-bill", action=argparse.BooleanOptionalAction, default=True,
        help="predict the memory of each stage after the run, in another process, for the report; without it the bill"
        " lists what was counted",
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="your own text (default: text found on this machine)"
    )
    data.add_argument("--corpus", type=Path, help="folder of the tokenised corpus (default: beside --out)")
    data.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bpe")
    data.add_argument("--vocab", type=int, default=2048, help="size of the BPE vocabulary")
    data.add_argument("--corpus-bytes", type=int, default=24_000_000, help="least bytes of text to collect")
    model = parser.add_argument_group("model")
    for name, text in (("layers", "blocks"), ("width", "model width"), ("heads", "attention heads")):
        model.add_argument(f"--{name}", type=int, help=f"{text} (default: by device)")
    model.add_argument("--init", type=Path, metavar="FILE", help="weights to start from (see --warm-start)")
    train = parser.add_argument_group("training")
    train.add_argument("--batch", type=int, default=None, help="sequences a micro-batch")
    train.add_argument("--seq", type=int, default=None, help="tokens a sequence")
    train.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    train.add_argument("--weight-decay", type=float, default=0.1)
    train.add_argument(
        "--warmup", type=int, default=20, help="steps of linear learning-rate warm-up, then cosine to a tenth"
    )
    train.add_argument("--eval-batches", type=int, default=8, help="held-out batches at every phase's start and end")
    train.add_argument("--storage", choices=("resident", "packed"), default="resident")
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    add_cycle_arguments(parser)


def add_cycle_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `cycle_config` reads."""
    cycle = parser.add_argument_group("cycle (see CycleConfig)")
    cycle.add_argument("--preset", choices=sorted(PRESETS))
    cycle.add_argument("--config", type=Path, metavar="FILE", help="TOML, YAML or JSON with options of the cycle")
    cycle.add_argument("--sparsity", type=float, help="the same sparsity in every cycle")
    add_option_arguments(parser, CycleConfig)


def cycle_config(args: argparse.Namespace) -> CycleConfig:
    """The cycle's configuration: preset, then --config (which may name a preset itself), then single options."""
    values: dict[str, Any] = read_options(args.config) if args.config else {}
    preset = args.preset or values.pop("preset", "default")
    values = {k: v for k, v in values.items() if k != "preset"} | given_options(args, CycleConfig)
    if args.sparsity is not None:
        clash = [n for n in ("schedule", "sparsity_start", "sparsity_end") if getattr(args, n) is not None]
        if clash:
            option = f"--{clash[0].replace('_', '-')}"
            raise ConfigError(f"--sparsity={args.sparsity} is one sparsity for every cycle; leave out it or {option}")
        values |= {"sparsity_start": args.sparsity, "sparsity_end": args.sparsity, "schedule": "constant"}
    return CycleConfig.preset(preset, **values)


def check(args: argparse.Namespace) -> None:
    """ConfigError for numbers that make no sense."""
    for name in ("batch", "seq", "eval_batches", "layers", "width", "heads", "vocab", "corpus_bytes", "keep_last"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: use a number of at least 1")
    for name in ("save_every", "warmup", "weight_decay"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)}: use 0 or more")
    if not args.lr > 0:
        raise ConfigError(f"--lr={args.lr}: use a positive number")
