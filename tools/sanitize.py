"""Every Triton kernel under NVIDIA's compute-sanitizer: memcheck and racecheck on small shapes.

    python tools/sanitize.py                       # both tools over every group, in processes of their own
    python tools/sanitize.py --groups theta --tools memcheck
    python tools/sanitize.py --run theta           # the calls of one group, without the sanitizer

A group's calls run on odd shapes, in every layout and dtype that its kernels are compiled for, with results that are
checked against the references on the CPU: a sanitizer that sees no fault in a kernel that computes nothing is no
comfort. Needs a GPU, and `compute-sanitizer` (of the CUDA toolkit) on PATH or in --sanitizer. One line for each run;
the exit status is 1 if any found an error or did not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fxresu import kernels as ops
from fxresu.kernels import theta_launch
from fxresu.kernels.blockwise8 import scale_shape
from fxresu.kernels.head_loss import scale_
from fxresu.kernels.theta_rules import MOMENTS_OF

TOOLS = ("memcheck", "racecheck")
MOMENT_FORMS = (torch.float32, torch.bfloat16, torch.uint8)
_ROWS, _K = 5, 1131  # more than one tile, block and mask word of everything, and a multiple of nothing
_LIMIT_S = 600
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A random mask and where theta lies: compact rows, one shared line, or a panel of columns or rows."""

    bits: Tensor
    mask: Tensor
    start: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]

    def on(self, device: str) -> Layout:
        """The same on another device."""
        moved = (None if t is None else t.to(device) for t in (self.bits, self.mask, self.start, self.columns))
        return Layout(*moved, self.shape)  # type: ignore[arg-type]


def layouts(rows: int = _ROWS, K: int = _K) -> list[Layout]:
    """One of every kind, with padding where there can be some."""
    mask = torch.rand(rows, K, generator=torch.Generator().manual_seed(rows + K)) < 0.5
    bits, counts = ops.pack(mask), (~mask).sum(1)
    own, shared = (rows, int(counts.max()) + 3), (1, int(counts.sum()) + 5)
    found = [Layout(bits, mask, ops.row_starts(counts, shape), None, shape) for shape in (own, shared)]
    some = torch.arange(0, K, 3, dtype=torch.int32)
    found.append(Layout(bits, mask, None, some, (rows, some.numel())))
    lines = torch.arange(0, rows, 2, dtype=torch.int32)
    return [*found, Layout(bits, mask, None, lines, (lines.numel(), K))]


def same(run: Callable[[str], list[Tensor]], tolerance: float = 1e-4) -> None:
    """The kernels' results against the references' on a CPU, from the same random numbers; sums that cancel are off by
    a share of what was summed."""
    results = []
    for device in (DEVICE, "cpu"):
        torch.manual_seed(0)
        results.append([t.detach().cpu() for t in run(device)])
    for got, wanted in zip(*results, strict=True):
        if got.dtype == torch.uint8:  # codes that are rounded stochastically: the last place may differ
            assert float((got.int() - wanted.int()).abs().gt(1).float().mean()) < 0.01
            continue
        got, wanted = got.double(), wanted.double()
        usual = max(1.0, float(wanted.nan_to_num().square().mean().sqrt())) if wanted.numel() else 1.0
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * usual, check_dtype=False)


def normal(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are the same on every device."""
    return torch.randn(shape).to(dtype).to(device)


def bits() -> None:
    """pack, unpack, population counts."""
    for layout in layouts()[:1]:
        same(
            lambda d, x=layout: [
                ops.pack(x.mask.to(d)),
                ops.unpack(x.bits.to(d), _K).int(),
                ops.row_counts(x.bits.to(d), _K, invert=True),
                ops.count(x.bits.to(d)),
            ]
        )


def phi() -> None:
    """gather, gather_add_, scatter, scatter_, pack_active."""
    for layout, dtype in itertools.product(layouts(), (torch.float32, torch.bfloat16)):

        def run(d: str, layout: Layout = layout, dtype: torch.dtype = dtype) -> list[Tensor]:
            x = layout.on(d)
            dense, place = normal(d, _ROWS, _K, dtype=dtype), (x.bits, x.start, x.columns)
            theta = ops.gather(dense, *place, x.shape, torch.float32)
            weight = normal(d, _ROWS, _K)
            return [
                theta,
                ops.gather(dense.t().contiguous().t(), *place, x.shape),
                ops.gather_add_(theta.clone(), dense, *place),
                ops.scatter(theta, *place, _K, dtype),
                ops.scatter_(weight, theta, *place),
            ]

        same(run, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def packed() -> None:
    """pack_active, compose, compose_quantized."""
    from fxresu.kernels.quantized import quantize

    layout = layouts()[0]
    kept = layout.mask.sum(1)
    shape = (_ROWS, int(kept.max()) + int(kept.max()) % 2)
    start = ops.row_starts(kept, shape)
    for kind in ("", "int8", "int4"):

        def run(d: str, kind: str = kind) -> list[Tensor]:
            x, begin = layout.on(d), start.to(d)
            active = ops.pack_active(normal(d, _ROWS, _K), x.bits, begin, shape)
            theta = ops.gather(normal(d, _ROWS, _K), x.bits, x.start, None, x.shape)
            place = (x.bits, begin, x.start, _K, torch.bfloat16)
            if kind:
                codes, scale = (t.to(d) for t in quantize(active.cpu(), kind))
                return [ops.compose_quantized(codes, scale, theta, *place)]
            return [active, ops.compose(active, theta, *place), ops.compose(active, None, *place)]

        same(run, 2e-2)


def _theta_operands(layout: Layout, d: str, rule: str, moments: torch.dtype, held: str) -> ops.ThetaOperands:
    x = layout.on(d)

    def theta_like() -> Tensor:
        dense = torch.randn(_ROWS, layout.mask.shape[1])
        return ops.gather(dense, layout.bits, layout.start, layout.columns, x.shape)

    m, v = theta_like(), theta_like().abs()
    given = {}
    for name, value in (("m", m), ("v", v)):
        if name in MOMENTS_OF[rule]:
            eight = moments == torch.uint8
            given[name] = (torch.zeros_like(value) if eight else value).to(moments).to(d)
            if eight:
                given[f"{name}_scale"] = torch.zeros(scale_shape(x.shape, _ROWS, layout.mask.shape[1]), device=d)
    weight = normal(d, _ROWS, layout.mask.shape[1])
    values = {
        "weight": {"weight": weight},
        "copy": {"weight": weight, "low": weight.to(torch.bfloat16)},
        "apart": {"low": weight.to(torch.bfloat16), "theta": theta_like().to(d)},
        "bf16": {"low": weight.to(torch.bfloat16), "theta": theta_like().to(d, torch.bfloat16)},
    }[held]
    grad = theta_like().to(d)
    return ops.ThetaOperands(grad, x.bits, x.start, x.columns, layout.mask.shape[1], **values, **given)


def theta(form: str = "rows") -> None:
    """theta_steps_ in every rule, layout and storage, two weights a launch."""
    theta_launch.FORM = form
    kinds = itertools.product(
        layouts(), ("sgd", "momentum", "adam", "selective"), (torch.float32, torch.bfloat16, torch.uint8),
        ("weight", "copy", "apart", "bf16"),
    )  # fmt: skip
    for layout, rule, moments, held in kinds:
        if rule == "sgd" and moments != torch.float32:
            continue

        def run(
            d: str, layout: Layout = layout, rule: str = rule, moments: torch.dtype = moments, held: str = held
        ) -> list[Tensor]:
            both = [_theta_operands(layout, d, rule, moments, held) for _ in range(2)]
            # 8-bit moments start at zero here, where C is 0.5 for every entry, up to the rounding of codes.
            consistency = 0.3 if moments == torch.uint8 else 0.5
            numbers = ops.Rule(rule, 0.05, 0.9, 0.8, 1e-8, 0.1, 3, consistency, 0.2, 0.5)
            stats = ops.theta_steps_(both, numbers)
            return [stats[:, 2], *(t for o in both for t in (o.weight, o.theta, o.low) if t is not None)]

        same(run, 3e-2)


def columns() -> None:
    """The same by the kernels in the columns' space."""
    theta("columns")


def wide() -> None:
    """Rows that are written in several parts, and lines of several blocks of 8-bit moments."""
    K = 4229
    for eight, rule in itertools.product((False, True), ("adam", "selective")):

        def run(d: str, eight: bool = eight, rule: str = rule) -> list[Tensor]:
            o = _theta_operands(layouts(_ROWS, K)[0], d, rule, torch.uint8 if eight else torch.float32, "copy")
            ops.theta_steps_([o], ops.Rule(rule, 0.05, 0.9, 0.8, 1e-8, 0.1, 3, 0.5, 0.2, 0.5))
            assert o.weight is not None and o.low is not None
            return [o.weight, o.low]

        same(run, 3e-2)


def rows(d: str, score: Tensor, old: Tensor) -> list[Tensor]:
    """What is chosen of rows, as 0 and 1, and sums of their active values, as shares of a row."""
    flag = torch.zeros((), dtype=torch.bool, device=d)
    few = torch.full((_ROWS,), 2, device=d)
    chosen = [
        ops.row_select(score, _K // 3, flag),
        ops.row_select(score.bfloat16(), few, flag, old, complement=True),
        ops.row_share(score, _K // 2, _K // 9, old, None, flag),
    ]
    return [*(mask.float() for mask in chosen), ops.active_sums(score, old) / _K]


def masks() -> None:
    """commit_, apply_mask_, transition_counts, kth_largest, row_select, row_share, active_sums."""
    for layout in layouts():

        def run(d: str, layout: Layout = layout) -> list[Tensor]:
            x = layout.on(d)
            fresh = ops.pack((torch.rand(_ROWS, _K) < 0.5).to(d))
            theta = ops.gather(normal(d, _ROWS, _K), x.bits, x.start, x.columns, x.shape)
            return [
                ops.commit_(normal(d, _ROWS, _K), x.bits, fresh, x.start, x.columns, theta),
                ops.apply_mask_(normal(d, _ROWS, _K), fresh),
                ops.transition_counts(x.bits, fresh),
                ops.kth_largest(normal(d, 5000).abs(), torch.tensor(777, device=d)),
                *rows(d, normal(d, _ROWS, _K), ops.unpack(x.bits, _K)),
            ]

        same(run, 1e-6)


def products() -> None:
    """grad_gather, grad_masked, mm_few."""
    for layout, dtype in itertools.product(layouts()[:2], (torch.float32, torch.bfloat16)):

        def run(d: str, layout: Layout = layout, dtype: torch.dtype = dtype) -> list[Tensor]:
            x = layout.on(d)
            dy, inputs = normal(d, 7, _ROWS, dtype=dtype), normal(d, 7, _K, dtype=dtype)
            weight = normal(d, _ROWS, _K, dtype=dtype)
            assert x.start is not None
            return [
                ops.grad_gather(dy, inputs, x.bits, x.start, x.shape, torch.float32),
                ops.grad_masked(dy, inputs, x.bits, torch.float32),
                ops.mm_few(inputs, weight, normal(d, _ROWS, dtype=dtype)),
                ops.mm_few(dy, weight.t()),
            ]

        same(run, 3e-2 if dtype == torch.bfloat16 else 1e-3)


def decode() -> None:
    """decode_linear in every form, on a 2:4 mask, which all of them take."""
    from fxresu.kernels._measure import random_mask
    from fxresu.kernels.decode_linear import FORMS

    mask = random_mask(96, 160, 0.5, "2:4", torch.Generator().manual_seed(0))
    bits, starts = ops.pack(mask), ops.row_starts(mask.sum(1), (96, 80))
    for tokens, form in itertools.product((1, 5, 17), FORMS):

        def run(d: str, tokens: int = tokens, form: str = form) -> list[Tensor]:
            active, theta = normal(d, 96, 80, dtype=torch.bfloat16), normal(d, 96, 80)
            x, place = normal(d, tokens, 160, dtype=torch.bfloat16), (bits.to(d), starts.to(d), starts.to(d))
            return [
                ops.decode_linear(x, active, theta, *place, form),
                ops.decode_linear(x, active, None, place[0], place[1], None, form),
            ]

        same(run, 3e-2)


def order() -> None:
    """2:4 weights in the order of the sparse tensor cores."""
    from fxresu.kernels import sparse_order
    from fxresu.kernels._measure import random_mask

    mask = random_mask(192, 320, 0.5, "2:4", torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):

        def run(d: str, dtype: torch.dtype = dtype) -> list[Tensor]:
            weight = normal(d, 192, 320, dtype=dtype) * mask.to(d)
            forms = sparse_order.compress(weight, ops.pack(mask).to(d), torch.bfloat16, True)
            return [form.view(torch.int16) for form in forms if form is not None]

        same(run)


def adamw() -> None:
    """adamw_step_ and adamw_steps_: whole weights and a piece, in every form of moments; one that is skipped.
    running_clip. factored_moments_, and updates that read them."""
    rule = ops.AdamW(0.05, 0.9, 0.99, 1e-8, 0.1, 3)
    sizes = (1, 255, 9001)
    for weight, moments in itertools.product((torch.float32, torch.bfloat16), MOMENT_FORMS):

        def operands(d: str, n: int, weight: torch.dtype = weight, form: torch.dtype = moments) -> ops.AdamWOperands:
            w, g = normal(d, n, dtype=weight), normal(d, n, dtype=weight)
            m, v = (torch.zeros(n, dtype=form, device=d) for _ in range(2))
            scales = [torch.zeros(-(-n // 256), device=d) for _ in range(2)] if form == torch.uint8 else []
            return ops.AdamWOperands(w, g, m, v, *scales)

        def run(d: str, operands: Callable[[str, int], ops.AdamWOperands] = operands) -> list[Tensor]:
            norms = torch.tensor([1.0, torch.nan, 2.0], device=d)
            many, one = [operands(d, n) for n in sizes], operands(d, 5000)
            ops.adamw_steps_([(o, rule, norm) for o, norm in zip(many, norms.unbind(), strict=True)])
            ops.adamw_step_(one, rule, torch.tensor(0.5, device=d), norms[0])
            return [*(o.weight for o in (*many, one)), ops.running_clip(norms, norms.nan_to_num().flip(0), 0.5)]

        same(run, 3e-2)

    for shape, weight in itertools.product(((1, 5), (7, 300), (300, 7), (20, 512)), (torch.float32, torch.bfloat16)):

        def factored(d: str, shape: tuple[int, int] = shape, weight: torch.dtype = weight) -> list[Tensor]:
            n = shape[0] * shape[1]
            w, g = normal(d, n, dtype=weight), normal(d, n, dtype=weight)
            m, scale = torch.zeros(n, dtype=torch.uint8, device=d), torch.zeros(-(-n // 256), device=d)
            vectors = [torch.zeros(size, device=d) for size in (*shape, 1)]
            norms = torch.tensor([1.0, torch.nan], device=d)
            o = ops.AdamWOperands(w, g, m, None, scale, None, 0, *vectors)
            updates = [(g, *vectors, rule.beta2, norm) for norm in norms.unbind()]
            ops.factored_moments_(updates, torch.tensor(0.5, device=d))
            ops.factored_moments_([(g, *(v.clone() for v in vectors), rule.beta2, norms[0])], measure=True)
            ops.adamw_step_(o, rule)
            ops.adamw_steps_([(o, rule, norms[0])])
            return [w, norms[0], *vectors]

        same(factored, 3e-2)


def heads() -> None:
    """head_loss, with and without its gradient, slope_rows_, slope_tile_ and scale_, on tiles and vocabularies of odd
    sizes; and read_number of the loss."""
    for dtype, words in itertools.product((torch.float32, torch.bfloat16), (33, 9001)):

        def run(d: str, dtype: torch.dtype = dtype, words: int = words) -> list[Tensor]:
            hidden, weight = normal(d, 7, 24, dtype=dtype), normal(d, words, 24, dtype=dtype)
            target = torch.randint(words, (7,)).to(d)
            target[2] = -100
            loss, gradient, _ = ops.head_loss(hidden, weight, target, -100, 3, True)
            logits, factor = normal(d, 7, words, dtype=dtype), torch.rand(7).to(d)
            slope = ops.slope_tile_(logits, logits.float().logsumexp(1), factor, target, 5)
            losses = torch.zeros(7).to(d)
            rows = ops.slope_rows_(normal(d, 7, words, dtype=dtype), target, losses, -100)
            without = ops.head_loss(hidden, weight, target, -100, 3, False)[0]
            scaled = scale_(normal(d, 7, words, dtype=dtype), torch.tensor(0.3, device=d))
            number = torch.tensor(ops.read_number(loss))
            return [loss, gradient, slope, without, rows, losses, scaled, number]

        same(run, 3e-2 if dtype == torch.bfloat16 else 1e-3)


GROUPS: dict[str, Callable[[], None]] = {
    "bits": bits, "phi": phi, "packed": packed, "theta": theta, "columns": columns, "wide": wide, "masks": masks,
    "products": products, "decode": decode, "order": order, "adamw": adamw, "heads": heads,
}  # fmt: skip


def sanitized(sanitizer: str, tool: str, group: str) -> bool:
    """One group under one tool; whether nothing was found."""
    options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "5"]
    command = [sanitizer, *options, sys.executable, str(Path(__file__).resolve()), "--run", group]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"{tool:9s} {group:9s} took more than {_LIMIT_S} s", flush=True)
        return False
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1] if lines else "no output")
    said = [
        f"{tool:9s} {group:9s} exit {done.returncode}  {summary.strip()}",
        *(lines[-40:] if done.returncode else []),
    ]
    print("\n".join(said), flush=True)
    return done.returncode == 0


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer"), help="path of compute-sanitizer")
    parser.add_argument("--run", choices=GROUPS, help="run one group in this process")
    args = parser.parse_args(argv)
    if args.run:
        GROUPS[args.run]()
        return 0
    if DEVICE != "cuda":
        parser.error("there is no CUDA device")
    if not args.sanitizer:
        parser.error("compute-sanitizer is not on PATH; it comes with the CUDA toolkit (--sanitizer PATH)")
    runs = [(args.sanitizer, tool, group) for tool in args.tools for group in args.groups]
    with ThreadPoolExecutor(args.jobs) as pool:
        clean = list(pool.map(lambda run: sanitized(*run), runs))
    print(f"{sum(clean)} of {len(clean)} runs are clean")
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
