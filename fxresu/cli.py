"""The `fxresu` command: finds the subcommand's module and turns errors into a message and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

# Modules with `add_arguments(parser)` and `run(args) -> int`. Imported when named: importing torch takes seconds.
COMMANDS = {
    "inspect": ("fxresu.cli_inspect", "show what the passes do to a model in a phase"),
    "doctor": ("fxresu.doctor", "show what is installed here, what runs, and remedies"),
    "memory": ("fxresu.cli_memory", "predict the memory of every phase and transition, and hold it against a budget"),
    "compile-and-train": ("fxresu.compile_and_train", "run a training script of your own through RESU cycles"),
    "report": ("fxresu.cli_report", "write a run's reports from its log"),
    "train": ("fxresu.cli_train", "train a GPT on text through RESU cycles"),
}
_INTERRUPTED = 130
_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's).

    Returns:
        The exit status: 0; 1 if what was asked to hold does not; 2 for bad input, with a message on stderr; 130 after
        an interrupt. With FXRESU_TRACEBACK=1 in the environment, errors show their traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?" rather than a traceback
    try:
        return _run(argv)
    except SystemExit as error:  # argparse, which has said why
        return error.code if isinstance(error.code, int) else _BAD_INPUT
    except KeyboardInterrupt:
        print("fxresu: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(error)


def _run(argv: list[str]) -> int:
    name = next((a for a in argv if not a.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="fxresu", description="Compiled graph transforms for sparse training in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fxresu {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for command, (path, text) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if command == name:
            module = importlib.import_module(path)
            module.add_arguments(sub)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unrecognised(unknown, parser))
    return module.run(args) if module is not None else _BAD_INPUT


def _unrecognised(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """What argparse would say, and the options whose names are near."""
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = [o for p in subparsers.choices.values() for action in p._actions for o in action.option_strings]
    odd = next((u for u in unknown if u.startswith("--")), unknown[0])
    near = difflib.get_close_matches(odd.partition("=")[0], known, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"unrecognized arguments: {' '.join(unknown)}{hint}"


def _version() -> str:
    from fxresu import __version__

    return __version__


def _report(error: Exception) -> int:
    from fxresu.errors import FxresuError

    shown = os.environ.get("FXRESU_TRACEBACK") == "1"
    if shown:
        traceback.print_exception(error)
    if isinstance(error, (FxresuError, OSError, ValueError)):
        print(f"fxresu: error: {error}", file=sys.stderr)
    else:  # not foreseen: a defect, or a device that gave up
        where = "" if shown else " (FXRESU_TRACEBACK=1 shows where)"
        print(f"fxresu: error: unexpected {type(error).__name__}: {error}{where}", file=sys.stderr)
    return _BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
