"""Where θ and the mask of a managed weight lie, and the steps of a transition that can be undone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxresu.kernels import forget_addresses, row_counts, row_starts
from fxresu.kernels import unpack as unpack_bits
from fxresu.passes._compat import mark_static

from . import weight_storage
from .candidates import panel_shape
from .errors import ConfigError
from .host_values import on_host
from .managed import ManagedWeight
from .model_state import Managed, ModelState
from .optimizer_state import restore_dropped
from .topk import keep_count
from .transposable import follows_pattern

Layout = tuple[tuple[int, int], Tensor]  # (theta_shape, row_start)
SLACK = 1.25  # room for layers that a global mask prunes more than the average


def layouts(
    record: ModelState, weights: Mapping[str, Managed], bits: Mapping[str, Tensor], capacities: Mapping[str, float]
) -> dict[str, Layout]:
    """(`theta_shape`, `row_start`) of θ by FQN under the masks `bits`.

    The shape stays as it is while the candidates fit; a new one has room for the weight's sparsity of `capacities`.
    """
    if record.candidates < 1:
        return {
            n: (panel_shape(m.entry, record.candidates), bits[n].new_zeros(m.entry.rows, dtype=torch.int64))
            for n, m in weights.items()
        }
    counts = {n: row_counts(bits[n], m.entry.k, invert=True) for n, m in weights.items()}
    # The most candidates of a row, and all of them.
    sizes = on_host({n: torch.stack((c.max(), c.sum())) for n, c in counts.items()})
    return {n: _layout(record, m.entry, counts[n], capacities[n], *sizes[n]) for n, m in weights.items()}


def _layout(
    record: ModelState, entry: ManagedWeight, counts: Tensor, capacity: float, largest: int, total: int
) -> Layout:
    """`counts`: int64 [rows], candidates of each row."""
    shape, rowwise = entry.theta_shape, record.granularity.kind in ("row", "n:m")
    if rowwise and (shape[0] != entry.rows or largest > shape[1]):
        planned = entry.k - keep_count(entry.k, capacity)
        shape = (entry.rows, max(largest, planned, 1))
    elif not rowwise and (shape[0] != 1 or total > shape[1]):
        slack = SLACK if record.granularity.kind == "global" else 1.0
        planned = entry.numel - keep_count(entry.numel, capacity)
        shape = (1, min(entry.numel, max(total, int(planned * slack), 1)))
    return shape, row_starts(counts, shape, fit=True)


def pattern_of(record: ModelState, entry: ManagedWeight, bits: Tensor | None) -> str:
    """`ManagedWeight.pattern` of a mask: looked up, because masks can be given and a sparsity of 0 keeps everything."""
    if bits is None or not record.granularity.transposable:
        return ""
    return "2:4" if follows_pattern(unpack_bits(bits, entry.k)) else ""


def set_mask(managed: Managed, bits: Tensor, theta: Layout, pattern: str) -> None:
    """Make `bits` the weight's mask, with θ laid out for it. In place where one is there: graphs hold its address."""
    entry = managed.entry
    entry.theta_shape, start = theta
    entry.pattern = pattern
    if entry.bits is None or entry.row_start is None:
        entry.bits, entry.row_start = bits, start
        mark_static(bits)
        mark_static(start)
    else:
        entry.bits.copy_(bits)
        entry.row_start.copy_(start)


@contextlib.contextmanager
def undone_on_error() -> Iterator[Callable[..., object]]:
    """Gives a function that registers how to undo a step; an exception runs what was registered, last first."""
    with contextlib.ExitStack() as stack:
        yield stack.callback
        stack.pop_all()


def unpack(managed: Managed, undo: Callable[..., object]) -> None:
    """Resident storage for a packed weight: an allocation, so it belongs to the part that can be undone."""
    entry, weight = managed.entry, managed.parameter
    if not entry.packed:
        return
    coded = (entry.active, entry.active_start, entry.active_scale) if entry.active_scale is not None else None
    storage = weight_storage.storage_of(entry)
    weight_storage.unpack_into(entry, weight)
    if coded is not None:
        undo(weight_storage.set_active, entry, *coded)  # the very codes: packing again rounds rounded values
    undo(weight_storage.send_away, entry, weight, storage)


def refuse_together(record: ModelState, weights: Mapping[str, Managed]) -> None:
    """ConfigError if weights wait in host memory, which come one block at a time, and masks look at all of them."""
    if record.granularity.kind == "global" and any(m.entry.stream is not None for m in weights.values()):
        raise ConfigError(
            f"granularity={str(record.granularity)!r} with stream_blocks(weights=...), which keeps weights in host"
            " memory and brings them one block at a time; use 'layer' or 'row', or leave weights= out"
        )


def settle_streams(weights: Iterable[Managed]) -> None:
    """Weights that wait in host memory: all of them there, with their present values."""
    for stream in {id(s): s for m in weights if (s := m.entry.stream) is not None}.values():
        stream.send_home()


def restore(optimizer: Optimizer | None, managed: Managed, steps: int, undo: Callable[..., object]) -> None:
    """The state that RESU dropped, as zeros: an allocation, too."""
    if optimizer is not None and restore_dropped(optimizer, managed, managed.entry.dropped, steps):
        undo(optimizer.state.pop, managed.parameter)


def end_theta(managed: Managed) -> None:
    """Give up θ and all that belongs to it; the weight keeps what it holds."""
    entry = managed.entry
    forget_addresses()
    entry.anchor = entry.theta = entry.columns = entry.dropped = None
    entry.panel = entry.panel_bits = entry.panel_start = None
    entry.m = entry.v = entry.m_scale = entry.v_scale = entry.low = None
    entry.low_version = (-1, 0)
    entry.remove_hook()
