"""RESU inside Lightning's Trainer: phases follow its steps, its checkpoints resume, contradictions have names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxresu_cycles import CLASSES, WIDTH, batch
from torch import nn

L = pytest.importorskip("lightning.pytorch", reason="needs lightning: pip install 'fxresu[integrations]'")

import fxresu  # noqa: E402
from fxresu import ConfigError, ResuLightningCallback  # noqa: E402
from fxresu.model_state import managed_weights  # noqa: E402
from fxresu.runner import runner_of  # noqa: E402

CYCLE: dict[str, Any] = {"cycles": 2, "sparsity_start": 0.5, "rule": "adam"}
EAGER = {"compile": False}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Task(L.LightningModule):
    """A network in one part, with dropout, so that a resume without the random state shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES)
        )

    def training_step(self, part, i):
        return F.cross_entropy(self.net(part[0]), part[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 15), "interval": "step"}]


def data() -> torch.utils.data.DataLoader:
    x, y = batch(0, 160)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)


def fit(out: Path, callback: ResuLightningCallback | None = None, task: Any = None, ckpt: Any = None, **changes: Any):
    callback = ResuLightningCallback(CYCLE, transform=EAGER) if callback is None else callback
    options = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": str(out),
    } | changes  # fmt: skip
    options["callbacks"] = [callback, *options.pop("callbacks", [])]
    trainer, task = L.Trainer(**options), Task() if task is None else task
    trainer.fit(task, data(), ckpt_path=ckpt)
    return trainer, task, callback


RUNS = [{}, {"accumulate_grad_batches": 2, "max_epochs": 4}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_whole_run(tmp_path: Path, changes: dict) -> None:
    trainer, task, callback = fit(tmp_path, **changes)
    cycle = callback.cycle
    assert cycle.finished and cycle.global_step == trainer.global_step == 20
    assert [(s.stage, s.steps, s.theta_updates) for s in cycle.summaries] == [
        ("train", 6, 0), ("stabilize", 1, 0), ("resu", 3, 3)] * 2  # fmt: skip
    assert cycle.summaries[-1].kept > 0 and cycle.config.grad_clip == changes.get("gradient_clip_val")
    assert 1.8 < cycle.summaries[0].loss_first < 3 and cycle.summaries[-1].loss_last < cycle.summaries[0].loss_first
    assert trainer.gradient_clip_val == changes.get("gradient_clip_val")
    assert cycle.model is task.net and len(managed_weights(task.net)) == 3
    assert task.state_dict().keys() == Task().state_dict().keys()


def test_clipping_includes_theta(tmp_path: Path) -> None:
    """The same run by hand, with `cycle.step`, has the same bits."""
    _, task, callback = fit(tmp_path, gradient_clip_val=0.05)
    reference = Task()
    fxresu.transform(reference.net, sparsity=callback.cycle.config.sparsity(1), compile=False)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 15)
    cycle = fxresu.ResuCycle(
        reference.net, optimizer, callback.cycle.config, loss=lambda net, part: F.cross_entropy(net(part[0]), part[1])
    )
    for _ in range(2):
        for part in data():
            cycle.step(part)
            scheduler.step()
    for a, b in zip(task.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_theta_inside_the_backward(tmp_path: Path) -> None:
    """The last micro-batch of a step updates θ, an epoch's shorter window included: the same bits."""
    ends = []
    for now in (False, True):
        callback = ResuLightningCallback(CYCLE | {"theta_in_backward": now}, transform=EAGER)
        torch.manual_seed(3)
        _, task, _ = fit(tmp_path, callback, accumulate_grad_batches=3, max_epochs=5)
        assert callback.cycle.finished and callback.cycle.theta_optimizer.abandoned == 0
        ends.append(task.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_resume_from_lightnings_checkpoint_is_bit_exact(tmp_path: Path, cycles: int) -> None:
    """At the end of the first of three epochs: in RESU, in the sparse phase, and after a commit."""
    keep = L.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    wanted = CYCLE | {"cycles": cycles, "split": (0.2, 0.1, 0.7) if cycles == 1 else (0.6, 0.1, 0.3)}
    first = ResuLightningCallback(wanted, transform=EAGER)
    _, through, _ = fit(tmp_path, first, max_epochs=3, enable_checkpointing=True, callbacks=[keep])
    torch.rand(7)
    resumed = ResuLightningCallback(wanted, transform=EAGER)
    _, task, _ = fit(tmp_path, resumed, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert resumed.cycle.finished and resumed.cycle.global_step == 30
    for (key, a), b in zip(through.state_dict().items(), task.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_compiled_once_a_phase_and_a_bypass_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled = {"compile": {"backend": "aot_eager"}}
    _, task, _ = fit(tmp_path, ResuLightningCallback(CYCLE, transform=compiled))
    assert [e.recompiles for e in runner_of(task.net).entries.values()] == [0, 0, 0]
    assert "does not call" not in caplog.text
    with caplog.at_level(logging.WARNING, "fxresu"):
        fit(tmp_path, ResuLightningCallback(CYCLE, transform=compiled, module="net.0"))
    assert "training_step does not call" not in caplog.text  # net calls it

    class Around(Task):
        def training_step(self, part, i):
            return F.cross_entropy(self.net.forward(part[0]), part[1])

    with caplog.at_level(logging.WARNING, "fxresu"):
        fit(tmp_path, ResuLightningCallback(CYCLE, transform=compiled), Around())
    assert "Around.training_step does not call the transformed Sequential itself" in caplog.text


@pytest.mark.parametrize(
    "changes, config, message",
    [
        ({}, {"steps_per_cycle": 11}, "max_steps=20: the cycle needs 22"),
        ({"max_steps": 1}, {}, "max_steps=1 is below cycles=2"),
        ({"gradient_clip_val": 0.5}, {"grad_clip": 1.0}, "grad_clip=1.0 contradicts gradient_clip_val=0.5"),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, {}, "gradient_clip_algorithm='value'"),
        ({"accumulate_grad_batches": 2}, {"accumulation": 4}, "accumulation=4 contradicts accumulate_grad_batches=2"),
        ({}, {"autocast": "bf16"}, "config.autocast='bf16' contradicts precision=None"),
        ({"callbacks": [L.callbacks.StochasticWeightAveraging(1e-2)]}, {}, "StochasticWeightAveraging.*contradicts"),
        ({"gradient_clip_val": 0.5}, {"theta_in_backward": True}, r"contradicts clipping \(gradient_clip_val=0.5\)"),
        ({"max_epochs": -1}, {}, "the training has no end"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(tmp_path: Path, changes: dict, config: dict, message: str) -> None:
    task = Task()
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, ResuLightningCallback(CYCLE | config, transform=EAGER), task, **changes)
    assert type(task.net) is nn.Sequential


def test_scaled_losses_train(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    callback = ResuLightningCallback(CYCLE | {"train_rest": True}, transform=EAGER)
    fit(tmp_path, callback, plugins=[plugin], gradient_clip_val=0.5)
    losses = [s.loss_last for s in callback.cycle.summaries]
    assert callback.cycle.finished and 1.5 < losses[-1] < losses[0] < 2.6


def test_steps_that_the_scaler_leaves_out_count(tmp_path: Path) -> None:
    """As they do for Lightning: the cycle ends with the training."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    callback = ResuLightningCallback(CYCLE | {"train_rest": True}, transform=EAGER)
    trainer, task, _ = fit(tmp_path, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.cycle.finished and callback.cycle.global_step == trainer.global_step == 20
    assert 3 < sum(s.skipped_updates for s in callback.cycle.summaries) < 15
    assert all(p.isfinite().all() for p in task.parameters())


def test_a_part_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="module='encoder': Task has no such part; it has net"):
        ResuLightningCallback(module="encoder")._model(Task())
    with pytest.raises(ConfigError, match="begins with the trainer's first step"):
        _ = ResuLightningCallback().cycle
