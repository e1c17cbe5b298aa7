"""Every option of the cycle from Python, the command line and files: one name, one check, near matches."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxresu import CycleConfig, cli, train
from fxresu.errors import ConfigError
from fxresu.options import (
    add_option_arguments,
    callable_name,
    given_options,
    import_callable,
    options_table,
    read_options,
)
from fxresu.train_options import cycle_config

# A value for every option that is not its default, and its words on the command line.
VALUES: dict[str, tuple[Any, list[str]]] = {
    "cycles": (3, ["3"]),
    "steps_per_cycle": (50, ["50"]),
    "split": ((0.5, 0.25, 0.25), ["0.5", "0.25", "0.25"]),
    "train_steps": (4, ["4"]),
    "stabilize_steps": (2, ["2"]),
    "resu_steps": (3, ["3"]),
    "warm_start": (True, []),
    "sparsity_start": (0.25, ["0.25"]),
    "sparsity_end": (0.5, ["0.5"]),
    "schedule": ("cubic", ["cubic"]),
    "granularity": ("layer", ["layer"]),
    "distribution": ("erk", ["erk"]),
    "prune_score": ("wanda++", ["wanda++"]),
    "wanda_alpha": (10.0, ["10"]),
    "stabilizer": ("dsnot", ["dsnot"]),
    "dsnot_swaps": (7, ["7"]),
    "dsnot_threshold": (1e-4, ["1e-4"]),
    "dsnot_variance_power": (0.5, ["0.5"]),
    "calibration_batches": (2, ["2"]),
    "calibration_device": ("cpu", ["cpu"]),
    "candidates": (0.5, ["0.5"]),
    "theta_init": ("uniform", ["uniform"]),
    "theta_epsilon": (0.2, ["0.2"]),
    "train_theta": (False, []),
    "rule": ("momentum", ["momentum"]),
    "theta_lr": (1e-4, ["1e-4"]),
    "theta_schedule": ("cosine", ["cosine"]),
    "theta_betas": ((0.8, 0.9), ["0.8", "0.9"]),
    "theta_eps": (1e-6, ["1e-6"]),
    "theta_dtype": ("bf16", ["bf16"]),
    "theta_moments": ("bf16", ["bf16"]),
    "theta_weight_decay": (0.1, ["0.1"]),
    "select": (0.3, ["0.3"]),
    "top": (0.4, ["0.4"]),
    "consistency": (0.2, ["0.2"]),
    "commit": ("compare", ["compare"]),
    "commit_score": ("snip", ["snip"]),
    "commit_threshold": (0.7, ["0.7"]),
    "amnesty_start": (0.3, ["0.3"]),
    "amnesty_end": (0.2, ["0.2"]),
    "amnesty_schedule": ("cosine", ["cosine"]),
    "survival_cohorts": (2, ["2"]),
    "optimizer_state": ("keep", ["keep"]),
    "theta_in_backward": (True, []),
    "restore_lookahead": (2, ["2"]),
    "pinned_limit": (1.5, ["1.5"]),
    "pinned_required": (True, []),
    "train_rest": (True, []),
    "accumulation": (2, ["2"]),
    "accumulation_normalization": ("sum", ["sum"]),
    "accumulation_scale": (0.5, ["0.5"]),
    "autocast": ("bf16", ["bf16"]),
    "grad_clip": (0.5, ["0.5"]),
    "seed": (9, ["9"]),
}
NAMES = [f.name for f in dataclasses.fields(CycleConfig)]


def parsed(*argv: str) -> CycleConfig:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return cycle_config(parser.parse_args(list(argv)))


def words(name: str) -> list[str]:
    value, given = VALUES[name]
    flag = name.replace("_", "-")
    return [f"--no-{flag}"] if value is False else [f"--{flag}", *given]


def together(name: str) -> list[str]:
    """The options without which this one is refused."""
    if name == "accumulation_scale":
        return ["accumulation_normalization", name]
    return ["train_steps", "stabilize_steps", "resu_steps"] if name.endswith("_steps") else [name]


def test_every_option_is_listed_and_differs_from_its_default() -> None:
    assert set(VALUES) == set(NAMES)
    assert all(getattr(CycleConfig(), name) != value for name, (value, _) in VALUES.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_four_ways_to_give_an_option_agree(name: str, tmp_path: Path) -> None:
    given = {n: VALUES[n][0] for n in together(name)}
    want = CycleConfig(**given)
    assert getattr(want, name) == VALUES[name][0]
    assert parsed(*[w for n in given for w in words(n)]) == want
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    toml = "\n".join(f"{k} = {json.dumps(v)}" for k, v in plain.items())
    yaml = "\n".join(f"{k}: {VALUES[k][1][0] if isinstance(v, float) else json.dumps(v)}" for k, v in plain.items())
    for suffix, text in ((".toml", toml), (".yaml", yaml), (".yml", yaml), (".json", json.dumps(plain))):
        (tmp_path / f"c{suffix}").write_text(text)
        assert CycleConfig.from_file(tmp_path / f"c{suffix}") == want, suffix
        assert parsed(f"--config={tmp_path / f'c{suffix}'}") == want
    assert CycleConfig.from_dict(json.loads(json.dumps(want.to_dict()))) == want


def test_the_command_line_overrides_the_file_and_the_file_its_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: quick_test\ncycles: 3\nsparsity_end: 0.25\n")
    assert CycleConfig.from_file(path) == CycleConfig.preset("quick_test", cycles=3, sparsity_end=0.25)
    config = parsed(f"--config={path}", "--cycles=4")
    assert (config.cycles, config.sparsity_end, config.steps_per_cycle) == (4, 0.25, 100)
    assert parsed(f"--config={path}", "--preset=aggressive").steps_per_cycle == 2000
    assert parsed("--schedule=0.1,0.5", "--cycles=2").schedule == (0.1, 0.5)


def test_help_names_every_option_its_choices_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in NAMES:
        assert f"--{name.replace('_', '-')}" in text
    assert "magnitude, random, wanda, wanda++, gradient, snip (default: magnitude)" in text
    assert "(default: 0.6 0.1 0.3)" in text


@pytest.mark.parametrize(("argv", "message"), [
    (["--prune-scor", "wanda"], None),
    (["--prune-skore=wanda"], "unrecognized arguments: --prune-skore=wanda (did you mean --prune-score"),
    (["--theta-rl", "1"], "unrecognized arguments: --theta-rl 1 (did you mean --theta-lr"),
    (["--commit=amnesti"], "commit='amnesti'; must be one of"),
    (["--prune-score=wandb"], "prune_score='wandb'; must be one of magnitude, random, wanda"),
    (["--granularity=2:4"], "use schedule='constant' with sparsity_end=0.5"),
    (["--schedule=0.1,0.2,x"], "schedule='0.1,0.2,x' is unknown"),
    (["--theta-betas", "0.9"], "expected 2 arguments"),
    (["--cycles=two"], "invalid int value: 'two'"),
])  # fmt: skip
def test_bad_options_on_the_command_line(argv: list[str], message: str | None, tmp_path: Path, capsys) -> None:
    data = tmp_path / "none.txt"
    status = cli.main(["train", *argv, f"--data={data}", f"--out={tmp_path / 'out'}"])
    err = capsys.readouterr().err
    assert status == 2 and "Traceback" not in err
    assert (message or "none.txt") in " ".join(err.split())


@pytest.mark.parametrize(("name", "text", "message"), [
    ("c.toml", "cycels = 3", r"unknown option 'cycels' \(did you mean 'cycles'"),
    ("c.yaml", "prune-score: wanda", r"unknown option 'prune-score' \(did you mean 'prune_score'"),
    ("c.yaml", "cycles: 3\ncycles: 4", r"c.yaml' is not YAML: .*'cycles' is given twice"),
    ("c.yaml", "cycles: [3", r"c.yaml' is not YAML"),
    ("c.yaml", "- cycles", r"c.yaml' holds no options, but list"),
    ("c.yaml", "", r"c.yaml' holds no options, but NoneType"),
    ("c.toml", "cycles 3", r"c.toml' is not TOML"),
    ("c.json", "{", r"c.json' is not JSON"),
    ("c.ini", "cycles=3", r"c.ini'; its name must end in .toml, .yaml, .yml, .json"),
    ("c.toml", 'cycles = "3"', r"cycles='3'; must be an integer"),
    ("c.toml", 'preset = "quick"', r"preset='quick' is unknown"),
])  # fmt: skip
def test_bad_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        CycleConfig.from_file(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_options(tmp_path / "none.toml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="b.yaml' is not YAML"):
        read_options(tmp_path / "b.yaml")


MODULE = """
def schedule(cycle, cycles):
    return 0.25 + 0.25 * cycle

def score(weight, statistics):
    return weight * statistics.input_norm()

score.needs = ("inputs",)

def halve(step, steps):
    return 0.5

class Share:
    def __call__(self, cycle, cycles):
        return 0.25

share = Share()
"""


def test_callables_by_name_from_files_and_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_choices.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    text = (
        'schedule = "own_choices:schedule"\nprune_score = "own_choices:score"\namnesty_schedule = "own_choices:share"'
    )
    (tmp_path / "c.toml").write_text(text + '\ntheta_schedule = "own_choices:halve"\ncycles = 2')
    config = CycleConfig.from_file("c.toml")
    assert [config.sparsity(c) for c in range(2)] == [0.25, 0.5]
    assert (config.amnesty(0), config.theta_lr_factor(3)) == (0.25, 0.5)
    same = parsed("--schedule=own_choices:schedule", "--prune-score=own_choices:score", "--cycles=2",
                  "--amnesty-schedule=own_choices:share", "--theta-schedule=own_choices:halve")  # fmt: skip
    assert same == config
    assert CycleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert str(tmp_path) not in __import__("sys").path
    with pytest.raises(ConfigError, match=r"'own_choices' has no 'scor' \(did you mean 'score'"):
        CycleConfig(prune_score="own_choices:scor")
    from fxresu_cycles import make, run

    cycle = make(prune_score="own_choices:score", cycles=1, schedule="constant", sparsity_end=0.5)
    run(cycle)
    assert cycle.finished


def own(weight: Tensor, statistics: object) -> Tensor:
    return weight


def test_callables_are_written_by_name() -> None:
    config = CycleConfig(prune_score=own, cycles=2, schedule=lambda c, n: 0.5)
    plain = config.to_dict()
    assert plain["prune_score"].endswith("test_options:own") and plain["schedule"] == [0.5, 0.5]
    json.dumps(plain)
    assert callable_name("wanda") == "wanda"
    assert import_callable("torch:add") is torch.add


def test_arguments_can_be_added_for_any_dataclass() -> None:
    parser = argparse.ArgumentParser()
    add_option_arguments(parser, CycleConfig)
    args = parser.parse_args(["--split", "0.2", "0.3", "0.5", "--no-train-theta"])
    assert given_options(args, CycleConfig) == {"split": (0.2, 0.3, 0.5), "train_theta": False}


def test_the_page_of_options_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "OPTIONS.md"
    assert page.read_text().endswith(options_table(CycleConfig)), "write it anew: fxresu.options.options_table"
