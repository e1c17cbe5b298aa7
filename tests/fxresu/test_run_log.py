"""The log of a run, its reports, and where else its numbers go."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fxresu_cycles import Net, batch, make

import fxresu
from fxresu import ConfigError, RunLog
from fxresu.errors import DataError
from fxresu.memory_bill import MemoryBill
from fxresu.model_state import managed_weights
from fxresu.report_html import write_reports
from fxresu.run_record import cut_log, read_log

SHORT = {"cycles": 2, "train_steps": 4, "stabilize_steps": 2, "resu_steps": 4, "sparsity_start": 0.5}


def losses(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(model(*batch(10_000)))


def logged(folder: Path, steps: int = 20, **options) -> RunLog:
    """A run of `cycle.step` with a log."""
    cycle = make(**{k: v for k, v in SHORT.items() if k != "sparsity_start"}, split=(0.6, 0.1, 0.3))
    log = RunLog(folder, **{"sinks": (), "tokens": 64, "evaluate": lambda: losses(cycle.model), **options})
    log.follow(cycle)
    for i in range(steps):
        cycle.step(batch(i))
    return log


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_for_everything_that_happens(tmp_path: Path) -> None:
    log = logged(tmp_path / "run")
    page = log.finish(graphs={"a": 1})
    found = lines(tmp_path / "run")
    assert [line["event"] for line in found] == [
        "start",
        *["step"] * 4, "phase", "memory", *["step"] * 2, "phase", "memory", *["step"] * 4, "phase", "memory", "commit",
        *["step"] * 4, "phase", "memory", *["step"] * 2, "phase", "memory", *["step"] * 4, "phase", "memory", "commit",
        "held_out", "end",
    ]  # fmt: skip
    steps = [line for line in found if line["event"] == "step"]
    assert [s["step"] for s in steps] == list(range(1, 21))
    assert all(s["loss"] > 0 and s["rss"] > 0 and s["lr"] == 3e-3 for s in steps)
    assert [s["step"] for s in steps if s["held_out"] is not None] == [1, 5, 7, 11, 15, 17]
    commit = next(line for line in found if line["event"] == "commit")
    assert commit["step"] == 10 and set(commit["layers"]) == set(managed_weights(log.cycle.model))
    assert all(0.4 < share < 0.6 for share in commit["layers"].values()) and 0 < commit["churn"] < 1
    record = read_log(tmp_path / "run" / "log.jsonl")
    assert len(record.history) == 20 and len(record.phases) == 8 and len(record.commits) == 2
    assert record.history[-1].held_out == record.phases[-1].held_out_after
    assert record.info["graphs"] == {"a": 1} and record.info["config"]["cycles"] == 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["memory"]["peak_bytes"] > 0 and len(report["info"]["cycles"]) == 6
    _assert_a_counted_bill(report["memory"])
    assert page == tmp_path / "run" / "report.html"


def _assert_a_counted_bill(memory: dict) -> None:
    """Without example inputs the bill has what was there between steps, and every stage and transition of the run."""
    bill = MemoryBill.from_dict(memory["bill"])
    assert bill.basis == "counted" and "between steps" in bill.notes()[0]
    assert [s.name for s in bill.stages] == ["dense", "prune", "sparse", "start RESU", "resu", "commit"]
    assert [s.name for s in bill.stages if s.transition] == ["prune", "start RESU", "commit"]
    for stage in bill.stages:
        assert 0 < stage.measured_host <= memory["peak_bytes"] and stage.host["interpreter and libraries"] > 0
        assert bill.unaccounted_host(stage) == stage.measured_host - stage.tensors - sum(stage.host.values())
    weights = sum(m.numel() * 4 for n, m in Net().named_parameters() if n.startswith(("up", "down")) and m.dim() == 2)
    assert bill["dense"].parts["managed weights"] == bill["dense"].parts["gradients"] - bill["dense"].parts[
        "other parameters"] == weights  # fmt: skip
    order = [one["stage"] for one in memory["timeline"]]
    assert order == ["dense", "prune", "sparse", "start RESU", "resu", "commit",
                     "sparse", "prune", "sparse", "start RESU", "resu", "commit"]  # fmt: skip


def test_a_predicted_bill_is_that_of_the_same_model(tmp_path: Path) -> None:
    logged(tmp_path / "run", inputs=batch(0)).finish()
    memory = json.loads((tmp_path / "run" / "report.json").read_text())["memory"]
    bill = MemoryBill.from_dict(memory["bill"])
    wanted = fxresu.predict_memory(Net(), batch(0), optimizer="adamw", sparsity=0.7, compile=False)
    assert bill.basis == "predicted" and memory["not_predicted"] == ""
    for stage in bill.stages:
        assert stage.parts == wanted[stage.name].parts and stage.measured_host > 0
    assert bill["resu"].parts["activations"] > 0
    assert "predicted" in (tmp_path / "run" / "report.html").read_text()


def test_a_failed_prediction_is_said_and_the_report_is_there(tmp_path: Path) -> None:
    page = logged(tmp_path / "run", inputs=torch.zeros(3)).finish()
    memory = json.loads((tmp_path / "run" / "report.json").read_text())["memory"]
    assert memory["bill"]["basis"] == "counted" and "Error" in memory["not_predicted"]
    assert "Not predicted" in page.read_text()


def test_the_page_in_a_browser(tmp_path: Path, open_page) -> None:
    page = logged(tmp_path / "run", title="A run <b>of mine</b>").finish()
    for dark in (False, True):
        opened = open_page(page, dark=dark).page
        assert opened.title() == "A run <b>of mine</b>" == opened.text_content("h1")
        for name, words in {
            "loss": ["loss (nats)", "held-out", "training (smoothed)", "cycle 1", "resu"],
            "layers": ["up.0.weight", "down.1.weight", "commit", "pruned (%)"],
            "churn": ["mask churn", "resurrected", "cycle"],
            "memory": ["RSS", "step", "sparse", "highest"],
            "stages": ["start", "commit", "measured", "interpreter"],
        }.items():
            box = opened.locator(f"#{name} svg").bounding_box()
            assert box["width"] > 700 and box["height"] > 150
            text = opened.text_content(f"#{name}")
            assert all(word in text for word in words), (name, words, text)
            assert opened.locator(f"#{name} svg path").count() > 5
        assert opened.locator("#phases tbody tr").count() == 8
        assert "unaccounted" in opened.text_content("#bill")
        ids = opened.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        assert "theta_epsilon" in opened.text_content("dl")
    narrow = open_page(page, width=420).page
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 420


def test_a_run_of_many_layers_and_steps_stays_small(tmp_path: Path, open_page) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    names = [f"model.layers.{i}.self_attention.projection_{j}.weight" for i in range(60) for j in range(6)]
    layers = {name: 0.5 + i % 6 / 20 for i, name in enumerate(names)}
    with (folder / "log.jsonl").open("w") as file:
        for cycle in range(40):
            for step in range(300 * cycle + 1, 300 * cycle + 301):
                line = {"event": "step", "step": step, "phase": "sparse", "cycle": cycle, "loss": 3.0, "sparsity": 0.5}
                file.write(json.dumps(line) + "\n")
            row = {"event": "commit", "step": step, "phase": "commit", "cycle": cycle, "steps": 0, "layers": layers}
            file.write(json.dumps({**row, "churn": 0.1, "resurrection_rate": 0.05}) + "\n")
    page = write_reports(folder)
    assert page.stat().st_size < 1_500_000
    assert len(read_log(folder / "log.jsonl").history) <= 4001
    assert open_page(page).page.locator("figure").count() == 4


def test_cutting_back_and_going_on(tmp_path: Path) -> None:
    """A resumed run's log has every step once, whatever the killed one had written after its checkpoint."""
    folder = tmp_path / "run"
    cycle = make(**{k: v for k, v in SHORT.items() if k != "sparsity_start"})
    log = RunLog(folder, sinks=())
    log.follow(cycle)
    for i in range(9):
        cycle.step(batch(i))
        if cycle.global_step == 7:
            cycle.save(tmp_path / "c")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # killed in the middle of a line
    resumed = make(**{k: v for k, v in SHORT.items() if k != "sparsity_start"})
    again = RunLog(folder, sinks=())
    again.follow(resumed)
    resumed.load(tmp_path / "c")
    for i in range(7, 20):
        resumed.step(batch(i))
    again.finish()
    steps = [line["step"] for line in lines(folder) if line["event"] == "step"]
    assert steps == list(range(1, 21))
    phases = [line["phase"] for line in lines(folder) if line["event"] == "phase"]
    assert phases == ["dense", "sparse", "resu", "sparse", "sparse", "resu"]
    new = RunLog(folder, sinks=())
    fresh = make(**{k: v for k, v in SHORT.items() if k != "sparsity_start"})
    new.follow(fresh)
    fresh.step(batch(0))
    new.finish()
    assert [line["step"] for line in lines(folder) if line["event"] == "step"] == [1]


def test_every_nth_step_and_losses_that_are_no_number(tmp_path: Path) -> None:
    log = logged(tmp_path / "run", steps=13, every=5, evaluate=None)
    log.held_out(2.5)
    log.finish()
    assert [line["step"] for line in lines(tmp_path / "run") if line["event"] == "step"] == [5, 10]
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with fxresu.attach(model, optimizer, SHORT, transform={"compile": False}, log=tmp_path / "own") as run:
        for _ in range(3):  # the model's own output is not used: nobody tells a loss
            optimizer.zero_grad()
            sum(p.square().sum() for p in model.parameters()).backward()
            optimizer.step()
        run.log.held_out(1.25)
    assert [line["loss"] for line in lines(tmp_path / "own") if line["event"] == "step"] == [None] * 3
    assert (tmp_path / "own" / "report.html").exists()
    assert read_log(tmp_path / "own" / "log.jsonl").history[-1].held_out == 1.25


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path / "run", sinks="tensorboard").finish()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert {"train/loss", "train/lr", "held_out/loss", "sparsity/total", "memory/bytes", "commit/churn"} <= set(names)
    assert "sparsity/up.0.weight" in names
    logs = [line for line in lines(tmp_path / "run") if line["event"] == "step"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in logs
    ]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: what it keeps on the disk is read back."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged(tmp_path / "run", steps=12, sinks=("wandb",)).finish()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert json.loads((tmp_path / "run" / "wandb.json").read_text())["id"] in file.name
    data = file.read_bytes()
    assert all(word in data for word in (b"train/loss", b"commit/churn", b"theta_epsilon"))
    assert wandb.run is None


def test_which_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxresu import log_sinks

    for name in log_sinks._WANDB_SIGNS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log_sinks.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert log_sinks._automatic() == ["tensorboard"]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert log_sinks._automatic() == ["tensorboard", "wandb"]
    monkeypatch.setattr(log_sinks.importlib.util, "find_spec", lambda name: None)
    assert log_sinks._automatic() == []
    with pytest.raises(ConfigError, match="'wandb' is not installed; pip install wandb"):
        RunLog(tmp_path, sinks=["wandb"])
    with pytest.raises(ConfigError, match="'mlflow' is unknown; use tensorboard, wandb"):
        RunLog(tmp_path, sinks="mlflow")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no log"):
        write_reports(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "start", "step": 0}\n')
    with pytest.raises(DataError, match="holds no step"):
        write_reports(tmp_path)
    assert cut_log(tmp_path / "none.jsonl", 3) == 0
    assert RunLog(tmp_path / "x", sinks=()).finish() is None
