"""`fxresu compile-and-train SCRIPT.py ...`: runs a training script that knows nothing of fxresu through RESU cycles.

The script runs as `python SCRIPT.py ...` would run it. Its model is found at its first training forward: the module
called there, if an optimizer that the script has made holds its parameters. From then on the cycle follows that
optimizer (see `attach`).
"""

from __future__ import annotations

import argparse
import contextlib
import runpy
import sys
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .attach import Attached, attach, fitted
from .config import CycleConfig
from .errors import ConfigError, FxresuError
from .model_state import managed_weights
from .options import given_options, read_options
from .report import phase_table
from .run_log import RunLog
from .run_record import read_log
from .train_options import add_cycle_arguments, cycle_config
from .train_setup import make_writable

__all__ = ["Adoption", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fxresu compile-and-train`."""
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps that the script makes")
    parser.add_argument("--out", type=Path, default=Path("runs/script"), help="folder for log and report")
    parser.add_argument("--include", action="append", metavar="PATTERN", help="names of weights to manage")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="names to leave alone")
    parser.add_argument("--storage", choices=("resident", "packed"), default="resident")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    add_cycle_arguments(parser)
    parser.add_argument("script", type=Path, metavar="SCRIPT.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")


def run(args: argparse.Namespace) -> int:
    """Run the script; 0 if it ended well and the cycle with it, 1 if either did not.

    Raises:
        ConfigError: wrong options, or a model, optimizer or loop that the cycle cannot follow.
    """
    config = _config(args)
    if not args.script.is_file():
        raise ConfigError(f"SCRIPT={str(args.script)!r}: there is no such file")
    make_writable(args.out)
    transform = {"exclude": args.exclude, "storage": args.storage}
    transform |= {"include": args.include} if args.include else {}
    transform |= {} if args.compile else {"compile": False}
    adoption = Adoption(config, transform, RunLog(args.out, title=f"RESU in {args.script.name}"))
    status = 0
    with adoption.watching():
        try:
            _run_script(args.script, args.arguments)
        except FxresuError:
            raise
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
    return _tell(args, adoption) or status


def _config(args: argparse.Namespace) -> CycleConfig:
    config = cycle_config(args)
    if args.steps is not None:
        return fitted(config, args.steps)
    given = {*(read_options(args.config) if args.config else {}), *given_options(args, CycleConfig)}
    if not given & {"steps_per_cycle", "train_steps"}:
        raise ConfigError("--steps is missing: say how many optimizer steps the script makes, as in --steps 10000")
    return config


def _run_script(script: Path, arguments: list[str]) -> None:
    """As `python SCRIPT ...` does: its folder is the first on the path, and it is `__main__`."""
    argv, path = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(script.resolve().parent)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def _tell(args: argparse.Namespace, adoption: Adoption) -> int:
    """What became of it, on stderr: the script's own output stays as it is. 1 if the cycle was not completed."""
    attached = adoption.attached
    if attached is None:
        print(
            f"fxresu: {args.script} never called, with gradients and in training mode, a module whose parameters an"
            " optimizer holds: nothing was managed",
            file=sys.stderr,
        )
        return 1
    cycle = attached.cycle
    if cycle.global_step:
        print(phase_table(read_log(args.out / "log.jsonl").phases), file=sys.stderr)
        print(f"\nfxresu: report {args.out / 'report.html'}", file=sys.stderr)
    if not cycle.finished:
        print(
            f"fxresu: the script ended in cycle {cycle.cycle}, {cycle.stage}, after {cycle.global_step} of"
            f" {cycle.total_steps} steps; its weights are the effective ones of that phase. Give --steps"
            f" {cycle.global_step} to have the cycle fitted",
            file=sys.stderr,
        )
    return int(not cycle.finished)


@contextlib.contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """A class's attribute is another one inside."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _accelerate_gathers() -> bool:
    """Whether the script accumulates gradients with Accelerate (as transformers' Trainer does), and is not at the last
    micro-batch. Its state is one for the process."""
    module = sys.modules.get("accelerate.state")
    return module is not None and not module.GradientState().sync_gradients


class Adoption:
    """Waits for a script's model and optimizer, and attaches a cycle to them.

    Attributes:
        attached: the `Attached`, once the model has been found.
    """

    def __init__(self, config: CycleConfig, transform: dict[str, Any], log: RunLog | None = None) -> None:
        self.config, self.transform, self.log = config, transform, log
        self.attached: Attached | None = None
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._scalers: list[weakref.ref[torch.amp.GradScaler]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notice what the code inside makes and calls. `Module.__call__` is itself again once the model is found."""
        init, scaler_init = Optimizer.__init__, torch.amp.GradScaler.__init__
        call, backward = nn.Module.__call__, Tensor.backward

        def made(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            init(optimizer, *args, **kwargs)
            self._optimizers.append(weakref.ref(optimizer))

        def scaling(scaler: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> None:
            scaler_init(scaler, *args, **kwargs)
            self._scalers.append(weakref.ref(scaler))

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module.training and torch.is_grad_enabled() and self._adopt(module):
                setattr(nn.Module, "__call__", call)  # noqa: B010  (a method, for the type checker)
            return call(module, *args, **kwargs)

        def told(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self.attached is not None and loss.dim() == 0:
                self.attached.loss(loss.detach() / self.attached.loss_scale())
            backward(loss, *args, **kwargs)

        with contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(Optimizer, "__init__", made))
            stack.enter_context(_replaced(torch.amp.GradScaler, "__init__", scaling))
            stack.enter_context(_replaced(Tensor, "backward", told))
            stack.enter_context(_replaced(nn.Module, "__call__", called))
            stack.callback(self._detach)
            yield

    def _detach(self) -> None:
        if self.attached is not None:
            self.attached.detach()

    def _adopt(self, module: nn.Module) -> bool:
        """Attach the cycle to this module if it is the one that an optimizer trains."""
        own = {id(p) for p in module.parameters()}
        held = [(o, self._held(o, own)) for ref in self._optimizers if (o := ref()) is not None]
        optimizer, count = max(held, key=lambda pair: pair[1], default=(None, 0))
        if optimizer is None or not count:
            return False
        scaler = next((s for ref in self._scalers if (s := ref()) is not None and s.is_enabled()), None)
        self.attached = attach(
            module, optimizer, self.config, transform=self.transform, scaler=scaler, log=self.log,
            more_follows=_accelerate_gathers,
        )  # fmt: skip
        self.attached.reads_losses = False
        model = self.attached.cycle.model
        print(
            f"fxresu: {type(model).__name__}, {len(managed_weights(model))} managed weights, follows"
            f" {type(optimizer).__name__} for {self.attached.cycle.total_steps:,} steps",
            file=sys.stderr,
        )
        return True

    @staticmethod
    def _held(optimizer: Optimizer, own: set[int]) -> int:
        return sum(id(p) in own for group in optimizer.param_groups for p in group["params"])
