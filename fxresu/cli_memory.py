"""`fxresu memory MODEL`: arguments, and the bill as a table, JSON or a picture."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from .cli_inspect import check_writable
from .sizes import parse_size

_EPILOG = """examples:
  fxresu memory demo                                       every phase and transition, nothing allocated
  fxresu memory hf:gpt2 --batch 16 --seq 1024 --autocast bf16 --picture gpt2.png
  fxresu memory hf:llama --phase resu --dtype bf16 --candidates 0.2 --theta-moments 8bit --budget 16GB
  fxresu memory demo --measure                             the same stages run here, and what nothing explains
  fxresu memory mypackage.models:build --optimizer "sgd?momentum=0.9" --json bill.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fxresu memory`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Predict the bytes of every component at the highest point of every phase and transition, before\n"
        "anything is allocated. Sizes are in 10^6 or 10^9 bytes."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "model", metavar="MODEL", help="'package.module:factory', 'hf:NAME', 'timm:NAME', 'demo' or 'demo?layers=6'"
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--phase", action="append", metavar="STAGE",
        help="a phase (dense, sparse, resu, predict, correct) or a transition (prune, 'start RESU', commit,"
        " 'drop masks'); repeatable",
    )  # fmt: skip
    which.add_argument("--all", action="store_true", help="every phase and transition (default)")
    add("--budget", metavar="SIZE", help="such as 14GB or 14GiB; exit status 1 if a stage does not fit")
    add("--measure", action="store_true", help="run every stage on the device too, and show what nothing explains")
    add("--context", metavar="SIZE", help="of the CUDA context and libraries, instead of the estimate")
    add("--json", metavar="FILE", help="write the bill as JSON")
    add("--picture", metavar="FILE", help="write a picture: a bar for every stage, with the budget")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the model is trained")
    add = group.add_argument
    add("--batch", type=int, default=2, metavar="N", help="sequences of a micro-batch (default 2)")
    add("--seq", type=int, default=64, metavar="N", help="tokens of a sequence (default 64)")
    known = "of torch.optim, 'sgd?momentum=0.9', streamed, or module:factory"
    add("--optimizer", default="adamw", metavar="NAME", help=known)
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model's parameters (default fp32)")
    add("--autocast", choices=("none", "bf16", "fp16"), default="none", help="matrix products in lower precision")
    add("--accumulation", type=int, default=1, metavar="N", help="micro-batches of a step (default 1)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled (default), or eager")
    add("--recompute", type=float, metavar="SHARE", help="run block by block, this share of the blocks recomputed")
    add("--recomputed", choices=("inputs", "narrow"), default="inputs", help="kept by them: inputs, or what is narrow")
    add("--kept", choices=("all", "costly"), default="all", help="by other blocks: all, or what is costly to repeat")
    add("--device", metavar="DEVICE", help="where it would train: cpu or cuda (default: cuda if there is one)")
    add("--workers", type=int, default=0, metavar="N", help="processes of the data loader (default 0)")
    add("--dataset", default="0", metavar="SIZE", help="of the data set that is kept in memory (default 0)")
    group = parser.add_argument_group("how it is transformed")
    add = group.add_argument
    add("--sparsity", type=float, default=0.5, metavar="S", help="share of pruned coordinates (default 0.5)")
    add("--granularity", default="row", metavar="G", help="row (default), layer, global, n:m or block:HxW")
    add("--candidates", type=float, default=1.0, metavar="A", help="share of input columns that θ covers (default 1)")
    add("--storage", default="resident", metavar="KIND", help="resident (default), packed or offload")
    add("--packed-values", default="native", metavar="KIND", help="native (default), bf16, int8 or int4")
    add("--rule", default="selective", metavar="R", help="θ's update: selective (default), adam, momentum or sgd")
    add("--theta-dtype", default="fp32", metavar="D", help="its storage where it is apart: fp32 (default) or bf16")
    add("--theta-moments", default="fp32", metavar="M", help="their storage: fp32 (default), bf16 or 8bit")
    add("--theta-in-backward", action="store_true", help="θ is updated, and its gradient freed, inside the backward")
    add("--optimizer-state", default=None, metavar="S", help="of the managed weights in RESU; default is the plan's")
    add("--train-rest", action="store_true", help="biases, norms and embeddings train in RESU too")
    add("--include", action="append", metavar="PATTERN", help="manage these weights, and only these; repeatable")
    add("--exclude", action="append", metavar="PATTERN", help="leave these weights alone; repeatable")


def run(args: argparse.Namespace) -> int:
    """Predict and print. Exit status 0, or 1 if a stage exceeds the budget.

    Raises:
        FxresuError: bad input.
        OSError: an output cannot be written.
    """
    for option in ("json", "picture"):
        if getattr(args, option):
            check_writable(f"--{option} {getattr(args, option)}", getattr(args, option))
    budget = None if args.budget is None else parse_size(args.budget, "--budget")
    if args.measure:  # or what the allocator cannot give back covers what a stage takes
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from .memory_predict import predict_memory

    with contextlib.redirect_stdout(sys.stderr):  # models that print
        model, inputs, options = _build(args)
        bill = predict_memory(
            model,
            inputs,
            phases=args.phase,
            optimizer=args.optimizer,
            autocast=None if args.autocast == "none" else args.autocast,
            accumulation=args.accumulation,
            compile=args.compile,
            rule=args.rule,
            moments=args.theta_moments,
            theta_dtype=args.theta_dtype,
            theta_in_backward=args.theta_in_backward,
            recompute=args.recompute,
            kept=args.kept,
            recomputed=args.recomputed,
            optimizer_state=args.optimizer_state,
            train_rest=args.train_rest,
            sparsity=args.sparsity,
            device=args.device,
            budget=budget,
            measure=args.measure,
            workers=args.workers,
            dataset=args.dataset,
            overhead=None if args.context is None else {"CUDA context and libraries": args.context},
            **options,
        )
    print(bill, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(bill.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.picture:
        from .memory_plot import draw_bill

        draw_bill(args.picture, bill)
    return 1 if bill.over_budget else 0


def _build(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    from .errors import ConfigError
    from .example_inputs import inputs_for
    from .memory_stages import stage_names
    from .models import load_model

    stage_names(args.phase)
    for name in ("batch", "seq"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    # The demo has a shape of its own for each device. Others have no weights here; `--measure` gives them random ones.
    small = args.model == "demo" and (args.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu"
    on = "cpu" if small else "meta"
    model, inputs = load_model(args.model, device=on, batch_size=args.batch, seq_len=args.seq)
    if args.dtype == "bf16":
        model = model.to(torch.bfloat16)
    options: dict[str, Any] = {
        "granularity": args.granularity, "candidates": args.candidates, "storage": args.storage,
        "packed_values": args.packed_values, "include": args.include, "exclude": args.exclude or (),
    }  # fmt: skip
    call = inputs_for(model, inputs, batch_size=args.batch, seq_len=args.seq)
    if args.model.startswith("hf:") and "LM" in type(model).__name__ and "input_ids" in call.kwargs:
        call.kwargs.setdefault("labels", call.kwargs["input_ids"])  # so that the loss is part of the step
    return model, call, options
