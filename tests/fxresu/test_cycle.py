"""The cycle: stages, events, θ's training, and the defects of the published one."""

from __future__ import annotations

import pytest
import torch
from fxresu_cycles import DEVICES, batch, held_out, make, run, until

from fxresu.cycle import phases_ahead
from fxresu.model_state import managed_weights

# --- stages ----------------------------------------------------------------------------------------------------------


def test_stages_steps_and_sparsities() -> None:
    cycle = make(cycles=3, schedule="linear", sparsity_start=0.0, sparsity_end=0.7)
    run(cycle)
    assert cycle.finished
    got = [(s.cycle, s.stage, s.phase, s.steps) for s in cycle.summaries]
    assert got == [
        (0, "train", "dense", 30),
        (1, "train", "dense", 12), (1, "stabilize", "sparse", 6), (1, "resu", "resu", 12),
        (2, "train", "sparse", 12), (2, "stabilize", "sparse", 6), (2, "resu", "resu", 12),
    ]  # fmt: skip
    assert cycle.summaries[-1].sparsity == pytest.approx(0.7, abs=0.02)
    assert sum(s.steps for s in cycle.summaries) == cycle.total_steps == 90
    plan = [(c, s, n) for c, s, n, _ in phases_ahead(cycle.config)]
    assert plan == [(c, s, n) for c, s, _, n in got]


def test_events_come_in_order() -> None:
    cycle, seen = make(cycles=1), []
    cycle.on_phase(lambda e: seen.append((e.when, e.stage)))
    cycle.on_commit(lambda r: seen.append(("commit", r.resurrected > 0)))
    steps = []
    cycle.on_step(lambda e: steps.append((e.step, e.stage)))
    run(cycle)
    assert seen == [
        ("start", "train"), ("end", "train"), ("start", "stabilize"), ("end", "stabilize"),
        ("start", "resu"), ("end", "resu"), ("commit", True),
    ]  # fmt: skip
    assert [s for s, _ in steps] == list(range(1, 31))
    assert [s for _, s in steps].count("resu") == 12


def test_steps_after_the_last_commit_train_the_sparse_model() -> None:
    cycle = make(cycles=1)
    run(cycle)
    before = [m.parameter.clone() for m in managed_weights(cycle.model).values()]
    cycle.step(batch(0))
    for managed, old in zip(managed_weights(cycle.model).values(), before):
        assert not torch.equal(managed.parameter, old)
        assert managed.parameter[~managed.entry.mask()].eq(0).all()


@pytest.mark.parametrize("granularity", ["row", "layer", "global", "2:4", "block:4x8"])
def test_granularities_keep_exact_counts_through_commits(granularity: str) -> None:
    constant = {"schedule": "constant", "sparsity_end": 0.5} if granularity == "2:4" else {"sparsity_end": 0.7}
    cycle = make(granularity=granularity, **constant)
    run(cycle)
    for managed in managed_weights(cycle.model).values():
        mask = managed.entry.mask()
        assert managed.parameter[~mask].eq(0).all()
        if granularity == "2:4":
            assert mask.view(-1, 4).sum(1).eq(2).all()
        if granularity == "row":
            assert mask.sum(1).unique().numel() == 1
    assert cycle.summaries[-1].sparsity == pytest.approx(constant["sparsity_end"], abs=0.02)


@pytest.mark.parametrize("rule", ["selective", "adam", "momentum", "sgd"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_rule_moves_theta_and_counts_its_updates(rule: str, device: str) -> None:
    cycle = make(device, cycles=1, rule=rule)
    start: dict[str, torch.Tensor] = {}

    @cycle.on_phase
    def keep(event) -> None:
        if event.stage == "resu":
            for name, m in managed_weights(cycle.model).items():
                values = m.parameter.detach()[~m.entry.mask()].clone()
                if event.when == "start":
                    start[name] = values
                else:
                    assert not torch.equal(values, start[name]), name

    run(cycle, device=device)
    resu = cycle.summaries[-1]
    assert len(start) == 4 and resu.theta_updates == resu.steps == 12
    assert (0 < resu.selection_ratio <= 0.2 + 0.01) if rule == "selective" else resu.selection_ratio == 1.0
    assert (0 < resu.mean_consistency <= 1) if rule == "selective" else resu.mean_consistency == 0


# --- θ really trains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["selective", "adam"])
def test_training_theta_lowers_held_out_loss_more_than_frozen_theta(rule: str) -> None:
    gains = {}
    for trains in (True, False):
        gain = []
        for seed in range(3):
            cycle = make(cycles=1, steps_per_cycle=200, split=(0.4, 0.1, 0.5), schedule="constant", sparsity_end=0.7,
                         rule=rule, train_rest=True, train_theta=trains, seed=seed)  # fmt: skip
            until(cycle, "resu")
            before = held_out(cycle.model)
            after = []
            cycle.on_phase(lambda e, after=after, cycle=cycle: after.append(held_out(cycle.model)))
            while not cycle.finished:
                cycle.step(batch(cycle.global_step))
            gain.append(before - after[0])
        gains[trains] = gain
    assert all(a > b for a, b in zip(gains[True], gains[False])), gains


def test_frozen_theta_stays_bit_identical() -> None:
    cycle = make(cycles=1, train_theta=False, train_rest=True)
    until(cycle, "resu")
    before = {n: m.parameter.clone() for n, m in managed_weights(cycle.model).items()}
    for _ in range(11):
        cycle.step(batch(cycle.global_step))
    assert cycle.stage == "resu"
    for name, managed in managed_weights(cycle.model).items():
        assert torch.equal(managed.parameter, before[name])


@pytest.mark.parametrize("train_rest", [False, True])
def test_rest_trains_in_resu_only_if_asked(train_rest: bool) -> None:
    cycle = make(cycles=1, train_rest=train_rest)
    until(cycle, "resu")
    bias = cycle.model.up[0].bias
    before, trainable = bias.clone(), bias.requires_grad
    for _ in range(5):
        cycle.step(batch(cycle.global_step))
    assert torch.equal(bias, before) != train_rest
    assert trainable == train_rest
    run(cycle, 10)
    assert bias.requires_grad


# --- defects of the published cycle ----------------------------------------------------------------------------------


def test_defect_no_theta_update() -> None:
    """There the step waited for W.grad, which a frozen W never gets: zero updates."""
    cycle = make(cycles=1, optimizer_state="drop")
    run(cycle)
    assert cycle.summaries[-1].theta_updates == 12


def test_defect_resu_without_candidates() -> None:
    """There cycle 0 of a linear schedule ran RESU with nothing pruned; here its steps train, and it is reported."""
    cycle = make(cycles=2, sparsity_start=0.0)
    run(cycle)
    assert cycle.skipped == [(0, "stabilize"), (0, "resu")]
    assert all(s.sparsity > 0 for s in cycle.summaries if s.stage == "resu")


def test_defect_winners_are_the_largest_initial_values() -> None:
    """With η·steps too small the commit picks by the initial draw. At the defaults training decides, too."""
    overlaps = {}
    for trains in (True, False):
        cycle = make(cycles=1, steps_per_cycle=100, schedule="constant", sparsity_end=0.7, train_theta=trains)
        until(cycle, "resu")
        managed = managed_weights(cycle.model)["up.0.weight"]
        old, initial = managed.entry.mask(), managed.parameter.detach().abs().clone()
        while not cycle.finished:
            cycle.step(batch(cycle.global_step))
        won = managed.entry.mask() & ~old
        per_row = int(won.sum(1)[0])
        top = initial.masked_fill(old, -1).topk(per_row, dim=1).indices
        overlaps[trains] = float(won.gather(1, top).float().mean())
    assert overlaps[False] == 1.0
    assert overlaps[True] < 0.9


def test_defect_dense_mask_and_dense_gradients() -> None:
    """There a bool mask and dense gradients stayed. Here: one bit a coordinate, no dW, no state of W."""
    cycle = make(cycles=1, optimizer_state="drop")
    until(cycle, "resu")
    cycle.step(batch(0))
    for managed in managed_weights(cycle.model).values():
        entry = managed.entry
        assert entry.bits.dtype == torch.int32 and entry.bits.numel() * 32 == entry.numel
        assert managed.parameter.grad is None
        assert not cycle.optimizer.state.get(managed.parameter)
        dense = [t for t in entry.__dict__.values() if isinstance(t, torch.Tensor)
                 and t.untyped_storage().nbytes() >= managed.parameter.nbytes]  # fmt: skip
        assert not dense


def test_defect_resurrected_count_is_a_quota() -> None:
    """At constant sparsity the count only repeats the amnesty ratio; the summary also says how far the mask moved."""
    cycle = make(cycles=2, schedule="constant", sparsity_end=0.5, amnesty_start=0.25, amnesty_end=0.25)
    run(cycle)
    for summary in (s for s in cycle.summaries if s.stage == "resu"):
        assert summary.resurrection_rate == pytest.approx(0.25, abs=0.02)
        assert summary.churn == pytest.approx(1 - summary.kept / (summary.kept + 2 * summary.resurrected), abs=1e-6)


def test_defect_commit_crashes() -> None:
    for granularity in ("row", "layer", "global"):
        run(make(cycles=1, granularity=granularity, train_rest=True))


@pytest.mark.parametrize("choice", ["drop", "keep"])
def test_the_configuration_decides_what_becomes_of_the_optimizers_state(choice: str) -> None:
    """The plan's default is "drop": "keep" shows that the cycle's own option reaches the transition."""
    cycle = make(cycles=1, optimizer_state=choice)
    until(cycle, "resu")
    weights = managed_weights(cycle.model).values()
    assert all(bool(cycle.optimizer.state.get(m.parameter)) == (choice == "keep") for m in weights)
    before = {m.entry.fqn: (m.entry.mask(), cycle.optimizer.state[m.parameter]["exp_avg_sq"].clone())
              for m in weights} if choice == "keep" else {}  # fmt: skip
    while not cycle.finished:
        cycle.step(batch(cycle.global_step))
    for managed in managed_weights(cycle.model).values():
        now = cycle.optimizer.state[managed.parameter]["exp_avg_sq"]
        assert now[~managed.entry.mask()].eq(0).all()
        if choice == "keep":
            old, values = before[managed.entry.fqn]
            survivors = old & managed.entry.mask()
            assert torch.equal(now[survivors], values[survivors])
