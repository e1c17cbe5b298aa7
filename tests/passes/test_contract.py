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


@pytest.mark.parametrize("plan", DEFAULT_PLANS.values(), ids=str)
def test_a_tag_gives_the_plan_back(plan: PhasePlan) -> None:
    again = PhasePlan.from_tag(plan.tag)
    assert (again.phase, again.weights, again.precision, again.activations) == (
        plan.phase, plan.weights, plan.precision, plan.activations,
    )  # fmt: skip
