"""Statistics for scores, gathered in one pass over calibration batches; no activation outlives its operation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxresu.passes import DEFAULT_PLANS, Phase
from fxresu.passes._compat import eager_only, no_attention_fast_path

from . import weight_storage
from .errors import ConfigError
from .input_recorder import InputRecorder, groups
from .losses import Loss, NonFiniteLossError, default_loss
from .model_state import Managed, managed_weights, state_of
from .options import Named
from .runner import runner_of
from .saliency import needs_of
from .weight_statistics import NEEDS, TENSORS, WeightStatistics

__all__ = ["Calibration", "calibrate"]


def refuse_streamed(model: nn.Module, needs: Iterable[str]) -> None:
    """ConfigError if statistics are needed of weights that wait in host memory: they are known by where they lie."""
    if tuple(needs) and any(m.entry.stream is not None for m in managed_weights(model).values()):
        raise ConfigError(
            "statistics of inputs or gradients need all weights on the device, and stream_blocks(weights=...) keeps"
            " some in host memory; score by 'magnitude' or 'random', or leave weights= out"
        )


class Calibration:
    """Statistics of all managed weights of a model.

    Attributes:
        needs: kinds of statistics, of `NEEDS`.
        weights: by FQN.
        batches: micro-batches observed.
    """

    def __init__(self, model: nn.Module, needs: Iterable[str], device: torch.device | str | None = None) -> None:
        self.model, self.needs = model, frozenset(needs)
        unknown = self.needs - set(NEEDS)
        if unknown:
            raise ConfigError(f"needs={sorted(unknown)[0]!r} is unknown; use {', '.join(NEEDS)}")
        refuse_streamed(model, self.needs)
        self.device = None if device is None else torch.device(device)
        self.weights = {name: WeightStatistics(groups(m)) for name, m in managed_weights(model).items()}
        self.batches = 0

    def observe(self, loss: Callable[[], Any]) -> None:
        """Run `loss()` once, in evaluation mode, uncompiled, and add what it shows of inputs and gradients.

        Its result is needed for gradients only.

        Leaves weights, gradients, buffers and random states as they were. Gradients are those of the dense effective
        weights; packed ones are unpacked for the time, offloaded ones come back for it.

        Raises:
            NonFiniteLossError: nothing has been added to gradients then.
            ConfigError: gradients are needed, and there is no scalar loss.
        """
        weights = managed_weights(self.model)
        gradients = bool(self.needs & {"gradients", "squares"})
        with _measuring(self.model, gradients), torch.set_grad_enabled(gradients):
            with contextlib.ExitStack() as stack:
                if "inputs" in self.needs:
                    stack.enter_context(InputRecorder(weights, self.weights))
                value = loss()
            if gradients:
                self._backward(weights, value)
        self.batches += 1
        for statistics in self.weights.values():
            statistics.batches = self.batches

    def _backward(self, weights: Mapping[str, Managed], loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ConfigError(
                "statistics of gradients need a scalar loss, which the model's output does not hold; give"
                " calibration=batches and loss=lambda model, batch: ..."
            )
        if not bool(torch.isfinite(loss.detach())):
            raise NonFiniteLossError(f"loss={float(loss.detach())} on a calibration batch; look at the batch")
        with contextlib.ExitStack() as stack:
            for name, managed in weights.items():
                if managed.parameter.requires_grad:
                    hook = managed.parameter.register_post_accumulate_grad_hook(self._consumer(name, managed))
                    stack.callback(hook.remove)
            loss.backward()

    def _consumer(self, name: str, managed: Managed) -> Callable[[Tensor], None]:
        """Takes the gradient in as soon as it is there, so that one weight's is alive at a time."""

        def consume(parameter: Tensor) -> None:
            if parameter.grad is not None:
                gradient = managed.entry.matrix(parameter.grad.contiguous())
                self.weights[name].add_gradient(gradient, self.needs, self.device)
                parameter.grad = None

        return consume

    # State

    def tensors(self) -> dict[str, Tensor]:
        """All sums, by "FQN.attribute"."""
        return {f"{n}.{k}": t for n, s in self.weights.items() for k, t in s.tensors().items()}

    def plain(self) -> dict[str, Any]:
        """Everything that is no tensor."""
        return {
            "needs": sorted(self.needs),
            "batches": self.batches,
            "weights": {n: s.plain() for n, s in self.weights.items()},
        }

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Put `tensors()` and `plain()` back."""
        weights = managed_weights(self.model)
        self.batches = plain["batches"]
        for name, statistics in self.weights.items():
            for key, value in plain["weights"][name].items():
                setattr(statistics, key, value)
            for key in TENSORS:
                value = tensors.get(f"{name}.{key}")
                device = weights[name].parameter.device
                if key.startswith("gradient") and self.device is not None:
                    device = self.device
                setattr(statistics, key, None if value is None else value.to(device).clone())


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    score: Named | Iterable[Named] = "wanda",
    loss: Loss = default_loss,
    device: torch.device | str | None = None,
) -> Calibration:
    """Gather what `score` (or several) needs, in one pass over `batches`; for `prune` and `commit`.

    Args:
        batches: what `loss(model, batch)` takes.
        device: where statistics of the weights' size (gradients) are kept; default is with the weights.

    Raises:
        ConfigError: no batch, or an unknown score.
    """
    scores = [score] if isinstance(score, str) or callable(score) else list(score)
    calibration = Calibration(model, frozenset().union(*(needs_of(s) for s in scores)), device)
    for batch in batches:
        calibration.observe(functools.partial(loss, model, batch))
    if not calibration.batches:
        raise ConfigError("batches is empty: statistics need at least 1 calibration batch")
    return calibration


@contextlib.contextmanager
def _measuring(model: nn.Module, gradients: bool) -> Iterator[None]:
    """The model as plain dense eager code in evaluation mode, everything of it put back afterwards."""
    record, weights = state_of(model), managed_weights(model)
    training = [(module, module.training) for module in model.modules()]
    kept = [(p, p.grad) for p in model.parameters()]
    away = [m for m in weights.values() if m.entry.host is not None or (gradients and m.entry.packed)]
    plan, options = record.state.plan, record.compile_options
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(eager_only())
        stack.enter_context(no_attention_fast_path())
        stack.callback(_put_back, record, plan, options, training, kept)
        runner = runner_of(model)
        stack.callback(runner.__dict__.update, on_input=runner.on_input, on_output=runner.on_output)
        runner.on_input = runner.on_output = None
        for managed in away:
            storage = weight_storage.storage_of(managed.entry)
            weight_storage.unpack_into(managed.entry, managed.parameter)
            stack.callback(weight_storage.send_away, managed.entry, managed.parameter, storage)
        for managed in weights.values():
            managed.entry.remove_hook()
        for parameter, _ in kept:
            parameter.grad = None
        record.compile_options = None
        record.state.set(DEFAULT_PLANS[Phase.DENSE])
        model.eval()
        yield


def _put_back(record: Any, plan: Any, options: Any, training: list, kept: list) -> None:
    record.compile_options = options
    record.state.set(plan)
    for module, flag in training:
        module.training = flag
    for parameter, gradient in kept:
        parameter.grad = gradient
