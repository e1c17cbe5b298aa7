"""`fxresu report FOLDER`: the reports of a run, from its log; also of a run that is under way or was killed."""

from __future__ import annotations

import argparse
from pathlib import Path

from .report_html import write_reports

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fxresu report`."""
    parser.add_argument("folder", type=Path, help="folder of the run, which holds log.jsonl")


def run(args: argparse.Namespace) -> int:
    """Write report.html, report.json and report.png; prints the page's path."""
    print(write_reports(args.folder))
    return 0
