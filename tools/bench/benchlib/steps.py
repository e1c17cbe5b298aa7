"""Full training steps of a model: dense, naive masked_scatter RESU, and every form that fxresu has."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig
from fxresu.model_state import managed_weights, state_of
from fxresu.passes import DEFAULT_PLANS, ActivationRecord, Phase, PhasePlan
from fxresu.runner import runner_of
from fxresu.theta import clear_theta_gradients

from .errors import distance, gathered
from .layers import LEARNING_RATE, NaiveLinear, autocast, compile_arguments, gradient_dtype, held, storage_arguments
from .models import Size, WithLoss, build, tokens
from .timing import Call, capture_parts, device_type

# Against float64, by Frobenius norm: bf16 rounds every activation of a deep model.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 0.1


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train a model.

    Attributes:
        method: "dense" and "naive" without fxresu; "fxdense", "sparse", "resu" with it.
        precision: "AMP" (fp32 weights and moments, bf16 autocast) or "bf16" (weights, gradients and moments).
        mode: "compiled", "graphs" (reduce-overhead) or "eager".
        alpha: share of the input columns that θ covers.
        rest: what is not managed (biases, norms, embeddings) is "frozen" in RESU, as published, or "trained".
        rule, moments, storage: of RESU.
        activations: policy of the phase as "recompute", "offload" or "needed", with "@0.5" behind it for a budget; ""
            is the phase's own.
        theta: "bf16" if θ is in it, rounded stochastically as bfloat16 weights' own updates are; "" is float32.
        loss: "tiled" if logits are never whole (`fxresu.linear_cross_entropy`); "" for transformers' way.
    """

    method: str
    precision: str = "AMP"
    mode: str = "compiled"
    alpha: float = 1.0
    rest: str = "frozen"
    rule: str = "adam"
    moments: str = ""
    storage: str = "resident"
    activations: str = ""
    theta: str = ""
    loss: str = ""

    @property
    def name(self) -> str:
        """For example "resu/AMP/compiled/a=0.25/trained/8bit"."""
        parts = [self.method, self.precision, self.mode]
        if self.method == "resu":
            parts += [f"a={self.alpha:g}", self.rest]
            parts += [value for value, usual in self._unusual() if value != usual]
        parts += [value for value in (self.theta and f"θ {self.theta}", self.activations, self.loss) if value]
        return "/".join(parts)

    def _unusual(self) -> list[tuple[str, str]]:
        usual = "bf16" if self.precision == "bf16" else "fp32"
        return [(self.stored_moments, usual), (self.rule, "adam"), (self.storage, "resident")]

    @property
    def stored_moments(self) -> str:
        """Storage of θ's moments: as given, else that of dense training in this precision."""
        return self.moments or ("bf16" if self.precision == "bf16" else "fp32")


def _plans(variant: Variant) -> dict[str, PhasePlan]:
    """The plan of the variant's phase with its policy for activations."""
    if not variant.activations:
        return {}
    phase = Phase.DENSE if variant.method == "fxdense" else Phase(variant.method)
    name, _, budget = variant.activations.partition("@")
    change = {"activations": name, "activation_budget": float(budget) if budget else None}
    return {str(phase): dataclasses.replace(DEFAULT_PLANS[phase], **change)}


class ModelStep:
    """A model with its optimizer and batch; `step()` is one full training step.

    Attributes:
        model: the module that maps tokens to a loss.
        batch: fixed random tokens.
    """

    def __init__(self, variant: Variant, size: Size, batch: int, sparsity: float, compiler: str) -> None:
        self.variant, self.size = variant, size
        dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
        self.model: WithLoss = build(size, dtype)
        self.model.tiled = variant.loss == "tiled"
        self.batch = tokens(size, batch)
        arguments = compile_arguments(variant.mode, compiler)
        self.weights: dict[str, Any] = {}
        if variant.method == "naive":
            _make_naive(self.model, sparsity)
        if variant.method in ("dense", "naive"):
            self.call = self.model if arguments is None else torch.compile(self.model, **arguments)
            self.optimizer = self._optimizer()
        else:
            self._transform(arguments, sparsity)

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = {"fused": True, "capturable": True} if device_type() == "cuda" else {}
        return torch.optim.AdamW(trained, lr=LEARNING_RATE, **fused)

    def _transform(self, arguments: dict[str, Any] | None, sparsity: float) -> None:
        variant = self.variant
        fxresu.transform(
            self.model,
            sparsity=sparsity,
            candidates=variant.alpha,
            **storage_arguments(variant.storage),
            plans=_plans(variant),
            compile=False if arguments is None else arguments,
        )
        self.call = self.model
        self.optimizer = self._optimizer()
        self.weights = managed_weights(self.model)
        if variant.method == "sparse":
            fxresu.set_phase(self.model, "sparse", optimizer=self.optimizer)
        if variant.method == "resu":
            fxresu.set_phase(
                self.model,
                "resu",
                optimizer=self.optimizer,
                rule=variant.rule,
                moments=variant.stored_moments,
                grad_dtype=gradient_dtype(variant.precision),
                theta_dtype=variant.theta or "fp32",
            )
            self.config = CycleConfig(rule=variant.rule)
            if variant.rest == "frozen":
                kept = {id(m.parameter) for m in self.weights.values()}
                for parameter in self.model.parameters():
                    parameter.requires_grad_(id(parameter) in kept)

    def loss(self, batch: Tensor) -> Tensor:
        """The loss of one forward."""
        if self.variant.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.variant.precision):
            return self.call(batch)

    def step(self) -> Tensor:
        """Forward, backward and the update of whatever the variant trains; returns the loss."""
        loss = self.forward_backward()
        self.update()
        self.clear()
        return loss

    def decisions(self) -> list[ActivationRecord]:
        """What the policy for activations decided, one record a graph; empty without one."""
        entries = runner_of(self.model).entries.values() if self.weights else ()
        return [record for entry in entries for graph in entry.graphs for record in graph.activations]

    def captured(self) -> Call:
        """`step` in CUDA graphs; it has to have run before."""
        anchors = [w.entry.anchor for w in self.weights.values() if w.entry.anchor is not None]
        return capture_parts(self.forward_backward, self.update, lambda: held([*self.model.parameters(), *anchors]))

    def clear(self) -> None:
        """Free all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        clear_theta_gradients(self.weights.values())

    def forward_backward(self) -> Tensor:
        """Gradients of the batch from a clean start; returns the loss."""
        self.clear()
        loss = self.loss(self.batch)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """The update alone, from the gradients that are there."""
        if self.variant.method == "resu":
            record = state_of(self.model)
            record.theta_steps += 1
            rate = self.config.resolved_theta_lr(LEARNING_RATE)
            fxresu.step_theta(self.weights.values(), self.config, rate, record.theta_steps)
        if self.variant.method != "resu" or self.variant.rest == "trained":
            self.optimizer.step()

    def check(self) -> dict[str, float]:
        """Errors of the loss and of three weights' gradients against an eager float64 model with the same weights.

        The batch of the check repeats one sequence: it has the mean loss and gradients of that sequence alone, which
        is all that the reference computes.

        Raises:
            AssertionError: above the tolerance.
        """
        one = self.batch[:1]
        loss = self.loss(one.expand_as(self.batch).contiguous())
        loss.backward()
        value = float(loss.detach())
        names = _three([n for n, _ in _matrices(self.model)])
        with torch.enable_grad():
            reference = self._reference()
            wanted = reference(one)
            wanted.backward()
        target = float(wanted.detach())
        true = {n: p.grad for n, p in reference.named_parameters() if n in names}
        errors = {"loss": abs(value - target) / abs(target)}
        errors["gradient"] = max(self._gradient_error(n, true[n]) for n in names)
        self.clear()
        if not (errors["loss"] < LOSS_TOLERANCE and errors["gradient"] < GRADIENT_TOLERANCE):
            raise AssertionError(f"errors {errors} against float64 exceed {LOSS_TOLERANCE} and {GRADIENT_TOLERANCE}")
        return errors

    def _reference(self) -> WithLoss:
        """A plain float64 model with this one's effective weights."""
        plain = build(self.size, torch.float64)
        values = dict(self.model.state_dict())
        for name, module in self.model.named_modules():
            if isinstance(module, NaiveLinear):
                del values[f"{name}.pruned"], values[f"{name}.theta"]
                values[f"{name}.weight"] = module.effective().detach()
        plain.load_state_dict(values)
        if hasattr(plain.model, "gradient_checkpointing_enable"):  # attention in float64 keeps all of its scores
            plain.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return plain

    def _gradient_error(self, name: str, wanted: Tensor) -> float:
        if name in self.weights:
            entry, parameter = self.weights[name].entry, self.weights[name].parameter
            if self.variant.method == "resu":
                return distance(entry.grad_of_theta(), gathered(entry, wanted))
            if self.variant.method == "sparse":
                wanted = wanted.where(entry.mask().view(entry.shape), 0)
            return distance(parameter.grad, wanted)
        module = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, NaiveLinear):
            return distance(module.theta.grad, wanted[module.pruned])
        return distance(self.model.get_parameter(name).grad, wanted)


def _three(names: list[str]) -> list[str]:
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def _matrices(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name of the weight, module) of all linears that fxresu manages by default, transformed or not."""
    found = []
    for name, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, NaiveLinear)) or type(module).__name__ == "Conv1D"
        if linear and not name.endswith(("lm_head", "model.head")):
            found.append((f"{name}.weight", module))
    return found


def _make_naive(model: nn.Module, sparsity: float) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in _matrices(model):
        model.set_submodule(name.rpartition(".")[0], NaiveLinear(module, sparsity))
