"""Changes of the masks: prune, commit, warm start, give up the mask.

Every function is a transaction in two parts. First all that can fail, for all weights: selection, and every allocation
that outlives the function; an error there is undone and leaves weights, masks, optimizer state and phase as they were.
Then writes in place, weight by weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import apply_mask_, commit_, pack, transition_counts
from fxresu.kernels import unpack as unpack_bits

from .calibration import Calibration
from .distributions import layer_sparsities
from .dsnot import refine_mask
from .errors import ConfigError, PhaseError
from .host_values import on_host
from .mask_change import MaskChange, actual_sparsity, mask_change
from .mask_choice import commit_masks, masks_from_zeros, pruning_masks
from .model_state import Managed, ModelState, managed_weights, state_of
from .optimizer_state import check_holds, check_state, commit_state, mask_state, set_memory_aside, step_counts
from .options import Named
from .phase_state import call_back
from .row_choice import NanFlags
from .saliency import score_of
from .scores import Score
from .theta_layout import (
    end_theta,
    layouts,
    pattern_of,
    refuse_together,
    restore,
    set_mask,
    undone_on_error,
    unpack,
)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What weights are ranked by: a named score or a callable, with its statistics, or score matrices by FQN.

    Attributes:
        score: see `saliency`; statistics: what it needs, from `calibrate`.
        scores: [rows, K] by FQN, larger |score| is kept; given instead of `score`.
        alpha: of "wanda++"; seed: of "random".
    """

    score: Named = "magnitude"
    statistics: Calibration | None = None
    scores: Mapping[str, Tensor] | None = None
    alpha: float = 100.0
    seed: int = 0

    def of(self, group: Mapping[str, Managed]) -> dict[str, Score]:
        """Score matrices of these weights, without a copy of a weight that is not packed."""
        if self.scores is not None:
            missing = [n for n in group if n not in self.scores]
            if missing:
                raise ConfigError(
                    f"scores[{missing[0]!r}]: none given; give one for every managed weight, or none at all"
                )
            return {n: self.scores[n] for n in group}
        known = {} if self.statistics is None else self.statistics.weights
        return {
            n: score_of(self.score, n, _matrix(m), known.get(n), alpha=self.alpha, seed=self.seed)
            for n, m in group.items()
        }


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Options of the DSNoT stabilizer (see `dsnot.refine_mask`)."""

    swaps: int = 50
    threshold: float = 0.01
    power: float = 1.0


def _matrix(managed: Managed) -> Tensor:
    entry = managed.entry
    entry.bring(managed.parameter)
    return entry.dense(managed.parameter).view(entry.rows, entry.k)


@torch.no_grad()
def prune(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    sparsity: float | None = None,
    score: Named = "magnitude",
    statistics: Calibration | None = None,
    scores: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    distribution: Named | None = None,
    stabilizer: Swaps | None = None,
    alpha: float = 100.0,
    seed: int = 0,
) -> MaskChange:
    """Choose masks and zero what they prune: weights, and the optimizer's moments there. `set_phase(model, "sparse")`
    comes next, so that training keeps it so.

    By `score`, weights that are pruned already stay so, as long as the active ones suffice for the sparsity; `scores`
    and `masks` are free to bring some back (as zeros).

    Args:
        optimizer: holds the weights; without it no moments are masked.
        sparsity: in [0, 1); default is the transform's.
        score: a name or a callable (see `saliency`); statistics: what it needs, from `calibrate`.
        scores: [rows, K] by FQN, larger |score| is kept; given instead of `score`.
        masks: bool [rows, K] by FQN, True = active; given instead of choosing.
        distribution: of the sparsity over the layers, "uniform" or "erk" or a callable; default is the model's last.
        stabilizer: DSNoT's options; None leaves the masks as they were chosen. It needs statistics of inputs.
        alpha: of "wanda++"; seed: of "random".

    Raises:
        PhaseError: while θ trains (commit first).
        ConfigError: bad sparsity, score, statistics or masks, or an optimizer whose state cannot follow a mask. The
            model is unchanged then.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base == "resu":
        raise PhaseError("prune: θ is in training; commit it first (set_phase(model, 'sparse', ...))")
    _check_optimizer(optimizer, weights)
    sparsity = record.sparsity if sparsity is None else sparsity
    distribution = record.distribution if distribution is None else distribution
    ranking = Ranking(score, statistics, scores, alpha, seed)
    new_bits: dict[str, Tensor] = {}
    flags = NanFlags()
    if masks is not None:
        new_bits = {n: pack(_checked_mask(m, masks, n)) for n, m in weights.items()}
    else:
        for group, share in _jointly_ranked(record, weights, sparsity, distribution):
            old = _old_masks(group) if scores is None and record.base != "dense" else None
            chosen = pruning_masks(ranking.of(group), old, share, record.granularity, flags)
            for name, managed in group.items():
                mask = chosen.pop(name)
                if stabilizer is not None:
                    flags.refuse()
                    mask = _stabilized(record, name, managed, mask, statistics, stabilizer)
                new_bits[name] = pack(mask)
    flags.refuse()
    change = _install_masks(model, optimizer, new_bits, sparsity, distribution)
    record.nominal_sparsity = sparsity
    return change


def _check_optimizer(optimizer: Optimizer | None, weights: Mapping[str, Managed]) -> None:
    check_holds(optimizer, weights.values())
    check_state(optimizer, weights.values())


def _install_masks(
    model: nn.Module, optimizer: Optimizer | None, new_bits: Mapping[str, Tensor], sparsity: float, distribution: Named
) -> MaskChange:
    """The writing part of a pruning, after the layouts, which can fail."""
    record, weights = state_of(model), managed_weights(model)
    capacity = max(record.capacity_sparsity, record.sparsity, sparsity)
    capacities = _layer_sparsities(weights, capacity, distribution)
    places = layouts(record, weights, new_bits, capacities)
    patterns = {n: pattern_of(record, m.entry, new_bits[n]) for n, m in weights.items()}
    counts = on_host({n: transition_counts(_bits(m), new_bits[n]) for n, m in weights.items()})
    with undone_on_error() as undo:
        home = call_back(model, optimizer, undo)
        change = mask_change(model, counts)
    home.commit()
    for name, managed in weights.items():
        managed.entry.bring(managed.parameter)
        set_mask(managed, new_bits[name], places[name], patterns[name])
        apply_mask_(managed.entry.matrix(managed.parameter), new_bits[name])
        mask_state(optimizer, managed)
        managed.parameter.grad = None
    record.base, record.capacity_sparsity, record.distribution = "sparse", capacity, distribution
    return change


def _bits(managed: Managed) -> Tensor:
    """The mask; all ones where there is none."""
    entry = managed.entry
    if entry.bits is not None:
        return entry.bits
    return pack(_everything(managed))


def _everything(managed: Managed) -> Tensor:
    """The mask that prunes nothing, without memory of its size."""
    one = torch.ones((), dtype=torch.bool, device=managed.entry.device(managed.parameter))
    return one.expand(managed.entry.rows, managed.entry.k)


def _old_masks(group: Mapping[str, Managed]) -> dict[str, Tensor]:
    return {n: unpack_bits(_bits(m), m.entry.k) for n, m in group.items()}


def _stabilized(
    record: ModelState, name: str, managed: Managed, mask: Tensor, statistics: Calibration | None, options: Swaps
) -> Tensor:
    if statistics is None or "inputs" not in statistics.needs:
        raise ConfigError(
            "stabilizer='dsnot' needs statistics of inputs; gather them with fxresu.calibrate(model, batches,"
            " score='wanda') and pass statistics="
        )
    return refine_mask(
        name, _matrix(managed), mask, statistics.weights[name], record.granularity,
        swaps=options.swaps, threshold=options.threshold, power=options.power,
    )  # fmt: skip


def _layer_sparsities(weights: Mapping[str, Managed], sparsity: float, distribution: Named) -> dict[str, float]:
    return layer_sparsities({n: (m.entry.rows, m.entry.k) for n, m in weights.items()}, sparsity, distribution)


def _jointly_ranked(
    record: ModelState, weights: Mapping[str, Managed], sparsity: float, distribution: Named
) -> Iterator[tuple[Mapping[str, Managed], float]]:
    """Groups of weights whose coordinates compete, with their sparsity: all for "global", else one at a time, so that
    the bool masks and scores of only one weight are alive."""
    if record.granularity.kind in ("global", "n:m") and distribution != "uniform":
        raise ConfigError(
            f"distribution={distribution!r}: granularity={str(record.granularity)!r} leaves no sparsity to share out"
            " over the layers; use 'uniform'"
        )
    if record.granularity.kind == "global":
        refuse_together(record, weights)
        yield weights, sparsity
    else:
        shares = _layer_sparsities(weights, sparsity, distribution)
        yield from (({name: managed}, shares[name]) for name, managed in weights.items())


def _checked_mask(managed: Managed, masks: Mapping[str, Tensor], name: str) -> Tensor:
    want = (managed.entry.rows, managed.entry.k)
    mask = masks.get(name)
    if mask is None or tuple(mask.shape) != want or mask.dtype != torch.bool:
        got = "none" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
        raise ConfigError(f"masks[{name!r}]: got {got}, expected a bool mask of shape {want}")
    return mask.to(managed.entry.device(managed.parameter))


@torch.no_grad()
def warm_start(model: nn.Module, optimizer: Optimizer | None = None) -> MaskChange:
    """From the zeros of an already pruned checkpoint to the sparse phase's masks: what is zero is pruned.
    `set_phase(model, "sparse")` comes next.

    Weights stay as they are. The granularity must fit the zeros only where it means blocks or n:m.

    Raises:
        PhaseError: the weights are not dense.
        ConfigError: no weight has a zero, or an n:m group has more than n weights.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base != "dense":
        raise PhaseError(f"warm_start: the weights are {record.base} already; load a checkpoint into a dense model")
    _check_optimizer(optimizer, weights)
    masks = masks_from_zeros(((n, _matrix(m)) for n, m in weights.items()), record.granularity)
    bits = {n: pack(masks.pop(n)) for n in weights}
    change = _install_masks(model, optimizer, bits, record.sparsity, record.distribution)
    pattern = record.granularity.pattern_sparsity
    record.nominal_sparsity = change.sparsity if pattern is None else pattern
    return change


@torch.no_grad()
def drop_masks(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    rule: str = "selective",
    betas: tuple[float, float] = (0.9, 0.9),
) -> None:
    """Back to dense weights: pruned coordinates stay where they are (zero, or θ's values) and train from there.

    From RESU the optimizer's state of the weights comes back, with θ's moments at the candidates (`rule`, `betas`: of
    θ's updates).
    """
    record, weights = state_of(model), managed_weights(model)
    with undone_on_error() as undo:
        home = call_back(model, optimizer, undo)
        for managed in weights.values():
            unpack(managed, undo)
            restore(optimizer, managed, record.theta_steps, undo)
        full = {n: pack(_everything(m)) for n, m in weights.items()} if record.base == "resu" else {}
        counted = step_counts(optimizer, weights, record.theta_steps)
        if full:
            set_memory_aside(optimizer, weights.values())
    home.commit()
    for name, managed in weights.items():
        if name in full:
            managed.entry.bring(managed.parameter)
            commit_state(optimizer, managed, full[name], rule, betas, record.theta_steps, counted[name])
        managed.parameter.grad = None
        end_theta(managed)
        managed.entry.bits = managed.entry.row_start = None
        managed.entry.pattern = ""
    record.base = "dense"


def _candidate_masks(weights: Mapping[str, Managed], old: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """bool [rows, K], True = candidate; None, which costs no memory, if all that `old` prunes are candidates."""
    if all(m.entry.columns is None for m in weights.values()):
        return None
    masks = {}
    for name, managed in weights.items():
        masks[name] = ~old[name] & managed.entry.covered()
    return masks


@torch.no_grad()
def commit(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    method: str = "amnesty",
    ratio: float = 0.1,
    threshold: float = 0.25,
    sparsity: float | None = None,
    score: Named = "magnitude",
    statistics: Calibration | None = None,
    scores: Mapping[str, Tensor] | None = None,
    alpha: float = 100.0,
    seed: int = 0,
    rule: str = "selective",
    betas: tuple[float, float] = (0.9, 0.9),
) -> MaskChange:
    """From RESU to sparse: new masks over active weights and candidates, by |score|. Losers become zero.
    `set_phase(model, "sparse")` comes next.

    The optimizer's moments: survivors keep theirs if they were kept, resurrected coordinates take θ's, losers get zero.

    Args:
        method: "amnesty": of the slots to keep, the share `ratio` goes to the best candidates, the rest to the best
            active weights; "compare": the best of both together; "wanda": the same by Wanda's score; "threshold": what
            scores above `threshold` times the active weights' mean (granularity "layer" or "global").
        score: a name or a callable (see `saliency`; the weight is the effective one); statistics: what it needs.
        scores: [rows, K] by FQN; given instead of `score`.
        sparsity: of the new masks; default is the old ones'. "threshold" has its own.
        rule, betas: of θ's updates, which say what its moments are.

    Raises:
        PhaseError: if the weights are not in RESU.
        ConfigError: an argument that does not fit; an optimizer that does not hold the weights, or whose state cannot
            follow a mask.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base != "resu":
        raise PhaseError(f"commit: the weights are {record.base}; only RESU has something to commit")
    _check_optimizer(optimizer, weights)
    sparsity = record.nominal_sparsity if sparsity is None else sparsity
    ranking = Ranking("wanda" if method == "wanda" else score, statistics, scores, alpha, seed)
    new_bits: dict[str, Tensor] = {}
    flags = NanFlags()
    for group, share in _jointly_ranked(record, weights, sparsity, record.distribution):
        old = _old_masks(group)
        candidate = _candidate_masks(group, old)
        masks = commit_masks(
            method, ranking.of(group), old, candidate, share, record.granularity,
            ratio=ratio, threshold=threshold, flags=flags,
        )  # fmt: skip
        new_bits |= {n: pack(masks.pop(n)) for n in group}
    flags.refuse()
    capacity = max(record.capacity_sparsity, sparsity)
    capacities = _layer_sparsities(weights, capacity, record.distribution)
    places = layouts(record, weights, new_bits, capacities)
    patterns = {n: pattern_of(record, m.entry, new_bits[n]) for n, m in weights.items()}
    counts = on_host({n: transition_counts(m.entry.bits, new_bits[n]) for n, m in weights.items()})
    with undone_on_error() as undo:
        home = call_back(model, optimizer, undo)
        for managed in weights.values():
            unpack(managed, undo)
            restore(optimizer, managed, record.theta_steps, undo)
        change = mask_change(model, counts)
        counted = step_counts(optimizer, weights, record.theta_steps)
        set_memory_aside(optimizer, weights.values())
    home.commit()
    for name, managed in weights.items():
        entry = managed.entry
        entry.bring(managed.parameter)
        commit_state(optimizer, managed, new_bits[name], rule, betas, record.theta_steps, counted[name])
        commit_(entry.matrix(managed.parameter), entry.bits, new_bits[name])
        managed.parameter.grad = None
        end_theta(managed)
        set_mask(managed, new_bits[name], places[name], patterns[name])
    record.capacity_sparsity, record.base = capacity, "sparse"
    record.rotation += 1
    record.nominal_sparsity = change.sparsity if method == "threshold" else sparsity
    return change


__all__ = [
    "MaskChange",
    "Ranking",
    "Swaps",
    "actual_sparsity",
    "commit",
    "drop_masks",
    "prune",
    "warm_start",
]
