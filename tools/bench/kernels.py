"""The kernels that are bound by bytes, against a device copy of the same run.

compose (bf16 operand from packed actives and θ), gather (Φᵀ of a dense dW), scatter_ (Φ into the weight), the θ step
(Adam or selective, with θ in the weight's slots; one launch for all weights), products of few tokens, and dθ straight
from dY and X. "columns" and "16 warps" are other forms of the same step, for the choice of the default. Useful bytes:
every value, index and mask word that the operation has to read or write, once; where a dense matrix is read or written
at scattered coordinates, the 32-byte sectors that hold at least one of them. Every result is compared with plain
PyTorch in float64 first, on random data and into poisoned outputs where the caller gives the output.

Operands rotate over independent sets of at least five times the L2, all captured in one CUDA graph, so that launches
cost the host nothing and no set is found in a cache. Targets compare with the run's copy of 512 MB; beside every kernel
stands a copy of as many bytes, captured alike, which starts and ends as often.

    python tools/bench/kernels.py --out tools/bench/results/kernels.json
    python tools/bench/kernels.py --quick --only 'theta step*'
    python tools/bench/kernels.py --quick --only 'mm*' 'linear*'
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchlib.errors import relative_error
from benchlib.limits import touched
from benchlib.results import Run, arguments
from benchlib.timing import capture, device_type, time_calls
from torch import Tensor

from fxresu import kernels as ops
from fxresu.kernels import theta_launch
from fxresu.kernels.blockwise8 import scale_shape
from fxresu.kernels.theta_rules import theta_step_reference

_ROTATED_BYTES = 256 * 2**20
_RULE = ops.Rule("adam", 1e-3, 0.9, 0.999, 1e-8, 0.01, 1, 0.5, 0.2, 0.5)
_SELECTIVE = ops.Rule("selective", 0.1, 0.9, 0.9, 1e-8, 0.01, 1, 0.5, 0.2, 0.5)


@dataclasses.dataclass
class Operands:
    """One weight with a random row-wise mask, in the compact layout.

    Attributes:
        mask, bits: bool [rows, K] and its packed form.
        start, active_start: of θ's and of the packed actives' rows.
        weight: effective weight, float32.
        theta, grad: float32, theta-like.
        active: the active values in bf16, packed.
    """

    mask: Tensor
    bits: Tensor
    start: Tensor
    active_start: Tensor
    weight: Tensor
    theta: Tensor
    active: Tensor
    grad: Tensor


def operands(rows: int, columns: int, sparsity: float) -> Operands:
    """Random ones; every row keeps the same number of weights."""
    device = device_type()
    drop = round(sparsity * columns)
    order = torch.rand(rows, columns, device=device).argsort(1)
    mask = order >= drop
    bits = ops.pack(mask)
    weight = torch.randn(rows, columns, device=device)
    pruned, kept = ops.row_counts(bits, columns, invert=True), ops.row_counts(bits, columns)
    start, active_start = ops.row_starts(pruned, (rows, drop)), ops.row_starts(kept, (rows, columns - drop))
    theta = weight[~mask].view(rows, drop).clone()
    active = weight[mask].view(rows, columns - drop).to(torch.bfloat16)
    return Operands(mask, bits, start, active_start, weight, theta, active, torch.randn_like(theta))


@dataclasses.dataclass
class Work:
    """A kernel on one set of operands.

    Attributes:
        call: runs it.
        check: largest relative error against float64.
        useful: bytes that it has to move.
        theta: its operands, where one launch takes those of all sets.
        rule: of the launch.
        form: constants of `theta_launch` that the launch goes by.
    """

    call: Callable[[], Any]
    check: Callable[[], float]
    useful: float
    theta: ops.ThetaOperands | None = None
    rule: ops.Rule = _RULE
    form: dict[str, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def formed(form: dict[str, Any]) -> Iterator[None]:
    """Constants of the launch, for as long as it is checked and captured."""
    before = {name: getattr(theta_launch, name) for name in form}
    for name, value in form.items():
        setattr(theta_launch, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(theta_launch, name, value)


def compose(o: Operands) -> Work:
    rows, columns = o.mask.shape

    def call() -> Tensor:
        return ops.compose(o.active, o.theta, o.bits, o.active_start, o.start, columns, torch.bfloat16)

    def check() -> float:
        wanted = torch.zeros(rows, columns, dtype=torch.float64, device=o.mask.device)
        wanted[o.mask], wanted[~o.mask] = o.active.double().view(-1), o.theta.double().view(-1)
        return relative_error(call(), wanted)

    return Work(call, check, o.active.nbytes + o.theta.nbytes + o.bits.nbytes + 2 * o.mask.numel())


def gather(dtype: torch.dtype, o: Operands) -> Work:
    dense = torch.randn_like(o.weight).to(dtype)
    share = o.theta.numel() / o.mask.numel()

    def call() -> Tensor:
        return ops.gather(dense, o.bits, o.start, None, tuple(o.theta.shape), torch.float32)

    def check() -> float:
        return relative_error(call().view(-1), dense[~o.mask].double())

    read = touched(share, dense.element_size()) * dense.nbytes
    return Work(call, check, read + o.theta.nbytes + o.bits.nbytes)


def scatter(o: Operands) -> Work:
    share = o.theta.numel() / o.mask.numel()
    target = o.weight.clone()

    def call() -> Tensor:
        return ops.scatter_(target, o.theta, o.bits, o.start, None)

    def check() -> float:
        target.copy_(o.weight).masked_fill_(~o.mask, float("nan"))
        return relative_error(call(), o.weight.double())

    # A sector that is written in part is read first.
    moved = 2 * touched(share, 4) * o.weight.nbytes
    return Work(call, check, moved + o.theta.nbytes + o.bits.nbytes)


def theta_step(
    moments: str, low: bool, o: Operands, rule: ops.Rule = _RULE, grad_dtype: torch.dtype = torch.float32, **form: Any
) -> Work:
    """The first step from zero, moments in fp32, bf16 or 8 bits; `low`: written to a bf16 copy of the weight too."""
    share = o.theta.numel() / o.mask.numel()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[moments]
    m, v = (torch.zeros(o.theta.shape, dtype=dtype, device=o.theta.device) for _ in range(2))
    shape = scale_shape((m.shape[0], m.shape[1]), *o.mask.shape)
    scales = [torch.zeros(shape, device=m.device) if moments == "8bit" else None for _ in range(2)]
    copy = o.weight.to(torch.bfloat16) if low else None
    grad = o.grad.to(grad_dtype)
    operands = ops.ThetaOperands(grad, o.bits, o.start, None, o.mask.shape[1], weight=o.weight, low=copy, m=m, v=v,
                                 m_scale=scales[0], v_scale=scales[1])  # fmt: skip

    def call() -> Tensor:
        return ops.theta_steps_([operands], rule)

    def check() -> float:
        zero = torch.zeros(o.theta.shape, dtype=torch.float64, device=m.device)
        exact = dataclasses.replace(operands, weight=o.weight.double(), low=None, m=zero, v=zero.clone(), m_scale=None,
                                    v_scale=None)  # fmt: skip
        theta_step_reference(exact, rule, 1.0)
        call()
        return relative_error(o.weight, exact.weight)

    moved = 2 * touched(share, 4) * o.weight.nbytes + grad.nbytes + 2 * (m.nbytes + v.nbytes) + o.bits.nbytes
    moved += sum(2 * scale.nbytes for scale in scales if scale is not None)
    moved += touched(share, 2) * copy.nbytes if copy is not None else 0
    return Work(call, check, moved, operands, rule, form)


def theta_panel(share: float, o: Operands) -> Work:
    """Adam with column candidates: θ is the dense panel of a share of the columns, in whole blocks of 64."""
    columns = o.mask.shape[1]
    count = max(round(share * columns / 64), 1) * 64
    chosen = torch.arange(count, dtype=torch.int32, device=o.mask.device)
    pruned = ~o.mask[:, :count]
    grad = torch.randn(pruned.shape, device=o.mask.device).masked_fill_(~pruned, 0)
    m, v = torch.zeros_like(grad), torch.zeros_like(grad)
    operands = ops.ThetaOperands(grad, o.bits, o.start, chosen, columns, weight=o.weight, m=m, v=v)

    def call() -> Tensor:
        return ops.theta_steps_([operands], _RULE)

    def check() -> float:
        g, wanted = grad.double(), o.weight.double()
        stepped = wanted[:, :count] * (1 - _RULE.lr * _RULE.weight_decay) - _RULE.lr * g / (g.abs() + _RULE.eps)
        wanted[:, :count] = stepped.where(pruned, wanted[:, :count])
        call()
        return relative_error(o.weight, wanted)

    sectors = touched(float(pruned.double().mean()), 4) * grad.nbytes
    return Work(call, check, 7 * sectors + o.bits.nbytes * count / columns, operands)


def products(fused: bool, tokens: int, dtype: torch.dtype, o: Operands) -> Work:
    """dθ from dY and X, in one kernel or by a product and `gather`, of the same useful bytes."""
    rows, columns = o.mask.shape
    dy = torch.randn(tokens, rows, device=o.mask.device, dtype=dtype)
    x = torch.randn(tokens, columns, device=o.mask.device, dtype=dtype)
    shape = (int(o.theta.shape[0]), int(o.theta.shape[1]))

    def call() -> Tensor:
        if fused:
            return ops.grad_gather(dy, x, o.bits, o.start, shape, torch.float32)
        return ops.gather(dy.t() @ x, o.bits, o.start, None, shape, torch.float32)

    def check() -> float:
        return relative_error(call().view(-1), (dy.double().t() @ x.double())[~o.mask])

    return Work(call, check, dy.nbytes + x.nbytes + o.theta.nbytes + o.bits.nbytes)


def few(how: str, tokens: int, dtype: torch.dtype, flipped: bool, o: Operands) -> Work:
    """y = x Wᵀ (x W if `flipped`) of few tokens, by `mm_few` or by the vendor's library ("mm")."""
    weight = o.weight.to(dtype).t() if flipped else o.weight.to(dtype)
    x = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=dtype)

    def call() -> Tensor:
        return ops.mm_few(x, weight) if how == "mm_few" else x @ weight.t()

    def check() -> float:
        return relative_error(call(), x.double() @ weight.double().t())

    return Work(call, check, x.nbytes + weight.nbytes + tokens * weight.shape[0] * weight.element_size())


def measure(
    make: Callable[[Operands], Work], rows: int, columns: int, args: Any, sparsity: float, tolerance: float
) -> dict[str, Any]:
    """Error, time and rates of one kernel."""
    first = make(operands(rows, columns, sparsity))
    with formed(first.form):
        error = first.check()
    if not error < tolerance:
        raise AssertionError(f"relative error {error} against float64 exceeds {tolerance}")
    moved = first.useful
    sets = max(2, -(-args.rotated // int(moved)))
    work = [first, *(make(operands(rows, columns, sparsity)) for _ in range(sets - 1))]

    together = [one.theta for one in work if one.theta is not None]

    def all_of_them() -> None:
        if together:
            ops.theta_steps_(together, first.rule)
            return
        for one in work:
            one.call()

    with formed(first.form):
        times = time_calls(capture(all_of_them, 2), args.warmup, args.steps)
    row: dict[str, Any] = {k: v / sets if k.endswith("_ms") else v for k, v in times.items()}
    rate = moved / (row["median_ms"] * 1e-3)
    same = same_copy_rate(moved, sets, args)
    return row | {"relative_error": error, "useful_bytes": moved, "bytes_per_s": rate, "same_copy_bytes_per_s": same}


def same_copy_rate(moved: float, sets: int, args: Any) -> float:
    """Bytes/s of device copies that move as many bytes, as many of them in one CUDA graph."""
    count = max(int(moved) // 2, 1)
    pairs = [torch.zeros(2, count, dtype=torch.uint8, device=device_type()) for _ in range(sets)]

    def all_of_them() -> None:
        for source, target in pairs:
            target.copy_(source)

    times = time_calls(capture(all_of_them, 2), args.warmup, args.steps)
    return 2 * count * sets / (times["median_ms"] * 1e-3)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--tokens", type=int, default=32, help="of the products (at most 64 for mm_few)")
    parser.add_argument("--quick", action="store_true", help="only 4096x4096 at 50 %%")
    parser.add_argument("--rotated", type=int, default=_ROTATED_BYTES, help="bytes of operands in one graph")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.sparsities = args.shapes[:1], args.sparsities[:1]
    torch.set_float32_matmul_precision("highest")  # no TF32
    low = torch.bfloat16
    makers: dict[str, tuple[Callable[[Operands], Work], float]] = {
        "compose": (compose, 5e-3),
        "gather fp32": (functools.partial(gather, torch.float32), 1e-6),
        "gather bf16": (functools.partial(gather, torch.bfloat16), 1e-6),
        "scatter": (scatter, 1e-6),
        "theta step": (functools.partial(theta_step, "fp32", False), 1e-5),
        "theta step, 8-bit": (functools.partial(theta_step, "8bit", False), 1e-5),
        "theta step, bf16 copy": (functools.partial(theta_step, "fp32", True), 1e-5),
        "theta step, a=0.25": (functools.partial(theta_panel, 0.25), 1e-5),
        "theta step, columns": (functools.partial(theta_step, "fp32", False, FORM="columns"), 1e-5),
        "theta step, 16 warps": (functools.partial(theta_step, "fp32", False, _SLOTS_PER_WARP=128), 1e-5),
        "theta step, 8-bit, 16 warps": (functools.partial(theta_step, "8bit", False, _SLOTS_PER_WARP=128), 1e-5),
        "theta step, bf16 gradient and copy": (functools.partial(theta_step, "fp32", True, grad_dtype=low), 1e-5),
        "theta step, selective": (functools.partial(theta_step, "fp32", False, rule=_SELECTIVE), 1e-5),
        "theta step, selective, 8-bit": (functools.partial(theta_step, "8bit", False, rule=_SELECTIVE), 3e-2),
        "theta step, selective, bf16 gradient": (
            functools.partial(theta_step, "fp32", False, rule=_SELECTIVE, grad_dtype=low),
            1e-5,
        ),
        "theta step, selective, columns": (
            functools.partial(theta_step, "fp32", False, rule=_SELECTIVE, FORM="columns"),
            1e-5,
        ),
        **{
            f"linear, {name}{', x W' * flipped}, {how}": (
                functools.partial(few, how, args.tokens, dtype, flipped),
                tolerance,
            )
            for name, dtype, tolerance in (("fp32", torch.float32, 1e-5), ("bf16", low, 1e-2))
            for flipped in (False, True)
            for how in ("mm", "mm_few")
        },
        "mm, gather": (functools.partial(products, False, args.tokens, torch.float32), 1e-4),
        "mm, gather bf16": (functools.partial(products, False, args.tokens, torch.bfloat16), 1e-2),
        "grad_gather": (functools.partial(products, True, args.tokens, torch.float32), 1e-4),
        "grad_gather bf16": (functools.partial(products, True, args.tokens, torch.bfloat16), 1e-2),
    }
    cases = {}
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        for sparsity in args.sparsities:
            for name, (make, tolerance) in makers.items():
                key = f"{name}/{shape}/s={sparsity:g}"
                cases[key] = functools.partial(measure, make, rows, columns, args, sparsity, tolerance)
    run = Run("kernels", args, {"tokens": args.tokens, "rotated_bytes": args.rotated})
    run.run(cases)
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
