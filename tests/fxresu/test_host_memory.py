"""The host budget: sizes, the planned micro-batch, the same numbers as whole batches, and a run that keeps it."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fxresu import host_memory
from fxresu.activations import saved_bytes
from fxresu.errors import ConfigError
from fxresu.host_budget import budget_bytes
from fxresu.ledger import current_rss
from fxresu.memory_bill import MemoryBill
from fxresu.models import GPT, GPTConfig

MODEL = [
    "--layers=2",
    "--width=32",
    "--heads=2",
    "--seq=32",
    "--batch=4",
    "--tokenizer=bytes",
    "--device=cpu",
    "--quiet",
]
CYCLE = ["--cycles=1", "--steps-per-cycle=10", "--split", "0.5", "0.1", "0.4", "--sparsity=0.5", "--eval-batches=1"]


@pytest.mark.parametrize(
    "text, size", [("472MB", 472e6), ("1.5 GiB", 1.5 * 2**30), ("650000000", 650e6), ("2g", 2e9), ("10kB", 1e4)]
)
def test_sizes(text: str, size: float) -> None:
    assert budget_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1MB", "0", "3 TB", "MB", "1e9"])
def test_wrong_sizes_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        budget_bytes(text)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose resident set does not depend on what ran in it before."""
    monkeypatch.setattr(host_memory, "current_rss", lambda: 200_000_000)


def plan(budget: int, **options: int) -> host_memory.HostPlan:
    model = GPT(GPTConfig(300, context=32, layers=2, heads=2, width=32))
    tokens, before = torch.randint(300, (1, 32)), {n: p.clone() for n, p in model.named_parameters()}
    made = host_memory.plan_micro_batch(model, lambda: model(tokens, tokens), budget=budget, batch=8, **options)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert made.peak <= made.budget
    return made


def test_a_plan_takes_the_largest_micro_batch_that_fits(steady: None) -> None:
    roomy = plan(400_000_000)
    assert roomy.micro_batch == 8 and roomy.parts == 1 and " 8 sequences" in str(roomy)
    sequence = roomy.predicted["activations"] // 8
    fixed = roomy.peak - 8 * sequence
    for fitting, micro in ((8, 8), (7, 4), (3, 2), (1, 1)):
        assert plan(fixed + fitting * sequence).micro_batch == micro
    assert "8 x 1 sequences" in str(plan(fixed + sequence))
    with pytest.raises(ConfigError, match=f"takes {(fixed + sequence) / 1e6:,.0f} MB; give at least"):
        plan(fixed + sequence - 1)


def test_a_plan_counts_what_is_there_and_what_will_be(steady: None) -> None:
    made, model = plan(400_000_000), GPT(GPTConfig(300, context=32, layers=2, heads=2, width=32))
    trained = sum(p.nbytes for p in model.parameters())
    tokens = torch.randint(300, (1, 32))
    kept = saved_bytes(model(tokens, tokens), (p.data for p in model.parameters()))
    assert made.predicted["process so far"] == 200_000_000
    assert made.predicted["gradients"] == trained and made.predicted["optimizer state"] == 2 * trained
    assert made.predicted["activations"] == pytest.approx(8 * host_memory._OVER_SAVED * kept, rel=0.001)


def test_what_is_mapped_and_compiled_counts(steady: None) -> None:
    made = plan(500_000_000, mapped=19_000_000, compiled_graphs=2)
    assert made.predicted["mapped files"] == 19_000_000 and made.predicted["compiler"] == 2 * host_memory._A_GRAPH


def test_split_keeps_order_and_shares() -> None:
    batches = [tuple(torch.arange(12).view(6, 2) + 100 * i + k for k in (0, 1)) for i in range(2)]
    parts = list(host_memory.split(batches, 3))
    assert len(parts) == 6 and all(x.shape == (2, 2) for x, _ in parts)
    assert torch.equal(torch.cat([x for x, _ in parts[:3]]), batches[0][0])
    assert torch.equal(torch.cat([y for _, y in parts[3:]]), batches[1][1])
    assert list(host_memory.split(batches, 1))[1][0] is batches[1][0]


def test_released_memory_goes_back_and_free_blocks_are_counted() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("no glibc of at least 2.33")
    blocks = [bytearray(100_000) for _ in range(500)]  # below glibc's threshold for mappings of their own
    keep = bytearray(100_000)
    held, free = current_rss(), host_memory.heap_free()
    del blocks
    assert host_memory.heap_free() > free + 40_000_000 or current_rss() < held - 40_000_000
    host_memory.release()
    assert current_rss() < held - 40_000_000 and len(keep) == 100_000


def test_pages_of_mapped_files_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(500_000, dtype=np.uint16).tofile(path)
    assert host_memory.mapped_bytes(path) == 0
    mapped = np.memmap(path, dtype=np.uint16, mode="r")
    assert mapped.sum() > 0
    assert host_memory.mapped_bytes(path, tmp_path / "other") >= 1_000_000


def train(*extra: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fxresu", "train", *MODEL, *CYCLE, *extra]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_run_within_a_budget(tmp_path: Path) -> None:
    options = ["--no-compile", f"--data={text_file(tmp_path)}", "--save-every=5"]
    refused = train(*options, f"--out={tmp_path / 'none'}", "--host-budget=100MB")
    assert refused.returncode == 2 and "give at least" in refused.stderr
    least = int(refused.stderr.split("takes ")[1].split(" MB")[0].replace(",", ""))
    kept = train(*options, f"--out={tmp_path / 'kept'}", f"--host-budget={least + 3}MB")
    assert kept.returncode == 0, kept.stderr
    assert "sequences a step" in kept.stdout and kept.stdout.count(": kept") == 1
    report = json.loads((tmp_path / "kept" / "report.json").read_text())
    bill = MemoryBill.from_dict(report["memory"]["bill"])
    assert bill.basis == "predicted" and report["memory"]["peak_bytes"] <= 1e6 * (least + 3)
    known = {"interpreter and libraries", "libraries' code, read since", "token files, mapped pages"}
    for stage in bill.stages:
        assert known <= set(stage.host)
        assert abs(bill.unaccounted_host(stage)) < 0.05 * stage.measured_host, str(bill)
    assert (tmp_path / "kept" / "report.html").is_file()


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(f"line {i}: {'abcdefgh'[i % 8 :]} {i * i}" for i in range(4000)))
    return path


def test_a_split_batch_is_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches see the same text, and losses, held-out losses and weights are those of whole batches."""
    from fxresu import train as module

    data, reports = text_file(tmp_path), []
    for name, micro in (("whole", 4), ("split", 1)):
        made = host_memory.HostPlan(10**9, 4, micro, {"process so far": 1})
        monkeypatch.setattr(module, "plan_micro_batch", lambda *args, made=made, **options: made)
        options = ["--no-compile", "--no-memory-bill", "--accumulation=2", f"--data={data}", f"--out={tmp_path / name}"]
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert module.run(parser.parse_args([*MODEL, *CYCLE, *options, "--host-budget=1GB"])) == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    losses = [[step["loss"] for step in report["history"]] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 10
    held_out = [[row["held_out_after"] for row in report["phases"]] for report in reports]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    weights = [load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "split")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=2e-3)


def test_a_budget_of_the_host_is_not_one_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxresu import train as module

    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args([*MODEL, f"--out={tmp_path}", "--host-budget=1GB"])
    monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match="on a CPU"):
        module.run(args)
