"""Times of the candidates of a problem on its device, with CUDA events, on random operands.

The operands are copied until they exceed the second-level cache twice, and the copies take turns: in a model a weight
is not in the cache when its layer runs.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from .bits import pack, row_counts
from .choose import Problem
from .layout import row_starts
from .phi import gather, pack_active
from .quantized import quantize

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference to the default, relative to its largest value."""
_COPIES = 16
_SAMPLES = 7
_SAMPLE_US = 3000.0


class WrongResultError(RuntimeError):
    """A candidate's result differs from the default's by more than rounding."""


Compiler = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Operands:
    """Arguments of one call of an operation, and what is differentiated.

    Attributes:
        op: overload of the operation.
        args: its arguments, tensors and others.
        dy: gradient of its result; None for a problem without a backward.
        inputs: what gets a gradient.
    """

    op: Any
    args: tuple[Any, ...]
    dy: Tensor | None
    inputs: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [a for a in self.args if isinstance(a, Tensor)]

    @property
    def nbytes(self) -> int:
        """Bytes of the arguments."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    def module(self, how: str) -> GraphModule:
        """The call as a graph over `tensors`."""
        graph = Graph()
        args = [graph.placeholder(f"a{i}") if isinstance(a, Tensor) else a for i, a in enumerate(self.args)]
        graph.output((graph.call_function(self.op, tuple(args), {"how": how}),))
        return GraphModule({}, graph)

    def step(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Result and gradients of a function over `tensors`."""
        (y,) = function(*self.tensors)
        if self.dy is None:
            return (y.detach(),)
        return y.detach(), *torch.autograd.grad(y, self.inputs, self.dy)


def random_mask(rows: int, K: int, sparsity: float, pattern: str, generator: torch.Generator) -> Tensor:
    """bool [rows, K] with the same number of active coordinates in every row; "2:4": checkerboards of 4 x 4 blocks
    whose rows are shuffled, so that every row and column of a block keeps two."""
    device = generator.device
    if pattern == "2:4":
        base = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]], device=device, dtype=torch.bool)
        blocks = torch.rand((rows // 4, K // 4, 4), generator=generator, device=device).argsort(-1)
        return base[blocks].transpose(1, 2).reshape(rows, K)
    keep = max(K - round(sparsity * K), 1)
    order = torch.rand((rows, K), generator=generator, device=device)
    return torch.zeros((rows, K), dtype=torch.bool, device=device).scatter_(1, order.topk(keep, dim=1).indices, True)


def operands(problem: Problem, device: torch.device, seed: int = 0) -> Operands:
    """Random operands of a problem. They do not touch the global random state."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    dtype = getattr(torch, problem.dtype)
    weight_dtype = torch.float32 if problem.values else getattr(torch, problem.weight_dtype)
    rows, K = problem.rows, problem.K
    mask = random_mask(rows, K, problem.sparsity, problem.pattern, generator)
    bits = pack(mask)
    weight = normal(rows, K, dtype=weight_dtype).mul_(K**-0.5)
    inside, outside = (rows, K) if problem.transposed else (K, rows)
    x = normal(problem.tokens, inside, dtype=dtype).requires_grad_(problem.input_grad)
    dy = normal(problem.tokens, outside, dtype=dtype)
    counts = row_counts(bits, K, invert=True)
    shape = (1, max(int(counts.sum()), 1)) if problem.layout == "flat" else (rows, max(int(counts.max()), 1))
    starts = row_starts(counts, shape)
    if problem.op == "linear_packed":
        op, args, trained = _packed(problem, weight, bits, starts, shape, x)
    else:
        op, args, trained = _resident(problem, weight, mask, bits, starts, shape, x)
    inputs = (*((x,) if problem.input_grad else ()), *((trained,) if problem.trains else ()))
    return Operands(op, args, dy if inputs else None, inputs)


Call = tuple[Any, tuple[Any, ...], Tensor]  # (operation, arguments, what the mode trains)


def _resident(
    problem: Problem, weight: Tensor, mask: Tensor, bits: Tensor, starts: Tensor, shape: tuple[int, int], x: Tensor
) -> Call:
    columns = anchor = None
    if problem.pattern:  # the weight of a sparse phase
        weight.masked_fill_(~mask, 0)
    if problem.layout:
        if problem.layout == "columns":
            columns = torch.arange(0, problem.K, 4, dtype=torch.int32, device=weight.device)
            shape = (problem.rows, columns.numel())
        anchor = torch.zeros(1, device=weight.device).expand(shape).detach().requires_grad_()
    trained = weight.requires_grad_() if problem.mode in ("dense", "sparse") else anchor
    args = (x, weight, None, anchor, bits, starts, columns, problem.mode, "", problem.transposed)
    return torch.ops.fxresu.linear.default, args, weight if trained is None else trained


def _packed(problem: Problem, weight: Tensor, bits: Tensor, starts: Tensor, shape: tuple[int, int], x: Tensor) -> Call:
    kept = row_counts(bits, problem.K)
    lines, length = (1, int(kept.sum())) if problem.layout == "flat" else (problem.rows, int(kept.max()))
    a_shape = lines, max(length + length % 2, 2) if problem.values else max(length, 1)
    a_starts = row_starts(kept, a_shape)
    active = pack_active(weight, bits, a_starts, a_shape)
    scale = None
    if problem.values:
        active, scale = quantize(active, problem.values)
    theta = gather(weight.float(), bits, starts, None, shape).requires_grad_(problem.trains)
    args = (x, active, theta, None, bits, a_starts, starts, problem.rows, problem.K, "", scale)
    return torch.ops.fxresu.linear_packed.default, args, theta


def compare(
    problem: Problem, device: torch.device, names: Sequence[str], compiler: Compiler | None = None
) -> dict[str, float | str]:
    """Microseconds of one forward and backward of every candidate, or why it failed.

    The results of the first are what the others' are checked against. compiler: makes a function of a graph, as the
    real graph will be compiled; None runs the operations one by one.
    """
    figures: dict[str, float | str] = {}
    dtype = getattr(torch, problem.dtype)
    # The default casts its weight only where autocast asks for it.
    mixed = problem.dtype in ("bfloat16", "float16") and problem.dtype != problem.weight_dtype
    with torch.enable_grad(), torch.autocast(device.type, dtype=dtype if mixed else None, enabled=mixed):
        sets = [operands(problem, device)]
        copies = _copies(sets[0].nbytes, device)
        sets += [operands(problem, device, seed) for seed in range(1, copies)]
        wanted: tuple[Tensor, ...] | None = None
        for name in names:
            try:
                module = sets[0].module(name)
                function = module if compiler is None else compiler(module, sets[0].tensors)
                got = sets[0].step(function)
                wanted = got if wanted is None else wanted
                check(got, wanted, dtype)
                figures[name] = _time(_turns(sets, function), problem.graphed, device) / copies
            except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory is a RuntimeError
                figures[name] = f"failed: {str(error).splitlines()[0][:200]}"
    return figures


def _copies(nbytes: int, device: torch.device) -> int:
    """How many sets of operands take turns."""
    if device.type != "cuda":
        return 1
    cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-cache // max(nbytes, 1)), 1), _COPIES)


def _turns(sets: Sequence[Operands], function: Callable[..., Any]) -> Callable[[], object]:
    return lambda: [s.step(function) for s in sets]


def check(got: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Raise WrongResultError unless all tensors agree within the rounding of their dtype and of `dtype`, the one that
    products are computed in."""
    allowed = _TOLERANCE[dtype]
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        allowed = _TOLERANCE[torch.float16]  # TF32 keeps as many bits
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise WrongResultError(f"result {index} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
        if b.numel() == 0:
            continue
        wide = torch.promote_types(a.dtype, torch.float32)
        error = (a.to(wide) - b.to(wide)).abs().max() / b.to(wide).abs().max().clamp_min(torch.finfo(wide).tiny)
        if not float(error) <= max(allowed, _TOLERANCE[b.dtype]):
            raise WrongResultError(f"result {index} is off the default's by {float(error):.1e} of its largest value")


def _time(step: Callable[[], object], graphed: bool, device: torch.device) -> float:
    """Median microseconds of `step` on the device: of replays if `graphed`, else of calls one after another, in which
    a slow host shows. On a CPU by the wall clock."""
    if device.type != "cuda":
        step()
        return statistics.median(_wall_us(step) for _ in range(_SAMPLES))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        run = _captured(step, stream) if graphed else step
        once = _elapsed(run, 1, stream)
        repeats = max(int(_SAMPLE_US / max(once, 1.0)), 1)
        result = statistics.median(_elapsed(run, repeats, stream) / repeats for _ in range(_SAMPLES))
    torch.cuda.current_stream(device).wait_stream(stream)
    return result


def _wall_us(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - start)


def _captured(step: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _elapsed(run: Callable[[], object], repeats: int, stream: torch.cuda.Stream) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    for _ in range(repeats):
        run()
    end.record(stream)
    end.synchronize()
    return 1000 * start.elapsed_time(end)
