"""RESU inside `transformers.Trainer`: phases follow its steps, its checkpoints resume, contradictions have names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from torch import nn  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402

from fxresu import CheckpointError, ConfigError, ResuTrainerCallback  # noqa: E402
from fxresu.model_state import managed_weights  # noqa: E402
from fxresu.runner import runner_of  # noqa: E402

CYCLE: dict[str, Any] = {"cycles": 2, "sparsity_start": 0.5, "rule": "adam"}
EAGER = {"compile": False}
BEST = {"save_strategy": "best", "metric_for_best_model": "loss", "load_best_model_at_end": True}


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards: learnable."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) + i) % 16
        return {"input_ids": tokens, "labels": tokens}


def model() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=12, n_embd=32, n_layer=1, n_head=2))


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    options = {
        "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(out), **options | changes)


def trainer(out: Path, callback: ResuTrainerCallback | None = None, **changes: Any) -> Trainer:
    callback = ResuTrainerCallback(CYCLE, transform=EAGER) if callback is None else callback
    return Trainer(model(), arguments(out, **changes), train_dataset=Counting(), callbacks=[callback])


def callback_of(trainer: Trainer) -> ResuTrainerCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, ResuTrainerCallback))


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_a_whole_run(tmp_path: Path, changes: dict) -> None:
    tr = trainer(tmp_path, **changes)
    out = tr.train()
    cycle = callback_of(tr).cycle
    assert cycle.finished and cycle.global_step == out.global_step == 20
    assert [(s.stage, s.steps, s.theta_updates) for s in cycle.summaries] == [
        ("train", 6, 0), ("stabilize", 1, 0), ("resu", 3, 3)] * 2  # fmt: skip
    assert all(s.sparsity > 0.49 for s in cycle.summaries if s.stage == "resu")
    assert cycle.summaries[-1].kept > 0 and cycle.config.grad_clip == 1.0
    # The loss is the mean over the micro-batches, as the Trainer itself logs it.
    logged = [h["loss"] for h in tr.state.log_history if "loss" in h]
    firsts = [logged[i] for i in (0, 6, 7, 10, 16, 17)]
    assert [s.loss_first for s in cycle.summaries] == pytest.approx(firsts, abs=1e-3)
    assert sum(logged[-3:]) < sum(logged[:3]) - 1
    assert tr.args.max_grad_norm == 1.0
    assert len(managed_weights(tr.model)) == 4
    tr.save_model(str(tmp_path / "saved"))
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    for a, b in zip(plain.state_dict().values(), tr.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_theta_inside_the_backward(tmp_path: Path) -> None:
    """The last micro-batch of a step updates θ, an epoch's shorter window included: the same bits."""
    ends = []
    for now in (False, True):
        callback = ResuTrainerCallback(CYCLE | {"theta_in_backward": now}, transform=EAGER)
        options = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "max_steps": 24}
        tr = trainer(tmp_path / str(now), callback, **options)
        tr.train()
        assert callback.cycle.finished and callback.cycle.theta_optimizer.abandoned == 0
        ends.append(tr.model.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"fp16": True, "optim": "adamw_torch"}], ids=str)
def test_a_whole_run_on_a_gpu(tmp_path: Path, changes: dict) -> None:
    callback = ResuTrainerCallback(CYCLE | {"train_rest": True}, transform=EAGER)
    tr = trainer(tmp_path, callback, use_cpu=False, max_steps=40, **changes)
    tr.train()
    logged = [h["loss"] for h in tr.state.log_history if "loss" in h]
    assert callback.cycle.finished and callback.cycle.global_step == 40
    assert sum(logged[-3:]) < sum(logged[:3]) - 1


@pytest.mark.parametrize("at", [5, 8, 10, 17], ids=lambda s: f"step {s}")
def test_resume_from_the_trainers_checkpoint_is_bit_exact(tmp_path: Path, at: int) -> None:
    through = trainer(tmp_path / "a", save_strategy="steps", save_steps=at, save_total_limit=None)
    through.train()
    name = f"checkpoint-{at}"
    assert (tmp_path / "a" / name / "fxresu" / "state.json").exists()
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "a" / name, tmp_path / "b" / name)
    resumed = trainer(tmp_path / "b")
    torch.rand(5)
    resumed.train(resume_from_checkpoint=True)
    for (key, a), b in zip(through.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert callback_of(resumed).cycle.finished


def test_scores_with_statistics_take_the_training_data(tmp_path: Path) -> None:
    """Calibration reads the data by the way: the run resumes to the same bits in the middle of an epoch."""
    wanda = CYCLE | {"prune_score": "wanda", "calibration_batches": 3}
    through = trainer(tmp_path, ResuTrainerCallback(wanda, transform=EAGER), save_strategy="steps", save_steps=14)
    through.train()
    resumed = trainer(tmp_path, ResuTrainerCallback(wanda, transform=EAGER))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert callback_of(resumed).cycle.finished
    for a, b in zip(through.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_lacks_the_cycle(tmp_path: Path) -> None:
    first = trainer(tmp_path, save_strategy="steps", save_steps=8)
    first.train()
    folder = tmp_path / "checkpoint-8"
    shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "checkpoint-16")
    with pytest.raises(CheckpointError, match=r"resumes at step 8, but there is no '.*checkpoint-8/fxresu'"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    again = trainer(tmp_path, ResuTrainerCallback(CYCLE, transform=EAGER, resume_from=tmp_path / "elsewhere"))
    again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "elsewhere" / "fxresu" / "cycle.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        trainer(tmp_path, ResuTrainerCallback(CYCLE, transform=EAGER, resume_from=tmp_path / "elsewhere")).train(
            resume_from_checkpoint=str(tmp_path / "elsewhere")
        )


def test_compiled_once_a_phase(tmp_path: Path) -> None:
    tr = trainer(tmp_path, ResuTrainerCallback(CYCLE, transform={"compile": {"backend": "aot_eager"}}))
    tr.train()
    entries = runner_of(tr.model).entries
    assert sorted(tag.partition("/")[0] for tag in entries) == ["dense", "resu", "sparse"]
    assert all(e.recompiles == 0 for e in entries.values())


def test_the_trainers_own_compilation_is_used(tmp_path: Path) -> None:
    tr = trainer(tmp_path, ResuTrainerCallback(CYCLE), torch_compile=True, torch_compile_backend="aot_eager")
    tr.train()
    assert callback_of(tr).cycle.finished and not runner_of(tr.model).entries


@pytest.mark.parametrize(
    "changes, config, message",
    [
        ({"max_steps": 19}, {"steps_per_cycle": 10}, "max_steps=19: the cycle needs 20"),
        ({"max_steps": 1}, {}, "max_steps=1 is below cycles=2"),
        ({"max_grad_norm": 0.5}, {"grad_clip": 1.0}, "config.grad_clip=1.0 contradicts max_grad_norm=0.5"),
        ({"gradient_accumulation_steps": 2}, {"accumulation": 4}, "=4 contradicts gradient_accumulation_steps=2"),
        ({}, {"autocast": "bf16"}, "config.autocast='bf16' contradicts mixed precision .*=None"),
        ({}, {"theta_in_backward": True}, r"theta_in_backward=True contradicts clipping \(max_grad_norm=1.0\)"),
        ({"auto_find_batch_size": True}, {}, r"TrainingArguments\(auto_find_batch_size=True\) contradicts"),
        (BEST, {}, "load_best_model_at_end=True.*another mask"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path: Path, changes: dict, config: dict, message: str) -> None:
    tr = trainer(tmp_path, ResuTrainerCallback(CYCLE | config, transform=EAGER), **changes)
    with pytest.raises(ConfigError, match=message):
        tr.train()
    assert type(tr.model) is GPT2LMHeadModel


def test_optimizers_that_step_in_the_backward_are_refused(tmp_path: Path) -> None:
    from fxresu.transformers_callback import refuse_arguments

    with pytest.raises(ConfigError, match="optim='galore_adamw_layerwise'.*during the backward"):
        refuse_arguments(arguments(tmp_path, optim="galore_adamw_layerwise"))


def test_before_training_there_is_no_cycle() -> None:
    with pytest.raises(ConfigError, match="begins with the trainer's first step"):
        _ = ResuTrainerCallback().cycle
