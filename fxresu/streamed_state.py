"""The state of a parameter under `StreamedAdamW`: AdamW's moments in one of four forms, on the host or the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxresu.kernels.adamw_rule import BLOCK, load_moment, scale_count, store_moment
from fxresu.kernels.factored_moments import means_of

from .errors import CheckpointError
from .lanes import Lanes, aligned
from .moment_stream import Parcel, Piece

__all__ = [
    "FORMS", "MOMENTS", "StreamedState", "bytes_per_entry", "factors", "form_of", "moment_sizes", "new_states",
    "slot_bytes",
]  # fmt: skip

FORMS = {"8bit": torch.uint8, "factored": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}
MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}
_TRAVELLING = (*MOMENTS, *(f"{key}_scale" for key in MOMENTS))
_FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq_mean")
_PIECE = 2**22  # entries that are recoded at a time: recoding needs some 50 bytes for each
_REMEDY = "; give the optimizer the moments= that the checkpoint was written with"
_NEAREST = 0x80000000  # the noise with which stochastic rounding rounds to nearest


def form_of(parameter: Tensor, form: str) -> str:
    """The form that a parameter's moments have under an optimizer's: only a matrix, or what can be seen as one, has a
    second moment that can be factored."""
    return "8bit" if form == "factored" and (parameter.dim() < 2 or not parameter.numel()) else form


def bytes_per_entry(form: str) -> float:
    """Of the moments that can travel, with their scales: of both, or of the first one where the second is factored."""
    moments = 1 if form == "factored" else 2
    return moments * (FORMS[form].itemsize + (4 / BLOCK if FORMS[form] == torch.uint8 else 0))


def slot_bytes(entries: int, form: str, members: int, vectors: int = 0) -> int:
    """Of a slot for parcels of so many entries, of at most `members` parameters: every tensor is aligned. vectors: how
    many of the entries may belong to parameters that are no matrices."""
    if form == "factored":
        both = min(vectors, entries)
        return entries + both + ((entries + both) // BLOCK + 2 * members) * 4 + 1024 * members
    return int(entries * FORMS[form].itemsize * 2 + (entries // BLOCK + members) * 8) + 1024 * members


def factors(parameter: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Zeros for a factored second moment: float32 [rows], [columns] and [1], of the parameter as a matrix whose rows
    are its first dimension."""
    rows = parameter.shape[0]
    sizes = rows, parameter.numel() // rows, 1
    return {name: torch.zeros(size, device=device) for name, size in zip(_FACTORS, sizes, strict=True)}


class StreamedState(dict[str, Any]):
    """What `optimizer.state` holds for a parameter: `step`, and the moments under torch's names.

    ==========================================  ==============================================================
    step                                        updates so far
    exp_avg, exp_avg_sq                         of the parameter's shape: uint8 codes, bfloat16 or float32
    exp_avg_scale, exp_avg_sq_scale             float32 [ceil(n / 256)], of 8-bit moments; the code of exp_avg_sq is
                                                that of its root
    exp_avg_sq_row, exp_avg_sq_col,             instead of exp_avg_sq where it is factored (`kernels.factored_moments`):
    exp_avg_sq_mean                             float32 [rows], [columns] and [1], always on the device
    ==========================================  ==============================================================

    A change of masks zeroes moments at pruned coordinates. A factored one holds nothing by coordinate, and stays: were
    it spread out, zeroed and factored again, what the pruned ones have lost would be lost to all, at every change anew.

    Attributes:
        pieces: parts that travel; empty where the moments stay on the device.
        settle: called before the host may read or write the moments.
    """

    def __init__(
        self, parameter: Tensor, tensors: Mapping[str, Tensor], settle: Callable[[], None], device: torch.device
    ) -> None:
        super().__init__(step=0, **tensors)
        self.shape, self.device, self.settle = tuple(parameter.shape), device, settle
        self.pieces: list[Piece] = []

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy or a pickle is plain: an optimizer that gets it makes its own of it

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What may travel: m, v and, of 8 bits, their scales; m and its scale where v is factored. Flat."""
        return tuple(self[n].view(-1) for n in _TRAVELLING if n in self)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Row, column and mean of a factored second moment; nothing of another."""
        return tuple(self[n] for n in _FACTORS) if self.factored else ()

    @property
    def factored(self) -> bool:
        """Whether the second moment is."""
        return _FACTORS[0] in self

    def cut(self, entries: int) -> None:
        """Make a parcel of every so many entries (a multiple of 4096)."""
        n = self["exp_avg"].numel()
        moments = 1 if self.factored else 2  # the others are scales
        for start in range(0, n, entries):
            stop = min(start + entries, n)
            blocks = slice(start // BLOCK, scale_count(stop))
            tensors = tuple(t[start:stop] if i < moments else t[blocks] for i, t in enumerate(self.operands))
            self.pieces.append(Piece(Parcel(tensors), start, stop))

    @contextlib.contextmanager
    def coordinates(self, key: str) -> Iterator[Tensor]:
        """A moment as float32 on the parameter's device, of its shape; what is written into it is kept (rounded to
        nearest; of a factored one its means by rows and columns)."""
        self.settle()
        if self.factored and key == "exp_avg_sq":
            dense = self._spread()
            yield dense.view(self.shape)
            self._factor(dense)
            return
        codes, scales, name = self[key].view(-1), self.get(f"{key}_scale"), MOMENTS[key]
        dense = torch.empty(codes.numel(), device=self.device)
        for piece, blocks in self._pieces():
            part = None if scales is None else scales[blocks].to(self.device)
            dense[piece] = load_moment(codes[piece].to(self.device), part, name)
        yield dense.view(self.shape)
        for piece, blocks in self._pieces():
            if scales is None:
                codes[piece].copy_(dense[piece])
                continue
            noise = torch.full((1,), _NEAREST, dtype=torch.int64, device=self.device).expand(dense[piece].numel())
            fresh, top = torch.empty_like(dense[piece], dtype=torch.uint8), scales[blocks].to(self.device, copy=True)
            store_moment(dense[piece], fresh, top, name, noise)
            codes[piece].copy_(fresh)
            scales[blocks].copy_(top)

    def _spread(self) -> Tensor:
        """row * col / mean, as a matrix."""
        row, col, mean = self.factors
        return torch.outer(torch.where(mean > 0, row / mean, 0), col)

    def _factor(self, dense: Tensor) -> None:
        for kept, fresh in zip(self.factors, means_of(dense), strict=True):
            kept.copy_(fresh)

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        n = math.prod(self.shape)
        for start in range(0, n, _PIECE):
            stop = min(start + _PIECE, n)
            yield slice(start, stop), slice(start // BLOCK, scale_count(stop))

    def check(self, name: str, other: Mapping[str, Any]) -> None:
        """CheckpointError unless `assign` can take `other` over: a state of this form, or with plain float moments
        where these are plain."""
        for key, own in self.items():
            if not isinstance(own, Tensor):
                continue
            value = other.get(key)
            if not isinstance(value, Tensor) or value.shape != own.shape:
                got, remedy = "nothing", _REMEDY
                if isinstance(value, Tensor):
                    got, remedy = f"shape {tuple(value.shape)}", ""
                raise CheckpointError(f"state of {name}: {key!r} is {got}, expected shape {tuple(own.shape)}{remedy}")
            if value.dtype != own.dtype and torch.uint8 in (value.dtype, own.dtype):
                raise CheckpointError(f"state of {name}: {key!r} is {value.dtype}, and here it is {own.dtype}{_REMEDY}")

    def assign(self, other: Mapping[str, Any]) -> None:
        """Copy a state that `check` has passed."""
        for key, value in self.items():
            if isinstance(value, Tensor):
                value.copy_(other[key])
        self["step"] = int(other.get("step", 0))

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Take over a plain state: one that was rebuilt after it had been dropped, or came with a copy."""
        self["step"] = int(state.get("step", 0))
        for key in MOMENTS:
            value = state.get(key)
            if isinstance(value, Tensor) and value.is_floating_point():
                with self.coordinates(key) as dense:
                    dense.copy_(value)
            elif isinstance(value, Tensor):
                self[key].copy_(value)
                self[f"{key}_scale"].copy_(state[f"{key}_scale"])
        for key, factor in zip(_FACTORS, self.factors, strict=False):
            if isinstance(value := state.get(key), Tensor):
                factor.copy_(value)


def new_states(
    parameters: Sequence[Tensor],
    form: str,
    lanes: Lanes | None,
    settle: Callable[[], None],
    entries: int,
    device: torch.device,
) -> list[StreamedState]:
    """Zero moments: on `device`, where the parameters are updated (lanes None), or in host memory: those of several
    parameters travel together, those of a large one in parcels of `entries`.

    Raises:
        HostMemoryError: there is not enough of it.
    """
    forms = [form_of(p, form) for p in parameters]
    found, sizes = list[StreamedState](), [moment_sizes(p, form) for p in parameters]
    memory, start = None, 0
    if lanes is not None:
        memory = lanes.host(sum(aligned(size) for each in sizes for size in each)).numpy()
    for parameter, each, own in zip(parameters, sizes, forms, strict=True):
        pieces = []
        # Every tensor has a storage of its own, in host memory over its part of one: torch.save refuses shared ones.
        for size in each:
            if memory is None:
                pieces.append(torch.zeros(size, dtype=torch.uint8, device=device))
            else:
                pieces.append(torch.from_numpy(memory[start : start + size]))
            start += aligned(size)
        tensors = _named(parameter, pieces, own) | (factors(parameter, device) if own == "factored" else {})
        found.append(StreamedState(parameter, tensors, settle, device))
    if memory is None:
        return found
    if len(found) == 1 and parameters[0].numel() > entries:
        found[0].cut(entries)
        return found
    # One copy: the tensors lie in host memory as in a slot.
    parcel = Parcel(tuple(t for state in found for t in state.operands), torch.from_numpy(memory))
    first = 0
    for state in found:
        state.pieces.append(Piece(parcel, 0, state["exp_avg"].numel(), first))
        first += len(state.operands)
    return found


def moment_sizes(parameter: Tensor, form: str) -> list[int]:
    """Bytes of a parameter's moments that may travel, and of their scales, under an optimizer's form."""
    own, entries = form_of(parameter, form), parameter.numel()
    moments = 1 if own == "factored" else 2
    scales = [4 * scale_count(entries)] * moments if FORMS[own] == torch.uint8 else []
    return [entries * FORMS[own].itemsize] * moments + scales


def _named(parameter: Tensor, pieces: Sequence[Tensor], form: str) -> dict[str, Tensor]:
    """The state's tensors over these bytes."""
    names = ("exp_avg", "exp_avg_scale") if form == "factored" else _TRAVELLING
    tensors = {}
    for name, piece in zip(names, pieces, strict=False):
        scales = name.endswith("_scale")
        tensors[name] = piece.view(torch.float32) if scales else piece.view(FORMS[form]).view(parameter.shape)
    return tensors
