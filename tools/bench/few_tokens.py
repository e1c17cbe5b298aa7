"""A sparse linear for few tokens (decoding): packed weights against cuBLAS on the dense bf16 weight.

Weights are pruned without candidates (a model in use, not in RESU): row-wise at 50 % and 90 %, and 2:4. Sets of weights
rotate so that every product reads its weight from memory, all in one CUDA graph. "Of the limit" is the time to read the
packed weight, x and y once at the rate of a device copy.

    python tools/bench/few_tokens.py --out tools/bench/results/few_tokens.json
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benchlib.errors import relative_error
from benchlib.results import Run, arguments
from benchlib.timing import capture, copy_rate, device_type, time_calls
from torch import Tensor

from fxresu.kernels import decode_linear, pack, pack_active, packed_linear, row_counts, row_starts
from fxresu.kernels.decode_linear import FORMS

TOLERANCE = 2e-2


@dataclasses.dataclass
class Weight:
    """A pruned bf16 weight, dense and packed.

    Attributes:
        dense: [rows, K], zero where pruned.
        bits: its mask; active, start: the packed values and where every row's begin.
    """

    dense: Tensor
    bits: Tensor
    active: Tensor
    start: Tensor

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed form."""
        return self.active.nbytes + self.bits.nbytes


def weight(rows: int, columns: int, pattern: str) -> Weight:
    """Random, with a random mask of the pattern: "2:4", or a sparsity such as "0.5" in every row."""
    scores = torch.rand(rows, columns, device=device_type())
    if pattern == "2:4":
        mask = scores.view(rows, -1, 4).argsort(2).argsort(2).ge(2).view(rows, columns)
    else:
        mask = scores.argsort(1) >= round(float(pattern) * columns)
    dense = torch.randn(rows, columns, device=device_type(), dtype=torch.bfloat16).masked_fill_(~mask, 0)
    bits = pack(mask)
    counts = row_counts(bits, columns)
    shape = (rows, int(counts.max()))
    start = row_starts(counts, shape)
    return Weight(dense, bits, pack_active(dense, bits, start, shape), start)


def composed(x: Tensor, w: Weight) -> Tensor:
    """Packed storage's default: compose the dense operand, then a GEMM."""
    rows, columns = w.dense.shape
    return packed_linear(x, w.active, None, w.bits, w.start, None, None, rows, columns)


def dense(x: Tensor, w: Weight) -> Tensor:
    """cuBLAS on the dense weight."""
    return F.linear(x, w.dense)


def decoded(form: str, x: Tensor, w: Weight) -> Tensor:
    """Packed values decoded in registers."""
    return decode_linear(x, w.active, None, w.bits, w.start, None, form)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Weight], Tensor]] = {
    "cublas": dense,
    "compose": composed,
    **{form: functools.partial(decoded, form) for form in FORMS},
}


def takes(how: str, pattern: str) -> bool:
    """Whether an implementation takes weights of the pattern: decoding in pairs is for 2:4."""
    return pattern == "2:4" or how not in FORMS or not FORMS[how].pairs


def measure(how: str, tokens: int, rows: int, columns: int, pattern: str, args: Any, rate: float) -> dict[str, Any]:
    """Error, time and share of the byte limit of one implementation."""
    run = IMPLEMENTATIONS[how]
    first = weight(rows, columns, pattern)
    copies = max(2, -(-args.rotated // first.packed_bytes))
    weights = [first, *(weight(rows, columns, pattern) for _ in range(copies - 1))]
    x = torch.randn(tokens, columns, device=device_type(), dtype=torch.bfloat16)
    with torch.no_grad():
        error = relative_error(run(x, first), x.double() @ first.dense.double().t())
        if not error < TOLERANCE:
            raise AssertionError(f"relative error {error} against float64 exceeds {TOLERANCE}")

        def all_of_them() -> None:
            for one in weights:
                run(x, one)

        times = time_calls(capture(all_of_them, 2), args.warmup, args.steps)
    row: dict[str, Any] = {k: v / copies if k.endswith("_ms") else v for k, v in times.items()}
    moved = (first.dense.nbytes if how == "cublas" else first.packed_bytes) + 2 * tokens * (rows + columns)
    limit = 1e3 * moved / rate
    return row | {"relative_error": error, "bytes": moved, "limit_ms": limit, "of_limit": limit / row["median_ms"]}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.9", "2:4"])
    parser.add_argument("--rotated", type=int, default=256 * 2**20, help="bytes of packed weights in one graph")
    args = parser.parse_args(argv)
    rate = 0.0 if args.list else copy_rate()
    cases = {}
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        for pattern in args.patterns:
            for tokens in args.tokens:
                for how in filter(functools.partial(takes, pattern=pattern), IMPLEMENTATIONS):
                    name = f"{how}/{shape}/{pattern}/{tokens}"
                    cases[name] = functools.partial(measure, how, tokens, rows, columns, pattern, args, rate)
    run = Run("few_tokens", args, {"rotated_bytes": args.rotated})
    run.run(cases)
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
