"""The predicted memory bill of a run that is over, from its cycle."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from .losses import default_loss
from .memory_predict import predict_memory

if TYPE_CHECKING:
    from .cycle import ResuCycle

__all__ = ["predicted"]


def predicted(cycle: ResuCycle, inputs: Any, stages: tuple[str, ...]) -> dict[str, Any]:
    """`MemoryBill.to_dict` of these stages, for the cycle's model, optimizer, configuration and loss.

    Args:
        inputs: of one micro-batch, as for `predict_memory`.

    Raises:
        InspectionError: the model, or its loss, does not run on shapes.
    """
    config, kind = cycle.config, type(cycle.optimizer)
    accepted = inspect.signature(kind).parameters
    defaults = {k: v for k, v in cycle.optimizer.defaults.items() if k in accepted}

    def optimizer(parameters: Iterable[Tensor]) -> Optimizer:
        return kind(parameters, **defaults)  # type: ignore[call-arg]

    optimizer.__name__ = kind.__name__
    bill = predict_memory(
        cycle.model,
        inputs,
        phases=stages,
        optimizer=optimizer,
        loss=None if cycle.loss is default_loss else _of_batch(cycle.loss, inputs),
        autocast=config.autocast,
        accumulation=config.accumulation,
        rule=config.rule,
        moments=config.theta_moments,
        theta_dtype=config.theta_dtype,
        theta_in_backward=config.theta_in_backward,
        train_rest=config.train_rest,
        sparsity=max(config.sparsity(c) for c in range(config.cycles)),
        device=next(cycle.model.parameters()).device,
        optimizer_state=config.optimizer_state,
        _cache=False,  # which is one of stages between which the cache is emptied, as no run does
    )
    return bill.to_dict()


def _of_batch(loss: Any, inputs: Any) -> Any:
    """The loss as the rehearsal calls it, which always has a tuple or a mapping of arguments."""
    if isinstance(inputs, Tensor):
        return lambda model, batch: loss(model, batch[0])
    return loss
