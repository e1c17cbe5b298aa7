"""An order that breaks a contract is refused before anything runs."""

import pytest
import torch
from fxresu_testing import EAGER, Net

import fxresu
from fxresu.passes import DEFAULT_PASSES, DEFAULT_PLANS, Pass, PassOrderError, PassResult, Phase, PhasePlan, Pipeline
from fxresu.passes.contract import check_order
from fxresu.runner import runner_of


def _pass(name: str, **facts: frozenset) -> Pass:
    return Pass(name, lambda graph, plan: PassResult(), **{k: frozenset(v) for k, v in facts.items()})


def test_missing_requirement_names_the_pass_that_would_provide_it() -> None:
    first, second = _pass("first", requires={"fact"}), _pass("second", provides={"fact"})
    with pytest.raises(PassOrderError, match="'first' requires 'fact': put 'second' before it"):
        check_order([first, second])
    with pytest.raises(PassOrderError, match="no pass of this pipeline provides it"):
        check_order([first])
    check_order([second, first])


def test_conflict_names_the_fact_and_where_it_comes_from() -> None:
    maker, hater = _pass("maker", provides={"fact"}), _pass("hater", conflicts={"fact"})
    with pytest.raises(PassOrderError, match="'hater' conflicts with 'fact', which 'maker' provides"):
        check_order([maker, hater])
    check_order([hater, maker])


def test_a_pass_twice_is_refused() -> None:
    with pytest.raises(PassOrderError, match="'same' is in the pipeline twice"):
        check_order([_pass("same"), _pass("same")])


def test_pipeline_refuses_the_default_passes_in_reverse() -> None:
    with pytest.raises(PassOrderError, match="linear_rewritten"):
        Pipeline(tuple(reversed(DEFAULT_PASSES)))
    assert [p.name for p in Pipeline().passes] == [
        "decompose_attention",
        "rewrite_batched",
        "rewrite_convolution",
        "rewrite_linear",
        "insert_casts",
        "discard_activations",
        "insert_transfers",
        "choose_kernels",
    ]


@pytest.mark.parametrize(
    ("phase", "ran"),
    [
        ("dense", ["rewrite_linear"]),
        ("sparse", ["rewrite_linear"]),
        ("resu", ["rewrite_linear", "discard_activations"]),
        ("predict", ["rewrite_linear", "insert_casts", "discard_activations"]),
        ("correct", ["rewrite_linear", "insert_casts", "discard_activations"]),
    ],
)
def test_the_plan_decides_which_passes_run(phase: str, ran: list[str]) -> None:
    model = fxresu.transform(Net(), compile=EAGER)
    if phase != "dense":
        fxresu.phases.set_phase(model, phase)
    model(torch.randn(3, 16))
    (record,) = runner_of(model).entries[DEFAULT_PLANS[Phase(phase)].tag].graphs
    assert [p.name for p in record.passes] == [*ran, "choose_kernels"]
    assert record.passes[0].matches == 4
    assert all(p.seconds >= 0 for p in record.passes)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weights": "other"},
        {"precision": "fp8"},
        {"precision": "int8"},
        {"precision_overrides": {"lm_head": "fp7"}},
        {"precision_overrides": {"a/b": "fp32"}},
        {"precision_overrides": "lm_head"},
        {"activation_budget": 0.0},
        {"activation_budget": 1.5},
        {"activation_budget": 0},
        {"activation_budget": True},
        {"activations": "some"},
        {"optimizer_state": "lost"},
        {"accumulation": 0},
        {"accumulation": 1.5},
        {"activations": "discard"},
    ],
)
def test_a_plan_that_contradicts_itself_names_the_field(kwargs: dict) -> None:
    (field,) = kwargs
    with pytest.raises(ValueError, match=field):
        PhasePlan(Phase.SPARSE, **{"weights": "sparse", **kwargs})


_RICH = (
    PhasePlan(Phase.RESU, "resu", activations="recompute", activation_budget=0.25),
    PhasePlan(Phase.DENSE, "dense", activations="offload", activation_budget=1 << 20),
    PhasePlan(Phase.SPARSE, "sparse", "bf16", precision_overrides={"lm_head": "fp32", "h.*.mlp.[!x]*": "fp16"}),
)


@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_a_phase_without_a_backward_has_no_activations_to_manage(activations: str) -> None:
    with pytest.raises(ValueError, match=f"activations='{activations}' in the plan of predict"):
        PhasePlan(Phase.PREDICT, "effective", activations=activations)
    with pytest.raises(ValueError, match=r"activation_budget=0\.5 in the plan of predict"):
        PhasePlan(Phase.PREDICT, "effective", activation_budget=0.5)


@pytest.mark.parametrize("plan", [*DEFAULT_PLANS.values(), *_RICH], ids=str)
def test_a_tag_gives_the_plan_back(plan: PhasePlan) -> None:
    again = PhasePlan.from_tag(plan.tag)
    fields = ("phase", "weights", "precision", "activations", "activation_budget", "precision_overrides")
    assert [getattr(again, f) for f in fields] == [getattr(plan, f) for f in fields]
    assert again.tag == plan.tag
