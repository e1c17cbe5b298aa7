"""Settings under which every phase and transition fits a budget, the cheapest first, or the smallest budget that would
do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ConfigError
from .example_inputs import as_inputs
from .memory_bill import MemoryBill
from .memory_predict import predict_memory
from .models import ExampleInputs
from .rehearsal import Peak
from .sizes import parse_size, size_text

# (setting, its price, what it costs). Prices only order the search: no time is known before it is measured.
_MOMENTS = (
    ("fp32", 0, ""),
    ("bf16", 1, "θ's moments are rounded to bfloat16"),
    ("8bit", 2, "θ's moments are rounded to 8 bits in blocks"),
)
_STORAGES = (
    ("resident", 0, ""),
    ("offload", 4, "entering and leaving RESU copies the weights to host memory and back"),
    ("packed", 5, "RESU composes every weight twice a step"),
)
_PARTS = ((1, 0, ""), *((n, price, f"{n} micro-batches a step") for n, price in ((2, 3), (4, 6), (8, 9))))


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
        theta_moments, accumulation: for `CycleConfig`; each micro-batch is 1/accumulation of the batch that was given.
        costs: what each choice costs, in words.
        bill: the prediction under these settings.
        tried: how many settings were predicted.
    """

    budget: int
    storage: str
    theta_moments: str
    accumulation: int
    costs: tuple[str, ...]
    bill: MemoryBill
    tried: int

    def __str__(self) -> str:
        chosen = f"storage={self.storage!r}, theta_moments={self.theta_moments!r}, accumulation={self.accumulation}"
        return (
            f"budget {size_text(self.budget)}: {chosen}; highest {size_text(self.bill.peak)} in {self.bill.peak_stage}"
            + (f"; costs: {'; '.join(self.costs)}" if self.costs else "")
        )


def plan_memory(
    model: nn.Module, budget: int | str, inputs: Any = None, *, storage: str | None = None, **options: Any
) -> MemoryPlan:
    """The cheapest settings that fit: storage of the weights in RESU, storage of θ's moments, and micro-batches.

    Args:
        model: plain; it stays as it is.
        budget: bytes, or a size such as "14GB", that no phase and no transition may exceed.
        inputs: of one whole step, as for `predict_memory`; micro-batches divide its first dimension.
        storage: keeps to this one.
        options: the other arguments of `predict_memory` and of `transform`.

    Raises:
        BudgetError: none fits; it names the smallest budget that would do.
        ConfigError: a bad argument.
    """
    limit = parse_size(budget, "memory_budget")
    call = as_inputs(model, inputs)
    known: dict[Any, tuple[Peak, ...]] = {}
    best = None
    for tried, (moments, kept, parts, costs) in enumerate(_settings(storage, call, options), start=1):
        bill = predict_memory(
            model, _part(call, parts), budget=limit, storage=kept, moments=moments, accumulation=parts,
            _known=known, **options,
        )  # fmt: skip
        plan = MemoryPlan(limit, kept, moments, parts, costs, bill, tried)
        if not bill.over_budget:
            return plan
        best = plan if best is None or bill.peak < best.bill.peak else best
    assert best is not None
    over = best.bill
    raise BudgetError(
        f"memory_budget={budget!r}: nothing fits; the smallest budget that would do is {size_text(over.peak)}"
        f" ({over.peak:,} bytes, in {over.peak_stage}), with storage={best.storage!r},"
        f" theta_moments={best.theta_moments!r} and {best.accumulation} micro-batches a step",
        over.peak,
    )


def _settings(
    storage: str | None, call: ExampleInputs, options: Mapping[str, Any]
) -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    rows = min((t.shape[0] for t in _batched(call)), default=1)
    storages = [s for s in _STORAGES if (s[0] == storage if storage is not None else _possible(s[0], options))]
    found = [
        (m[1] + s[1] + p[1], m[0], s[0], p[0], tuple(c for c in (m[2], s[2], p[2]) if c))
        for m in _MOMENTS
        for s in storages
        for p in _PARTS
        if rows % p[0] == 0
    ]
    if not found:
        raise ConfigError(f"storage={storage!r}: use one of {', '.join(s[0] for s in _STORAGES)}")
    for _, *rest in sorted(found, key=lambda f: f[0]):
        yield tuple(rest)  # type: ignore[misc]


def _possible(storage: str, options: Mapping[str, Any]) -> bool:
    return storage != "offload" or options.get("autocast") == "bf16"


def _batched(call: ExampleInputs) -> list[Tensor]:
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return [t for t in leaves if isinstance(t, Tensor) and t.dim()]


def _part(call: ExampleInputs, parts: int) -> ExampleInputs:
    def cut(nested: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t[: t.shape[0] // parts] if t.dim() else t, nested)

    return call if parts == 1 else ExampleInputs(cut(call.args), cut(call.kwargs))


__all__ = ["BudgetError", "MemoryPlan", "plan_memory"]
