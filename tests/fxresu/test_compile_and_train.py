"""`fxresu compile-and-train` on scripts that know nothing of fxresu."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from fxresu.cli import main

EXAMPLE = Path(__file__).resolve().parents[2] / "tools" / "examples" / "plain_loop.py"
OPTIONS = ["--no-compile", "--cycles=2", "--sparsity-start=0.5", "--rule=adam"]
SCRIPT = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
{before}
for step in range(20):
    x = torch.randn(32, 16)
    {context}
    loss = nn.functional.cross_entropy({call}(x), x[:, :4].argmax(1))
    optimizer.zero_grad()
    {backward}
{after}
"""


def script(folder: Path, **parts: str) -> Path:
    """The script with some of its parts changed."""
    usual = {"before": "", "context": "", "call": "model", "after": "", "backward": "loss.backward(); optimizer.step()"}
    path = folder / "train.py"
    path.write_text(SCRIPT.format(**usual | parts))
    return path


def command(folder: Path, *rest: object, options: list[str] = OPTIONS, steps: int = 20) -> int:
    return main(["compile-and-train", f"--steps={steps}", f"--out={folder / 'run'}", *options, *map(str, rest)])


def events_of(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def events(folder: Path, kind: str) -> list[dict]:
    return events_of(folder / "run", kind)


def test_the_example_is_trained_sparse(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "fxresu" not in EXAMPLE.read_text().split('"""')[2]
    originals = nn.Module.__call__, torch.Tensor.backward, Optimizer.__init__, list(sys.path), list(sys.argv)
    assert command(tmp_path, EXAMPLE, "--steps", 100, "--save", tmp_path / "w.pt", steps=80) == 0
    assert originals == (nn.Module.__call__, torch.Tensor.backward, Optimizer.__init__, sys.path, sys.argv)
    out, err = capfd.readouterr()
    assert "step 50: loss" in out and "accuracy 0." in out
    assert "Sequential, 4 managed weights, follows AdamW for 80 steps" in err and "report" in err
    weights = torch.load(tmp_path / "w.pt")
    assert 0.6 < float((weights["2.weight"] == 0).float().mean()) < 0.8
    assert list(weights) == [f"{i}.{n}" for i in (0, 2, 4, 6) for n in ("weight", "bias")]
    steps = events(tmp_path, "step")
    assert [s["step"] for s in steps] == list(range(1, 101))
    assert steps[0]["loss"] == pytest.approx(1.1, abs=0.1) and len(events(tmp_path, "commit")) == 2
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "parts, options",
    [
        ({"before": "net = torch.compile(model, backend='aot_eager')", "call": "net"}, []),
        (
            {"before": "scaler = torch.amp.GradScaler('cpu', init_scale=64.0)",
             "backward": "scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()"},
            ["--train-rest"],
        ),
        ({"context": "with torch.no_grad(): model(x)"}, []),
        ({}, ["--theta-in-backward"]),
        ({"before": "teacher = nn.Linear(16, 4)", "context": "teacher(x)"}, []),
    ],
    ids=["compiled", "scaled", "forward without gradients first", "theta in the backward", "another module first"],
)  # fmt: skip
def test_loops_of_other_kinds(tmp_path: Path, parts: dict, options: list[str]) -> None:
    assert command(tmp_path, script(tmp_path, **parts), options=[*OPTIONS, *options]) == 0
    steps = events(tmp_path, "step")
    assert len(steps) == 20 and steps[0]["loss"] == pytest.approx(1.4, abs=0.2) and steps[-1]["loss"] < 1.4
    assert len(events(tmp_path, "commit")) == 2


def test_it_trains_as_attach_does(tmp_path: Path) -> None:
    """One line in the loop, or none: the same bits."""
    save = f"torch.save(model.state_dict(), {str(tmp_path / 'none.pt')!r})"
    assert command(tmp_path, script(tmp_path, after=save)) == 0
    line = (
        "import fxresu; fxresu.attach(model, optimizer, {'cycles': 2, 'sparsity_start': 0.5, 'rule': 'adam'},"
        " total_steps=20, transform={'compile': False})"
    )
    one = script(tmp_path, before=line, after=save.replace("none.pt", "one.pt"))
    exec(compile(one.read_text(), str(one), "exec"), {"__name__": "__main__"})
    a, b = torch.load(tmp_path / "none.pt"), torch.load(tmp_path / "one.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "parts, status, message",
    [
        ({"after": "sys.exit(3)"}, 3, ""),
        ({"after": "sys.exit('no')"}, 1, ""),
        ({"after": "raise KeyError('mine')"}, 1, "KeyError: 'mine'"),
        ({"before": "model.eval()"}, 1, "never called, with gradients and in training mode, a module"),
        ({"before": "net = nn.DataParallel(model)", "call": "net"}, 2, "model=DataParallel: distributed wrappers"),
        ({"before": "torch.set_grad_enabled(False)", "backward": "pass"}, 1, "nothing was managed"),
    ],
)
def test_how_a_script_ends(tmp_path: Path, capfd, parts: dict, status: int, message: str) -> None:
    try:
        assert command(tmp_path, script(tmp_path, **parts)) == status
    finally:
        torch.set_grad_enabled(True)
    assert message in capfd.readouterr().err


def test_a_script_that_ends_too_early(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, script(tmp_path), steps=50) == 1
    err = capfd.readouterr().err
    assert "ended in cycle 0, resu, after 20 of 50 steps" in err and "Give --steps 20" in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rule=adm"], "did you mean 'adam'"),
        (["--cycles=0"], "cycles=0"),
        (["--cycles=2", "--train-steps=3"], "train_steps=3"),
        (["--config", "no.toml"], "no.toml"),
    ],
)
def test_wrong_options(tmp_path: Path, capfd, options: list[str], message: str) -> None:
    assert command(tmp_path, script(tmp_path), options=options) == 2
    assert message in capfd.readouterr().err


def test_steps_are_needed_and_files_are_read(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = script(tmp_path)
    assert main(["compile-and-train", str(path)]) == 2
    assert "--steps is missing" in capfd.readouterr().err
    assert main(["compile-and-train", "--steps=20", "nowhere.py"]) == 2
    assert "SCRIPT='nowhere.py': there is no such file" in capfd.readouterr().err
    (tmp_path / "c.toml").write_text("cycles = 1\nsteps_per_cycle = 10\nsparsity_start = 0.5\n")
    assert main(["compile-and-train", "--config=c.toml", "--no-compile", "--exclude=4.*", str(path)]) == 0
    assert set(events_of(tmp_path / "runs" / "script", "commit")[0]["layers"]) == {"0.weight", "2.weight"}
    assert main(["report", "runs/script"]) == 0
    assert "report.html" in capfd.readouterr().out
    assert main(["report", str(tmp_path)]) == 2
    assert "there is no log" in capfd.readouterr().err
