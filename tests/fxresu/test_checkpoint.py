"""Checkpoints: bit-exact resume at every step, damage found before anything changes, an earlier one survives."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxresu
from fxresu import CheckpointError, CycleConfig, ResuCycle, checkpoint, checkpoint_folder
from fxresu.model_state import managed_weights


class Net(nn.Module):
    """Dropout, so that a resume that forgets the random state shows."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(width, 32), nn.Linear(32, width), nn.Linear(width, 4)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.down(F.dropout(F.gelu(self.up(x)), 0.1, self.training))
        return F.cross_entropy(self.head(self.norm(x)), y)


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(16, 16, generator=generator)
    return x, x[:, :4].argmax(1)


def make(width: int = 16, transform: dict | None = None, optimizer: str = "AdamW", **options) -> ResuCycle:
    torch.manual_seed(0)
    options = {"cycles": 2, "train_steps": 3, "stabilize_steps": 2, "resu_steps": 3, "sparsity_start": 0.5, **options}
    given = {k: options[k] for k in ("candidates", "granularity") if k in options}
    model = fxresu.transform(Net(width), **{"compile": False, **given, **(transform or {})})
    kinds = {"momentum": 0.9} if optimizer == "SGD" else {"amsgrad": True} if optimizer == "Adam" else {}
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2, **kinds)
    return ResuCycle(model, made, CycleConfig(**options))


def go(cycle: ResuCycle, to: int) -> None:
    while cycle.global_step < to:
        cycle.step(batch(cycle.global_step))


def everything(cycle: ResuCycle) -> dict:
    state = cycle.state_dict()
    state["meta"]["meter"].pop("seconds")
    for summary in state["meta"]["summaries"]:
        summary.pop("seconds")
    return {
        "model": {k: v.clone() for k, v in cycle.model.state_dict().items()},
        "optimizer": copy.deepcopy(cycle.optimizer.state_dict()),
        "cycle": state,
        "rng": torch.get_rng_state(),
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


VARIANTS = [
    {},
    {"optimizer_state": "keep", "train_rest": True},
    {"transform": {"storage": "packed"}, "rule": "adam"},
    {"granularity": "layer", "optimizer": "SGD", "rule": "momentum"},
    {"candidates": 0.5, "optimizer": "Adam", "optimizer_state": "keep"},
    {"optimizer": "Adafactor", "granularity": "global", "rule": "sgd"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_resume_at_every_step_is_bit_exact(tmp_path: Path, options: dict) -> None:
    through = make(**options)
    total = through.total_steps
    for step in range(total + 1):
        go(through, step)
        through.save(tmp_path / str(step))
    end = everything(through)
    for step in range(0, total + 1):
        resumed = make(**options)
        go(resumed, min(3, total))  # a used model, optimizer and random state
        resumed.load(tmp_path / str(step))
        assert resumed.global_step == step
        go(resumed, total)
        assert same(everything(resumed), end), f"resumed at step {step}"


def test_state_dict_form_goes_through_torch_save(tmp_path: Path) -> None:
    """For those who write their own checkpoints: model, optimizer and cycle, each its own state."""
    through = make()
    go(through, 7)
    torch.save([through.model.state_dict(), through.optimizer.state_dict(), through.state_dict()], tmp_path / "c.pt")
    rng = torch.get_rng_state()
    go(through, 16)
    resumed = make()
    model, optimizer, cycle = torch.load(tmp_path / "c.pt")
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.load_state_dict(cycle)
    torch.set_rng_state(rng)
    go(resumed, 16)
    assert same(resumed.model.state_dict(), through.model.state_dict())


def test_saved_model_loads_into_the_plain_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    cycle = make(transform={"storage": "packed"})
    go(cycle, 7)
    assert cycle.stage == "resu"
    cycle.save(tmp_path / "c")
    plain = Net()
    plain.load_state_dict(load_file(tmp_path / "c" / "model.safetensors"), strict=True)
    plain.eval(), cycle.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(*batch(0)), cycle.model(*batch(0)))


def damaged(tmp_path: Path) -> tuple[ResuCycle, Path]:
    cycle = make()
    go(cycle, 7)
    cycle.save(tmp_path / "c")
    return cycle, tmp_path / "c"


@pytest.mark.parametrize("name", [*checkpoint.FILES, "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "foreign"])
def test_damage_is_found_and_nothing_changes(tmp_path: Path, name: str, damage: str) -> None:
    cycle, folder = damaged(tmp_path)
    file = folder / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(data) // 2
        file.write_bytes({
            "truncated": data[:middle],
            "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
            "foreign": b'{"some": "other file"}',
        }[damage])  # fmt: skip
    go(cycle, 9)
    before = everything(cycle)
    with pytest.raises(CheckpointError, match=name.split(".")[0]):
        cycle.load(folder)
    assert same(everything(cycle), before)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"width": 24}, r"another model: '.*' is \("),
        ({"transform": {"exclude": "down"}}, r"manages 2 weights and the model 1.*down\.weight"),
        ({"resu_steps": 4}, "written with resu_steps=3, this run has 4"),
        ({"granularity": "layer"}, "granularity='row'"),
        ({"sparsity_end": 0.8}, "written with sparsity_end=0.7, this run has 0.8"),
        ({"optimizer": "SGD"}, "another optimizer than SGD"),
    ],
)
def test_checkpoint_of_something_else(tmp_path: Path, other: dict, message: str) -> None:
    _, folder = damaged(tmp_path)
    cycle = make(**other)
    before = everything(cycle)
    with pytest.raises(CheckpointError, match=message):
        cycle.load(folder)
    assert same(everything(cycle), before)


def test_later_format(tmp_path: Path) -> None:
    cycle, folder = damaged(tmp_path)
    document = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**document, "format": 3}))
    with pytest.raises(CheckpointError, match="has format 3; this fxresu reads format 2"):
        cycle.load(folder)


@pytest.mark.parametrize("moment", ["save_file", "sync", "_replace"])
def test_a_failing_save_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    cycle, folder = damaged(tmp_path)
    saved = everything(cycle)
    go(cycle, 9)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, moment, full)
        with pytest.raises(OSError, match="No space left.*MB.*not written; the earlier checkpoint '.*c' is intact"):
            cycle.save(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    cycle.load(folder)
    assert same(everything(cycle), saved)


def test_a_crash_between_the_renames_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    cycle, folder = damaged(tmp_path)
    saved = everything(cycle)
    folder.rename(tmp_path / ".c.old")
    shutil.copytree(tmp_path / ".c.old", tmp_path / ".c.writing")
    cycle.load(folder)
    assert same(everything(cycle), saved)
    go(cycle, 9)
    cycle.save(folder)
    assert folder.exists()


def test_save_in_the_middle_of_an_accumulation_is_refused(tmp_path: Path) -> None:
    cycle = make(accumulation=2)
    cycle.step(batch(0))
    with pytest.raises(CheckpointError, match="1 of 2 micro-batches are accumulated"):
        cycle.save(tmp_path / "c")
    cycle.step(batch(1))
    cycle.save(tmp_path / "c")


def test_save_does_not_replace_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years of work")
    with pytest.raises(CheckpointError, match="is no checkpoint folder"):
        make().save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text()


def test_masks_and_theta_are_not_in_the_models_state_dict() -> None:
    cycle = make()
    go(cycle, 7)
    assert cycle.model.state_dict().keys() == Net().state_dict().keys()
    names = {k.rpartition(".")[2] for k in cycle.state_dict()["tensors"]}
    assert {"bits", "m", "v", "row_start"} <= names
    assert all(m.entry.bits is not None for m in managed_weights(cycle.model).values())


def test_keep_last_keeps_the_newest_and_names_earlier_ones_by_step(tmp_path: Path) -> None:
    cycle, folder = make(), tmp_path / "c"
    for step in (2, 4, 6, 6, 9):  # a step may be saved twice
        go(cycle, step)
        cycle.save(folder, {"at": step}, keep_last=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c-00000004", "c-00000006"]
    assert make().load(folder) == {"at": 9}
    earlier = make()
    assert earlier.load(tmp_path / "c-00000004") == {"at": 4} and earlier.global_step == 4
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"earlier checkpoints: .*c-00000006, .*c-00000004"):
        make().load(folder)
    (tmp_path / "c-mine").mkdir()
    cycle.save(folder)  # keep_last=1 replaces the newest and leaves what others kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c-00000004", "c-00000006", "c-mine"]
    cycle.save(folder, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c-00000009", "c-mine"]


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_keep_last_of_nothing(tmp_path: Path, number: object) -> None:
    with pytest.raises(CheckpointError, match="keep_last="):
        make().save(tmp_path / "c", keep_last=number)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep_last", [1, 3])
def test_a_crash_between_the_renames_reads_the_one_before(tmp_path: Path, monkeypatch, keep_last: int) -> None:
    cycle, folder = make(), tmp_path / "c"
    go(cycle, 3)
    cycle.save(folder, keep_last=keep_last)
    saved = everything(cycle)
    go(cycle, 5)

    def crash(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise KeyboardInterrupt
        return original(self, target)

    original = Path.rename
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", crash)
        cycle.save(folder, keep_last=keep_last)
    assert not folder.exists()
    cycle.load(folder)
    assert same(everything(cycle), saved)


def test_all_random_generators_go_on(tmp_path: Path) -> None:
    import random

    import numpy as np

    cycle = make()
    np.random.rand(3), random.random(), torch.rand(3)
    cycle.save(tmp_path / "c")
    want = (np.random.rand(), np.random.randn(), random.random(), torch.rand(2).tolist())
    cycle.load(tmp_path / "c")
    assert (np.random.rand(), np.random.randn(), random.random(), torch.rand(2).tolist()) == want


def test_another_precision_or_storage_is_another_model(tmp_path: Path) -> None:
    cycle, folder = damaged(tmp_path)
    half = make(transform={})
    half.model.bfloat16()
    with pytest.raises(CheckpointError, match=r"torch.float32 there and .* torch.bfloat16 here"):
        half.load(folder)
    with pytest.raises(CheckpointError, match="storage='resident', the model has 'packed'"):
        make(transform={"storage": "packed"}).load(folder)


def test_the_cycles_state_alone(tmp_path: Path) -> None:
    """For loops that store model and optimizer themselves, as the Trainer does."""
    through = make()
    go(through, 7)
    checkpoint.save_state(through, tmp_path / "s")
    rest = copy.deepcopy([through.model.state_dict(), through.optimizer.state_dict()])
    rng = torch.get_rng_state()
    go(through, 16)
    resumed = make()
    resumed.model.load_state_dict(rest[0])
    resumed.optimizer.load_state_dict(rest[1])
    checkpoint.load_state(resumed, tmp_path / "s")
    torch.set_rng_state(rng)
    go(resumed, 16)
    assert same(resumed.model.state_dict(), through.model.state_dict())
    with pytest.raises(CheckpointError, match="is a cycle's, expected a run's"):
        resumed.load(tmp_path / "s")


FULL = """
import resource, sys
sys.path[:0] = [{tests!r}, {support!r}]
from test_checkpoint import go, make
from fxresu.checkpoint_folder import read_folder
from pathlib import Path
cycle, folder = make(), Path({folder!r})
go(cycle, 7)
cycle.save(folder)
go(cycle, 9)
for limit in sorted(f.stat().st_size - 1 for f in folder.iterdir()):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        cycle.save(folder)
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert read_folder(folder, "run")[0]["step"] == 7
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
cycle.save(folder)
assert read_folder(folder, "run")[0]["step"] == 9
"""


def test_a_disk_that_takes_no_more_bytes(tmp_path: Path) -> None:
    """The system itself refuses the write, at several places of the save, as a full disk does."""
    import subprocess
    import sys

    here = Path(__file__).parent
    script = FULL.format(tests=str(here), support=str(here.parent / "support"), folder=str(tmp_path / "c"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert "File too large: the checkpoint was not written; the earlier checkpoint" in line and "is intact" in line
