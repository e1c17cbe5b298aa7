"""Options of `fxresu train`, and the run's configuration made from them."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from .config import PRESETS, RULES, CycleConfig
from .errors import ConfigError
from .schedules import SCHEDULES

# Options of the cycle that the command line can set; the names are those of `CycleConfig`.
_CYCLE = (
    "cycles", "steps_per_cycle", "sparsity_start", "sparsity_end", "schedule", "granularity", "candidates", "rule",
    "theta_lr", "theta_init", "theta_epsilon", "optimizer_state", "theta_moments", "train_rest", "train_theta", "amnesty_start",
    "amnesty_end", "accumulation", "autocast", "grad_clip", "seed",
)  # fmt: skip


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
    cycle = parser.add_argument_group("cycle (see CycleConfig)")
    cycle.add_argument("--preset", choices=sorted(PRESETS), default="default")
    cycle.add_argument("--config", type=Path, metavar="FILE", help="TOML or JSON with options of the cycle")
    for name in ("cycles", "steps-per-cycle", "accumulation", "seed"):
        cycle.add_argument(f"--{name}", type=int)
    for name in ("sparsity-start", "sparsity-end", "candidates", "theta-lr", "theta-epsilon", "amnesty-start",
                 "amnesty-end", "grad-clip"):  # fmt: skip
        cycle.add_argument(f"--{name}", type=float)
    cycle.add_argument("--sparsity", type=float, help="the same sparsity in every cycle")
    cycle.add_argument("--split", type=float, nargs=3, metavar=("TRAIN", "STABILIZE", "RESU"))
    cycle.add_argument("--schedule", help=", ".join(SCHEDULES))
    cycle.add_argument("--granularity", help="row, layer, global, n:m, block:HxW")
    cycle.add_argument("--rule", help=", ".join(RULES))
    cycle.add_argument("--theta-init", help="normal, uniform, zero")
    cycle.add_argument("--optimizer-state", help="drop or keep")
    cycle.add_argument("--autocast", help="bf16")
    cycle.add_argument("--train-rest", action=argparse.BooleanOptionalAction)
    cycle.add_argument("--train-theta", action=argparse.BooleanOptionalAction)


def cycle_config(args: argparse.Namespace) -> CycleConfig:
    """The cycle's configuration: preset, then --config, then single options."""
    values: dict[str, Any] = _read(args.config) if args.config else {}
    for name in _CYCLE:
        value = getattr(args, name, None)
        if value is not None:
            values[name] = value
    if args.split is not None:
        values["split"] = tuple(args.split)
    if args.sparsity is not None:
        clash = [n for n in ("schedule", "sparsity_start", "sparsity_end") if getattr(args, n) is not None]
        if clash:
            option = f"--{clash[0].replace('_', '-')}"
            raise ConfigError(f"--sparsity={args.sparsity} is one sparsity for every cycle; leave out it or {option}")
        values |= {"sparsity_start": args.sparsity, "sparsity_end": args.sparsity, "schedule": "constant"}
    return CycleConfig.preset(args.preset, **values)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (tomllib.TOMLDecodeError, ValueError) as error:
        language = "TOML" if path.suffix == ".toml" else "JSON"
        raise ConfigError(f"--config {str(path)!r} is not {language}: {error}") from None


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
