"""What fxresu does to one architecture, phase by phase, and whether every gradient is right."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from typing import Any

import torch
from fxresu_testing import gathered
from fxresu_zoo import Architecture
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxresu
from fxresu.model_state import managed_weights
from fxresu.models import ExampleInputs
from fxresu.phases import set_phase
from fxresu.runner import CompiledEntry, runner_of

TRAINING, FORWARD = ("dense", "sparse", "resu"), ("predict", "correct")
# Largest difference of a weight's gradient from the float64 reference, in units of its largest element.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.06, torch.bfloat16: 0.25}


@dataclasses.dataclass
class Coverage:
    """One phase of one architecture.

    Attributes:
        managed: managed weights.
        rewritten: of them, those all of whose consumers were rewritten.
        consumers: rewritten consumers.
        graphs: of the first call.
        breaks: of the first call.
        compiles: graphs over two calls.
        left: "weight: operation: reason" of every consumer that was not rewritten, and weights that were not read.
        error: largest difference of a weight's gradient (of an output, in phases without one) from the float64
            reference, in units of its largest element.
    """

    managed: int
    rewritten: int
    consumers: int
    graphs: int
    breaks: int
    compiles: int
    left: list[str]
    error: float

    def counts(self) -> dict[str, Any]:
        """What does not depend on the machine."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "error"}


def built(architecture: Architecture) -> tuple[nn.Module, ExampleInputs]:
    """The model and its inputs, where no parameter starts at zero or next to it: behind a head of zeros, a scale of
    1e-6 or attention that is uniform, every gradient is right."""
    torch.manual_seed(0)
    model, inputs = architecture.make()
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() < 0.1:
            nn.init.uniform_(parameter, -0.2, 0.2)
    return model.to(architecture.dtype), _to(inputs, architecture.dtype)


def cover(architecture: Architecture, phases: tuple[str, ...]) -> dict[str, Coverage]:
    """Compile and run an architecture in each phase, twice, and check its gradients.

    Raises:
        AssertionError: a gradient or an output is not that of the eager float64 reference.
    """
    torch._dynamo.reset()
    model, inputs = built(architecture)
    backend = "inductor" if architecture.inductor else "aot_eager"
    options = {"backend": backend, "fullgraph": architecture.fullgraph, **architecture.compile}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is what is counted here
        fxresu.transform(model, compile=options)
        found = {}
        for phase in phases:
            set_phase(model, phase)
            known = set(runner_of(model).entries)
            error = max(check(model, inputs, phase, architecture.dtype) for _ in range(2))
            (key,) = set(runner_of(model).entries) - known
            found[phase] = _counted(model, runner_of(model).entries[key], error)
    return found


def _to(inputs: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    def moved(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    args, kwargs = pytree.tree_map_only(Tensor, moved, (inputs.args, inputs.kwargs))
    return ExampleInputs(args, kwargs)


def _counted(model: nn.Module, entry: CompiledEntry, error: float) -> Coverage:
    rewrites = [r for graph in entry.graphs[: entry.first_graphs] for r in graph.rewrites]
    left = {f"{r.weight}: {r.before}: {r.reason}" for r in rewrites if r.reason}
    weights = set(managed_weights(model))
    spoiled = {r.weight for r in rewrites if r.reason} | (weights - {r.weight for r in rewrites})
    cause = re.sub(r" at /\S+:\d+", "", entry.eager_cause)
    left |= {f"{name}: read by eager code: {cause}" for name in entry.eager_reads}
    spoiled |= set(entry.eager_reads)
    left |= {f"{name}: not read" for name in weights - {r.weight for r in rewrites} - set(entry.eager_reads)}
    return Coverage(
        managed=len(weights),
        rewritten=len(weights - spoiled),
        consumers=sum(not r.reason for r in rewrites),
        graphs=entry.first_graphs,
        breaks=entry.breaks,
        compiles=len(entry.graphs),
        left=sorted(left),
        error=error,
    )


# -------------------------------------------------------------------------------------------------------- correctness


def _outputs(result: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _loss(outputs: list[Tensor]) -> Tensor:
    """Of every result, weighted so that no symmetry hides an error."""
    total = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        if out.requires_grad:
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape)
            total = total + (out.double() * weights).sum()
    return total


def check(model: nn.Module, inputs: ExampleInputs, phase: str, dtype: torch.dtype) -> float:
    """Compare one call (and its backward) of the compiled model with the plain model in float64.

    Returns:
        The largest difference of a gradient, or of an output where there is none, in units of its largest element.

    Raises:
        AssertionError: a difference beyond the dtype's tolerance, or a gradient of the wrong kind.
    """
    reference = fxresu.untransform(copy.deepcopy(model)).double()
    if hasattr(reference, "set_experts_implementation"):
        reference.set_experts_implementation("eager")  # torch has no grouped product in float64
    for parameter in reference.parameters():
        parameter.grad = None
    model.zero_grad()
    for managed in managed_weights(model).values():
        if managed.entry.anchor is not None:
            managed.entry.anchor.grad = None
    wants = _outputs(_to(inputs, torch.float64).call(reference))
    outs = _outputs(inputs.call(model))
    tolerance = TOLERANCE[torch.bfloat16 if phase == "predict" else dtype]
    assert len(outs) == len(wants) > 0
    errors = [_close(o.detach(), w.detach(), tolerance, f"an output in {phase}") for o, w in zip(outs, wants)]
    if phase in FORWARD:
        assert not any(out.requires_grad for out in outs)
        return max(errors)
    errors = [0.0]
    _loss(wants).backward()
    _loss(outs).backward()
    for name, managed in managed_weights(model).items():
        want = reference.get_parameter(name).grad
        if want is None:
            continue
        assert want.abs().max() > 1e-4, f"{name} has next to no gradient in the reference: nothing would be compared"
        entry, got = managed.entry, managed.parameter.grad
        if not managed.parameter.requires_grad:
            assert got is None, f"{name} is frozen and has a gradient"
            continue
        if phase == "resu":
            assert got is None, f"{name} keeps a dense gradient in RESU"
            got, want = entry.anchor.grad, gathered(entry, want)
        elif phase == "sparse":
            kept = entry.mask().view(entry.shape)
            assert not got[~kept].any(), f"{name} has a gradient where it is pruned"
            want = want * kept
        assert got is not None, f"{name} has no gradient in {phase}"
        errors.append(_close(got, want, tolerance, f"the gradient of {name} in {phase}"))
    return max(errors)


def _close(got: Tensor, want: Tensor, tolerance: float, what: str) -> float:
    scale = float(want.abs().max()) if want.numel() else 0.0
    error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    assert error <= tolerance * scale + 1e-6, f"{what} is off by {error:.3g}, where its largest element is {scale:.3g}"
    return error / (scale + 1e-6 / tolerance)  # at most the tolerance
