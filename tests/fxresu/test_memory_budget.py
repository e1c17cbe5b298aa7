"""A memory budget: what is planned for it, what is refused, and that training keeps to it."""

from __future__ import annotations

import pytest
import torch

import fxresu
from fxresu.memory_bill import STAGES
from fxresu.memory_measure import measure
from fxresu.memory_stages import Stages
from fxresu.model_state import state_of
from fxresu.models import GPT, ExampleInputs, GPTConfig
from fxresu.optimizer_names import make_optimizer
from fxresu.rehearsed_step import StepOptions

_CONFIG = GPTConfig(256, context=32, layers=2, heads=4, width=128)


def _tokens(batch: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (batch, 32))
    return tokens, tokens


def test_plenty_changes_nothing() -> None:
    plan = fxresu.plan_memory(GPT(_CONFIG), "1GB", _tokens(), compile=False)
    assert (plan.storage, plan.theta_moments, plan.accumulation) == ("resident", "fp32", 1)
    assert plan.costs == () and plan.tried == len(STAGES) and not plan.bill.over_budget


def test_less_than_plenty_costs_something_and_holds() -> None:
    inputs = _tokens()
    whole = fxresu.predict_memory(GPT(_CONFIG), inputs, compile=False)
    budget = int(0.75 * whole.peak)
    model = fxresu.transform(GPT(_CONFIG), compile=False, memory_budget=budget, example_inputs=inputs)
    plan = state_of(model).memory_plan
    assert plan.accumulation > 1 and plan.costs and plan.bill.peak <= budget
    assert f"accumulation={plan.accumulation}" in str(plan)
    config = fxresu.ResuCycle(model, torch.optim.AdamW(model.parameters())).config
    assert (config.accumulation, config.theta_moments) == (plan.accumulation, plan.theta_moments)

    part = ExampleInputs(tuple(t[: len(t) // plan.accumulation] for t in inputs))
    options = StepOptions(make_optimizer("adamw", "cpu"), accumulation=plan.accumulation, compiled=False)
    found = measure(
        lambda: fxresu.transform(GPT(_CONFIG), storage=plan.storage, compile=False),
        part,
        options,
        Stages(moments=plan.theta_moments),
    )
    assert max(found.peaks.values()) <= 1.05 * budget


def test_too_little_is_refused_with_what_would_do() -> None:
    model = GPT(_CONFIG)
    with pytest.raises(fxresu.BudgetError, match="smallest budget that would do is") as caught:
        fxresu.transform(model, compile=False, memory_budget="1MB", example_inputs=_tokens())
    assert type(model) is GPT and caught.value.smallest > 1e6
    plan = fxresu.plan_memory(model, caught.value.smallest, _tokens(), compile=False)
    assert plan.bill.peak == caught.value.smallest


def test_config_that_contradicts_the_plan_is_refused() -> None:
    inputs = _tokens()
    model = fxresu.transform(GPT(_CONFIG), compile=False, memory_budget="1GB", example_inputs=inputs)
    optimizer = torch.optim.AdamW(model.parameters())
    config = fxresu.CycleConfig(sparsity_end=0.5, accumulation=4)
    with pytest.raises(fxresu.ConfigError, match="config.accumulation=4, but the memory budget"):
        fxresu.ResuCycle(model, optimizer, config)


def test_arguments_without_a_budget_are_refused() -> None:
    with pytest.raises(fxresu.ConfigError, match="give that too"):
        fxresu.transform(GPT(_CONFIG), example_inputs=_tokens())
    with pytest.raises(fxresu.ConfigError, match="memory_budget='much'"):
        fxresu.transform(GPT(_CONFIG), memory_budget="much", example_inputs=_tokens())


@pytest.mark.gpu
def test_budget_holds_under_a_hard_cap() -> None:
    with torch.device("cuda"):
        model = GPT(GPTConfig(50304, context=512, layers=12, heads=12, width=768))
        tokens = torch.randint(50304, (8, 512))
    options = {"autocast": "bf16", "device": "cuda"}
    free = fxresu.predict_memory(model, (tokens, tokens), **options)
    budget = int(0.85 * free.peak)
    fxresu.transform(model, memory_budget=budget, example_inputs=(tokens, tokens), budget_options=options)
    plan = state_of(model).memory_plan
    total = torch.cuda.get_device_properties(0).total_memory
    # The cap is on the allocator; 5 % is what the ledger promises to account for.
    torch.cuda.set_per_process_memory_fraction(1.05 * (budget - sum(plan.bill.overhead.values())) / total)
    try:
        part = tokens[: len(tokens) // plan.accumulation]
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        config = fxresu.CycleConfig(
            cycles=1, train_steps=2, stabilize_steps=2, resu_steps=2, sparsity_start=0.5, sparsity_end=0.5,
            autocast="bf16", theta_moments=plan.theta_moments, accumulation=plan.accumulation,
        )  # fmt: skip
        cycle = fxresu.ResuCycle(model, optimizer, config)
        for _ in range(cycle.total_steps * plan.accumulation):
            cycle.step((part, part))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
