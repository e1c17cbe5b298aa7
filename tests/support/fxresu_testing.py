"""Small models, a recording compiler, and float64 references shared by the tests."""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import fxresu
from fxresu.model_state import managed_weights
from fxresu.phases import set_phase

EAGER = {"backend": "aot_eager"}


class Block(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Residual blocks and an output head; 2 managed weights a block. Wide enough for two blocks of 64 columns."""

    def __init__(self, width: int = 16, hidden: int = 32, blocks: int = 2, recompute: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.head = nn.Linear(width, 5)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = block(x)
        return self.head(x)


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (p.view(n, t, self.heads, c // self.heads).transpose(1, 2) for p in self.qkv(x).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(n, t, c))


@dataclasses.dataclass
class Recorder:
    """A compiler (`transform(compile={"backend": ...})`) that keeps AOTAutograd's graphs and runs them as they are."""

    forward: list[GraphModule] = dataclasses.field(default_factory=list)
    backward: list[GraphModule] = dataclasses.field(default_factory=list)
    inference: list[GraphModule] = dataclasses.field(default_factory=list)
    captured: list[GraphModule] = dataclasses.field(default_factory=list)

    def __call__(self, module: GraphModule, inputs: list) -> object:
        self.captured.append(copy.copy(module))

        def keep(graphs: list[GraphModule]):
            def compiler(graph: GraphModule, _inputs: list) -> object:
                graphs.append(graph)
                return make_boxed_func(graph.forward)

            return compiler

        return aot_autograd(
            fw_compiler=keep(self.forward),
            bw_compiler=keep(self.backward),
            inference_compiler=keep(self.inference),
            partition_fn=min_cut_rematerialization_partition,
        )(module, inputs)


def values(graph: GraphModule) -> dict[torch.fx.Node, Tensor]:
    """Fake tensors computed by a graph, by node; inputs not counted."""
    return {
        n: n.meta["val"] for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)
    }


def targets(graph: GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def saved(graph: GraphModule, user_outputs: int = 1) -> list[Tensor]:
    """What a forward graph hands to its backward."""
    out = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    given = [n.meta["val"] for n in out[user_outputs:] if isinstance(n, torch.fx.Node)]
    return [v for v in given if isinstance(v, Tensor)]


def in_phase(model: nn.Module, phase: str, optimizer: torch.optim.Optimizer | None = None, **kwargs: object):
    """Bring a freshly transformed model into a phase."""
    if phase != "dense":
        set_phase(model, phase, optimizer=optimizer, **kwargs)
    return model


def flat_positions(entry) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, flat position in θ) of every candidate, by the definition of the layouts, in loops."""
    mask, rows, cols, flat = entry.mask().cpu(), [], [], []
    starts = [] if entry.columns is not None else entry.row_start.tolist()
    for r in range(entry.rows):
        if entry.columns is None:
            pruned = (~mask[r]).nonzero().flatten().tolist()
            places = [starts[r] + j for j in range(len(pruned))]
        elif entry.input_rows:
            chosen = entry.columns.tolist()
            pruned = (~mask[r]).nonzero().flatten().tolist() if r in chosen else []
            places = [chosen.index(r) * entry.k + c for c in pruned]
        else:
            listed = list(enumerate(entry.columns.tolist()))
            pruned = [c for _, c in listed if not mask[r, c]]
            places = [r * len(listed) + j for j, c in listed if not mask[r, c]]
        rows += [r] * len(pruned)
        cols += pruned
        flat += places
    return torch.tensor(rows), torch.tensor(cols), torch.tensor(flat)


def gathered(entry, dense: Tensor) -> Tensor:
    """Φᵀ of a dense matrix, float64, by definition."""
    rows, cols, flat = flat_positions(entry)
    out = torch.zeros(entry.theta_shape, dtype=torch.float64)
    out.view(-1)[flat] = dense.reshape(entry.rows, entry.k).double().cpu()[rows, cols]
    return out.to(dense.device)


def reference_gradients(model: nn.Module, *args: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, gradient by parameter name) of the plain model in float64, eager."""
    plain = copy.deepcopy(model)
    if hasattr(type(plain), "fxresu_base"):
        fxresu.untransform(plain)
    plain = plain.double().requires_grad_(True)
    plain.zero_grad()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    out = plain(*args)
    loss_of(out).backward()
    return out.detach(), {n: p.grad for n, p in plain.named_parameters(remove_duplicate=True)}


def loss_of(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device)).square().sum()


def check_gradients(
    model: nn.Module, phase: str, *args: Tensor, run=None, tol: float = 2e-5, accumulated: int = 1
) -> None:
    """Run `model` (or `run`) forward and backward, and compare every gradient with the phase's float64 reference."""
    expected_out, expected = reference_gradients(model, *args)
    model.zero_grad()
    for m in managed_weights(model).values():
        if m.entry.anchor is not None:
            m.entry.anchor.grad = None
    for _ in range(accumulated):
        out = (model if run is None else run)(*args)
        loss_of(out).backward()
    torch.testing.assert_close(out.detach().double(), expected_out, rtol=tol, atol=tol)
    weights = managed_weights(model)
    by_id = {id(m.parameter): m for m in weights.values()}
    seen = 0
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
            continue
        want = accumulated * expected[name]
        managed = by_id.get(id(parameter))
        if managed is not None:
            seen += 1
            if phase == "resu":
                assert parameter.grad is None, f"{name} keeps a dense gradient"
                got = managed.entry.anchor.grad
                assert got is not None, f"θ of {name} has no gradient"
                want = gathered(managed.entry, want)
                assert want.abs().sum() > 0
                torch.testing.assert_close(got.double(), want, rtol=tol * 10, atol=tol * 10)
                continue
            if phase == "sparse":
                mask = managed.entry.mask().view(managed.entry.shape)
                assert not mask.all()
                assert (parameter.grad[~mask] == 0).all()
                want = want * mask
        torch.testing.assert_close(
            parameter.grad.double(), want, rtol=tol * 10, atol=tol * 10, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert seen == len(weights) > 0
