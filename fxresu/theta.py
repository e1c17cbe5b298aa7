"""θ's update over all managed weights, after the backward or inside it; also as an optimizer that schedulers and
scalers know."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxresu.kernels import Rule, ThetaOperands, theta_steps_
from fxresu.passes._compat import version_of
from fxresu.passes.notices import MissingGradientWarning, PartialStepWarning, listed, warn

from . import weight_storage
from .config import CycleConfig
from .errors import CheckpointError, ConfigError, PhaseError
from .managed import ManagedWeight
from .model_state import Managed, managed_weights, other_parameters, state_of
from .streamed import StreamedAdamW

_UNTRACKED = (
    "their forward ran with gradients off: torch.no_grad, or reentrant checkpointing, which gives no gradient to a"
    " region whose inputs need none, such as frozen embeddings: use_reentrant=False, or train_rest=True"
)
_UNREACHED = (
    "no backward reached them: the forward left them out, as experts that no token chose, or the loss does not depend"
    " on them; or not the transformed model itself was run, in RESU and with gradients enabled"
)


def theta_gradients(weights: Iterable[Managed]) -> list[Tensor]:
    """dθ of every weight that has one, as accumulated so far."""
    return [g for m in weights if (g := m.entry.grad_of_theta()) is not None]


def clear_theta_gradients(weights: Iterable[Managed]) -> None:
    """Free dθ."""
    for managed in weights:
        if managed.entry.anchor is not None:
            managed.entry.anchor.grad = None


@functools.lru_cache(maxsize=4096)
def rounding_key(fqn: str, seed: int, phase: int) -> int:
    """The key of the stochastic rounding of a weight's θ in the `phase`-th RESU of a run; below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{phase}/{fqn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _operands(managed: Managed, grad: Tensor, key: int) -> ThetaOperands:
    entry = managed.entry
    return ThetaOperands(
        grad,
        *entry.theta_layout,
        weight=None if entry.packed else entry.matrix(managed.parameter),
        low=None if entry.low is None else entry.matrix(entry.low),
        theta=None if entry.theta is None else entry.theta.detach(),
        m=entry.m,
        v=entry.v,
        m_scale=entry.m_scale,
        v_scale=entry.v_scale,
        key=key,
    )


def _at_hand(stepped: Sequence[tuple[Managed, Tensor]], seed: int, phase: int) -> Iterator[list[ThetaOperands]]:
    """Operands of what can be updated together: weights that wait in host memory come one after another."""
    together: list[ThetaOperands] = []
    for managed, grad in stepped:
        key = rounding_key(managed.entry.fqn, seed, phase)
        waits = not managed.entry.packed and managed.entry.stream is not None
        if waits:
            if together:
                yield together
                together = []
            managed.entry.bring(managed.parameter)
            yield [_operands(managed, grad, key)]
        else:
            together.append(_operands(managed, grad, key))
    if together:
        yield together


@torch.no_grad()
def step_theta(
    weights: Iterable[Managed],
    config: CycleConfig,
    lr: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    *,
    phase: int = 0,
) -> Tensor:
    """Update θ by the configured rule and write Φ(θ) into the weights; frees dθ.

    Args:
        step: 1 for the first update since θ was initialised.
        grad_scale: multiplies dθ (clipping, unscaling); a float32 tensor of one element on the device is not waited
            for.
        phase: number of this RESU in the run; with the configuration's seed and the step it decides the rounding of a θ
            in bfloat16.

    Returns:
        The kernels' statistics, float32 [weights with a gradient, 4], still on the device.

    Raises:
        PhaseError: if no weight has a gradient: the model was run in another phase, or not at all.
    """
    stepped = [(m, grad) for m in weights if (grad := m.entry.grad_of_theta()) is not None]
    if not stepped:
        raise PhaseError(
            "no managed weight has a gradient of θ: run forward and backward of the transformed model itself in RESU,"
            " with gradients enabled, before the step"
        )
    beta1, beta2 = config.resolved_theta_betas()
    rule = Rule(
        config.rule, lr, beta1, beta2, config.theta_eps, config.theta_weight_decay, step, config.consistency,
        config.select, config.top,
    )  # fmt: skip
    scale = grad_scale if isinstance(grad_scale, Tensor) else None
    factor = 1.0 if scale is not None else float(grad_scale)
    # A copy that is not the weight's own stays known as such: the step writes θ's slots, and not the others.
    copied = {id(m.entry) for m, _ in stepped if weight_storage.copied(m.entry, m.parameter)}
    parts = [theta_steps_(part, rule, factor, scale) for part in _at_hand(stepped, config.seed, phase)]
    for managed, _ in stepped:
        assert managed.entry.anchor is not None
        managed.entry.anchor.grad = None
        if id(managed.entry) in copied:
            managed.entry.low_version = version_of(managed.parameter)  # the step has written both
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class ThetaOptimizer(Optimizer):
    """θ of all managed weights as a `torch.optim.Optimizer`, for learning-rate schedulers, `GradScaler`, and loops of
    one's own. Its parameters are the leaves that receive dθ in the present RESU phase; none outside of it.

    `step()` is `step_theta` at the rate `param_groups[0]["lr"]`; θ's moments live with the weights, not in `state`.

    With `config.theta_in_backward` a weight's θ is updated, and its gradient freed, as soon as a backward has added all
    that it has to it; `step()` then ends the step: it updates what still has a gradient, and counts. Results are those
    of the ordinary order, bit for bit (up to rounding where that order makes dθ of few tokens straight: `few_linear`).
    A gradient that is accumulated over several backward passes has to be announced: run all but the last of a step
    inside `with theta_optimizer.accumulate():`. The rate is that of the time of the backward. What needs all gradients
    of θ before the update (clipping them, a loss scale) cannot be had. A backward that fails leaves the θ that it has
    updated as it is; `zero_grad()` gives such a step up and says what was done.

    Args:
        model: transformed.
        config: rule, moments and learning rate of θ.
        follow: with a rate that follows the managed weights' (`CycleConfig.follows_optimizer`), the optimizer that has
            them; `lr` then shows that rate as of the last step. What a `StreamedAdamW` accumulates or only measures,
            θ does too.

    Attributes:
        last_stats: of the last step, see `step_theta`.
        abandoned: steps that were given up after they had updated some weights' θ.
        more_follows: says during a backward whether another one of the same step follows it, where a loop knows that
            by itself; None where only `accumulate` does.

    Raises:
        ConfigError: the rate follows an optimizer, and none is given.
    """

    def __init__(self, model: nn.Module, config: CycleConfig | None = None, *, follow: Optimizer | None = None) -> None:
        state_of(model)
        self.model, self.config, self.follow = model, config or CycleConfig(), follow
        self._groups: list[dict[str, Any]] = []
        self.factor = 1.0  # of the phase's own schedule
        self.last_stats: Tensor | None = None
        self._looked = False
        self._told: set[str] = set()
        self.abandoned = 0
        self.more_follows: Callable[[], bool] | None = None
        self._accumulating = False
        self._weights: dict[str, Managed] = {}  # of the step whose backward is under way
        self._updated: dict[str, Tensor] = {}  # statistics of what this step has updated already
        if self.config.follows_optimizer and follow is None:
            raise ConfigError("theta_lr=None follows an optimizer with rule='adam'; give theta_lr, or follow=optimizer")
        lr = self._followed_lr() if self.config.follows_optimizer else self.config.resolved_theta_lr(0.0)
        super().__init__([torch.zeros(0, requires_grad=True)], {"lr": lr})
        self.unfollow()  # an earlier optimizer gives way
        self._follow_gradients()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """One group, whose parameters are those of the present phase."""
        if self._groups:
            self._groups[0]["params"] = self._anchors()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def _anchors(self) -> list[Tensor]:
        anchors = (m.entry.anchor for m in managed_weights(self.model).values())
        return [a for a in anchors if a is not None and a.requires_grad]

    def _followed_lr(self) -> float:
        """Learning rate of the group that holds the managed weights, as a scheduler left it."""
        managed = {id(m.parameter) for m in managed_weights(self.model).values()}
        assert self.follow is not None
        for group in self.follow.param_groups:
            if any(id(p) in managed for p in group["params"]):
                return float(group["lr"])
        kind = type(self.follow).__name__
        raise ConfigError(f"theta_lr=None follows optimizer={kind}, which holds no managed weight; give theta_lr")

    # Inside the backward

    def _follow_gradients(self) -> None:
        """Hear of every gradient of θ that is complete. Again after each step: tied weights may have been untied."""
        if not self.config.theta_in_backward:
            return
        me = weakref.ref(self)

        def arrived(entry: ManagedWeight) -> None:
            if (live := me()) is not None:
                live._arrived(entry)

        for managed in managed_weights(self.model).values():
            managed.entry.follow_theta(arrived)

    def unfollow(self) -> None:
        """No backward updates θ any more, until the next `step()`."""
        for managed in managed_weights(self.model).values():
            managed.entry.follow_theta(None)

    @contextlib.contextmanager
    def accumulate(self, more: bool = True) -> Iterator[None]:
        """Backward passes inside add their gradients up and update nothing: all of a step but the last one.

        Args:
            more: False does nothing.
        """
        before, self._accumulating = self._accumulating, self._accumulating or more
        try:
            yield
        finally:
            self._accumulating = before

    @property
    def updated(self) -> tuple[str, ...]:
        """FQNs of the weights whose θ the step that is under way has updated in its backward."""
        return tuple(self._updated)

    @property
    def _waits(self) -> bool:
        """Whether another backward of the same step follows."""
        if self._accumulating or (self.more_follows is not None and self.more_follows()):
            return True
        return isinstance(self.follow, StreamedAdamW) and self.follow.gathers

    @torch.no_grad()
    def _arrived(self, entry: ManagedWeight) -> None:
        """A backward has added all that it has to a weight's dθ."""
        if entry.fqn in self._updated:
            raise PhaseError(
                f"θ of {entry.fqn} got a second gradient after this step had updated it (theta_in_backward=True): end"
                " each step with step(), run all but the last backward of one inside accumulate(), and use"
                " checkpoint(..., use_reentrant=False) for weights that are used more than once"
            )
        if self._waits:
            return
        if not self._updated:
            self._weights = managed_weights(self.model)
        self._updated[entry.fqn] = self._stepped([self._weights[entry.fqn]])

    def _stepped(self, weights: Iterable[Managed], grad_scale: float | Tensor = 1.0) -> Tensor:
        """Update these at the present rate, as part of the step that is under way."""
        record, group = state_of(self.model), self._groups[0]
        if self.config.follows_optimizer:
            if "initial_lr" in group:
                raise ConfigError(
                    "theta_lr=None makes θ follow the optimizer's learning rate, and a scheduler has been put on θ's"
                    " own; give theta_lr, or take the scheduler off"
                )
            group["lr"] = self._followed_lr()
        rate, step = float(group["lr"]) * self.factor, record.theta_steps + 1
        return step_theta(weights, self.config, rate, step, grad_scale, phase=record.rotation)

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: float | Tensor = 1.0) -> float | None:  # type: ignore[override]
        """Update θ once and write it into the weights; frees dθ. What the backward has updated is counted only.

        Args:
            grad_scale: multiplies dθ (clipping).

        Raises:
            PhaseError: no weight has a gradient of θ.
            ConfigError: a scheduler was given a rate that follows another optimizer's; a scale comes too late for what
                the backward has updated. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        record, weights = state_of(self.model), managed_weights(self.model)
        if self._updated and (isinstance(grad_scale, Tensor) or grad_scale != 1.0):
            raise ConfigError(
                f"grad_scale={grad_scale!r}: the backward has updated θ of {len(self._updated)} weights without it"
                " (theta_in_backward=True); leave one of the two out"
            )
        self._tell_missing(weights, record.state.untracked)
        waiting = {n: m for n, m in weights.items() if m.entry.grad_of_theta() is not None}
        if waiting or not self._updated:
            late = self._stepped(waiting.values(), grad_scale)
            self._updated |= zip(waiting, late.split(1))
        self.last_stats = torch.cat([self._updated[n] for n in weights if n in self._updated])
        self._updated, self._weights = {}, {}
        record.theta_steps += 1
        self._follow_gradients()
        return loss

    def _tell_missing(self, weights: Mapping[str, Managed], untracked: set[str]) -> None:
        """Say once which weights got no gradient in a phase's first step: their θ stays as it is."""
        if self._looked:
            return
        self._looked = True
        missing = {
            n
            for n, m in weights.items()
            if m.entry.anchor is not None and m.entry.grad_of_theta() is None and n not in self._updated
        }
        causes = {_UNTRACKED: missing & untracked, _UNREACHED: missing - untracked}
        told = "; ".join(f"{listed(names)} ({cause})" for cause, names in causes.items() if names)
        if not missing or told in self._told:
            return
        if len(missing) == len(weights):
            raise PhaseError(f"no managed weight has a gradient of θ: {told}")
        self._told.add(told)
        of = f"{len(missing)} of {len(weights)} managed weights"
        warn(MissingGradientWarning, f"θ of {of} got no gradient and is not updated: {told}")

    def begin_phase(self) -> None:
        """A RESU phase starts."""
        self._looked, self.factor = False, 1.0
        self._updated, self._weights = {}, {}
        self._follow_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free dθ. A step that is under way is given up, with a warning if its backward has updated θ already."""
        clear_theta_gradients(managed_weights(self.model).values())
        if names := self.abandon():
            warn(
                PartialStepWarning,
                f"a step was given up after its backward had updated θ of {len(names)} weights ({listed(names)}), which"
                " stays so (theta_in_backward=True)",
            )

    def abandon(self) -> tuple[str, ...]:
        """Give up a step that is under way; FQNs of the weights whose θ it has updated, and which keep that."""
        names = self.updated
        self.abandoned += bool(names)
        self._updated, self._weights = {}, {}
        return names

    def state_dict(self) -> dict[str, Any]:
        """The group's options; θ and its moments are in the cycle's state.

        Raises:
            CheckpointError: a backward has updated a part of the weights, and `step()` has not ended the step.
        """
        if self._updated:
            raise CheckpointError(
                f"a step has updated θ of {len(self._updated)} weights and is not complete; call step() first"
            )
        options = {k: v for k, v in self._groups[0].items() if k != "params"}
        return {"state": {}, "param_groups": [{**options, "params": []}]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put the group's options back."""
        self._groups[0].update({k: v for k, v in state_dict["param_groups"][0].items() if k != "params"})


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients of a transformed model, θ's included, so that their common 2-norm is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_(model.parameters(), ...)` does not see θ. Returns the norm before.

    Raises:
        ConfigError: the backward has used θ's gradients already (`theta_in_backward`). Nothing has changed then.
    """
    weights = managed_weights(model).values()
    used = any(m.entry.consume is not None and m.entry.anchor is not None for m in weights)
    if used and not theta_gradients(weights):
        raise ConfigError(
            f"clip_grad_norm_(max_norm={max_norm!r}) with theta_in_backward=True, which has used θ's gradients by now;"
            " leave that out, or clip the other parameters alone with torch.nn.utils.clip_grad_norm_"
        )
    grads = [p.grad for p in model.parameters() if p.grad is not None] + theta_gradients(weights)
    norm = nn.utils.get_total_norm(grads) if grads else torch.zeros(())
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    return norm


def rest_gradients(model: nn.Module) -> list[Tensor]:
    """Gradients of the parameters that are not managed."""
    return [p.grad for _, p in other_parameters(model) if p.grad is not None]
