"""`fxresu train`: what has to be decided before torch and the rest are imported."""

from __future__ import annotations

import argparse
import os

from .lean_imports import defer_compiler, hide_triton

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fxresu train`."""
    defer_compiler()
    from .train_options import add_arguments

    add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train; without the compiler in the process unless something compiles, and on a CPU without Triton."""
    import torch

    if args.device == "cpu" or (args.device is None and not torch.cuda.is_available()):
        hide_triton()
    if args.host_budget is not None:
        # Before Inductor is imported: its pool of compiling processes would hold several hundred MB.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    from .train import run

    return run(args)
