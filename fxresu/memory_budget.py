"""Settings under which every phase and transition fits a budget, the cheapest first, or the smallest budget that would
do. What may be chosen, and in which order, is in `memory_choices`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxresu.passes import Phase, PhasePlan

from . import memory_choices as choices
from .errors import ConfigError, FxresuError
from .example_inputs import as_inputs
from .memory_bill import MemoryBill
from .memory_choices import TRAINING, Choice
from .memory_predict import predict_memory, target_device
from .models import ExampleInputs
from .sizes import parse_size, size_text

# Stages of RESU and what follows it, in the order in which it is cheap to see that one does not fit.
_WITH_RESU = ("start RESU", "commit", "drop masks")
_FORWARD = (Phase.PREDICT, Phase.CORRECT)


class BudgetError(ConfigError):
    """No setting fits the budget.

    Attributes:
        smallest: bytes of the smallest budget that would do.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What was chosen for a budget.

    Attributes:
        budget: bytes.
        storage: for `transform`.
        plans: of every phase, for `transform`: activations, precision and optimizer state among them.
        theta_moments, accumulation, optimizer_state, restore_lookahead: for `CycleConfig`; each micro-batch is
            1/accumulation of the batch that was given.
        costs: what each choice costs, in words; price: their sum, by which the search is ordered (`memory_choices`).
        bill: the prediction under these settings.
        tried: how many predictions of a stage were made.
    """

    budget: int
    storage: str
    theta_moments: str
    accumulation: int
    plans: Mapping[Phase, PhasePlan]
    costs: tuple[str, ...]
    price: int
    bill: MemoryBill
    tried: int

    @property
    def optimizer_state(self) -> str:
        """What becomes of the managed weights' in RESU."""
        return self.plans[Phase.RESU].optimizer_state

    @property
    def restore_lookahead(self) -> int:
        """Steps before RESU's end in which it comes back."""
        return self.plans[Phase.RESU].restore_lookahead

    @property
    def settings(self) -> str:
        """All of them in a line."""
        policies = (_policy(self.plans[phase]) for phase in TRAINING)
        return ", ".join(
            [
                f"storage={self.storage!r}, theta_moments={self.theta_moments!r}, accumulation={self.accumulation}",
                f"optimizer_state={self.optimizer_state!r}",
                *filter(None, policies),
            ]
        )

    def __str__(self) -> str:
        return (
            f"budget {size_text(self.budget)}: {self.settings}; highest {size_text(self.bill.peak)} in"
            f" {self.bill.peak_stage}" + (f"; costs: {'; '.join(self.costs)}" if self.costs else "")
        )


def _policy(plan: PhasePlan) -> str:
    told = [plan.activations] if plan.manages_activations else []
    told += [str(plan.activation_budget)] if plan.activation_budget is not None else []
    told += [plan.precision] if plan.precision != "inherit" else []
    return f"{plan.phase}: {' '.join(told)}" if told else ""


def plan_memory(
    model: nn.Module,
    budget: int | str,
    inputs: Any = None,
    *,
    storage: str | None = None,
    plans: Mapping[Phase | str, PhasePlan] | None = None,
    policies: bool = True,
    **options: Any,
) -> MemoryPlan:
    """The cheapest settings that fit: storage of the weights in RESU, storage of θ's moments, the optimizer's state in
    RESU and in forward-only phases, activations and precision of each phase that trains, and micro-batches.

    Args:
        model: plain; it stays as it is.
        budget: bytes, or a size such as "14GB", that no phase and no transition may exceed.
        inputs: of one whole step, as for `predict_memory`; micro-batches divide its first dimension.
        storage: keeps to this one.
        plans: as for `transform`; what they say of activations and precision stays, their state is the first choice.
        policies: False leaves activations and precision as they are.
        options: the other arguments of `predict_memory` and of `transform`.

    Raises:
        BudgetError: none fits; it names the smallest budget that would do, and what beyond these settings would help.
        ConfigError: a bad argument.
    """
    limit = parse_size(budget, "memory_budget")
    search = _Search(model, as_inputs(model, inputs), limit, storage, plans, policies, options)
    found = search.cheapest()
    if found is not None:
        return search.plan(found[1])
    smallest, best = search.smallest()
    over = search.plan(best)
    raise BudgetError(
        f"memory_budget={budget!r}: nothing fits; the smallest budget that would do is {size_text(smallest)}"
        f" ({smallest:,} bytes, in {over.bill.peak_stage}), with {over.settings}. {search.advice(over, smallest)}",
        smallest,
    )


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One choice for everything."""

    parts: Choice
    storage: Choice
    moments: Choice
    state: Choice
    policies: Mapping[Phase, Choice]
    forward: Mapping[Phase, Choice]

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All of them."""
        own = (self.moments, self.parts, self.state, self.storage)
        return *own, *self.policies.values(), *self.forward.values()


class _Search:
    """Looks for settings stage by stage: each depends on few of them, and phases that train choose for themselves."""

    def __init__(
        self,
        model: nn.Module,
        call: ExampleInputs,
        limit: int,
        storage: str | None,
        plans: Mapping[Phase | str, PhasePlan] | None,
        with_policies: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.call, self.limit, self.options = model, call, limit, dict(options)
        self.options.pop("phases", None)
        self.given = choices.plans_of(plans)
        self.device = target_device(model, options.get("device"))
        autocast = options.get("autocast")
        self.storages = choices.storages(autocast) if storage is None else (Choice(storage),)
        self.parts = choices.parts(min((t.shape[0] for t in _batched(call)), default=1))
        self.moments = choices.moments()
        compiled = with_policies and options.get("compile") is not False
        low = all(p.element_size() < 4 for p in model.parameters() if p.is_floating_point())
        # Without a GPU steps for one are rehearsed as on a CPU, where what waits on the host would count.
        where = "cpu" if self.device != "cpu" and not torch.cuda.is_available() else self.device
        self.policies = {
            phase: choices.policies(self.given[phase], compiled=compiled, device=where, autocast=autocast, low=low)
            for phase in TRAINING
        }
        self.state = choices.state(self.given[Phase.RESU], self.device)
        self.forward = {phase: choices.state(self.given[phase], self.device) for phase in _FORWARD}
        self._known: dict[Any, Any] = {}
        self._totals: dict[Any, float] = {}

    # Predicting

    def total(self, stage: str, setting: _Setting) -> float:
        """Bytes of a stage; infinite where a policy cannot be kept to."""
        plans = self.plans(setting)
        resu = stage not in ("dense", "prune", "sparse")
        key = (
            stage, setting.parts.value, *((setting.storage.value, setting.moments.value, plans[Phase.RESU]) if resu else
            ()), plans.get(stage),
        )  # fmt: skip
        if key not in self._totals:
            self._totals[key] = self._predicted(stage, setting, plans)
        return self._totals[key]

    def _predicted(self, stage: str, setting: _Setting, plans: Mapping[Phase, PhasePlan]) -> float:
        try:
            return self._bill(setting, plans, stage).peak
        except FxresuError:
            policy = setting.policies.get(stage)  # type: ignore[call-overload]
            if policy is None or policy.price == 0:
                raise
            return math.inf

    def _bill(self, setting: _Setting, plans: Mapping[Phase, PhasePlan], stage: str | None = None) -> MemoryBill:
        # The allocator frees its cache before it fails, so that even a hard limit needs no room for it.
        # Gaps within pages that are in use would stay; how many there are under a limit is not predicted.
        return predict_memory(
            self.model, _part(self.call, setting.parts.value), phases=stage, budget=self.limit, plans=plans,
            storage=setting.storage.value, moments=setting.moments.value, accumulation=setting.parts.value,
            _known=self._known, _cache=False, **self._rest(setting),
        )  # fmt: skip

    def _rest(self, setting: _Setting) -> dict[str, Any]:
        """Options that only some settings take."""
        packed = setting.storage.value == "packed"
        return {k: v for k, v in self.options.items() if k != "packed_values" or packed}

    def plans(self, setting: _Setting) -> dict[Phase, PhasePlan]:
        """The plan of every phase under a setting. Warm-up is like dense."""
        plans = {**self.given, **{phase: choice.value for phase, choice in setting.policies.items()}}
        warm, dense = self.given[Phase.WARMUP], setting.policies[Phase.DENSE]
        if dense.price and not warm.manages_activations:
            plans[Phase.WARMUP] = dataclasses.replace(dense.value, phase=Phase.WARMUP, accumulation=warm.accumulation)
        for phase, choice in {Phase.RESU: setting.state, **setting.forward}.items():
            kept, ahead = choice.value
            plans[phase] = dataclasses.replace(plans[phase], optimizer_state=kept, restore_lookahead=ahead)
        return plans

    # Searching

    def _plain(self, parts: Choice) -> _Setting:
        first = {phase: found[0] for phase, found in self.policies.items()}
        forward = {phase: found[0] for phase, found in self.forward.items()}
        return _Setting(parts, self.storages[0], self.moments[0], self.state[0], first, forward)

    def cheapest(self) -> tuple[int, _Setting] | None:
        """(price, setting) that fits; None if nothing does."""
        best: tuple[int, _Setting] | None = None
        for parts in self.parts:
            if best is not None and parts.price >= best[0]:
                break
            found = self._fitting(parts, math.inf if best is None else best[0])
            if found is not None:
                best = found
        return best

    def _fitting(self, parts: Choice, below: float) -> tuple[int, _Setting] | None:
        """The cheapest setting with these micro-batches that fits and costs less than `below`."""
        setting, price = self._plain(parts), parts.price
        if self.total("prune", setting) > self.limit:
            return None
        for phase in (Phase.DENSE, Phase.SPARSE):
            chosen = next((s for s in self._with_policies(setting, phase) if self._fits(phase, s)), None)
            if chosen is None:
                return None
            setting, price = chosen, price + chosen.policies[phase].price
        best: tuple[int, _Setting] | None = None
        for own, (kept, moments, away) in choices.together(self.storages, self.moments, self.state):
            if price + own >= min(below, math.inf if best is None else best[0]):
                break
            tried = self._resu(dataclasses.replace(setting, storage=kept, moments=moments, state=away))
            if tried is None:
                continue
            # An expensive policy of RESU may cost more than the next storage.
            extra = sum(tried.forward[p].price for p in _FORWARD) + tried.policies[Phase.RESU].price
            if best is None or price + own + extra < best[0]:
                best = price + own + extra, tried
        return best if best is None or best[0] < below else None

    def _resu(self, setting: _Setting) -> _Setting | None:
        """The setting with policies under which RESU and what follows it fits; None if there are none."""
        if any(self.total(stage, setting) > self.limit for stage in _WITH_RESU):
            return None
        for phase in _FORWARD:
            chosen = next((s for s in self._with_forward(setting, phase) if self._fits(phase, s)), None)
            if chosen is None:
                return None
            setting = chosen
        return next((s for s in self._with_policies(setting, Phase.RESU) if self._fits(Phase.RESU, s)), None)

    def _fits(self, phase: Phase, setting: _Setting) -> bool:
        return self.total(str(phase), setting) <= self.limit

    def _with_policies(self, setting: _Setting, phase: Phase) -> Iterator[_Setting]:
        for choice in self.policies[phase]:
            yield dataclasses.replace(setting, policies={**setting.policies, phase: choice})

    def _with_forward(self, setting: _Setting, phase: Phase) -> Iterator[_Setting]:
        for choice in self.forward[phase]:
            yield dataclasses.replace(setting, forward={**setting.forward, phase: choice})

    # Refusing

    def smallest(self) -> tuple[int, _Setting]:
        """The smallest budget under which `cheapest` finds something, and what it would find."""
        best, found = math.inf, self._plain(self.parts[0])
        for parts in reversed(self.parts):  # mostly the least, so that others are soon seen to take more
            size, setting = self._least(parts, best)
            if size < best:
                best, found = size, setting
        return int(best), found

    def _least(self, parts: Choice, bound: float) -> tuple[float, _Setting]:
        """The lowest peak with these micro-batches, or something of at least `bound`."""
        setting = self._plain(parts)
        highest = self.total("prune", setting)
        for phase in (Phase.DENSE, Phase.SPARSE):
            if highest >= bound:
                return highest, setting
            setting = min(self._with_policies(setting, phase), key=lambda s: self.total(str(phase), s))
            highest = max(highest, self.total(str(phase), setting))
        best, found = math.inf, setting
        for _, (kept, moments, away) in choices.together(self.storages, self.moments, self.state):
            least = self._least_of_resu(
                dataclasses.replace(setting, storage=kept, moments=moments, state=away), min(bound, best)
            )
            if least[0] < best:
                best, found = least
        return max(highest, best), found

    def _least_of_resu(self, setting: _Setting, bound: float) -> tuple[float, _Setting]:
        highest = max(self.total(stage, setting) for stage in _WITH_RESU)
        for phase in _FORWARD:
            setting = min(self._with_forward(setting, phase), key=lambda s: self.total(str(phase), s))
            highest = max(highest, self.total(str(phase), setting))
        if highest >= bound:
            return highest, setting
        setting = min(self._with_policies(setting, Phase.RESU), key=lambda s: self.total("resu", s))
        return max(highest, self.total("resu", setting)), setting

    def advice(self, over: MemoryPlan, smallest: int) -> str:
        """What would help and is never chosen by itself, with its figures where they are known."""
        told = []
        candidates = 0.25
        if self.options.get("candidates", 1.0) > candidates:
            fewer = _Search(
                self.model, self.call, self.limit, None, self.given, False,
                {**self.options, "candidates": candidates},
            )  # fmt: skip
            fewer.parts = tuple(p for p in self.parts if p.value == over.accumulation)
            size = fewer.smallest()[0]
            if size < smallest:
                told.append(f"candidates={candidates} (a smaller θ: another result) would do with {size_text(size)}")
        dense = over.bill["dense"]
        held = sum(dense.parts.get(n, 0) for n in ("gradients", "optimizer state, managed", "optimizer state, other"))
        told.append(
            f"StreamedAdamW (another training loop) keeps gradients and moments, {size_text(held)} of the"
            f" {size_text(over.bill.total(dense))} in dense, off the device"
        )
        told.append("smaller batches, or parameters in bfloat16, take less")
        return "Not chosen by itself: " + "; ".join(told)

    def plan(self, setting: _Setting) -> MemoryPlan:
        """The plan of a setting, with its whole bill."""
        plans = self.plans(setting)
        bill = self._bill(setting, plans)
        costs, price = tuple(c.cost for c in setting.choices if c.cost), sum(c.price for c in setting.choices)
        return MemoryPlan(
            self.limit, setting.storage.value, setting.moments.value, setting.parts.value, plans, costs, price, bill,
            len(self._totals),
        )  # fmt: skip


def _batched(call: ExampleInputs) -> list[Tensor]:
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return [t for t in leaves if isinstance(t, Tensor) and t.dim()]


def _part(call: ExampleInputs, parts: int) -> ExampleInputs:
    def cut(nested: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t[: t.shape[0] // parts] if t.dim() else t, nested)

    return call if parts == 1 else ExampleInputs(cut(call.args), cut(call.kwargs))


__all__ = ["BudgetError", "MemoryPlan", "plan_memory"]
