"""Every candidate of the chooser on a list of problems, forward and backward, and the decoding linear by itself.

Times are the chooser's own: CUDA events, operands in turns so that weights come from memory. The decoding linear reads
a packed weight without theta, against cuBLAS on the dense one, both in CUDA graphs.

    python tools/bench/candidates.py --out candidates.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxresu.kernels import _measure, decode_linear, pack, pack_active, row_counts, row_starts
from fxresu.kernels.choose import Problem, candidates
from fxresu.kernels.decode_linear import FORMS
from fxresu.passes._compat import isolated_inductor

DEVICE = torch.device("cuda")
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]


def problems() -> Iterator[Problem]:
    """Sparse phases on 2:4 weights, few-token phases, packed storage."""
    for graphed in (True, False):
        for rows, K in ((4096, 4096), (16384, 4096), (4096, 16384)):
            yield Problem("linear", "sparse", rows, K, 8192, "bfloat16", "float32", pattern="2:4", graphed=graphed)
        for tokens in (32, 256):
            yield Problem("linear", "resu", 4096, 4096, tokens, "float32", "float32", layout="rows", graphed=graphed,
                          input_grad=False)  # fmt: skip
            yield Problem("linear", "sparse", 4096, 4096, tokens, "float32", "float32", graphed=graphed,
                          input_grad=False)  # fmt: skip
    for tokens in (1, 16):
        for pattern in ("", "2:4"):
            yield Problem("linear_packed", "frozen", 4096, 4096, tokens, "bfloat16", "bfloat16", layout="rows",
                          pattern=pattern, graphed=True, input_grad=False)  # fmt: skip


def compared(problem: Problem) -> dict[str, Any]:
    """Figures of all candidates of a problem, those that cannot run with their reason."""
    known = candidates(problem.op)
    reasons = {c.name: why for c in known if (why := c.supports(problem, DEVICE)) is not None}
    able = [c.name for c in known if c.name not in reasons]
    figures = _measure.compare(problem, DEVICE, able, isolated_inductor)
    return {"problem": problem.key, "figures": {**figures, **reasons}}


def _packed(rows: int, K: int, sparsity: str, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(dense weight, packed operands of the decoding linear)."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    pattern = "2:4" if sparsity == "2:4" else ""
    mask = _measure.random_mask(rows, K, 0.5 if pattern else float(sparsity), pattern, generator)
    weight = torch.randn(rows, K, device=DEVICE, generator=generator).bfloat16().mul_(K**-0.5).masked_fill_(~mask, 0)
    bits = pack(mask)
    counts = row_counts(bits, K)
    shape = (rows, int(counts.max()))
    start = row_starts(counts, shape)
    return weight, (pack_active(weight, bits, start, shape), bits, start)


def decoding(rows: int, K: int, sparsity: str, tokens: int) -> dict[str, Any]:
    """Microseconds of cuBLAS and of every form, in CUDA graphs, and each form's packed bytes a second."""
    first = _packed(rows, K, sparsity, 0)
    nbytes = sum(t.numel() * t.element_size() for t in first[1][:2])
    copies = _measure._copies(nbytes, DEVICE)
    sets = [first, *(_packed(rows, K, sparsity, seed) for seed in range(1, copies))]
    x = torch.randn(tokens, K, device=DEVICE, dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(x, first[0])

    def time(call: Callable[[Any], Tensor]) -> float:
        return _measure._time(lambda: [call(s) for s in sets], True, DEVICE) / copies

    result: dict[str, Any] = {"cuBLAS": time(lambda s: torch.nn.functional.linear(x, s[0]))}
    for how, form in FORMS.items():
        if form.pairs and sparsity != "2:4":
            continue

        def call(s: Any, how: str = how) -> Tensor:
            active, bits, start = s[1]
            return decode_linear(x, active, None, bits, start, None, how)

        try:
            _measure.check((call(first),), (wanted,))
            us = time(call)
            result[how] = {"us": us, "GB/s": nbytes / us / 1e3, "of cuBLAS": result["cuBLAS"] / us}
        except Exception as error:  # a form that fails must not hide the others
            result[how] = f"failed: {str(error).splitlines()[0][:200]}"
    return {"rows": rows, "K": K, "sparsity": sparsity, "tokens": tokens, "packed bytes": nbytes, "times": result}


def main() -> None:
    """Print one JSON line for every case, and keep them all in --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for all results")
    parser.add_argument("--only", choices=("problems", "decoding"))
    args = parser.parse_args()
    results: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        print(json.dumps(result), flush=True)
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results},
                          file, indent=1)  # fmt: skip

    if args.only != "problems":
        for rows, K in SHAPES:
            for sparsity in ("0.5", "0.9", "2:4"):
                for tokens in (1, 4, 16, 32):
                    keep(decoding(rows, K, sparsity, tokens))
    if args.only != "decoding":
        for problem in problems():
            keep(compared(problem))


if __name__ == "__main__":
    main()
