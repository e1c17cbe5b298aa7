"""Changes of what the managed weights hold: prune, start θ, commit, give up the mask.

Every function computes what it needs for all weights first and changes the weights after that, so that an error leaves
the model as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import apply_mask_, commit_, gather, pack, row_counts, row_starts, scatter_, transition_counts

from .amnesty import amnesty_masks
from .candidates import active_std, candidate_column_count, candidate_columns, theta_init
from .errors import ConfigError, PhaseError
from .masks import select_masks
from .model_state import Managed, ModelState, managed_weights, state_of
from .optimizer_state import check_holds, commit_state, drop_state, mask_state, restore_dropped
from .topk import keep_count

_SLACK = 1.25  # room for layers that a global mask prunes more than the average


@dataclasses.dataclass(frozen=True)
class CommitResult:
    """What a commit changed, summed over all managed weights.

    Attributes:
        kept: coordinates active before and after.
        resurrected: candidates that became active.
        dropped: active coordinates that were pruned.
        churn: 1 - Jaccard overlap of the old and the new mask.
        sparsity: of the new masks.
    """

    kept: int
    resurrected: int
    dropped: int
    churn: float
    sparsity: float

    @property
    def resurrection_rate(self) -> float:
        """Share of the new active coordinates that were resurrected."""
        active = self.kept + self.resurrected
        return self.resurrected / active if active else 0.0


def weight_scores(weights: Mapping[str, Managed]) -> dict[str, Tensor]:
    """The weights themselves as [rows, K] matrices: magnitude scores, without a copy where nothing is packed."""
    return {n: m.entry.dense(m.parameter).view(m.entry.rows, m.entry.k) for n, m in weights.items()}


@torch.no_grad()
def prune(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    sparsity: float | None = None,
    scores: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Choose masks and zero what they prune: weights, and the optimizer's moments there.

    Args:
        optimizer: holds the weights; without it no moments are masked.
        sparsity: in [0, 1); default is the transform's.
        scores: [rows, K] by FQN, larger |score| is kept; default is the weight itself.
        masks: bool [rows, K] by FQN, True = active; given instead of choosing.

    Returns:
        Actual sparsity by FQN.

    Raises:
        PhaseError: while θ trains (commit first).
        ConfigError: bad sparsity, scores or masks. The model is unchanged then.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base == "resu":
        raise PhaseError("prune: θ is in training; commit it first (set_phase(model, 'sparse', ...))")
    check_holds(optimizer, weights.values())
    sparsity = record.sparsity if sparsity is None else sparsity
    record.capacity_sparsity = max(record.capacity_sparsity, record.sparsity, sparsity)
    if masks is None:
        masks = select_masks(scores or weight_scores(weights), sparsity, record.granularity)
    new_bits = {n: pack(_checked_mask(m, masks, n)) for n, m in weights.items()}
    for name, managed in weights.items():
        set_mask(record, managed, new_bits[name])
        apply_mask_(managed.entry.matrix(managed.parameter), new_bits[name])
        mask_state(optimizer, managed)
        managed.parameter.grad = None
    record.base, record.nominal_sparsity = "sparse", sparsity
    return actual_sparsity(model)


def _checked_mask(managed: Managed, masks: Mapping[str, Tensor], name: str) -> Tensor:
    want = (managed.entry.rows, managed.entry.k)
    mask = masks.get(name)
    if mask is None or tuple(mask.shape) != want or mask.dtype != torch.bool:
        got = "none" if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
        raise ConfigError(f"masks[{name!r}]: got {got}, expected a bool mask of shape {want}")
    return mask.to(managed.parameter.device)


def actual_sparsity(model: nn.Module) -> dict[str, float]:
    """Share of pruned coordinates by FQN; 0 where a weight is dense."""
    result = {}
    for name, managed in managed_weights(model).items():
        entry = managed.entry
        active = entry.numel if entry.bits is None else int(row_counts(entry.bits, entry.k, invert=False).sum())
        result[name] = 1 - active / entry.numel
    return result


def set_mask(record: ModelState, managed: Managed, bits: Tensor) -> None:
    """Make `bits` the weight's mask, and lay out θ for it. In place where a mask is there: graphs hold its address."""
    entry = managed.entry
    counts = row_counts(bits, entry.k, invert=True)
    shape = entry.theta_shape
    if record.candidates < 1:
        shape, start = (entry.rows, candidate_column_count(entry.k, record.candidates)), torch.zeros_like(counts)
    else:
        rowwise = record.granularity.kind in ("row", "n:m")
        largest, total = int(counts.max()), int(counts.sum())
        if rowwise and (shape[0] != entry.rows or largest > shape[1]):
            planned = entry.k - keep_count(entry.k, record.capacity_sparsity)
            shape = (entry.rows, max(largest, planned, 1))
        elif not rowwise and (shape[0] != 1 or total > shape[1]):
            slack = _SLACK if record.granularity.kind == "global" else 1.0
            planned = entry.numel - keep_count(entry.numel, record.capacity_sparsity)
            shape = (1, min(entry.numel, max(total, int(planned * slack), 1)))
        start = row_starts(counts, shape)
    if entry.bits is None:
        entry.bits = bits
    else:
        entry.bits.copy_(bits)
    if entry.row_start is None:
        entry.row_start = start
    else:
        entry.row_start.copy_(start)
    entry.theta_shape = shape


@torch.no_grad()
def drop_masks(model: nn.Module) -> None:
    """Back to dense weights: pruned coordinates stay where they are (zero, or θ's values) and train from there."""
    record, weights = state_of(model), managed_weights(model)
    for managed in weights.values():
        managed.parameter.grad = None
        _end_theta(managed)
        managed.entry.bits = managed.entry.row_start = None
        managed.entry.remove_hook()
    record.base = "dense"


def _end_theta(managed: Managed) -> None:
    entry = managed.entry
    if entry.packed:
        entry.unpack_into(managed.parameter)
    entry.anchor = entry.theta = entry.m = entry.v = entry.columns = None
    entry.remove_hook()


def seeded(device: torch.device, *parts: object) -> torch.Generator:
    """A generator whose stream is a pure function of `parts`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def start_theta(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    init: str = "normal",
    epsilon: float = 0.1,
    seed: int = 0,
    rule: str = "selective",
    trains: bool = True,
    optimizer_state: str = "drop",
) -> None:
    """From sparse to RESU: initialise θ, write Φ(θ) into the pruned slots, free the optimizer's state if it is dropped.

    θ = ε·σ·N(0, 1) with σ the standard deviation of the layer's active weights (RESU), or "uniform", or "zero".

    Raises:
        PhaseError: if the weights are not sparse.
        ConfigError: unknown init; an optimizer that does not hold the weights.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base != "sparse":
        raise PhaseError(f"start_theta: the weights are {record.base}, not sparse; prune first")
    check_holds(optimizer, weights.values())
    fresh = {n: _fresh_theta(record, m, init, epsilon, seed, rule) for n, m in weights.items()}
    for name, managed in weights.items():
        entry, parameter = managed.entry, managed.parameter
        theta, columns, moments = fresh.pop(name)
        parameter.grad = None
        entry.columns = columns
        entry.m, entry.v = moments
        scatter_(entry.matrix(parameter), theta, entry.bits, entry.row_start, columns)
        if record.storage == "packed" or parameter.dtype != torch.float32:
            ones = torch.ones(1, 1, device=theta.device).expand(entry.rows, entry.k)
            # Padding of every theta-like tensor is zero.
            entry.theta = theta.mul_(gather(ones, entry.bits, entry.row_start, columns, entry.theta_shape))
        entry.set_anchor(parameter.device, trains)
        if optimizer_state == "drop":
            entry.dropped = drop_state(optimizer, managed)
        if record.storage == "packed":
            entry.pack(parameter)
    record.base = "resu"
    record.theta_steps = 0


def _fresh_theta(
    record: ModelState, managed: Managed, init: str, epsilon: float, seed: int, rule: str
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    entry, parameter = managed.entry, managed.parameter
    matrix, mask = entry.matrix(parameter), entry.mask()
    columns = None
    if record.candidates < 1:
        columns = candidate_columns(None, mask, record.candidates, rotation=record.rotation)
    sigma = active_std(matrix, mask)
    generator = seeded(parameter.device, seed, record.rotation, entry.fqn)
    theta = theta_init(init, entry.theta_shape, sigma, epsilon, generator, device=parameter.device)
    moments = [torch.zeros(entry.theta_shape, device=parameter.device) for _ in range(_moments(rule))]
    return theta, columns, (moments[0] if moments else None, moments[1] if len(moments) > 1 else None)


def _moments(rule: str) -> int:
    return {"sgd": 0, "momentum": 1, "adam": 2, "selective": 2}[rule]


def _candidate_masks(weights: Mapping[str, Managed], old: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    if all(m.entry.columns is None for m in weights.values()):
        return None
    masks = {}
    for name, managed in weights.items():
        inside = torch.zeros(managed.entry.k, dtype=torch.bool, device=old[name].device)
        inside[managed.entry.columns.long()] = True
        masks[name] = ~old[name] & inside
    return masks


@torch.no_grad()
def commit(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    ratio: float = 0.1,
    sparsity: float | None = None,
    rule: str = "selective",
    betas: tuple[float, float] = (0.9, 0.9),
    scores: Mapping[str, Tensor] | None = None,
) -> CommitResult:
    """From RESU to sparse by amnesty: of the slots to keep, the share `ratio` goes to the best candidates, the rest to
    the best active weights, each by |score| (default |W_eff|). Losers become zero.

    The optimizer's moments: survivors keep theirs if they were kept, resurrected coordinates take θ's, losers get zero.

    Raises:
        PhaseError: if the weights are not in RESU.
        ConfigError: a ratio, sparsity or score that does not fit; an optimizer that does not hold the weights.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base != "resu":
        raise PhaseError(f"commit: the weights are {record.base}; only RESU has something to commit")
    check_holds(optimizer, weights.values())
    sparsity = record.nominal_sparsity if sparsity is None else sparsity
    old = {n: m.entry.mask() for n, m in weights.items()}
    candidate = _candidate_masks(weights, old)
    masks = amnesty_masks(scores or weight_scores(weights), old, candidate, sparsity, ratio, record.granularity)
    new_bits = {n: pack(masks.pop(n)) for n in weights}
    del old, candidate
    totals = torch.zeros(4, dtype=torch.int64)
    for name, managed in weights.items():
        entry = managed.entry
        if entry.packed:
            entry.unpack_into(managed.parameter)
        totals += transition_counts(entry.bits, new_bits[name]).cpu()
        restore_dropped(optimizer, managed, entry.dropped, record.theta_steps)
        commit_state(optimizer, managed, new_bits[name], rule, betas, record.theta_steps)
        commit_(entry.matrix(managed.parameter), entry.bits, new_bits[name])
        managed.parameter.grad = None
        _end_theta(managed)
        entry.dropped = None
        set_mask(record, managed, new_bits[name])
    record.base, record.nominal_sparsity = "sparse", sparsity
    record.rotation += 1
    kept, resurrected, dropped, union = totals.tolist()
    return CommitResult(kept, resurrected, dropped, 1 - kept / union if union else 0.0, total_sparsity(model))


@torch.no_grad()
def discard_theta(model: nn.Module, optimizer: Optimizer | None) -> None:
    """From RESU back to sparse with the old mask: Φ(θ) is zeroed."""
    record, weights = state_of(model), managed_weights(model)
    if record.base != "resu":
        raise PhaseError(f"discard_theta: the weights are {record.base}, not in RESU")
    for managed in weights.values():
        entry = managed.entry
        if entry.packed:
            entry.unpack_into(managed.parameter)
        apply_mask_(entry.matrix(managed.parameter), entry.bits)
        restore_dropped(optimizer, managed, entry.dropped, record.theta_steps)
        managed.parameter.grad = None
        _end_theta(managed)
        entry.dropped = None
    record.base = "sparse"
    record.rotation += 1


def total_sparsity(model: nn.Module) -> float:
    """Share of pruned coordinates over all managed weights together."""
    weights = managed_weights(model)
    shares = actual_sparsity(model)
    total = sum(m.entry.numel for m in weights.values())
    return sum(shares[n] * m.entry.numel for n, m in weights.items()) / total
