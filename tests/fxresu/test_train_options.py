"""`fxresu train` with the cycle's further options: whole runs, and a warm start from what an earlier one wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fxresu import cli

TINY = ("--tokenizer=bytes", "--layers=1", "--width=16", "--heads=2", "--batch=2", "--seq=16", "--eval-batches=1",
        "--quiet", "--no-compile", "--device=cpu", "--cycles=1", "--steps-per-cycle=10", "--sparsity=0.5")  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}, and its cube {i**3}.\n" for i in range(600)))
    return path


def trained(text: Path, out: str, *options: str) -> Path:
    folder = text.parent / out
    assert cli.main(["train", *TINY, f"--data={text}", f"--out={folder}", *options]) == 0
    return folder


@pytest.mark.parametrize("options", [
    ("--prune-score=wanda", "--stabilizer=dsnot", "--commit=compare", "--commit-score=snip", "--distribution=erk"),
    ("--autocast=fp16", "--grad-clip=1", "--rule=adam", "--theta-lr=1e-3", "--theta-schedule=cosine", "--train-rest"),
    ("--commit=threshold", "--granularity=global", "--commit-threshold=0.1", "--prune-score=wanda++"),
])  # fmt: skip
def test_whole_runs(text: Path, options: tuple[str, ...]) -> None:
    out = trained(text, "out", *options)
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    commits = [line for line in lines if line.get("event") == "commit"]
    assert len(commits) >= 1 and commits[-1]["resurrected"] > 0
    state = json.loads((out / "checkpoint" / "state.json").read_text())
    assert state["cycle"]["finished"]


@pytest.mark.parametrize("form", ["folder", "safetensors", "pt"])
def test_warm_start_from_an_earlier_run(text: Path, form: str) -> None:
    first = trained(text, "first")
    weights = first / "checkpoint" / "model.safetensors"
    path = {"folder": first / "checkpoint", "safetensors": weights, "pt": first / "weights.pt"}[form]
    state = load_file(weights)
    if form == "pt":
        torch.save(state, path)
    second = trained(text, "second", f"--init={path}", "--warm-start", "--resu-steps=0", "--train-steps=2",
                     "--stabilize-steps=2", "--commit=compare", "--theta-init=zero")  # fmt: skip
    after = load_file(second / "checkpoint" / "model.safetensors")
    pruned = {n for n, t in state.items() if t.dim() == 2 and 0.4 < float(t.eq(0).float().mean()) < 0.6}
    assert len(pruned) == 4
    for name in pruned:
        assert torch.equal(after[name] == 0, state[name] == 0), name
        assert not torch.equal(after[name], state[name])


def test_bad_initial_weights(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str) -> str:
        capsys.readouterr()
        out = text.parent / "bad"
        assert cli.main(["train", *TINY, f"--data={text}", f"--out={out}", *options]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message and "unexpected" not in message
        return " ".join(message.split())

    folder = text.parent
    (folder / "damaged.safetensors").write_bytes(b"not weights")
    (folder / "damaged.pt").write_bytes(b"not weights")
    torch.save({"other.weight": torch.ones(2, 2)}, folder / "other.pt")
    assert "there is no" in refused(f"--init={folder / 'none.pt'}")
    for name in ("damaged.safetensors", "damaged.pt"):
        assert f"{name}' does not fit this model" in refused(f"--init={folder / name}")
    assert 'Missing key(s) in state_dict: "token_embedding.weight"' in refused(f"--init={folder / 'other.pt'}")
    assert "warm_start: none of the 4 managed weights has a zero" in refused("--warm-start")
