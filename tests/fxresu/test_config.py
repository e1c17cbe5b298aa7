"""CycleConfig: one validation that names field, value and remedy; dictionaries, presets, steps."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxresu.config import PRESETS, CycleConfig, phase_steps
from fxresu.errors import ConfigError, FxresuError
from fxresu.granularity import parse_granularity


def test_defaults_are_the_published_cycle() -> None:
    config = CycleConfig()
    assert phase_steps(config) == {"train": 600, "stabilize": 100, "resu": 300}
    assert [config.sparsity(c) for c in range(5)] == pytest.approx([0.0, 0.175, 0.35, 0.525, 0.7])
    assert [config.amnesty(c) for c in range(5)] == pytest.approx([0.10, 0.08, 0.06, 0.04, 0.02])
    assert (config.rule, config.select, config.top, config.consistency) == ("selective", 0.2, 0.5, 0.5)
    assert (config.theta_init, config.theta_epsilon, config.theta_weight_decay) == ("normal", 0.1, 0.01)


@pytest.mark.parametrize(
    ("name", "sparsities", "steps"),
    [
        ("default", (0.0, 0.7), (5, 1000)),
        ("published", (0.0, 0.7), (5, 1000)),
        ("aggressive", (0.0, 0.9), (7, 2000)),
        ("conservative", (0.0, 0.5), (3, 500)),
        ("densification", (0.7, 0.0), (5, 1000)),
        ("quick_test", (0.0, 0.5), (2, 100)),
    ],
)
def test_presets(name: str, sparsities: tuple[float, float], steps: tuple[int, int]) -> None:
    config = CycleConfig.preset(name)
    assert (config.sparsity(0), config.sparsity(config.cycles - 1)) == sparsities
    assert (config.cycles, config.steps_in_cycle) == steps


def test_every_preset_is_covered_and_takes_changes() -> None:
    assert set(PRESETS) == {"default", "published", "aggressive", "conservative", "densification", "quick_test"}
    assert CycleConfig.preset("quick_test", cycles=1).cycles == 1
    with pytest.raises(ConfigError, match=r"preset='quick'.*"):
        CycleConfig.preset("quick")
    with pytest.raises(ConfigError, match=r"unknown option 'cycle' \(did you mean 'cycles'"):
        CycleConfig.preset("default", cycle=3)


def test_theta_learning_rate() -> None:
    assert CycleConfig(rule="adam").resolved_theta_lr(3e-4) == 3e-4
    assert CycleConfig(rule="adam", theta_lr=0.5).resolved_theta_lr(3e-4) == 0.5
    for rule in ("selective", "momentum", "sgd"):
        # The published 1e-4 is too small for rules whose step is proportional to the gradient: theta would not train.
        assert CycleConfig(rule=rule).resolved_theta_lr(3e-4) == 0.1
    published = CycleConfig.preset("published")
    assert (published.resolved_theta_lr(1.0), published.resolved_theta_betas()) == (1e-4, (0.9, 0.9))
    assert CycleConfig(rule="adam").resolved_theta_betas() == (0.9, 0.999)
    assert CycleConfig(rule="momentum").resolved_theta_betas() == (0.9, 0.9)
    assert CycleConfig(rule="adam", theta_betas=(0.8, 0.95)).resolved_theta_betas() == (0.8, 0.95)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"cycles": 0}, r"cycles=0.*at least 1"),
    ({"cycles": 2.0}, r"cycles=2\.0.*integer"),
    ({"cycles": True}, r"cycles=True.*integer"),
    ({"steps_per_cycle": -5}, r"steps_per_cycle=-5"),
    ({"split": (0.5, 0.5)}, r"split=\(0\.5, 0\.5\).*3 numbers"),
    ({"split": (0.5, 0.5, 0.5)}, r"split=.*sum to 1"),
    ({"split": (1.2, -0.2, 0.0)}, r"split=.*>= 0"),
    ({"split": "most"}, r"split='most'"),
    ({"resu_steps": 3}, r"train_steps=None.*resu_steps=3"),
    ({"train_steps": -1, "stabilize_steps": 1, "resu_steps": 1}, r"train_steps=-1"),
    ({"train_steps": 0, "stabilize_steps": 0, "resu_steps": 0}, r"at least 1 step"),
    ({"sparsity_start": -0.1}, r"sparsity_start=-0\.1"),
    ({"sparsity_end": 1.0}, r"sparsity_end=1\.0.*\[0, 1\)"),
    ({"sparsity_end": math.nan}, r"sparsity_end=nan"),
    ({"sparsity_end": "0.5"}, r"sparsity_end='0\.5'"),
    ({"schedule": "linaer"}, r"schedule='linaer'.*'linear'"),
    ({"schedule": [0.1, 0.2], "cycles": 3}, r"2 sparsities for 3 cycles"),
    ({"schedule": lambda c, n: c, "cycles": 2}, r"schedule\(1, 2\)=1"),
    ({"granularity": "rows"}, r"granularity='rows'"),
    ({"granularity": "4:2"}, r"granularity='4:2'.*n < m"),
    ({"granularity": "block"}, r"granularity='block'.*block:HxW"),
    ({"granularity": "2:4"}, r"sparsity 0\.175 in cycle 1.*'2:4'.*constant"),
    ({"candidates": 0.0}, r"candidates=0\.0"),
    ({"theta_init": "gaussian"}, r"theta_init='gaussian'.*'normal'"),
    ({"theta_epsilon": -1.0}, r"theta_epsilon=-1\.0"),
    ({"train_theta": 1}, r"train_theta=1.*True or False"),
    ({"rule": "adm"}, r"rule='adm'.*did you mean 'adam'"),
    ({"theta_lr": 0.0}, r"theta_lr=0\.0.*positive"),
    ({"theta_lr": math.inf}, r"theta_lr=inf"),
    ({"theta_betas": (0.9, 1.0)}, r"theta_betas=\(0\.9, 1\.0\)"),
    ({"theta_eps": 0.0}, r"theta_eps=0\.0"),
    ({"theta_weight_decay": -0.01}, r"theta_weight_decay=-0\.01"),
    ({"select": 1.5}, r"select=1\.5"),
    ({"top": 0.0}, r"top=0\.0"),
    ({"consistency": 1.0}, r"consistency=1\.0"),
    ({"amnesty_start": 2.0}, r"amnesty_start=2\.0"),
    ({"amnesty_end": -0.1}, r"amnesty_end=-0\.1"),
    ({"restore_lookahead": -1}, r"restore_lookahead=-1; must be"),
    ({"pinned_limit": 0.0}, r"pinned_limit=0.0; must be positive"),
    ({"pinned_required": "yes"}, r"pinned_required='yes'; must be True or False"),
    ({"theta_in_backward": 1}, r"theta_in_backward=1; must be True or False"),
    ({"optimizer_state": "disk"}, r"optimizer_state='disk'.*'drop', 'keep', 'offload', 'pinned', 'compress'"),
    ({"train_rest": None}, r"train_rest=None"),
    ({"accumulation": 0}, r"accumulation=0"),
    ({"accumulation_normalization": "both"}, r"accumulation_normalization='both'"),
    ({"accumulation_scale": 0.5}, r"accumulation_scale=0.5.*'mean' divides already"),
    ({"autocast": "bfloat16"}, r"autocast='bfloat16'.*'bf16'"),
    ({"autocast": 16}, r"autocast=16"),
    ({"grad_clip": -1.0}, r"grad_clip=-1\.0"),
    ({"seed": -1}, r"seed=-1"),
    ({"theta_dtype": "fp16"}, r"theta_dtype='fp16'.*'fp32', 'bf16'"),
    ({"theta_moments": "int8"}, r"theta_moments='int8'.*'fp32', 'bf16', '8bit'"),
    ({"warm_start": "yes"}, r"warm_start='yes'.*True or False"),
    ({"distribution": "erc"}, r"distribution='erc'.*did you mean 'erk'"),
    ({"distribution": "erk", "granularity": "global"}, r"distribution='erk'.*'global' ranks all layers together"),
    ({"prune_score": "wandb"}, r"prune_score='wandb'.*did you mean 'wanda'"),
    ({"prune_score": "no.such.module:f"}, r"prune_score='no.such.module:f'; module 'no.such.module' cannot be imp"),
    ({"prune_score": "math:sqroot"}, r"prune_score='math:sqroot'; 'math' has no 'sqroot' \(did you mean 'sqrt'"),
    ({"prune_score": "math:pi"}, r"prune_score='math:pi'; a float cannot be called"),
    ({"wanda_alpha": -1.0}, r"wanda_alpha=-1\.0.*not negative"),
    ({"stabilizer": "dsno"}, r"stabilizer='dsno'.*did you mean 'dsnot'"),
    ({"stabilizer": "dsnot", "granularity": "block:4x4"}, r"stabilizer='dsnot'.*whole blocks"),
    ({"stabilizer": "dsnot", "granularity": "2:4", "schedule": "constant", "sparsity_end": 0.5}, r"use '2:4-rows'"),
    ({"dsnot_swaps": 0}, r"dsnot_swaps=0.*at least 1"),
    ({"dsnot_threshold": -0.1}, r"dsnot_threshold=-0\.1"),
    ({"dsnot_variance_power": -1.0}, r"dsnot_variance_power=-1\.0"),
    ({"calibration_batches": 0}, r"calibration_batches=0.*at least 1"),
    ({"calibration_device": "gpu"}, r"calibration_device='gpu'.*'cpu'"),
    ({"theta_schedule": "cosin"}, r"theta_schedule='cosin'.*did you mean 'cosine'"),
    ({"theta_schedule": lambda step, steps: -1.0}, r"theta_schedule\(0, 300\)=-1\.0.*finite number >= 0"),
    ({"commit": "amnesti"}, r"commit='amnesti'.*did you mean 'amnesty'"),
    ({"commit": "threshold"}, r"commit='threshold'.*'row' keeps fixed counts.*'layer' or 'global'"),
    ({"commit_score": "snap"}, r"commit_score='snap'.*did you mean 'snip'"),
    ({"commit_threshold": -1.0}, r"commit_threshold=-1\.0"),
    ({"amnesty_schedule": "linea"}, r"amnesty_schedule='linea'.*did you mean 'linear'"),
    ({"amnesty_schedule": lambda cycle, n: 2.0}, r"amnesty_schedule\(0, 5\)=2\.0.*\[0, 1\]"),
    ({"survival_cohorts": -1}, r"survival_cohorts=-1"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[f"{next(iter(v))}-{i}" for i, (v, _) in enumerate(BAD)])
def test_bad_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CycleConfig(**values)
    with pytest.raises(ValueError, match=message):
        CycleConfig().replace(**values)


def test_every_field_has_a_bad_value_above() -> None:
    assert {key for values, _ in BAD for key in values} == {field.name for field in dataclasses.fields(CycleConfig)}


def test_unknown_keys_are_refused_with_near_matches() -> None:
    with pytest.raises(FxresuError, match=r"unknown option 'sparsity_ned' \(did you mean 'sparsity_end'"):
        CycleConfig.from_dict({"sparsity_ned": 0.5})
    with pytest.raises(ConfigError, match=r"must be a mapping"):
        CycleConfig.from_dict([("cycles", 2)])  # type: ignore[arg-type]


@given(
    cycles=st.integers(1, 6),
    steps=st.integers(1, 5000),
    parts=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20)),
    end=st.floats(0.0, 0.99),
    schedule=st.sampled_from(["linear", "constant", "cosine", "exponential", "densification"]),
    granularity=st.sampled_from(["row", "layer", "global", "block:4x16"]),
    betas=st.none() | st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.999)),
)
def test_dictionary_round_trip_and_exact_step_sum(
    cycles: int, steps: int, parts: tuple[int, int, int], end: float, schedule: str, granularity: str, betas: Any
) -> None:
    split = tuple(part / sum(parts) for part in parts)
    config = CycleConfig(
        cycles=cycles,
        steps_per_cycle=steps,
        split=split,
        sparsity_end=end,
        schedule=schedule,
        granularity=granularity,
        theta_betas=betas,
    )
    assert CycleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    taken = phase_steps(config)
    assert sum(taken.values()) == config.steps_in_cycle == steps
    assert all(abs(taken[name] - share * steps) < 1.001 for name, share in zip(taken, split))


def test_explicit_steps_replace_the_split() -> None:
    config = CycleConfig(train_steps=7, stabilize_steps=0, resu_steps=5)
    assert phase_steps(config) == {"train": 7, "stabilize": 0, "resu": 5}
    assert config.steps_in_cycle == 12


def test_callable_schedule_becomes_its_values() -> None:
    config = CycleConfig(cycles=4, schedule=lambda c, n: 0.1 * (c + 1))
    read = CycleConfig.from_dict(config.to_dict())
    assert [read.sparsity(c) for c in range(4)] == [config.sparsity(c) for c in range(4)]


def test_n_m_needs_a_schedule_of_its_own_sparsity() -> None:
    assert CycleConfig(granularity="2:4", schedule="constant", sparsity_end=0.5).sparsity(0) == 0.5
    assert CycleConfig(granularity="2:4", cycles=2, sparsity_end=0.5).sparsity(0) == 0.0
    assert CycleConfig(granularity="1:3", schedule="constant", sparsity_end=2 / 3).cycles == 5


def test_is_frozen_and_replace_leaves_the_original() -> None:
    config = CycleConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cycles = 3  # type: ignore[misc]
    assert (config.replace(cycles=3).cycles, config.cycles) == (3, 5)
    assert hash(config) == hash(CycleConfig())


@pytest.mark.parametrize("text", ["row", "layer", "global", "2:4", "1:8", "block:4x16"])
def test_granularity_round_trip(text: str) -> None:
    assert str(parse_granularity(text)) == text
    assert parse_granularity(parse_granularity(text)) == parse_granularity(text)


@pytest.mark.parametrize(
    "text", ["", "Row", "2:4:8", "0:4", "4:4", "-1:4", "block:0x4", "block:1x1", "block:4", None, 2]
)
def test_granularity_refusals(text: Any) -> None:
    with pytest.raises(ConfigError, match="granularity="):
        parse_granularity(text)


def test_granularity_names_the_weight_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"m=4 inputs.*'blocks\.0\.fc'.*K=30.*multiple of 4"):
        parse_granularity("2:4").check("blocks.0.fc", 8, 30)
    with pytest.raises(ConfigError, match=r"'fc' of 6 rows and K=32.*4x16"):
        parse_granularity("block:4x16").check("fc", 6, 32)
    with pytest.raises(ConfigError, match=r"sparsity=0\.3 contradicts.*'fc'.*0\.5"):
        parse_granularity("2:4").check("fc", 8, 32, 0.3)
