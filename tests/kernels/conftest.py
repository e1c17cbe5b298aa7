"""Problems for the kernel tests, built by loops straight from the definition of the data layout.

The same tests run three ways: on CPU against the references, on CPU with TRITON_INTERPRET=1 against the Triton kernels
in the interpreter (test_interpreter.py starts that), and on CUDA (marker `gpu`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from fxresu.kernels._triton import INTERPRET

settings.register_profile("kernels", max_examples=5 if INTERPRET else 25, deadline=None)
settings.load_profile("kernels")

SIZES = [
    (1, 1, 0.0),
    (1, 1, 1.0),
    (3, 32, 0.5),
    (5, 37, 0.5),
    (4, 64, 0.0),
    (3, 70, 1.0),
    (1, 100, 0.3),
    (3, 131, 0.8),
    (2, 2100, 0.5),
]
if INTERPRET:  # slow: keep the sizes that differ in kind
    SIZES = [(1, 1, 0.0), (5, 37, 0.5), (4, 64, 0.0), (3, 70, 1.0), (2, 2100, 0.5)]
LAYOUTS = ["row", "row+3", "layer", "layer+5", "panel", "row panel"]


@dataclass
class Problem:
    """A mask, its layout, and the list of (row, column, flat slot) of every candidate in row-major order."""

    mask: Tensor
    bits: Tensor
    row_start: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]
    entries: list[tuple[int, int, int]]
    active_start: Tensor
    active_shape: tuple[int, int]
    active_entries: list[tuple[int, int, int]]
    device: str

    @property
    def layout(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.bits, self.row_start, self.columns

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.mask.shape, dtype=torch.float64).to(dtype).to(self.device)

    def theta_like(self, dtype: torch.dtype = torch.float32, padding: float = 0.0) -> Tensor:
        """Random values at the candidates, `padding` elsewhere."""
        flat = torch.full((self.shape[0] * self.shape[1],), padding, dtype=torch.float64)
        for _, _, slot in self.entries:
            flat[slot] = torch.randn((), dtype=torch.float64)
        return flat.view(self.shape).to(dtype).to(self.device)

    def gathered(self, dense: Tensor, dtype: torch.dtype, active: bool = False) -> Tensor:
        """Phi^T by definition."""
        shape, entries = (self.active_shape, self.active_entries) if active else (self.shape, self.entries)
        out = torch.zeros(shape[0] * shape[1], dtype=dtype)
        source = dense.cpu()
        for row, column, slot in entries:
            out[slot] = source[row, column].to(dtype)
        return out.view(shape).to(self.device)

    def scattered(self, into: Tensor, theta: Tensor, active: bool = False) -> Tensor:
        """Phi by definition, over a copy of `into`."""
        out, source = into.cpu().clone(), theta.cpu().flatten()
        for row, column, slot in self.active_entries if active else self.entries:
            out[row, column] = source[slot].to(out.dtype)
        return out.to(self.device)


def _pack(mask: Tensor) -> Tensor:
    rows, K = mask.shape
    words = [[0] * ((K + 31) // 32) for _ in range(rows)]
    for row, column in mask.nonzero().tolist():
        words[row][column // 32] |= 1 << (column % 32)
    signed = [[word - (1 << 32) if word >> 31 else word for word in line] for line in words]
    return torch.tensor(signed, dtype=torch.int32).view(rows, (K + 31) // 32)


def _compact(mask: Tensor, rowwise: bool, slack: int) -> tuple[Tensor, tuple[int, int], list[tuple[int, int, int]]]:
    counts = mask.sum(1).tolist()
    capacity = (max(counts) if rowwise else sum(counts)) + slack
    starts, entries, used = [], [], 0
    for row, line in enumerate(mask):
        starts.append(row * capacity if rowwise else used)
        for j, column in enumerate(line.nonzero().flatten().tolist()):
            entries.append((row, column, starts[-1] + j))
        used += counts[row]
    return torch.tensor(starts, dtype=torch.int64), (mask.shape[0] if rowwise else 1, capacity), entries


def build(rows: int, K: int, density: float, layout: str, device: str = "cpu", seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((rows, K), generator=generator) < density
    kind, _, slack = layout.partition("+")
    active_start, active_shape, active_entries = _compact(mask, kind != "layer", int(slack or 0))
    columns = None
    if kind == "row panel":
        row_start = None
        columns = torch.randperm(rows, generator=generator)[: -(-rows // 2)].sort().values.to(torch.int32)
        shape = (len(columns), K)
        entries = [
            (row, column, line * K + column)
            for line, row in enumerate(columns.tolist())
            for column in range(K)
            if not mask[row, column]
        ]
    elif kind == "panel":
        row_start = None
        columns = torch.randperm(K, generator=generator)[: max(1, K // 3)].sort().values.to(torch.int32)
        shape = (rows, len(columns))
        entries = [
            (row, int(column), row * len(columns) + j)
            for row in range(rows)
            for j, column in enumerate(columns.tolist())
            if not mask[row, column]
        ]
    else:
        row_start, shape, entries = _compact(~mask, kind == "row", int(slack or 0))

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return Problem(
        mask.to(device),
        _pack(mask).to(device),
        move(row_start),
        move(columns),
        shape,
        entries,
        active_start.to(device),
        active_shape,
        active_entries,
        device,
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(device: str) -> Callable[..., Problem]:
    def make(rows: int, K: int, density: float, layout: str = "row", seed: int = 0) -> Problem:
        return build(rows, K, density, layout, device, seed)

    return make


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}@{size[2]}")
def size(request: pytest.FixtureRequest) -> tuple[int, int, float]:
    return request.param


@pytest.fixture(params=LAYOUTS)
def problem(request: pytest.FixtureRequest, size: tuple[int, int, float], make: Callable[..., Problem]) -> Problem:
    """Every size in every layout."""
    return make(*size, layout=request.param)


@pytest.fixture
def same() -> Callable[[Tensor, Tensor], bool]:
    """Exact equality; a unit in the last place for bfloat16 in the interpreter, which truncates instead of rounding."""

    def same(actual: Tensor, expected: Tensor) -> bool:
        if INTERPRET and expected.dtype == torch.bfloat16 and actual.dtype == torch.bfloat16:
            return torch.allclose(actual.float(), expected.float(), rtol=2**-7, atol=1e-30)
        return actual.dtype == expected.dtype and torch.equal(actual, expected)

    return same


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN or a large integer, so that an element which a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
