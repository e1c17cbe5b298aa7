"""The command line: exit statuses, messages without tracebacks, JSON, and a quick start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fxresu import Phase, __version__, cli

MODELS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        print("chatter")
        for layer in self.layers:
            x = layer(x)
        return x

def small():
    return Small(), torch.randn(2, 8)

def without_inputs():
    return Small()

def wrong_inputs():
    return Small(), torch.randn(2, 7)

def raising():
    raise RuntimeError("no weights today")

def exiting():
    raise SystemExit(0)

def bert_without_inputs():
    from transformers import BertConfig, BertForMaskedLM
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=50, **size))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FXRESU_TRACEBACK", raising=False)
    sys.modules.pop("cli_models", None)
    return tmp_path


def test_inspect_prints_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "cli_models:small", "--exclude", "layers.0"]) == 0
    out = capsys.readouterr().out
    assert "Small in phase resu: 2 managed weights" in out
    assert "layers.{1..2}.weight" in out and "linear -> fxresu.linear" in out
    assert "excluded" in out and "graph breaks:" in out
    assert "chatter" not in out


def test_views(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*arguments: str) -> str:
        assert cli.main(["inspect", "cli_models:small", *arguments]) == 0
        return capsys.readouterr().out

    lines = [line.split() for line in shown("--phases").splitlines()]
    assert ["weight", "shape", *Phase] in lines
    assert ["layers.{0..2}.weight", "x3", "8x8", *["linear"] * 4, "linear", "in", "bf16", "linear"] in lines
    assert "+ %linear_default = fxresu.linear(" in shown("--diff", "--after", "rewrite_linear")
    assert shown("--after", "rewrite_linear", "--module", "layers.1").count("+ rewritten") == 1
    assert "\x1b[32m+ " in shown("--diff", "--color", "always")
    explained = shown("--explain", "layers.1")
    assert [line.partition(":")[0] for line in explained.splitlines() if "->" in line and line[0] != " "] == list(Phase)
    assert "insert_casts" in shown("--phase", "predict") and "discard" not in shown("--only-changed")
    assert json.loads(shown("--phases", "--json"))["phases"]["predict"]["rewritten"] == 3
    assert json.loads(shown("--explain", "layers.1", "--json"))["phases"]["resu"][0]["after"] == "fxresu.linear"
    stages = json.loads(shown("--diff", "--json"))["graphs"][0]["stages"]
    assert [s["name"] for s in stages][:3] == ["captured", "rewrite_linear", "discard_activations"]


def test_html_is_written_beside_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "cli_models:small", "--html", "page.html", "--phase", "sparse"]) == 0
    told = capsys.readouterr()
    assert "Small in phase sparse" in told.out and "wrote page.html" in told.err
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", page)


def test_inputs_of_known_families_are_derived(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "cli_models:bert_without_inputs", "--expect", "6"]) == 0
    assert "6 of 6 consumers" in capsys.readouterr().out


@pytest.mark.parametrize(("expected", "status"), [(3, 0), (4, 1)])
def test_expect(folder: Path, capsys: pytest.CaptureFixture[str], expected: int, status: int) -> None:
    assert cli.main(["inspect", "cli_models:small", "--expect", str(expected)]) == status
    told = capsys.readouterr().err
    assert ("expected 4 rewritten consumers, found 3" in told) == (status == 1)


def test_json_to_the_terminal_and_to_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "cli_models:small", "--json", "--phase", "sparse", "--sparsity", "0.25"]
    assert cli.main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["phase"], data["rewritten"], data["sparsity"]) == ("sparse", 3, 0.25)
    assert cli.main([*arguments, "-o", "out.json"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((folder / "out.json").read_text())["rows"] == data["rows"]


def test_named_models_allocate_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    spec = "hf:llama?num_hidden_layers=2"
    assert cli.main(["inspect", spec, "--seq", "8", "--expect", "14", "--all"]) == 0
    out = capsys.readouterr().out
    assert "without allocating a weight" in out
    assert "model.layers.1.mlp.down_proj.weight" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf:lama"], "did you mean llama"),
        (["nonsense"], "model 'nonsense'"),
        (["cli_models:raising"], "no weights today"),
        (["cli_models:exiting"], "raised SystemExit"),
        (["cli_models:smal"], "did you mean small"),
        (["no_such_module:f"], "no_such_module"),
        (["cli_model:small"], "did you mean cli_models"),
        (["cli_models:without_inputs"], "one call of forward(x); give example inputs"),
        (["cli_models:without_inputs"], "(module, inputs)"),
        (["cli_models:wrong_inputs"], "shapes cannot be multiplied"),
        (["cli_models:small", "--phase", "rezu"], "phase='rezu'"),
        (["cli_models:small", "--sparsity", "1.5"], "sparsity=1.5"),
        (["cli_models:small", "--sparsity", "much"], "invalid float"),
        (["cli_models:small", "--granularity", "3:2"], "granularity='3:2'"),
        (["cli_models:small", "--candidates", "0"], "candidates=0.0"),
        (["cli_models:small", "--storage", "tape"], "storage='tape'"),
        (["cli_models:small", "--include", "nothing"], "include='nothing'"),
        (["cli_models:small", "--exclude", "nothing"], "exclude='nothing'"),
        (["cli_models:small", "--batch", "0"], "--batch 0"),
        (["cli_models:small", "--device", "toaster"], "--device toaster"),
        (["cli_models:small", "-o", "missing/out.txt"], "no directory 'missing'"),
        (["cli_models:small", "-o", "."], "is a directory"),
        (["cli_models:small", "--html", "missing/out.html"], "--html missing/out.html: there is no directory"),
        (["cli_models:small", "--html", "."], "--html .: is a directory"),
        (["cli_models:small", "--html", "/dev/full"], "--html /dev/full: No space left"),
        (["cli_models:small", "-o", "/dev/full"], "--output /dev/full: No space left"),
        (["cli_models:small", "-o", "x", "--html", "x"], "name two files"),
        (["cli_models:small", "--after", "rewrite_liner"], "did you mean rewrite_linear"),
        (["cli_models:small", "--after", "insert_casts"], "does not run in phase resu"),
        (["cli_models:small", "--explain", "layers.1.wait"], "did you mean layers.1.weight"),
        (["cli_models:small", "--explain", "layers.1", "--diff"], "show one at a time"),
        (["cli_models:small", "--diff", "--module", "layer.1"], "did you mean layers.1"),
        (["cli_models:small", "--module", "layers.1"], "is for --diff and --after"),
        (["cli_models:small", "--storage", "offload"], "--autocast bf16"),
        (["cli_models:small", "--frobnicate"], "--frobnicate"),
        ([], "MODEL"),
    ],
)
def test_bad_input(folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["inspect", *arguments]) == 2
    told = capfd.readouterr()
    assert message in told.err and "fxresu" in told.err
    assert "Traceback" not in told.err + told.out
    assert [p.name for p in folder.iterdir() if p.name != "__pycache__"] == ["cli_models.py"]


def test_traceback_on_request(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXRESU_TRACEBACK", "1")
    assert cli.main(["inspect", "cli_models:raising"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_and_defects(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxresu import cli_inspect

    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    def defective(args: object) -> int:
        raise AttributeError("nothing there")

    monkeypatch.setattr(cli_inspect, "run", interrupted)
    assert cli.main(["inspect", "demo"]) == 130
    monkeypatch.setattr(cli_inspect, "run", defective)
    assert cli.main(["inspect", "demo"]) == 2
    told = capsys.readouterr().err
    assert "unexpected AttributeError: nothing there" in told and "Traceback" not in told


@pytest.mark.parametrize("arguments", [[], ["fly"]])
def test_no_or_unknown_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 2
    assert "inspect" in capsys.readouterr().err or not arguments


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fxresu {__version__}"


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; from fxresu.cli import main; s = main({arguments}); sys.exit(s or 'torch' in sys.modules)"
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr


def test_module_form_and_plain_terminals() -> None:
    done = _python("-m", "fxresu", "inspect", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "share of input columns that ? covers" in done.stdout


def test_exports_are_not_hidden_by_submodules_of_their_names() -> None:
    code = (
        "import fxresu.transform, fxresu.summary, types, fxresu\n"
        "assert isinstance(fxresu.transform, types.FunctionType) and isinstance(fxresu.summary, types.FunctionType)\n"
        "assert {n for n in fxresu.__all__ if not hasattr(fxresu, n)} == set()\n"
        "optional = {'ResuLightningCallback', 'ResuTrainerCallback'}\n"
        "assert set(fxresu.__all__) == set(fxresu._HOME) - optional <= set(dir(fxresu))\n"
        "from fxresu.transform import STORAGES"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--activation-budget", "half"], "--activation-budget half: use a share such as 0.5, or bytes"),
        (["--activation-budget", "1.5"], "activation_budget=1.5"),
        (["--precision", "head"], "--precision head: use PATTERN=DTYPE"),
        (["--precision", "nothing=fp32"], "precision_overrides['nothing']"),
    ],
    ids=str,
)
def test_bad_policies_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["inspect", "demo", *words]) != 0
    assert said in capsys.readouterr().err


def test_policies_are_shown(capsys: pytest.CaptureFixture) -> None:
    words = ["--activations", "offload", "--activation-budget", "0.5", "--precision", "blocks.0.*=bf16"]
    assert cli.main(["inspect", "demo", "--phase", "dense", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["activations"] == "offload" and found["plan"]["activation_budget"] == 0.5
    rows = found["activations"][0]["rows"]
    assert {"save", "offload"} <= {r["decision"] for r in rows}
    assert any(p["name"] == "insert_casts" and p["matches"] for p in found["passes"])
