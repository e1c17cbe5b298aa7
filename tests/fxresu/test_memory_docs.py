"""What docs/MEMORY.md shows runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import fxresu
from fxresu.cli import main
from fxresu.models import GPT, GPTConfig

_TEXT = (Path(__file__).resolve().parents[2] / "docs" / "MEMORY.md").read_text(encoding="utf-8")


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", _TEXT, re.DOTALL)
    for line in block.splitlines():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
        assert "highest:" in capsys.readouterr().out
    assert (tmp_path / "bill.json").exists() and (tmp_path / "bill.png").exists()


def test_python_runs() -> None:
    tokens = torch.randint(64, (4, 16))
    plain, names = GPT(GPTConfig(64, context=16, layers=1, heads=2, width=64)), {"fxresu": fxresu}
    for block in reversed(re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)):
        names |= {"model": plain, "example_inputs": (tokens, tokens)}
        exec(compile(block, "MEMORY.md", "exec"), names)
    assert names["bill"].peak_stage in ("resu", "commit") and names["plan"].accumulation == 1
