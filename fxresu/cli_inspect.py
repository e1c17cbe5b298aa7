"""`fxresu inspect MODEL`: arguments, and the inspection as text or JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from .inspection import Inspection
    from .models import ExampleInputs

_EPILOG = """examples:
  fxresu inspect demo
  fxresu inspect hf:llama --phase sparse            a 7B model, from its configuration, no weight allocated
  fxresu inspect "hf:llama?num_hidden_layers=2" --candidates 0.25 --expect 14
  fxresu inspect mypackage.models:build --phase predict --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fxresu inspect`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Show what the passes do to a model in a phase: which weights are managed, what became of the\n"
        "operations that read them, what executes, what each pass changed, and what was left alone and why.\n"
        "The model is captured, not compiled; it is called, not trained."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="'package.module:factory' (a function that returns a module, or a module and example inputs),"
        " 'hf:NAME', 'timm:NAME', or 'demo'",
    )
    add = parser.add_argument
    add("--phase", default="resu", help="warmup, dense, sparse, resu (default), predict or correct")
    add("--sparsity", type=float, default=0.5, metavar="S", help="share of pruned coordinates (default 0.5)")
    add("--granularity", default="row", metavar="G", help="row (default), layer, global, n:m or block:HxW")
    add("--candidates", type=float, default=1.0, metavar="A", help="share of input columns that θ covers (default 1)")
    add("--storage", default="resident", metavar="KIND", help="resident (default) or packed")
    add("--include", action="append", metavar="PATTERN", help="manage these weights, and only these; repeatable")
    add("--exclude", action="append", metavar="PATTERN", help="leave these weights alone; repeatable")
    add("--batch", type=int, default=2, metavar="N", help="batch size of derived inputs (default 2)")
    add("--seq", type=int, default=64, metavar="N", help="sequence length of derived inputs (default 64)")
    add("--device", metavar="DEVICE", help="where it would train: cpu or cuda (default: cuda if there is one)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--values", dest="values", action="store_true", default=None,
        help="build the model with its weights (default for demo and factories)",
    )  # fmt: skip
    group.add_argument(
        "--no-values", dest="values", action="store_false",
        help="use shapes only and allocate no weight (default for hf: and timm:)",
    )  # fmt: skip
    add("--all", action="store_true", help="a row for each weight, instead of one for all blocks alike")
    add("--json", action="store_true", help="print JSON")
    add("-o", "--output", metavar="FILE", help="write to FILE instead of the terminal")
    add("--expect", type=int, metavar="N", help="exit with status 1 unless exactly N consumers were rewritten")


def run(args: argparse.Namespace) -> int:
    """Inspect and print. Exit status 0, or 1 where `--expect` does not hold.

    Raises:
        FxresuError: bad input.
        OSError: the output cannot be written.
    """
    if args.output:
        _check_writable(args.output)
    from .inspection import inspect

    with contextlib.redirect_stdout(sys.stderr):  # what the model prints must not get into the JSON
        model, inputs, device = _build(args)
        found = inspect(
            model,
            inputs,
            phase=args.phase,
            sparsity=args.sparsity,
            granularity=args.granularity,
            candidates=args.candidates,
            storage=args.storage,
            include=args.include,
            exclude=args.exclude,
            values=args.values,
            device=device,
        )
    _write(args, _text(found, args))
    if args.expect is not None and found.rewritten != args.expect:
        print(f"fxresu: expected {args.expect} rewritten consumers, found {found.rewritten}", file=sys.stderr)
        return 1
    return 0


def _build(args: argparse.Namespace) -> tuple[nn.Module, ExampleInputs, str]:
    """(model, inputs, device that it would train on)."""
    import torch

    from .errors import ConfigError
    from .models import load_model
    from .passes import Phase

    Phase.parse(args.phase)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(f"--device {args.device}: is unknown; use cpu or cuda") from None
    for name in ("batch", "seq"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.values is None:
        args.values = not args.model.startswith(("hf:", "timm:"))
    build_on = device if args.values else torch.device("meta")
    if build_on.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: no CUDA device here; with --no-values none is needed")
    model, inputs = load_model(args.model, device=build_on, batch_size=args.batch, seq_len=args.seq)
    if inputs is None:
        raise ConfigError(
            f"model {args.model!r}: example inputs are needed to capture it; let the factory return (module, inputs)"
        )
    return model, inputs, str(device)


def _text(found: Inspection, args: argparse.Namespace) -> str:
    from .inspection_text import render

    if args.json:
        return json.dumps(found.to_dict(), indent=2)
    terminal = not args.output and sys.stdout.isatty()
    return render(found, every=args.all, width=shutil.get_terminal_size().columns if terminal else None)


def _check_writable(output: str) -> None:
    """Refuse a file that cannot be written before the work rather than after it."""
    path = Path(output)
    if path.is_dir():
        raise IsADirectoryError(f"--output {output}: is a directory; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no directory {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--output {output}: not writable")


def _write(args: argparse.Namespace, text: str) -> None:
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    else:
        print(text, flush=True)
