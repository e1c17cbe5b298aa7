"""Changes of what the managed weights hold: prune, start θ, commit, give up the mask.

Every function is a transaction in two parts. First all that can fail, for all weights: selection, and every allocation
that outlives the function; an error there is undone and leaves weights, masks, optimizer state and phase as they were.
Then writes in place, weight by weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import (
    apply_mask_,
    commit_,
    gather,
    pack,
    row_counts,
    row_starts,
    scatter_,
    transition_counts,
    unpack,
)
from fxresu.kernels.blockwise8 import scale_shape
from fxresu.kernels.theta_rules import MOMENTS_OF

from .amnesty import amnesty_masks
from .candidates import active_std, candidate_column_count, candidate_columns, seeded, theta_init
from .errors import ConfigError, PhaseError
from .managed import ManagedWeight
from .masks import select_masks
from .model_state import Managed, ModelState, managed_weights, state_of
from .optimizer_state import check_holds, commit_state, drop_state, mask_state, restore_dropped
from .topk import keep_count
from .transposable import follows_pattern

# Storage of θ's moments.
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
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
    capacity = max(record.capacity_sparsity, record.sparsity, sparsity)
    new_bits: dict[str, Tensor] = {}
    for group in _jointly_ranked(record, weights):
        chosen = select_masks(_scores(group, scores), sparsity, record.granularity) if masks is None else masks
        new_bits |= {n: pack(_checked_mask(m, chosen, n)) for n, m in group.items()}
    layouts = {n: layout(record, m.entry, new_bits[n], capacity) for n, m in weights.items()}
    patterns = {n: pattern_of(record, m.entry, new_bits[n]) for n, m in weights.items()}
    for name, managed in weights.items():
        _set_mask(managed, new_bits[name], layouts[name], patterns[name])
        apply_mask_(managed.entry.matrix(managed.parameter), new_bits[name])
        mask_state(optimizer, managed)
        managed.parameter.grad = None
    record.base, record.nominal_sparsity, record.capacity_sparsity = "sparse", sparsity, capacity
    return actual_sparsity(model)


def _jointly_ranked(record: ModelState, weights: Mapping[str, Managed]) -> Iterator[Mapping[str, Managed]]:
    """Groups of weights whose coordinates compete: all for "global", else one at a time, so that the bool masks and
    scores of only one weight are alive."""
    if record.granularity.kind == "global":
        yield weights
    else:
        yield from ({name: managed} for name, managed in weights.items())


def _scores(group: Mapping[str, Managed], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if given is None:
        return weight_scores(group)
    missing = [n for n in group if n not in given]
    if missing:
        raise ConfigError(f"scores[{missing[0]!r}]: none given; give one for every managed weight, or none at all")
    return {n: given[n] for n in group}


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


Layout = tuple[tuple[int, int], Tensor]  # (theta_shape, row_start)


def layout(record: ModelState, entry: ManagedWeight, bits: Tensor, capacity: float) -> Layout:
    """(`theta_shape`, `row_start`) of θ under the mask `bits`.

    The shape stays as it is while the candidates fit; a new one has room for the sparsity `capacity`.
    """
    counts = row_counts(bits, entry.k, invert=True)
    shape = entry.theta_shape
    if record.candidates < 1:
        return (entry.rows, candidate_column_count(entry.k, record.candidates)), torch.zeros_like(counts)
    rowwise = record.granularity.kind in ("row", "n:m")
    largest, total = int(counts.max()), int(counts.sum())
    if rowwise and (shape[0] != entry.rows or largest > shape[1]):
        planned = entry.k - keep_count(entry.k, capacity)
        shape = (entry.rows, max(largest, planned, 1))
    elif not rowwise and (shape[0] != 1 or total > shape[1]):
        slack = _SLACK if record.granularity.kind == "global" else 1.0
        planned = entry.numel - keep_count(entry.numel, capacity)
        shape = (1, min(entry.numel, max(total, int(planned * slack), 1)))
    return shape, row_starts(counts, shape)


def pattern_of(record: ModelState, entry: ManagedWeight, bits: Tensor | None) -> str:
    """`ManagedWeight.pattern` of a mask: looked up, because masks can be given and a sparsity of 0 keeps everything."""
    if bits is None or not record.granularity.transposable:
        return ""
    return "2:4" if follows_pattern(unpack(bits, entry.k)) else ""


def _set_mask(managed: Managed, bits: Tensor, theta: Layout, pattern: str) -> None:
    """Make `bits` the weight's mask, with θ laid out for it. In place where one is there: graphs hold its address."""
    entry = managed.entry
    entry.theta_shape, start = theta
    entry.pattern = pattern
    if entry.bits is None or entry.row_start is None:
        entry.bits, entry.row_start = bits, start
    else:
        entry.bits.copy_(bits)
        entry.row_start.copy_(start)


@contextlib.contextmanager
def _undone_on_error() -> Iterator[Callable[..., object]]:
    """Gives a function that registers how to undo a step; an exception runs what was registered, last first."""
    with contextlib.ExitStack() as stack:
        yield stack.callback
        stack.pop_all()


def _unpack(managed: Managed, undo: Callable[..., object]) -> None:
    """Resident storage for a packed weight: an allocation, so it belongs to the part that can be undone."""
    entry, weight = managed.entry, managed.parameter
    if not entry.packed:
        return
    coded = (entry.active, entry.active_start, entry.active_scale) if entry.active_scale is not None else None
    again = entry.pack if entry.host is None else entry.offload
    entry.unpack_into(weight)
    if coded is not None:
        undo(entry.set_active, *coded)  # the very codes: packing again rounds rounded values
    undo(again, weight)


def _restore(optimizer: Optimizer | None, managed: Managed, steps: int, undo: Callable[..., object]) -> None:
    """The state that RESU dropped, as zeros: an allocation, too."""
    if optimizer is not None and restore_dropped(optimizer, managed, managed.entry.dropped, steps):
        undo(optimizer.state.pop, managed.parameter)


@torch.no_grad()
def drop_masks(model: nn.Module) -> None:
    """Back to dense weights: pruned coordinates stay where they are (zero, or θ's values) and train from there."""
    record, weights = state_of(model), managed_weights(model)
    with _undone_on_error() as undo:
        for managed in weights.values():
            _unpack(managed, undo)
    for managed in weights.values():
        managed.parameter.grad = None
        _end_theta(managed)
        managed.entry.bits = managed.entry.row_start = None
        managed.entry.pattern = ""
    record.base = "dense"


def _end_theta(managed: Managed) -> None:
    entry = managed.entry
    entry.anchor = entry.theta = entry.columns = entry.dropped = None
    entry.m = entry.v = entry.m_scale = entry.v_scale = entry.low = None
    entry.low_version = -1
    entry.remove_hook()


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
    moments: str = "fp32",
    grad_dtype: torch.dtype = torch.float32,
) -> None:
    """From sparse to RESU: initialise θ, write Φ(θ) into the pruned slots, free the optimizer's state if it is dropped.

    θ = ε·σ·N(0, 1) with σ the standard deviation of the layer's active weights (RESU), or "uniform", or "zero".

    Args:
        moments: storage of θ's m and v, a key of `MOMENTS`.
        grad_dtype: of dθ (packed storage: always float32).

    Raises:
        PhaseError: if the weights are not sparse.
        ConfigError: unknown init or moments; an optimizer that does not hold the weights.
    """
    record, weights = state_of(model), managed_weights(model)
    if record.base != "sparse":
        raise PhaseError(f"start_theta: the weights are {record.base}, not sparse; prune first")
    check_holds(optimizer, weights.values())
    with _undone_on_error() as undo:
        for managed in weights.values():
            # W's slots can be θ's master only while W is there, and in θ's precision.
            own_theta = record.storage == "packed" or managed.parameter.dtype != torch.float32
            theta, columns = _fresh_theta(record, managed, init, epsilon, seed)
            managed.entry.grad_dtype = grad_dtype
            _enter_resu(managed, theta, columns, own_theta, trains, undo)
            _allocate_moments(managed, rule, moments)
            if record.storage != "resident":
                exact = managed.parameter.data if managed.entry.rounds(managed.parameter) else None
                send_away(managed, record.storage)
                # What rounding loses is kept until nothing can fail any more.
                undo(managed.entry.unpack_into, managed.parameter, exact)
        if optimizer_state == "drop" and optimizer is not None:
            for managed in weights.values():
                state = optimizer.state.get(managed.parameter)
                if state is not None:
                    undo(optimizer.state.__setitem__, managed.parameter, state)
                managed.entry.dropped = drop_state(optimizer, managed)
    for managed in weights.values():
        managed.parameter.grad = None
    record.base, record.theta_steps = "resu", 0


def _enter_resu(
    managed: Managed,
    theta: Tensor,
    columns: Tensor | None,
    own_theta: bool,
    trains: bool,
    undo: Callable[..., object],
) -> None:
    """Write Φ(θ) into one weight and make its record one in RESU."""
    entry, parameter = managed.entry, managed.parameter
    undo(_leave_resu, managed)
    scatter_(entry.matrix(parameter), theta, entry.bits, entry.row_start, columns)
    entry.columns = columns
    if own_theta:
        ones = torch.ones(1, 1, device=theta.device).expand(entry.rows, entry.k)
        # Padding of every theta-like tensor is zero.
        entry.theta = theta.mul_(gather(ones, entry.bits, entry.row_start, columns, entry.theta_shape))
    entry.set_anchor(parameter.device, trains)


def _leave_resu(managed: Managed) -> None:
    """Back to M∘W with the mask as it is."""
    apply_mask_(managed.entry.matrix(managed.parameter), managed.entry.bits)
    _end_theta(managed)


def _fresh_theta(
    record: ModelState, managed: Managed, init: str, epsilon: float, seed: int
) -> tuple[Tensor, Tensor | None]:
    entry, parameter = managed.entry, managed.parameter
    matrix, mask = entry.matrix(parameter), entry.mask()
    columns = None
    if record.candidates < 1:
        columns = candidate_columns(None, mask, record.candidates, rotation=record.rotation)
    sigma = active_std(matrix, mask)
    generator = seeded(parameter.device, seed, record.rotation, entry.fqn)
    return theta_init(init, entry.theta_shape, sigma, epsilon, generator, device=parameter.device), columns


def _allocate_moments(managed: Managed, rule: str, storage: str) -> None:
    """Zero moments of θ for the rule, in their storage."""
    if rule not in MOMENTS_OF:
        raise ConfigError(f"rule={rule!r} is unknown; use one of {', '.join(MOMENTS_OF)}")
    if storage not in MOMENTS:
        raise ConfigError(f"moments={storage!r} is unknown; use one of {', '.join(MOMENTS)}")
    entry, device = managed.entry, managed.parameter.device
    for name in MOMENTS_OF[rule]:
        setattr(entry, name, torch.zeros(entry.theta_shape, dtype=MOMENTS[storage], device=device))
        if storage == "8bit":
            entries = entry.k if entry.columns is None else entry.columns.numel()
            setattr(entry, f"{name}_scale", torch.zeros(scale_shape(entry.rows, entries), device=device))


def send_away(managed: Managed, storage: str) -> None:
    """Take a weight in RESU out of the device's memory in the way its storage says."""
    if storage == "packed":
        managed.entry.pack(managed.parameter)
    else:
        managed.entry.offload(managed.parameter)


def _candidate_masks(weights: Mapping[str, Managed], old: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """bool [rows, K], True = candidate; None, which costs no memory, if all that `old` prunes are candidates."""
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
    new_bits: dict[str, Tensor] = {}
    for group in _jointly_ranked(record, weights):
        old = {n: m.entry.mask() for n, m in group.items()}
        candidate = _candidate_masks(group, old)
        masks = amnesty_masks(_scores(group, scores), old, candidate, sparsity, ratio, record.granularity)
        new_bits |= {n: pack(masks.pop(n)) for n in group}
    capacity = max(record.capacity_sparsity, sparsity)
    layouts = {n: layout(record, m.entry, new_bits[n], capacity) for n, m in weights.items()}
    patterns = {n: pattern_of(record, m.entry, new_bits[n]) for n, m in weights.items()}
    totals = sum(transition_counts(m.entry.bits, new_bits[n]).cpu() for n, m in weights.items())
    with _undone_on_error() as undo:
        for managed in weights.values():
            _unpack(managed, undo)
            _restore(optimizer, managed, record.theta_steps, undo)
    for name, managed in weights.items():
        entry = managed.entry
        commit_state(optimizer, managed, new_bits[name], rule, betas, record.theta_steps)
        commit_(entry.matrix(managed.parameter), entry.bits, new_bits[name])
        managed.parameter.grad = None
        _end_theta(managed)
        _set_mask(managed, new_bits[name], layouts[name], patterns[name])
    record.capacity_sparsity = capacity
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
    check_holds(optimizer, weights.values())
    with _undone_on_error() as undo:
        for managed in weights.values():
            _unpack(managed, undo)
            _restore(optimizer, managed, record.theta_steps, undo)
    for managed in weights.values():
        managed.parameter.grad = None
        _leave_resu(managed)
    record.base = "sparse"
    record.rotation += 1


def total_sparsity(model: nn.Module) -> float:
    """Share of pruned coordinates over all managed weights together."""
    weights = managed_weights(model)
    shares = actual_sparsity(model)
    total = sum(m.entry.numel for m in weights.values())
    return sum(shares[n] * m.entry.numel for n, m in weights.items()) / total
