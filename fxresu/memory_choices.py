"""What a memory budget may choose from, what each choice costs, and which is cheaper.

Prices only order the search: no time is known before it is measured. A price is for one phase that trains; what touches
all three (micro-batches) counts three times. Cheapest first:

1. Rounding θ's moments (1 bfloat16, 2 in 8 bits): takes no time, and touches what RESU alone has.
2. Computing cheap results again in the backward (2): exact; some per cent of a backward.
3. Twice the micro-batches (3, 6, 9): exact; a step launches twice as many kernels, each on half the rows, which fill a
   GPU less and less. State that waits in pinned memory until RESU's end (3): exact; waits once a cycle.
4. Weights that wait in host memory in RESU (4), state in pageable memory (4): exact but for the bfloat16 copy that
   computes; copies block.
5. Packed weights (5): every linear composes its weight twice a step. Compressed state (5): at most 4.4 % off.
   Activations over the bus (5): exact; bounded by the bus in every step.
6. Keeping half of the saved bytes (6): matrix products are computed again. Dropped state (6): moments begin anew.
7. bfloat16 products where float32 was asked for (8): rounds in every step. Not on a CPU, where what oneDNN takes beside
   them is not predicted.

What changes the algorithm is never chosen: fewer candidates, another training loop, values of weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from fxresu.passes import DEFAULT_PLANS, Phase, PhasePlan

__all__ = ["TRAINING", "Choice", "moments", "parts", "plans_of", "policies", "state", "storages", "together"]

TRAINING = (Phase.DENSE, Phase.SPARSE, Phase.RESU)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value of a setting.

    Attributes:
        value: of the setting.
        price: orders the search.
        cost: in words; "" for what is so without a budget.
    """

    value: Any
    price: int = 0
    cost: str = ""


def moments() -> tuple[Choice, ...]:
    """Storage of θ's moments."""
    return (
        Choice("fp32"),
        Choice("bf16", 1, "θ's moments are rounded to bfloat16"),
        Choice("8bit", 2, "θ's moments are rounded to 8 bits in blocks"),
    )


def parts(rows: int) -> tuple[Choice, ...]:
    """Micro-batches of a step of so many rows."""
    counts = ((2, 3), (4, 6), (8, 9))
    own = len(TRAINING)
    return Choice(1), *(Choice(n, own * price, f"{n} micro-batches a step") for n, price in counts if rows % n == 0)


def storages(autocast: str | None) -> tuple[Choice, ...]:
    """Storage of the weights in RESU."""
    found = [Choice("resident")]
    if autocast == "bf16":
        found.append(Choice("offload", 4, "entering and leaving RESU copies the weights to host memory and back"))
    return *found, Choice("packed", 5, "RESU composes every weight twice a step")


def state(plan: PhasePlan, device: str) -> tuple[Choice, ...]:
    """(optimizer_state, restore_lookahead) of a phase that does not train the weights: as planned, and what takes less.

    On a CPU host memory is the device's, so that sending state there gains nothing.
    """
    where = f"in {plan.phase} optimizer state"
    order = [
        Choice(("keep", plan.restore_lookahead)),
        Choice(("pinned", 0), 3, f"{where} waits in pinned memory and comes back at the end"),
        Choice(("offload", 0), 4, f"{where} waits in pageable memory and comes back at the end"),
        Choice(("compress", plan.restore_lookahead), 5, f"{where} is rounded to 8 bits"),
        Choice(("drop", plan.restore_lookahead), 6, f"{where} is dropped and begins anew"),
    ]
    at = [c.value[0] for c in order].index(plan.optimizer_state)
    if plan.phase is not Phase.RESU:
        order = order[:4]  # to predict must not cost the moments
    less = [c for c in order[at:] if device != "cpu" or c.value[0] in ("compress", "drop")]
    given = Choice((plan.optimizer_state, plan.restore_lookahead))
    return given, *(c for c in less if c.value != given.value and c.value[0] != "keep")


def policies(plan: PhasePlan, *, compiled: bool, device: str, autocast: str | None, low: bool) -> tuple[Choice, ...]:
    """Plans of a phase that trains, cheapest first: what its activations and its products may become.

    Args:
        plan: as it is without a budget. A policy or a precision that it has stays.
        compiled: all of this is done in the compiled graph.
        low: the parameters are in 16 bits already.
    """
    found = [Choice(plan)]
    if not compiled:
        return tuple(found)
    if not plan.manages_activations:
        again = dataclasses.replace(plan, activations="recompute")
        found.append(Choice(again, 2, f"{plan.phase} computes cheap results again in the backward"))
        half = dataclasses.replace(again, activation_budget=0.5)
        found.append(Choice(half, 6, f"{plan.phase} keeps half of its activations and computes the rest again"))
        if device != "cpu":
            away = dataclasses.replace(plan, activations="offload")
            found.append(Choice(away, 5, f"{plan.phase} sends activations to pinned memory and back in every step"))
    if plan.precision == "inherit" and autocast is None and not low and device != "cpu":
        text = f"{plan.phase} multiplies in bfloat16 instead of float32"
        found += [
            Choice(dataclasses.replace(c.value, precision="bf16"), c.price + 8, "; ".join(filter(None, (c.cost, text))))
            for c in tuple(found)
        ]
    return tuple(sorted(found, key=lambda c: c.price))


def plans_of(given: Mapping[Phase | str, PhasePlan] | None) -> dict[Phase, PhasePlan]:
    """The plan of every phase."""
    return {**DEFAULT_PLANS, **{Phase.parse(name): plan for name, plan in (given or {}).items()}}


def together(*choices: tuple[Choice, ...]) -> Iterator[tuple[int, tuple[Choice, ...]]]:
    """(price, one of each) of all combinations, cheapest first."""
    found = list(itertools.product(*choices))
    for one in sorted(found, key=lambda one: sum(c.price for c in one)):
        yield sum(c.price for c in one), one
