"""`CycleConfig`: every option of the RESU cycle, and one validation for Python, command line and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from fxresu.candidates import THETA_INITS
from fxresu.distributions import DISTRIBUTIONS
from fxresu.errors import ConfigError
from fxresu.granularity import parse_granularity
from fxresu.options import Named, callable_name, from_mapping, near, normalise, option, read_options, refuse
from fxresu.presets import PRESETS
from fxresu.saliency import SCORES
from fxresu.schedules import LR_SCHEDULES, SHAPES, Schedule, amnesty_ratio, has_work, lr_factor, sparsity_at

__all__ = ["COMMITS", "PHASES", "PRESETS", "RULES", "CycleConfig", "phase_steps"]

RULES = ("selective", "adam", "momentum", "sgd")
COMMITS = ("amnesty", "compare", "wanda", "threshold")
PHASES = ("train", "stabilize", "resu")
"""The phases of a cycle that take steps, in order; pruning and the commit take none."""

_GRADIENT_RULE_LR = 0.1
_BETAS = {"adam": (0.9, 0.999)}


@dataclass(frozen=True)
class CycleConfig:
    """Options of `ResuCycle`. Frozen and validated: ConfigError names the field, the value and the remedy.

    Every field is an option of `fxresu train` as well (`--steps-per-cycle`), and a key of TOML, YAML and JSON files
    (`from_file`). Its help says what it is; what needs more words:

    - `schedule`: a name, a sequence with one sparsity for each cycle, or a callable (cycle, n_cycles) -> sparsity. A
      sparsity below the mask's grows the mask at the commit, by what RESU has trained ("densification"). n:m has only
      the sparsities 0 and 1 - n/m, so the schedule must give these, as "constant" does.
    - `theta_lr`: None is the learning rate of the managed weights' group in the optimizer for "adam", and 0.1 for the
      other rules, whose step is proportional to the gradient: with them the published 1e-4 hardly moves theta in a
      phase of some hundred steps. The preset "published" keeps 1e-4.
    - `theta_dtype`: of packed storage, and of weights in bfloat16 or float16. "bf16" halves theta, and its gradient in
      packed storage; small updates survive on average, because each is rounded up or down at random (of `seed`, step
      and place, so that a run can be repeated).
    - `theta_in_backward`: the last backward of a step updates theta weight by weight and frees its gradient, with the
      results of the ordinary order (see docs/GUIDE.md). It rules out what needs all of these gradients at once:
      `grad_clip` and float16's loss scale.
    - `theta_betas`: None is (0.9, 0.999) for "adam" and (0.9, 0.9) otherwise. `theta_eps`: delta of the consistency
      |m| / (v + delta), or Adam's epsilon.
    - `prune_score`, `commit_score`: a callable is score(weight, statistics) -> Tensor (see `saliency`).
    - `commit`: "amnesty" gives candidates a quota and ranks each side by itself; "compare" ranks candidates and active
      weights together by `commit_score`, without a quota; "wanda" re-prunes everything by Wanda's score; "threshold"
      keeps what scores above `commit_threshold` times the active weights' mean score, so that sparsity follows.
      Where weights compete is the granularity's business: per row, layer, or globally.
    - Any named choice may be "package.module:function", which files and the command line can say too.
    """

    # Cycle
    cycles: int = option(5, "cycles of train, prune, stabilize, RESU, commit", group="cycle", low=1)
    steps_per_cycle: int = option(1000, "optimizer steps of a cycle", group="cycle", low=1)
    split: tuple[float, float, float] = option(
        (0.6, 0.1, 0.3), "shares of train, stabilize and RESU in a cycle's steps", group="cycle"
    )
    train_steps: int | None = option(None, "with the next two: replaces steps and split", group="cycle", low=0)
    stabilize_steps: int | None = option(None, "steps of stabilize", group="cycle", low=0)
    resu_steps: int | None = option(None, "steps of RESU", group="cycle", low=0)
    warm_start: bool = option(False, "start from the zeros of an already pruned model", group="cycle")

    # Sparsity and masks
    sparsity_start: float = option(
        0.0, "sparsity of the first cycle", group="sparsity", low=0, high=1, open_high=True,
        remedy="must be in [0, 1), a share of pruned weights",
    )  # fmt: skip
    sparsity_end: float = option(
        0.7, "sparsity of the last cycle", group="sparsity", low=0, high=1, open_high=True,
        remedy="must be in [0, 1), a share of pruned weights",
    )  # fmt: skip
    schedule: Schedule = option(
        "linear", "way of the sparsity over the cycles, or its values 0.3,0.5,0.7", group="sparsity",
        names=(*SHAPES, "densification"),
    )  # fmt: skip
    granularity: str = option("row", "where weights compete: row, layer, global, n:m, block:HxW", group="sparsity")
    distribution: Named = option("uniform", "sparsity of the single layers", group="sparsity", names=DISTRIBUTIONS)
    prune_score: Named = option("magnitude", "what pruning ranks weights by", group="pruning", names=SCORES)
    wanda_alpha: float = option(100.0, "weight of the gradients in wanda++", group="pruning", low=0)
    stabilizer: str | None = option(None, "refines new masks by swaps in each row", group="pruning",
                                    choices=(None, "dsnot"))  # fmt: skip
    dsnot_swaps: int = option(50, "most swaps a row", group="pruning", low=1)
    dsnot_threshold: float = option(0.01, "mean error of an output that is left alone", group="pruning", low=0)
    dsnot_variance_power: float = option(1.0, "power of the inputs' variance in growing", group="pruning", low=0)
    calibration_batches: int = option(
        8, "micro-batches for the statistics of scores that need some", group="pruning", low=1
    )
    calibration_device: str | None = option(
        None, "where statistics of the weights' size are kept; None is with the weights", group="pruning",
        choices=(None, "cpu"),
    )  # fmt: skip

    # Candidates and theta
    candidates: float = option(
        1.0, "share of the input columns, in blocks of 64, that theta covers", group="theta", low=0, high=1,
        open_low=True,
    )  # fmt: skip
    theta_init: str = option("normal", "theta's start", group="theta", choices=THETA_INITS)
    theta_epsilon: float = option(0.1, "its deviation, in units of the active weights'", group="theta", low=0)
    train_theta: bool = option(True, "train theta; off is the control that shows what that is worth", group="theta")
    rule: str = option("selective", "update rule of theta", group="theta", choices=RULES)
    theta_lr: float | None = option(None, "learning rate of theta", group="theta", low=0, open_low=True)
    theta_schedule: Named = option(
        "constant", "course of that rate over a RESU phase", group="theta", names=LR_SCHEDULES
    )
    theta_betas: tuple[float, float] | None = option(None, "decay rates of theta's moments", group="theta")
    theta_eps: float = option(1e-8, "delta of the consistency, or Adam's epsilon", group="theta", low=0, open_low=True)
    theta_dtype: str = option(
        "fp32", "storage of theta itself where it is not in float32 weights' own slots; bf16 is rounded stochastically",
        group="theta", choices=("fp32", "bf16"),
    )  # fmt: skip
    theta_moments: str = option("fp32", "storage of theta's moments", group="theta", choices=("fp32", "bf16", "8bit"))
    theta_weight_decay: float = option(0.01, "decoupled weight decay of theta", group="theta", low=0)
    select: float = option(
        0.2, "share of the candidates that a selective update changes", group="theta", low=0, high=1, open_low=True
    )
    top: float = option(
        0.5, "share by |gradient| that they are chosen from", group="theta", low=0, high=1, open_low=True
    )
    consistency: float = option(
        0.5, "consistency that they must exceed", group="theta", low=0, high=1, open_high=True,
        remedy="must be in [0, 1): a consistency never exceeds 1",
    )  # fmt: skip

    # Commit
    commit: str = option("amnesty", "how the masks after RESU are chosen", group="commit", choices=COMMITS)
    commit_score: Named = option("magnitude", "what the commit ranks weights by", group="commit", names=SCORES)
    commit_threshold: float = option(0.25, "in mean scores of the active weights", group="commit", low=0)
    amnesty_start: float = option(
        0.10, "share of the slots for candidates, first commit", group="commit", low=0, high=1,
        remedy="must be in [0, 1], a share of the kept weights",
    )  # fmt: skip
    amnesty_end: float = option(
        0.02, "the same, last commit", group="commit", low=0, high=1,
        remedy="must be in [0, 1], a share of the kept weights",
    )  # fmt: skip
    amnesty_schedule: Named = option("linear", "way from one to the other", group="commit", names=SHAPES)
    survival_cohorts: int = option(
        4, "commits whose resurrected weights are followed over later prunings, a bit a weight each in host memory",
        group="commit", low=0,
    )

    # Training
    optimizer_state: str = option(
        "drop", "what becomes in RESU of the optimizer state that it does not train", group="memory",
        choices=("drop", "keep", "offload", "pinned", "compress"),
    )  # fmt: skip
    theta_in_backward: bool = option(
        False, "theta is updated inside the backward: no gradient of it waits for the step", group="memory"
    )
    restore_lookahead: int = option(
        5, "steps before RESU's end in which offloaded or pinned state comes back; 0 waits for the end", group="memory",
        low=0,
    )  # fmt: skip
    pinned_limit: float | None = option(
        None, "GB (10^9 bytes) of pinned host memory for optimizer state; no limit by default", group="memory", low=0,
        open_low=True,
    )  # fmt: skip
    pinned_required: bool = option(
        False, "refuse where pinned memory is short, instead of using pageable memory", group="memory"
    )
    train_rest: bool = option(False, "unmanaged parameters keep training in RESU", group="training")
    accumulation: int = option(1, "micro-batches for each step", group="training", low=1)
    accumulation_normalization: str = option(
        "mean", "of a step's micro-batches: their mean, weighted by tokens, or their sum", group="training",
        choices=("mean", "tokens", "sum"),
    )  # fmt: skip
    accumulation_scale: float | None = option(
        None, "multiplies summed gradients; instead of normalizing, not beside it", group="training", low=0,
        open_low=True,
    )  # fmt: skip
    autocast: str | None = option(None, "mixed precision; fp16 scales the loss", group="training",
                                  choices=(None, "bf16", "fp16"))  # fmt: skip
    grad_clip: float | None = option(
        None, "largest norm of the gradient, theta's included", group="training", low=0, open_low=True
    )
    seed: int = option(
        0, "of theta's initial values, its rounding, and random masks", group="training", low=0, high=2**63 - 1,
        remedy="must be in [0, 2**63)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        normalise(self)
        object.__setattr__(self, "granularity", str(parse_granularity(self.granularity)))
        if self.theta_betas is not None and not all(0.0 <= beta < 1.0 for beta in self.theta_betas):
            refuse("theta_betas", self.theta_betas, "must be two numbers in [0, 1)")
        self._check_steps()
        self._check_schedule()
        self._check_combinations()

    # Reading

    @property
    def steps_in_cycle(self) -> int:
        """Optimizer steps of one cycle, over all phases."""
        return sum(phase_steps(self).values())

    def sparsity(self, cycle: int) -> float:
        """Target sparsity of a cycle."""
        return sparsity_at(self.schedule, cycle, self.cycles, self.sparsity_start, self.sparsity_end)

    def has_work(self, cycle: int) -> bool:
        """Whether a cycle has pruned coordinates for its stabilize and RESU phases: its own, or those that the mask
        before it left (a commit at sparsity 0 needs them)."""
        if cycle == 0 and self.warm_start:
            return True
        return has_work(self.sparsity(cycle)) or (cycle > 0 and has_work(self.sparsity(cycle - 1)))

    def amnesty(self, cycle: int) -> float:
        """Share of the kept slots that the commit of a cycle gives to candidates."""
        return amnesty_ratio(cycle, self.cycles, self.amnesty_start, self.amnesty_end, self.amnesty_schedule)

    @property
    def follows_optimizer(self) -> bool:
        """Whether theta's learning rate is that of the managed weights in the optimizer."""
        return self.theta_lr is None and self.rule == "adam"

    def resolved_theta_lr(self, optimizer_lr: float) -> float:
        """Learning rate of theta, where `optimizer_lr` is the one of the managed weights' group in the optimizer."""
        if self.theta_lr is not None:
            return self.theta_lr
        return float(optimizer_lr) if self.rule == "adam" else _GRADIENT_RULE_LR

    def theta_lr_factor(self, step: int) -> float:
        """What `theta_schedule` multiplies theta's learning rate with at step `step` (0-based) of a RESU phase."""
        return lr_factor(self.theta_schedule, step, phase_steps(self)["resu"])

    def resolved_theta_betas(self) -> tuple[float, float]:
        """Decay rates of theta's first and second moment."""
        return self.theta_betas if self.theta_betas is not None else _BETAS.get(self.rule, (0.9, 0.9))

    @property
    def score_of_commit(self) -> Named:
        """The score that the commit ranks by."""
        return "wanda" if self.commit == "wanda" else self.commit_score

    # Making

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CycleConfig:
        """A named configuration (see `PRESETS`), with `changes` on top."""
        if name not in PRESETS:
            raise ConfigError(f"preset={name!r} is unknown{near(name, PRESETS)}; use one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CycleConfig:
        """The configuration with these fields, as from JSON, TOML or YAML (lists for tuples); refuses unknown keys."""
        return from_mapping(cls, values)

    @classmethod
    def from_file(cls, path: str | Path) -> CycleConfig:
        """The configuration in a TOML, YAML or JSON file; its key "preset" names what the other keys change.

        Raises:
            ConfigError: unknown keys, bad values, another suffix, or a file that is not what its suffix says.
            OSError: it cannot be read.
        """
        values = read_options(path)
        return cls.preset(values.pop("preset", "default"), **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which `from_dict` reads back: a callable schedule becomes its list of sparsities,
        another callable its "module:function"."""
        values = {field.name: callable_name(getattr(self, field.name)) for field in fields(self)}
        if not isinstance(self.schedule, str):
            values["schedule"] = [self.sparsity(cycle) for cycle in range(self.cycles)]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def replace(self, **changes: Any) -> CycleConfig:
        """A copy with some fields changed, validated again."""
        return self.from_dict({**{f.name: getattr(self, f.name) for f in fields(self)}, **changes})

    # Validation

    def _check_steps(self) -> None:
        explicit = {name: getattr(self, name) for name in ("train_steps", "stabilize_steps", "resu_steps")}
        missing = [name for name, value in explicit.items() if value is None]
        if 0 < len(missing) < 3:
            given = ", ".join(f"{name}={value}" for name, value in explicit.items() if value is not None)
            raise ConfigError(
                f"{missing[0]}=None, but {given}; give all of {', '.join(explicit)}, or none and use split"
            )
        if min(self.split) < 0.0 or abs(sum(self.split) - 1.0) > 1e-6:
            refuse("split", self.split, f"must be three shares >= 0 that sum to 1, not {sum(self.split):g}")
        if self.steps_in_cycle < 1:
            raise ConfigError("train_steps=0, stabilize_steps=0 and resu_steps=0; a cycle takes at least 1 step")

    def _check_schedule(self) -> None:
        if isinstance(self.schedule, list):
            object.__setattr__(self, "schedule", tuple(self.schedule))
        grain = parse_granularity(self.granularity)
        self.theta_lr_factor(0)  # this one and `amnesty` refuse a callable's bad value
        for cycle in range(self.cycles):
            sparsity = self.sparsity(cycle)
            self.amnesty(cycle)
            if not grain.allows(sparsity):
                raise ConfigError(
                    f"schedule={self.schedule!r} gives sparsity {sparsity:g} in cycle {cycle}, but "
                    f"granularity={self.granularity!r} allows only 0 and {grain.pattern_sparsity}; use "
                    f"schedule='constant' with sparsity_end={grain.pattern_sparsity}"
                )

    def _check_combinations(self) -> None:
        if self.accumulation_scale is not None and self.accumulation_normalization != "sum":
            remedy = f"accumulation_normalization={self.accumulation_normalization!r} divides already; use 'sum'"
            refuse("accumulation_scale", self.accumulation_scale, remedy)
        self._check_in_backward()
        grain = parse_granularity(self.granularity)
        kind = grain.kind
        if self.distribution != "uniform" and kind in ("global", "n:m"):
            why = "ranks all layers together" if kind == "global" else "fixes every layer's sparsity"
            refuse("distribution", self.distribution, f"granularity={self.granularity!r} {why}; use 'uniform'")
        if self.commit == "threshold" and kind not in ("layer", "global"):
            remedy = "keeps fixed counts, which a threshold cannot; use granularity='layer' or 'global'"
            refuse("commit", self.commit, f"granularity={self.granularity!r} {remedy}")
        if self.stabilizer == "dsnot" and grain.transposable:
            refuse("stabilizer", self.stabilizer, "granularity='2:4' holds along columns too; use '2:4-rows'")
        if self.stabilizer == "dsnot" and kind == "block":
            remedy = "keeps whole blocks, which swaps of single weights would break; use another granularity"
            refuse("stabilizer", self.stabilizer, f"granularity={self.granularity!r} {remedy}")

    def _check_in_backward(self) -> None:
        """What needs theta's gradient of all weights at once is refused."""
        if not self.theta_in_backward:
            return
        if self.grad_clip is not None:
            remedy = f"grad_clip={self.grad_clip!r} needs the norm of all gradients first; leave one of the two out"
            refuse("theta_in_backward", True, remedy)
        if self.autocast == "fp16":
            remedy = "autocast='fp16' scales the loss, which is taken off all gradients together; use 'bf16', or False"
            refuse("theta_in_backward", True, remedy)


def phase_steps(config: CycleConfig) -> dict[str, int]:
    """Optimizer steps of each phase of a cycle: {"train": ..., "stabilize": ..., "resu": ...}.

    The explicit numbers if given; else `split` of `steps_per_cycle`, rounded down, with the left-over steps given to
    the largest remainders (the earlier phase first), so that the sum is exact.
    """
    if config.train_steps is not None and config.stabilize_steps is not None and config.resu_steps is not None:
        return dict(zip(PHASES, (config.train_steps, config.stabilize_steps, config.resu_steps)))
    shares = [Fraction(repr(share)) * config.steps_per_cycle for share in config.split]
    steps = [math.floor(share) for share in shares]
    by_remainder = sorted(range(3), key=lambda i: steps[i] - shares[i])
    for i in by_remainder[: max(config.steps_per_cycle - sum(steps), 0)]:
        steps[i] += 1
    return dict(zip(PHASES, steps))
