"""The sparse phase with 2:4 masks: full step of a stack of 4096-wide residual MLP blocks, 8192 tokens.

Dense (compiled, autocast and bf16 throughout), the sparse phase with row-wise masks and with the n:m granularities
named by `--granularities` (dense GEMMs, which are the default), and that of 2:4 on the sparse tensor cores. y and the
first weight's gradient are compared with float64.

    python tools/bench/semistructured.py --out tools/bench/results/semistructured.json
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from benchlib.errors import distance
from benchlib.layers import LEARNING_RATE, autocast, compile_arguments
from benchlib.results import Run, arguments, one_line
from benchlib.timing import capture, device_type, peaks, time_calls
from torch import Tensor, nn

import fxresu
from fxresu.model_state import managed_weights

TOLERANCE = 5e-2  # by Frobenius norm, through the whole stack in bf16


class Stack(nn.Module):
    """x + down(gelu(up(norm(x)))), `blocks` times."""

    def __init__(self, width: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.ups = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs):
            x = x + down(F.gelu(up(norm(x))))
        return x


class StackStep:
    """Forward, backward and fused AdamW of a stack, dense or in the sparse phase of a granularity."""

    def __init__(self, precision: str, granularity: str | None, kernel: str | None, args: Any) -> None:
        device = device_type()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Stack(args.width, args.hidden, args.blocks).to(dtype)
            self.x = torch.randn(args.tokens, args.width, dtype=torch.bfloat16).requires_grad_()
            self.dy = torch.randn(args.tokens, args.width, dtype=torch.bfloat16)
        self.precision, self.granularity = precision, granularity
        compiled = compile_arguments("compiled", args.compiler) or {}
        fused = {"fused": True, "capturable": True} if device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, **fused)
        if granularity is None:
            self.call = torch.compile(self.model, **compiled)
        else:
            fxresu.transform(self.model, sparsity=0.5, granularity=granularity, compile=compiled,
                             kernels={"*": kernel} if kernel else {})  # fmt: skip
            fxresu.set_phase(self.model, "sparse", optimizer=self.optimizer)
            self.call = self.model

    def forward_backward(self) -> Tensor:
        """Gradients from a clean start; returns y."""
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None
        with autocast(self.precision):
            y = self.call(self.x)
        torch.autograd.backward(y, self.dy.to(y.dtype))
        return y.detach()

    def full(self) -> None:
        """One step."""
        self.forward_backward()
        self.optimizer.step()

    def check(self) -> dict[str, float]:
        """Errors of y, dX and the first dW against float64 with the same (masked) weights.

        Raises:
            AssertionError: above the tolerance.
        """
        y = self.forward_backward()
        plain = Stack(self.model.ups[0].in_features, self.model.ups[0].out_features, len(self.model.ups))
        plain.to(self.x.device).double().load_state_dict(self.model.state_dict())
        x = self.x.detach().double().requires_grad_()
        wanted = plain(x)
        torch.autograd.backward(wanted, self.dy.double())
        gradient = plain.ups[0].weight.grad
        if self.granularity is not None:
            gradient = gradient.where(managed_weights(self.model)["ups.0.weight"].entry.mask(), 0)
        errors = {
            "y": distance(y, wanted.detach()),
            "dX": distance(self.x.grad, x.grad),
            "dW": distance(self.model.get_parameter("ups.0.weight").grad, gradient),
        }
        if not max(errors.values()) < TOLERANCE:
            raise AssertionError(f"errors {errors} against float64 exceed {TOLERANCE}")
        return errors


def measure(precision: str, granularity: str | None, kernel: str | None, args: Any) -> dict[str, Any]:
    """Errors, times and peaks of a step, and times of a captured one; a capture that fails costs only these."""
    step = StackStep(precision, granularity, kernel, args)
    row: dict[str, Any] = {"errors": step.check()}
    row |= time_calls(step.full, args.warmup, args.steps) | peaks(step.full)
    try:
        return row | {"graph": time_calls(capture(step.full), args.warmup, args.steps)}
    except Exception as error:
        return row | {"graph_error": one_line(error)}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--granularities", nargs="+", default=["row", "2:4"])
    args = parser.parse_args(argv)
    cases = {}
    for precision in ("AMP", "bf16"):
        cases[f"dense/{precision}"] = functools.partial(measure, precision, None, None, args)
        for granularity in args.granularities:
            cases[f"sparse, {granularity}/{precision}"] = functools.partial(measure, precision, granularity, None, args)
        if "2:4" in args.granularities:
            name = f"sparse, 2:4, cusparselt/{precision}"
            cases[name] = functools.partial(measure, precision, "2:4", "cusparselt", args)
    run = Run("semistructured", args, {k: getattr(args, k) for k in ("width", "hidden", "blocks", "tokens")})
    run.run(cases)
    return 1 if run.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
