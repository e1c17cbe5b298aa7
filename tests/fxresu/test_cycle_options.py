"""Every way of choosing masks, through whole cycles."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from fxresu_cycles import Net, batch, make, run, until
from torch import Tensor

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.calibration import calibrate
from fxresu.errors import ConfigError, HostMemoryError, PhaseError
from fxresu.kernels import unpack
from fxresu.lanes import HostLanes
from fxresu.mask_change import actual_sparsity, total_sparsity
from fxresu.model_state import managed_weights, state_of
from fxresu.saliency import SCORES
from fxresu.survival import Cohorts

SHORT = {"steps_per_cycle": 15, "schedule": "constant", "sparsity_end": 0.5}


def masks(cycle: ResuCycle) -> dict[str, Tensor]:
    return {n: m.entry.mask().clone() for n, m in managed_weights(cycle.model).items()}


def pruned_are_zero(cycle: ResuCycle) -> None:
    for managed in managed_weights(cycle.model).values():
        if managed.entry.bits is not None:
            assert managed.parameter[~managed.entry.mask()].eq(0).all()


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_prunes_and_commits_with_statistics_gathered_by_the_cycle(score: str, compile: object) -> None:
    if compile and score not in ("wanda", "snip"):
        pytest.skip("these two have every way of gathering statistics between them")
    cycle = make(prune_score=score, commit_score=score, calibration_batches=3, transform={"compile": compile}, **SHORT)
    run(cycle)
    pruned_are_zero(cycle)
    assert cycle.finished and total_sparsity(cycle.model) == 0.5
    assert [s.resurrected > 0 for s in cycle.summaries if s.stage == "resu"] == [True, True]
    if compile:
        from fxresu.runner import runner_of

        assert all(entry.recompiles == 0 for entry in runner_of(cycle.model).entries.values())
        assert not runner_of(cycle.model).eager_calls


def test_scores_choose_different_masks() -> None:
    found = {}
    for score in SCORES:
        cycle = make(prune_score=score, cycles=1, **SHORT)
        until(cycle, "stabilize")
        found[score] = torch.cat([m.flatten() for m in masks(cycle).values()])
    for a, b in itertools.combinations(found, 2):
        assert not torch.equal(found[a], found[b]), (a, b)


def test_masks_by_wanda_are_those_of_the_last_batches() -> None:
    cycle = make(prune_score="wanda", cycles=1, calibration_batches=3, **SHORT)
    steps = cycle.stage_steps(0)["train"]
    norms: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    @cycle.on_phase
    def keep(event) -> None:
        if event.when == "end":
            seen.update({n: m.parameter.detach().clone() for n, m in managed_weights(cycle.model).items()})

    for i in range(steps):
        if i >= steps - 3:  # before the step, as the cycle sees the batch
            plain = fxresu.untransform(copy.deepcopy(cycle.model)).eval()
            for name, module in plain.named_modules():
                if f"{name}.weight" in managed_weights(cycle.model):
                    module.register_forward_hook(
                        lambda m, x, out, n=f"{name}.weight": norms.__setitem__(
                            n, norms.get(n, 0) + x[0].square().sum(0)
                        )
                    )
            plain(*batch(i))
        cycle.step(batch(i))
    assert cycle.stage == "stabilize"
    for name, mask in masks(cycle).items():
        score = seen[name].abs() * norms[name].sqrt()
        kept = score.shape[1] // 2
        want = torch.zeros_like(mask).scatter_(1, score.topk(kept, dim=1).indices, True)
        assert torch.equal(mask, want), name


def test_calibration_batches_of_the_users_own() -> None:
    data = [batch(500 + i) for i in range(4)]
    reads = []

    def source():
        reads.append(len(reads))
        return iter(data)

    for calibration in (data, source):
        options = {"prune_score": "wanda", "commit_score": "snip", "calibration_batches": 2, **SHORT}
        cycle = make(**options)
        cycle = ResuCycle(cycle.model, cycle.optimizer, cycle.config, calibration=calibration)
        until(cycle, "stabilize")
        expected = managed_weights(cycle.model)
        run(cycle, cycle.total_steps - cycle.global_step)
        assert cycle.finished and expected
    assert reads == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="every transition reads it anew"):
        ResuCycle(cycle.model, cycle.optimizer, cycle.config, calibration=iter(data))
    empty = make(prune_score="wanda", **SHORT)
    empty = ResuCycle(empty.model, empty.optimizer, empty.config, calibration=[])
    with pytest.raises(ConfigError, match="calibration gave no batch"):
        until(empty, "stabilize")


def test_a_stage_without_steps_cannot_give_statistics() -> None:
    options = {"train_steps": 0, "stabilize_steps": 2, "resu_steps": 4, "cycles": 1}
    with pytest.raises(ConfigError, match=r"prune_score='wanda' needs statistics.*'train' before it takes no step"):
        make(prune_score="wanda", **options, schedule="constant", sparsity_end=0.5)
    cycle = make(commit_score="wanda", **options, schedule="constant", sparsity_end=0.5)
    run(cycle)
    assert cycle.finished


def test_a_dataloader_for_calibration_does_not_move_the_random_state() -> None:
    data = torch.utils.data.TensorDataset(*batch(3))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    states = []
    for calibration in (loader, [batch(3)]):
        cycle = make(prune_score="wanda", cycles=1, **SHORT)
        cycle = ResuCycle(cycle.model, cycle.optimizer, cycle.config, calibration=calibration)
        torch.manual_seed(4)
        until(cycle, "stabilize")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def largest_last(weight: Tensor, statistics: object) -> Tensor:
    return torch.arange(weight.numel()).view(weight.shape).float()


def test_callables_choose_masks() -> None:
    cycle = make(prune_score=largest_last, commit_score=largest_last, commit="compare", cycles=1, **SHORT)
    run(cycle)
    for mask in masks(cycle).values():
        half = mask.shape[1] // 2
        assert mask[:, half:].all() and not mask[:, :half].any()


# --- stabilizer, distribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["row", "layer", "global", "2:4-rows"])
def test_dsnot_swaps_without_changing_counts(granularity: str) -> None:
    counts = []
    for stabilizer in (None, "dsnot"):
        cycle = make(
            prune_score="wanda", stabilizer=stabilizer, granularity=granularity, cycles=1, dsnot_threshold=0.0, **SHORT
        )
        until(cycle, "stabilize")
        counts.append({n: m.sum(1) for n, m in masks(cycle).items()})
        kept = torch.cat([m.flatten() for m in masks(cycle).values()])
        if stabilizer is None:
            plain = kept
        pruned_are_zero(cycle)
        run(cycle, 4)
    assert all(torch.equal(counts[0][n], counts[1][n]) for n in counts[0])
    assert not torch.equal(plain, kept)


# --- commits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["row", "layer", "global", "2:4", "block:4x8"])
@pytest.mark.parametrize("candidates", [1.0, 0.5])
@pytest.mark.parametrize("method", ["amnesty", "compare", "wanda", "threshold"])
def test_every_commit_keeps_its_counts(method: str, candidates: float, granularity: str) -> None:
    options = {"commit": method, "granularity": granularity, "candidates": candidates, **SHORT}
    if method == "threshold" and granularity not in ("layer", "global"):
        with pytest.raises(ConfigError, match="keeps fixed counts"):
            CycleConfig(**options)
        return
    cycle = make(**options)
    run(cycle)
    pruned_are_zero(cycle)
    if method != "threshold":
        assert total_sparsity(cycle.model) == pytest.approx(0.5, abs=0.02)
    else:
        assert state_of(cycle.model).nominal_sparsity == total_sparsity(cycle.model)


def test_compare_has_no_quota_where_amnesty_has_one() -> None:
    rates = {}
    for method in ("amnesty", "compare"):
        for epsilon in (0.01, 3.0):
            cycle = make(commit=method, theta_epsilon=epsilon, theta_lr=1e-6, cycles=1, amnesty_start=0.2,
                         amnesty_end=0.2, **SHORT)  # fmt: skip
            run(cycle)
            rates[method, epsilon] = cycle.summaries[-1].resurrection_rate
            assert cycle.summaries[-1].budget == (0.2 if method == "amnesty" else 0.0)
    assert rates["amnesty", 0.01] == pytest.approx(rates["amnesty", 3.0], abs=0.01)
    assert rates["compare", 0.01] < 0.05 and rates["compare", 3.0] > 0.3


def test_amnesty_schedules() -> None:
    shares = {s: [CycleConfig(amnesty_schedule=s).amnesty(c) for c in range(5)]
              for s in ("constant", "linear", "cosine", "cubic")}  # fmt: skip
    assert shares["constant"] == [0.02] * 5
    assert shares["linear"] == pytest.approx([0.10, 0.08, 0.06, 0.04, 0.02])
    assert shares["cubic"][1] < shares["linear"][1] and shares["cosine"][1] > shares["linear"][1]
    assert CycleConfig(amnesty_schedule=lambda c, n: 0.5).amnesty(3) == 0.5


# --- densification, warm start ---------------------------------------------------------------------------------------


def test_densification_grows_by_what_resu_trained() -> None:
    cycle = make(cycles=5, steps_per_cycle=10, schedule="densification", sparsity_start=0.7, sparsity_end=0.0)
    grown = []

    @cycle.on_commit
    def look(change) -> None:
        grown.append((round(change.sparsity, 1), change.dropped, change.resurrected))

    before: list[Tensor] = []

    @cycle.on_phase
    def keep(event) -> None:
        if event.when == "start" and event.stage == "resu":
            before[:] = [m.clone() for m in masks(cycle).values()]

    pruned = []
    cycle.on_prune(lambda change: pruned.append(change.sparsity))
    run(cycle)
    assert [s for s, _, _ in grown] == [0.7, 0.5, 0.3, 0.1, 0.0]
    assert len(pruned) == 1 and pruned[0] == pytest.approx(0.7, abs=0.01)
    assert all(resurrected > 0 for _, _, resurrected in grown)
    assert grown[-1][1] == 0, "the last commit keeps everything"
    assert state_of(cycle.model).base == "dense" and total_sparsity(cycle.model) == 0.0
    for managed in managed_weights(cycle.model).values():
        assert managed.parameter.ne(0).float().mean() > 0.95
    cycle.step(batch(0))


def pruned_checkpoint(sparsity: float = 0.6) -> dict[str, Tensor]:
    cycle = make(cycles=1, schedule="constant", sparsity_end=sparsity, steps_per_cycle=20)
    run(cycle)
    return copy.deepcopy(cycle.model.state_dict())


def test_warm_start_reads_the_mask_from_the_zeros() -> None:
    state = pruned_checkpoint()
    cycle = make(warm_start=True, cycles=2, schedule=[0.6, 0.8], steps_per_cycle=15)
    cycle.model.load_state_dict(state)
    zeros = {n: state[n] == 0 for n in managed_weights(cycle.model)}
    cycle.step(batch(0))
    assert str(cycle.phase) == "sparse"
    assert all(torch.equal(~m, zeros[n]) for n, m in masks(cycle).items())
    run(cycle, cycle.total_steps - 1)
    assert total_sparsity(cycle.model) == pytest.approx(0.8, abs=0.02)
    assert [s.stage for s in cycle.summaries][:3] == ["train", "stabilize", "resu"]
    pruned_are_zero(cycle)


def test_warm_start_can_densify() -> None:
    state = pruned_checkpoint(0.75)
    cycle = make(warm_start=True, cycles=2, schedule=[0.5, 0.25], steps_per_cycle=10)
    cycle.model.load_state_dict(state)
    seen = []
    cycle.on_commit(lambda change: seen.append(round(change.sparsity, 2)))
    run(cycle)
    assert seen == [0.5, 0.25]


def test_warm_start_of_an_unpruned_or_sparse_model_is_refused() -> None:
    cycle = make(warm_start=True)
    with pytest.raises(ConfigError, match="none of the 4 managed weights has a zero; load the pruned checkpoint"):
        cycle.step(batch(0))
    assert state_of(cycle.model).base == "dense" and not cycle._started
    fxresu.prune(cycle.model)
    with pytest.raises(PhaseError, match="warm_start: the weights are sparse already"):
        fxresu.warm_start(cycle.model)


# --- what is reported ------------------------------------------------------------------------------------------------


def test_churn_and_survival_are_those_of_the_masks() -> None:
    cycle = make(cycles=4, steps_per_cycle=15, schedule=[0.4, 0.5, 0.6, 0.7], survival_cohorts=2, amnesty_start=0.3,
                 amnesty_end=0.3)  # fmt: skip
    history: list[dict[str, Tensor]] = []
    resurrected: dict[int, dict[str, Tensor]] = {}
    checked = []

    def note(change, number: int) -> None:
        new = masks(cycle)
        old = history[-1] if history else {n: torch.ones_like(m) for n, m in new.items()}
        kept = sum(int((old[n] & new[n]).sum()) for n in new)
        union = sum(int((old[n] | new[n]).sum()) for n in new)
        assert change.kept == kept and change.churn == pytest.approx(1 - kept / union)
        for n in new:
            both, either = (old[n] & new[n]).sum(), (old[n] | new[n]).sum()
            assert change.layer_churn[n] == pytest.approx(1 - float(both / either), abs=1e-6)
            assert change.layer_sparsity[n] == pytest.approx(1 - float(new[n].float().mean()), abs=1e-6)
        history.append(new)
        checked.append(number)
        return old, new

    cycle.on_prune(lambda change: note(change, cycle.cycle))

    @cycle.on_commit
    def committed(change) -> None:
        old, new = note(change, cycle.cycle)
        resurrected[cycle.cycle] = {n: new[n] & ~old[n] for n in new}

    run(cycle)
    assert len(checked) == 8
    last = cycle.summaries[-1].survival
    assert set(last) == {"2", "3"}, "older cohorts are forgotten"
    for number, share in last.items():
        cohort, now = resurrected[int(number)], masks(cycle)
        alive = sum(int((c & now[n]).sum()) for n, c in cohort.items())
        assert share == pytest.approx(alive / sum(int(c.sum()) for c in cohort.values()))
    assert last["3"] == 1.0 and 0 < last["2"] < 1
    pruning = [s for s in cycle.summaries if s.stage == "train"][3]
    assert pruning.dropped > 0 and set(pruning.survival) == {"1", "2"}
    assert actual_sparsity(cycle.model) == cycle.summaries[-1].layer_sparsity


def test_survival_follows_a_mask_that_was_changed_by_hand() -> None:
    cycle = make(cycles=2, schedule=[0.5, 0.5], steps_per_cycle=12, split=(0.5, 0.2, 0.3), amnesty_start=0.3)
    run(cycle, 12)
    cohorts = cycle.survival
    assert cohorts.survival(cycle.model) == {"0": 1.0} == cohorts.survival(cycle.model)
    fxresu.prune(cycle.model, cycle.optimizer, sparsity=0.95)
    now = masks(cycle)
    resurrected = {name: unpack(bits, now[name].shape[1]) for name, bits in cohorts.bits[0].items()}
    alive = sum(int((mask & now[name]).sum()) for name, mask in resurrected.items())
    share = alive / sum(int(mask.sum()) for mask in resurrected.values())
    assert share < 1 and cohorts.survival(cycle.model) == {"0": pytest.approx(share)}
    fxresu.set_phase(cycle.model, "dense", optimizer=cycle.optimizer)
    assert cohorts.survival(cycle.model) == {"0": 1.0}


def test_survival_is_counted_on_the_host_if_the_device_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"cycles": 3, "schedule": [0.4, 0.5, 0.6], "steps_per_cycle": 12, "split": (0.5, 0.2, 0.3)}
    whole, short = make(**options), make(**options)
    run(whole)
    true, refused = torch.Tensor.to, []

    def to(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        if kwargs.get("non_blocking") and not refused.append(self.shape):
            raise torch.OutOfMemoryError("no memory")
        return true(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    run(short)
    assert refused and [s.survival for s in short.summaries] == [s.survival for s in whole.summaries]
    cohorts = (c.survival.tensors().values() for c in (whole, short))
    assert all(torch.equal(a, b) for a, b in zip(*cohorts, strict=True))


def test_cohorts_go_to_pageable_memory_if_none_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"cycles": 3, "schedule": [0.4, 0.5, 0.6], "steps_per_cycle": 12, "split": (0.5, 0.2, 0.3)}
    whole, short = make(**options), make(**options)
    run(whole)

    def refused(self: HostLanes, size: int, pooled: bool = False) -> Tensor:
        raise HostMemoryError("no memory to pin")

    monkeypatch.setattr(HostLanes, "host", refused)
    run(short)
    assert short.summaries[-1].survival
    assert [s.survival for s in short.summaries] == [s.survival for s in whole.summaries]


def test_no_cohort_is_kept_if_none_is_asked_for() -> None:
    cycle = make(survival_cohorts=0, cycles=1, **SHORT)
    run(cycle)
    assert cycle.survival.bits == {} and cycle.summaries[-1].survival == {}
    assert Cohorts(0).before(cycle.model) == {}


@pytest.mark.parametrize("options", [
    {"prune_score": "wanda++", "commit_score": "snip", "calibration_batches": 4, "stabilizer": "dsnot"},
    {"commit": "wanda", "theta_schedule": "cosine", "rule": "adam", "theta_lr": 1e-3},
    {"distribution": "erk", "prune_score": "gradient", "commit": "compare", "calibration_batches": 5},
])  # fmt: skip
def test_resume_in_the_middle_of_statistics_is_bit_exact(options: dict, tmp_path) -> None:
    options = {"cycles": 2, "schedule": [0.4, 0.6], "steps_per_cycle": 12, "split": (0.5, 0.2, 0.3), **options}
    whole = make(**options)
    run(whole)
    for stop in (4, 5, 7, 10, 11, 16):
        first = make(**options)
        run(first, stop)
        first.save(tmp_path / "c")
        second = make(**options)
        second.load(tmp_path / "c")
        run(second, whole.total_steps - stop)
        for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
            assert torch.equal(a, b), (stop, name)
        assert [s.survival for s in second.summaries] == [s.survival for s in whole.summaries]
        assert [s.layer_churn for s in second.summaries] == [s.layer_churn for s in whole.summaries]


# --- without a cycle -------------------------------------------------------------------------------------------------


def test_prune_and_commit_by_hand_with_statistics() -> None:
    model = fxresu.transform(Net(), sparsity=0.5, compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = [batch(i) for i in range(3)]
    statistics = calibrate(model, data, score=["wanda", "snip"])
    change = fxresu.prune(model, optimizer, score="snip", statistics=statistics, distribution="erk")
    assert change.sparsity == pytest.approx(0.5, abs=0.02) and change.resurrected == 0
    fxresu.set_phase(model, "sparse", optimizer=optimizer)
    fxresu.set_phase(model, "resu", optimizer=optimizer)
    result = fxresu.commit(model, optimizer, method="wanda", statistics=calibrate(model, data))
    assert result.sparsity == pytest.approx(0.5, abs=0.02) and result.resurrected > 0
    with pytest.raises(ConfigError, match=r"scores\['up.1.weight'\]: none given"):
        fxresu.prune(model, optimizer, scores={"up.0.weight": torch.ones(64, 32)})
    with pytest.raises(ConfigError, match="stabilizer='dsnot' needs statistics of inputs"):
        fxresu.prune(model, optimizer, stabilizer=fxresu.sparsify.Swaps())
