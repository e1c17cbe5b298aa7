"""Steps of linear layers: dense, naive masked_scatter RESU, and fxresu's phases, each checked against float64."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig
from fxresu.model_state import managed_weights, state_of
from fxresu.theta import clear_theta_gradients

from .errors import gathered, relative_error
from .timing import Call, capture_parts, device_type

LEARNING_RATE = 1e-4
TOLERANCE = {"fp32": 1e-4, "AMP": 3e-2, "bf16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is measured.

    Attributes:
        method: "dense", "naive" (masked_scatter of a vector θ), or a phase of fxresu: "sparse", "resu".
        rows, columns, tokens: shape of the weight and of its input [tokens, columns].
        precision: "fp32" (without TF32), "AMP" (fp32 weights, bf16 autocast) or "bf16" (all of it).
        mode: "eager", "compiled", or "graphs" (torch.compile's reduce-overhead).
        copies: independent layers in one step, so that every one finds cold caches.
        input_gradient: whether dX is computed.
        frozen_rest: in RESU the bias does not train, as published.
        sparsity, alpha, rule, moments, storage: of RESU ("packed int8": how packed values are kept).
        theta: "bf16" if θ is in it, beside weights in bfloat16; "" is float32.
        kernels: the kernel that fxresu's linears are made to run, or "". A dense layer with one is fxresu's dense
            phase: what makes RESU's products faster is open to dense training too.
    """

    method: str
    rows: int
    columns: int
    tokens: int
    precision: str = "fp32"
    mode: str = "compiled"
    copies: int = 1
    input_gradient: bool = False
    frozen_rest: bool = False
    sparsity: float = 0.5
    alpha: float = 1.0
    rule: str = "adam"
    moments: str = "fp32"
    storage: str = "resident"
    theta: str = ""
    kernels: str = ""
    compiler: str = "inductor"


class Layers(nn.Module):
    """Independent linears, each on its own input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs))


class NaiveLinear(nn.Module):
    """RESU as one would write it first: a vector θ, scattered into the masked weight in every forward.

    Takes the place of an `nn.Linear`, or of transformers' `Conv1D`, whose weight is transposed.
    """

    def __init__(self, module: nn.Module, sparsity: float) -> None:
        super().__init__()
        weight = module.weight.detach()
        with torch.no_grad():
            drop = round(sparsity * weight.numel())
            pruned = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            pruned[weight.abs().flatten().topk(drop, largest=False).indices] = True
            pruned = pruned.view_as(weight)
            self.register_buffer("pruned", pruned)
            self.register_buffer("weight", weight.masked_fill(pruned, 0))
            sigma = weight[~pruned].float().std()
            self.theta = nn.Parameter((0.1 * sigma * torch.randn(drop, device=weight.device)).to(weight.dtype))
        self.bias = module.bias
        self.transposed = not isinstance(module, nn.Linear)

    def effective(self) -> Tensor:
        """M∘W + Φ(θ)."""
        return self.weight.masked_scatter(self.pruned, self.theta)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.effective()
        return F.linear(x, weight.t() if self.transposed else weight, self.bias)


def gradient_dtype(precision: str) -> torch.dtype:
    """Of dθ: that of the product it comes from."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def storage_arguments(storage: str) -> dict[str, Any]:
    """Arguments of `fxresu.transform` for "resident", "offload", "packed", or "packed" with the kind of its values."""
    kind, _, values = storage.partition(" ")
    return {"storage": kind, **({"packed_values": values} if values else {})}


def held(leaves: list[Tensor]) -> Call:
    """Remembers the gradients of some leaves; call the result to put them back."""
    gradients = [leaf.grad for leaf in leaves]

    def put_back() -> None:
        for leaf, gradient in zip(leaves, gradients):
            leaf.grad = gradient

    return put_back


def compile_arguments(mode: str, compiler: str) -> dict[str, Any] | None:
    """Arguments of `torch.compile` for a mode; None for eager."""
    if mode == "eager":
        return None
    arguments: dict[str, Any] = {"fullgraph": True}
    if compiler != "inductor":
        return {**arguments, "backend": compiler}
    return {**arguments, "mode": "reduce-overhead"} if mode == "graphs" else arguments


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast for "AMP", else nothing."""
    if precision == "AMP":
        return torch.autocast(device_type(), dtype=torch.bfloat16)
    return contextlib.nullcontext()


class LayerStep:
    """A step of a `Layer`, in parts that can be timed alone.

    Attributes:
        model: the one linear, or `Layers` of several; transformed or not.
        linears: all of them.
        inputs, gradients: x and dY of every copy, fixed random tensors.
    """

    def __init__(self, layer: Layer, capturable: bool = False) -> None:
        self.layer = layer
        device = device_type()
        torch.manual_seed(0)
        self.linears: list[nn.Module] = []
        for _ in range(layer.copies):
            linear = nn.Linear(layer.columns, layer.rows, device=device)
            if layer.precision == "bf16":
                linear.to(torch.bfloat16)
            self.linears.append(NaiveLinear(linear, layer.sparsity) if layer.method == "naive" else linear)
        self.model = self.linears[0] if layer.copies == 1 else Layers(self.linears)
        low = torch.float32 if layer.precision == "fp32" else torch.bfloat16
        shapes = ((layer.tokens, layer.columns), (layer.tokens, layer.rows))
        x, dy = ([torch.randn(s, device=device, dtype=low) for _ in range(layer.copies)] for s in shapes)
        self.inputs = [t.requires_grad_(layer.input_gradient) for t in x]
        self.gradients = dy
        arguments = compile_arguments(layer.mode, layer.compiler)
        if layer.method in ("dense", "naive") and not layer.kernels:
            self.call: Callable[..., Any] = self.model if arguments is None else torch.compile(self.model, **arguments)
            self.weights: list[Any] = []
        else:
            self._transform(layer, arguments)
        if layer.method == "naive" and layer.frozen_rest:
            self._freeze_biases()
        fused = {"fused": True, "capturable": capturable} if device == "cuda" else {}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, **fused)
        if layer.method in ("sparse", "resu"):
            self._enter_phase(layer)

    def _transform(self, layer: Layer, arguments: dict[str, Any] | None) -> None:
        fxresu.transform(
            self.model,
            sparsity=layer.sparsity,
            candidates=layer.alpha,
            **storage_arguments(layer.storage),
            **({"kernels": {"*": layer.kernels}} if layer.kernels else {}),
            compile=False if arguments is None else arguments,
        )
        self.call = self.model
        self.weights = list(managed_weights(self.model).values())

    def _enter_phase(self, layer: Layer) -> None:
        fxresu.set_phase(
            self.model,
            layer.method,
            optimizer=self.optimizer,
            rule=layer.rule,
            moments=layer.moments,
            grad_dtype=gradient_dtype(layer.precision),
            theta_dtype=layer.theta or "fp32",
        )
        if layer.method == "resu" and layer.frozen_rest:
            self._freeze_biases()
        self.config = CycleConfig(rule=layer.rule)

    def _freeze_biases(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(False)

    def forward(self) -> tuple[Tensor, ...]:
        """y of every copy."""
        with autocast(self.layer.precision):
            outputs = self.call(*self.inputs)
        return outputs if self.layer.copies > 1 else (outputs,)

    def forward_backward(self) -> None:
        """Gradients for the fixed dY, from a clean start."""
        self.clear()
        torch.autograd.backward(self.forward(), self.gradients)

    def clear(self) -> None:
        """Free all gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None
        for x in self.inputs:
            x.grad = None
        clear_theta_gradients(self.weights)

    def full(self) -> None:
        """Forward, backward, and the update of what the method trains."""
        self.forward_backward()
        self.update()

    def update(self) -> None:
        """The update alone, from the gradients that are there."""
        if self.layer.method == "resu":
            record = state_of(self.model)
            record.theta_steps += 1
            rate = self.config.resolved_theta_lr(LEARNING_RATE)
            fxresu.step_theta(self.weights, self.config, rate, record.theta_steps)
            if not self.layer.frozen_rest:
                self.optimizer.step()
        else:
            self.optimizer.step()

    def captured(self) -> Call:
        """`full` in CUDA graphs."""
        for _ in range(3):
            self.full()
        anchors = [w.entry.anchor for w in self.weights if w.entry.anchor is not None]
        return capture_parts(self.forward_backward, self.update, lambda: held([*self.model.parameters(), *anchors]))

    def check_finite(self) -> None:
        """After replays: AssertionError if an effective weight is not finite, so that something else was timed."""
        for index in range(self.layer.copies):
            if not bool(self._effective(index).isfinite().all()):
                raise AssertionError(f"{self.layer}: a weight is not finite after the captured steps")

    def check(self) -> dict[str, float]:
        """Largest relative errors of y, the weight's gradient and dX against float64.

        Raises:
            AssertionError: above the precision's tolerance.
        """
        self.clear()
        outputs = self.forward()
        torch.autograd.backward(outputs, self.gradients)
        errors = [self._errors(i, y) for i, y in enumerate(outputs)]
        worst = {name: max(row[name] for row in errors) for name in errors[0]}
        self.clear()
        bound = TOLERANCE[self.layer.precision]
        wrong = {name: error for name, error in worst.items() if not error < bound}
        if wrong:
            raise AssertionError(f"{self.layer}: relative errors {wrong} against float64 exceed {bound}")
        return worst

    def _errors(self, index: int, output: Tensor) -> dict[str, float]:
        module, x, dy = self.linears[index], self.inputs[index].detach().double(), self.gradients[index].double()
        weight = self._effective(index)
        wanted = x @ weight.t() + module.bias.detach().double()
        errors = {"y": relative_error(output, wanted)}
        if self.layer.input_gradient:
            errors["dX"] = relative_error(self.inputs[index].grad, dy @ weight)
        del wanted, weight
        errors["dW"] = self._gradient_error(index, dy.t() @ x)
        return errors

    def _effective(self, index: int) -> Tensor:
        module = self.linears[index]
        if self.weights:
            return self.weights[index].entry.dense(self.weights[index].parameter).double()
        return (module.effective() if isinstance(module, NaiveLinear) else module.weight).detach().double()

    def _gradient_error(self, index: int, wanted: Tensor) -> float:
        module = self.linears[index]
        if isinstance(module, NaiveLinear):
            return relative_error(module.theta.grad, wanted[module.pruned])
        if not self.weights or self.layer.method == "dense":
            return relative_error(module._parameters["weight"].grad, wanted)
        entry = self.weights[index].entry
        if self.layer.method == "sparse":
            return relative_error(self.weights[index].parameter.grad, wanted.where(entry.mask(), 0))
        return relative_error(entry.grad_of_theta(), gathered(entry, wanted))
