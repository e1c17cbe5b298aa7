"""`fxresu inspect MODEL`: arguments, and the inspection as text, JSON or an HTML page."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .inspection import PhaseInspections
    from .models import ExampleInputs

_EPILOG = """examples:
  fxresu inspect demo
  fxresu inspect hf:llama --phases                  a 7B model, from its configuration, no weight allocated
  fxresu inspect hf:gpt2 --diff --phase predict     what every pass changed, repeated blocks once
  fxresu inspect demo --explain blocks.0.mlp.up     why this weight became that node, in every phase
  fxresu inspect hf:bert --html bert.html           a page with the graph of every block, phase and pass
  fxresu inspect "hf:llama?num_hidden_layers=2" --candidates 0.25 --expect 14
  fxresu inspect hf:gpt2 --phase dense --activations recompute --autocast bf16
  fxresu inspect mypackage.models:build --phase predict --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fxresu inspect`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Show what the passes do to a model in a phase: which weights are managed, what became of the\n"
        "operations that read them, what executes, what it saves, what each pass changed, and what was\n"
        "left alone and why. The model is captured, not compiled; it is called, not trained."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="'package.module:factory' (a function that returns a module, or a module and example inputs),"
        " 'hf:NAME', 'timm:NAME', or 'demo'",
    )
    add = parser.add_argument
    add(
        "--phase", metavar="PHASE",
        help="warmup, dense, sparse, resu, predict or correct (default: resu; every phase for --phases, --explain and"
        " --html)",
    )  # fmt: skip
    _add_views(parser)
    _add_settings(parser)
    add("--all", action="store_true", help="a row for each weight, instead of one for all blocks alike")
    add("--json", action="store_true", help="print JSON")
    add("-o", "--output", metavar="FILE", help="write to FILE instead of the terminal")
    add("--color", choices=("auto", "always", "never"), default="auto", help="colours of --diff and --after")
    add("--expect", type=int, metavar="N", help="exit with status 1 unless exactly N consumers were rewritten")


def _add_views(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to show (default: the weights and what became of them)")
    add = group.add_argument
    add("--phases", action="store_true", help="one row a weight, one column a phase")
    add("--after", metavar="PASS", help="the graph as PASS left it; 'captured' is before all passes")
    add("--diff", action="store_true", help="the graph before and after every pass (with --after: that pass)")
    add("--only-changed", action="store_true", help="only what a pass changed")
    add("--module", default="", metavar="FQN", help="only this part of the model (for --diff and --after)")
    add("--explain", metavar="FQN", help="why a weight became the node that it is")
    add("--html", metavar="FILE", help="write a self-contained page with all of this")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to transform, build and run the model")
    add = group.add_argument
    add("--sparsity", type=float, default=0.5, metavar="S", help="share of pruned coordinates (default 0.5)")
    add("--granularity", default="row", metavar="G", help="row (default), layer, global, n:m or block:HxW")
    add("--candidates", type=float, default=1.0, metavar="A", help="share of input columns that θ covers (default 1)")
    add("--storage", default="resident", metavar="KIND", help="resident (default), packed or offload")
    add(
        "--activations", choices=("save", "needed", "recompute", "offload"),
        help="what phases that train do with activations (default: each phase's own)",
    )  # fmt: skip
    add("--activation-budget", metavar="N", help="a share such as 0.5 of what the compiler would keep, or bytes")
    add(
        "--precision", action="append", metavar="PATTERN=DTYPE",
        help="cast these modules or weights: fp32, bf16, fp16, inherit; repeatable, the first that matches counts",
    )  # fmt: skip
    add("--include", action="append", metavar="PATTERN", help="manage these weights, and only these; repeatable")
    add("--exclude", action="append", metavar="PATTERN", help="leave these weights alone; repeatable")
    add("--batch", type=int, default=2, metavar="N", help="batch size of derived inputs (default 2)")
    add("--seq", type=int, default=64, metavar="N", help="sequence length of derived inputs (default 64)")
    add("--autocast", choices=("none", "bf16", "fp16"), default="none", help="under autocast, as it would train")
    add("--device", metavar="DEVICE", help="where it would train: cpu or cuda (default: cuda if there is one)")
    values = group.add_mutually_exclusive_group()
    values.add_argument(
        "--values", dest="values", action="store_true", default=None,
        help="build the model with its weights (default for demo and factories)",
    )  # fmt: skip
    values.add_argument(
        "--no-values", dest="values", action="store_false",
        help="use shapes only and allocate no weight (default for hf: and timm:)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Inspect and print. Exit status 0, or 1 where `--expect` does not hold.

    Raises:
        FxresuError: bad input.
        OSError: the output cannot be written.
    """
    _check(args)
    from .capture import fake_device
    from .inspection import inspect_phases

    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:  # models that print, and JSON
        model, inputs, device = _build(args)
        stack.enter_context(_autocast(args, device if args.values else fake_device()))
        found = inspect_phases(
            model,
            inputs,
            phases=_phases(args),
            sparsity=args.sparsity,
            granularity=args.granularity,
            candidates=args.candidates,
            storage=args.storage,
            include=args.include,
            exclude=args.exclude,
            plans=plans_of(args),
            values=args.values,
            device=device,
            keep_graphs=bool(args.html or args.diff or args.after),
        )
    text = _text(found, args)
    if args.html:
        with _named(f"--html {args.html}"):
            found.save_html(args.html)
    _write(args, text)
    if args.html:
        print(f"fxresu: wrote {args.html}", file=sys.stderr)
    return _as_expected(found, args)


def plans_of(args: argparse.Namespace) -> dict[Any, Any] | None:
    """Plans with the policies that the arguments name; None for the defaults.

    Raises:
        ValueError: a budget or an override that no plan takes.
    """
    from fxresu.passes import DEFAULT_PLANS

    if args.activations is None and args.activation_budget is None and not args.precision:
        return None
    overrides = []
    for text in args.precision or []:
        pattern, equals, precision = text.partition("=")
        if not equals:
            raise ValueError(f"--precision {text}: use PATTERN=DTYPE, such as 'lm_head=fp32'")
        overrides.append((pattern, precision))
    budget = None if args.activation_budget is None else _budget(args.activation_budget)
    plans = {}
    for phase, plan in DEFAULT_PLANS.items():
        changes: dict[str, Any] = {"precision_overrides": tuple(overrides)}
        if plan.trains:
            changes |= {"activations": args.activations or plan.activations, "activation_budget": budget}
        plans[phase] = dataclasses.replace(plan, **changes)
    return plans


def _budget(text: str) -> float | int:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--activation-budget {text}: use a share such as 0.5, or bytes") from None


def _autocast(args: argparse.Namespace, device: str) -> contextlib.AbstractContextManager[Any]:
    import torch

    if args.autocast == "none":
        return contextlib.nullcontext()
    return torch.autocast(device, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[args.autocast])


def _as_expected(found: PhaseInspections, args: argparse.Namespace) -> int:
    wrong = [p for p in found if args.expect is not None and p.rewritten != args.expect]
    for p in wrong:
        told = f"expected {args.expect} rewritten consumers, found {p.rewritten}"
        print(f"fxresu: phase {p.phase}: {told}", file=sys.stderr)
    return 1 if wrong else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before the work rather than after it."""
    for option in ("output", "html"):
        if getattr(args, option):
            check_writable(f"--{option} {getattr(args, option)}", getattr(args, option))
    if args.html and args.output and Path(args.html).resolve() == Path(args.output).resolve():
        raise ValueError(f"--html {args.html}: is the file of --output too; name two files")
    views = [name for name in ("phases", "explain") if getattr(args, name)]
    views += ["diff"] if args.diff else ["after"] if args.after else []
    if len(views) > 1:
        raise ValueError(f"--{views[0]} and --{views[1]}: show one at a time")
    if args.module and not (args.diff or args.after):
        raise ValueError(f"--module {args.module}: is for --diff and --after")


def _phases(args: argparse.Namespace) -> list[str] | None:
    if args.phase is not None:
        return [args.phase]
    return None if args.phases or args.explain or args.html else ["resu"]


def _build(args: argparse.Namespace) -> tuple[nn.Module, ExampleInputs, str]:
    """(model, inputs, device that it would train on)."""
    import torch

    from .errors import ConfigError
    from .example_inputs import inputs_for
    from .models import load_model
    from .passes import Phase

    if args.phase is not None:
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
    return model, inputs_for(model, inputs, batch_size=args.batch, seq_len=args.seq), device.type


def _text(found: PhaseInspections, args: argparse.Namespace) -> str:
    """What goes to the terminal or to `--output`."""
    from .inspection_diff import after_text, diff_text
    from .inspection_explain import explain
    from .inspection_text import render, render_phases

    only = found.phases[0] if len(found) == 1 else None
    terminal = not args.output and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    colour = args.color == "always" or (args.color == "auto" and terminal and not os.environ.get("NO_COLOR"))
    if args.explain:
        explanation = explain(found, args.explain)
        return _json(explanation.to_dict()) if args.json else str(explanation)
    if args.diff or args.after:
        shown: dict[str, Any] = {"only_changed": args.only_changed, "module": args.module, "colour": colour}
        texts = [diff_text(p, args.after, **shown) if args.diff else after_text(p, args.after, **shown) for p in found]
        return _json(_data(found, only)) if args.json else "\n\n".join(texts)
    if args.json:
        return _json(_data(found, only))
    if only is None or args.phases:
        return render_phases(found, every=args.all, width=width)
    return render(only, every=args.all, width=width, only_changed=args.only_changed)


def _data(found: PhaseInspections, only: Any) -> dict[str, Any]:
    return found.to_dict() if only is None else only.to_dict()


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2)


def check_writable(argument: str, output: str) -> None:
    """Refuse a file that cannot be written before the work rather than after it.

    Args:
        argument: as the user wrote it, for the message.

    Raises:
        OSError: it is a directory, is in none, or may not be written.
    """
    path = Path(output)
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: is a directory; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{argument}: there is no directory {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{argument}: not writable")


@contextlib.contextmanager
def _named(argument: str) -> Iterator[None]:
    """Errors of the file system with the argument that they are about."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{argument}: {error.strerror or error}") from error


def _write(args: argparse.Namespace, text: str) -> None:
    if args.output:
        with _named(f"--output {args.output}"):
            Path(args.output).write_text(text + "\n", encoding="utf-8")
    else:
        print(text, flush=True)
