"""`fxresu train` as a user runs it: a whole run, a kill and a resume, and everything that can be wrong."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fxresu import ConfigError, DataError, train
from fxresu.memory_bill import MemoryBill
from fxresu.report import PhaseRow

TINY = [
    "--layers=1", "--width=16", "--heads=2", "--batch=2", "--seq=16", "--tokenizer=bytes", "--no-compile",
    "--cycles=2", "--steps-per-cycle=20", "--split", "0.5", "0.1", "0.4", "--sparsity=0.5", "--eval-batches=1",
    "--quiet", "--device=cpu", "--no-memory-bill",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"line {i}: {'abcdefgh'[i % 8 :]} {i * i}" for i in range(4000)))
    return path


def arguments(*extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args([*TINY, *extra])


def command(*extra: str) -> list[str]:
    return [sys.executable, "-m", "fxresu", "train", *TINY, *extra]


# Sums depend on how many threads share them: the killed run gets as many as the undisturbed one in this process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_a_whole_run(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train.run(arguments(f"--out={out}", f"--data={text}", "--memory-bill")) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("dense", "sparse", "resu", "commit", "unaccounted", "peak resident set"))
    report = json.loads((out / "report.json").read_text())
    rows = [PhaseRow(**row) for row in report["phases"]]
    assert [(r.cycle, r.phase, r.steps) for r in rows] == [
        (0, "dense", 10), (0, "sparse", 2), (0, "resu", 8), (0, "commit", 0),
        (1, "sparse", 10), (1, "sparse", 2), (1, "resu", 8), (1, "commit", 0),
    ]  # fmt: skip
    bill = MemoryBill.from_dict(report["memory"]["bill"])
    assert [s.name for s in bill.stages] == ["dense", "prune", "sparse", "start RESU", "resu", "commit"]
    assert str(bill) in printed and not report["memory"]["not_predicted"]
    for stage in bill.stages:
        parts = sum(stage.parts.values()) + sum(stage.host.values())
        assert parts + bill.unaccounted_host(stage) == stage.measured_host <= report["memory"]["peak_bytes"]
    # The bill is the one that the command makes of the same model.
    assert bill["dense"].parts["activations"] > 0 and bill.basis == "predicted"
    assert bill["dense"].host["interpreter and libraries"] > 50_000_000
    assert rows[-1].held_out_after < rows[0].held_out_before
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["event"] == "step"] == list(range(1, 41))
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    written = {"checkpoint", "log.jsonl", "report.html", "report.json", "report.png"}
    assert {p.name for p in out.iterdir()} - {"tensorboard"} == written


@pytest.mark.parametrize("at", [13, 35], ids=["in resu of cycle 0", "in resu of cycle 1"])
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, text: Path, at: int) -> None:
    """SIGKILL at some step; the resumed run ends with the same bits, and its log has every step once."""
    common = (f"--data={text}", f"--corpus={tmp_path / 'corpus'}", "--save-every=3")
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    assert train.run(arguments(*common, f"--out={undisturbed}")) == 0
    with subprocess.Popen(command(*common, f"--out={killed}"), env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        log = killed / "log.jsonl"
        while not (log.exists() and f'"step": {at},' in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "report.json").exists()
    assert train.run(arguments(*common, f"--out={killed}", "--resume")) == 0
    for name in ("model", "optimizer", "cycle"):
        a, b = (load_file(run / "checkpoint" / f"{name}.safetensors") for run in (undisturbed, killed))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    for run in (undisturbed, killed):
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in steps if r["event"] == "step"] == list(range(1, 41))
    histories = [json.loads((run / "report.json").read_text())["history"] for run in (undisturbed, killed)]
    losses = [[r["loss"] for r in history] for history in histories]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "options, error, message",
    [
        (["--sparsity=1.0"], ConfigError, r"sparsity_start=1\.0"),
        (["--granularity=rows"], ConfigError, "rows"),
        (["--batch=0"], ConfigError, "--batch=0: use a number of at least 1"),
        (["--lr=0"], ConfigError, r"--lr=0\.0"),
        (["--device=cuda:99"], ConfigError, "--device='cuda:99'"),
        (["--schedule=linear"], ConfigError, "leave out it or --schedule"),
        (["--granularity=2:4", "--sparsity=0.7"], ConfigError, "2:4"),
        (["--width=15"], ConfigError, "width=15"),
    ],
)
def test_wrong_options(tmp_path: Path, text: Path, options: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train.run(arguments(f"--out={tmp_path / 'run'}", f"--data={text}", *options))
    assert not (tmp_path / "run" / "report.json").exists()


def test_earlier_checkpoints_are_kept(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    assert train.run(arguments(f"--out={out}", f"--data={text}", "--save-every=15", "--keep-last=3")) == 0
    kept = sorted(p.name for p in out.glob("checkpoint*"))
    assert kept == ["checkpoint", "checkpoint-00000015", "checkpoint-00000030"]


@pytest.mark.parametrize("kind", ["empty", "binary", "missing", "short"])
def test_wrong_data(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "data.txt"
    if kind != "missing":
        file.write_bytes({"empty": b"", "binary": bytes(range(256)) * 40, "short": b"abc"}[kind])
    with pytest.raises((DataError, OSError), match=r"data\.txt"):
        train.run(arguments(f"--out={tmp_path / 'run'}", f"--data={file}"))


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_output_folder_that_cannot_be_written(
    tmp_path: Path, text: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from fxresu.cli import main

    taken = tmp_path / "taken"
    taken.touch()
    out = {"a file": taken, "below a file": taken / "run", "read-only": Path("/proc/fxresu")}[kind]
    assert main(["train", *TINY, f"--out={out}", f"--data={text}"]) == 2
    printed = capfd.readouterr().err
    assert str(out) in printed and "give a writable folder with --out" in printed and "Traceback" not in printed


def test_resume_without_a_checkpoint(tmp_path: Path, text: Path) -> None:
    with pytest.raises(Exception, match="holds no checkpoint"):
        train.run(arguments(f"--out={tmp_path / 'run'}", f"--data={text}", "--resume"))


def test_resume_with_other_options(tmp_path: Path, text: Path) -> None:
    common = (f"--out={tmp_path / 'run'}", f"--data={text}")
    train.run(arguments(*common))
    with pytest.raises(ConfigError, match="made with batch=2, this run has 4"):
        train.run(arguments(*common, "--resume", "--batch=4"))


@pytest.mark.parametrize("name, content", [("c.toml", "cycles = ["), ("c.json", "{"), ("c.toml", "cycels = 2")])
def test_wrong_configuration_file(tmp_path: Path, text: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="TOML|JSON|did you mean 'cycles'"):
        train.run(arguments(f"--out={tmp_path / 'run'}", f"--data={text}", f"--config={tmp_path / name}"))


def test_configuration_file_is_used(tmp_path: Path, text: Path) -> None:
    (tmp_path / "c.toml").write_text('rule = "adam"\ntheta_lr = 0.01\n')
    args = arguments(f"--config={tmp_path / 'c.toml'}", "--cycles=3")
    config = train.cycle_config(args)
    assert (config.rule, config.theta_lr, config.cycles) == ("adam", 0.01, 3)
