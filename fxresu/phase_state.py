"""Which of an optimizer's state a phase needs, and where the rest goes: the plan's word to the manager."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.passes import PhasePlan

from .model_state import managed_weights, state_of
from .state_manager import AWAY, Move, find_manager, manager_of

__all__ = ["call_back", "restore_ahead", "send_untrained", "settle", "untrained"]


def untrained(model: nn.Module, plan: PhasePlan) -> list[Tensor]:
    """Parameters that a phase does not train: in RESU the managed weights and what is frozen, forward only all."""
    if plan.weights in ("dense", "sparse"):
        return []
    if plan.weights == "effective":
        return list(model.parameters())
    frozen = state_of(model).frozen
    return [*(m.parameter for m in managed_weights(model).values()), *frozen]


def send_untrained(model: nn.Module, optimizer: Optimizer | None, plan: PhasePlan) -> Move:
    """Prepare to send away what the phase does not train, as its plan says. RESU's "drop" is not done here."""
    drops = plan.optimizer_state == "drop" and plan.weights == "effective"
    if optimizer is None or not (drops or plan.optimizer_state in AWAY):
        return Move()
    return manager_of(optimizer).send(untrained(model, plan), plan.optimizer_state)


def settle(model: nn.Module, plan: PhasePlan, optimizer: Optimizer | None) -> Move:
    """Prepare all that a phase asks of the optimizer's state: what it trains at home, the rest where its plan says.

    Raises:
        torch.OutOfMemoryError, HostMemoryError: nothing has changed then.
    """
    manager = find_manager(optimizer)
    stays = {id(p) for p in untrained(model, plan)}
    move = Move() if manager is None else manager.fetch([p for p in model.parameters() if id(p) not in stays])
    try:
        away = send_untrained(model, optimizer, plan)
    except BaseException:
        move.rollback()
        raise
    return move.with_(away)


def call_back(model: nn.Module, optimizer: Optimizer | None, undo: Callable[..., object]) -> Move:
    """The whole model's state at home, for a change of masks; `commit` the move once nothing can fail any more."""
    manager = find_manager(optimizer)
    move = Move() if manager is None else manager.fetch(model.parameters())
    undo(move.rollback)
    return move


def restore_ahead(model: nn.Module, steps: int) -> None:
    """The present phase ends in `steps` steps: from now on state that is away comes back beside the computation, a part
    in each step, if the plan's `restore_lookahead` has begun. `ResuCycle` calls this itself.

    Args:
        steps: that are left, at least 1.
    """
    record = state_of(model)
    plan = record.state.plan
    if record.transfers is not None and plan.transfers and steps <= plan.restore_lookahead:
        record.transfers.arm(steps)
