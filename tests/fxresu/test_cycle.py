"""The cycle: stages, numbers, events, and the defects of the published one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxresu
from fxresu import ConfigError, CycleConfig, ResuCycle
from fxresu.cycle import NonFiniteLossError, phases_ahead
from fxresu.model_state import managed_weights, state_of
from fxresu.runner import runner_of

WIDTH, CLASSES = 32, 10
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Net(nn.Module):
    """Residual blocks with a loss in the forward; learnable, unlike random labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down):
            x = x + down(F.gelu(up(x)))
        return F.cross_entropy(self.head(self.norm(x)), y)


def batch(i: int, size: int = 64, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(size, WIDTH, generator=generator)
    teacher = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(12345))
    return x.to(device), (x.tanh() @ teacher).argmax(1).to(device)


def make(
    device: str = "cpu", lr: float = 3e-3, transform: dict | None = None, optimizer=torch.optim.AdamW, **options
) -> ResuCycle:
    torch.manual_seed(0)
    defaults = {"cycles": 2, "steps_per_cycle": 30, "split": (0.4, 0.2, 0.4), "sparsity_start": 0.5, "amnesty_end": 0.1}
    config = CycleConfig(**(defaults | options))
    model = fxresu.transform(
        Net().to(device),
        sparsity=0.5,
        granularity=config.granularity,
        candidates=config.candidates,
        **{"compile": False, **(transform or {})},
    )
    return ResuCycle(model, optimizer(model.parameters(), lr=lr), config)


def run(cycle: ResuCycle, steps: int | None = None, device: str = "cpu") -> list[float]:
    steps = cycle.total_steps if steps is None else steps
    return [float(cycle.step(batch(cycle.global_step, device=device))) for _ in range(steps)]


def held_out(model: nn.Module, device: str = "cpu") -> float:
    with torch.no_grad():
        return float(torch.stack([model(*batch(10_000 + i, 256, device)) for i in range(4)]).mean())


def until(cycle: ResuCycle, stage: str, number: int = 0) -> None:
    while (cycle.cycle, cycle.stage) != (number, stage):
        cycle.step(batch(cycle.global_step))


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


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_packed_resident_compiled_eager_give_the_same_curve(device: str) -> None:
    curves = {}
    for compile in (False, True):
        for storage in ("resident", "packed"):
            cycle = make(device, transform={"compile": compile, "storage": storage}, cycles=3, rule="adam",
                         schedule="linear", sparsity_end=0.75, steps_per_cycle=20, sparsity_start=0.25)  # fmt: skip
            curves[compile, storage] = run(cycle, device=device)
            if compile:
                entries = runner_of(cycle.model).entries.values()
                assert [(len(e.graphs), e.recompiles, e.breaks) for e in entries] == [(1, 0, 0)] * len(entries)
    reference = torch.tensor(curves[False, "resident"])
    for key, curve in curves.items():
        torch.testing.assert_close(torch.tensor(curve), reference, rtol=2e-3, atol=2e-3, msg=str(key))
    assert reference[-1] < reference[0]


def test_bf16_weights_keep_a_float32_theta() -> None:
    torch.manual_seed(0)
    model = fxresu.transform(Net().bfloat16(), compile=False)
    config = CycleConfig(cycles=1, steps_per_cycle=30, sparsity_end=0.5, schedule="constant", rule="adam")
    cycle = ResuCycle(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config,
                      loss=lambda m, b: m(b[0].bfloat16(), b[1]))  # fmt: skip
    until(cycle, "resu")
    cycle.step(batch(0))
    entry = managed_weights(model)["up.0.weight"].entry
    assert entry.theta.dtype == torch.float32
    slots = model.up[0].weight.detach()[~entry.mask()]
    torch.testing.assert_close(slots, entry.theta.detach().flatten().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["train", "resu"])
def test_accumulation_equals_the_large_batch(stage: str) -> None:
    x, y = batch(5, 64)
    results = []
    for parts in (1, 4):
        cycle = make(accumulation=parts, cycles=1, rule="sgd", train_rest=True, optimizer=torch.optim.SGD)
        while cycle.stage != stage:
            for part in torch.arange(64).chunk(parts):
                cycle.step((x[part], y[part]))
        for part in torch.arange(64).chunk(parts):
            cycle.step((x[part], y[part]))
        results.append(cycle.model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rest", [False, True])
def test_clipping_includes_theta(rest: bool) -> None:
    """SGD on θ with a tiny clip: the length of the whole update is lr · clip."""
    cycle = make(cycles=1, rule="sgd", theta_lr=1.0, theta_weight_decay=0.0, grad_clip=1e-3, train_rest=rest,
                 lr=1.0, optimizer=torch.optim.SGD)  # fmt: skip
    for group in cycle.optimizer.param_groups:
        group["lr"] = 1e-3
    until(cycle, "resu")
    for group in cycle.optimizer.param_groups:
        group["lr"] = 1.0
    before = copy.deepcopy(cycle.model.state_dict())
    cycle.step(batch(0))
    moved = math.sqrt(sum((v - before[k]).double().square().sum().item() for k, v in cycle.model.state_dict().items()))
    assert moved == pytest.approx(1e-3, rel=0.02)


def test_autocast_bf16_trains() -> None:
    cycle = make(cycles=1, autocast="bf16", rule="adam")
    curve = run(cycle)
    assert math.isfinite(curve[-1]) and all(p.dtype == torch.float32 for p in cycle.model.parameters())


def test_scheduler_reaches_theta() -> None:
    """Adam's θ takes the learning rate of the optimizer's group, as a scheduler left it."""
    cycle = make(cycles=1, rule="adam", theta_weight_decay=0.0)
    until(cycle, "resu")
    cycle.optimizer.param_groups[0]["lr"] = 0.0
    before = cycle.model.up[0].weight.clone()
    cycle.step(batch(0))
    assert torch.equal(cycle.model.up[0].weight, before)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "resu"])
def test_non_finite_loss_changes_nothing(stage: str) -> None:
    cycle = make(cycles=1, train_rest=True)
    until(cycle, stage)
    before = copy.deepcopy(cycle.model.state_dict())
    x, y = batch(0)
    x[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=rf"loss=nan at step \d+ \(cycle 0, {stage}\)"):
        cycle.step((x, y))
    for key, value in cycle.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in cycle.model.parameters())
    assert math.isfinite(float(cycle.step(batch(1))))


def test_optimizer_of_another_model() -> None:
    model = fxresu.transform(Net(), compile=False)
    with pytest.raises(ConfigError, match="does not hold 4 managed weights.*model.parameters"):
        ResuCycle(model, torch.optim.SGD(Net().parameters(), lr=0.1))


def test_untransformed_model() -> None:
    model = Net()
    with pytest.raises(TypeError, match=r"Net has not been transformed; call fxresu\.transform"):
        ResuCycle(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_configuration_that_contradicts_the_transform() -> None:
    model = fxresu.transform(Net(), granularity="layer", compile=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="granularity='row', but the model was transformed with granularity='layer'"):
        ResuCycle(model, optimizer, CycleConfig())
    with pytest.raises(ConfigError, match="fp16"):
        ResuCycle(model, optimizer, CycleConfig(granularity="layer", autocast="fp16"))


def test_configuration_from_the_transform() -> None:
    model = fxresu.transform(Net(), sparsity=0.6, granularity="layer", compile=False)
    cycle = ResuCycle(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (cycle.config.sparsity_end, cycle.config.granularity) == (0.6, "layer")


def test_model_without_a_scalar_loss() -> None:
    model = fxresu.transform(nn.Sequential(nn.Linear(8, 8)), compile=False)
    cycle = ResuCycle(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="no scalar loss; pass"):
        cycle.step(torch.randn(2, 8))


@pytest.mark.parametrize("form", ["mapping", "tuple", "output"])
def test_batches_and_outputs_people_have(form: str) -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor):
            loss = self.fc(x).square().mean()
            return {"mapping": {"loss": loss}, "tuple": (loss, x), "output": loss}[form]

    model = fxresu.transform(Output(), compile=False)
    cycle = ResuCycle(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert cycle.step({"x": torch.randn(4, 8)}).dim() == 0


def test_step_of_theta_without_a_backward_is_refused() -> None:
    cycle = make(cycles=1)
    until(cycle, "resu")
    with pytest.raises(fxresu.PhaseError, match=r"no managed weight has a gradient of θ"):
        fxresu.step_theta(managed_weights(cycle.model).values(), cycle.config, 0.1, 1)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_resu_and_its_transitions_peak_below_dense(storage: str) -> None:
    """Without activations to speak of: weights, gradients and state of one step, compiled; and the way from stage to
    stage, which happens between a step's event and the next step."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(6)]).cuda()
    fxresu.transform(model, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    steps = {"train_steps": 4, "stabilize_steps": 4, "resu_steps": 4}
    config = CycleConfig(cycles=1, schedule="constant", sparsity_end=0.5, **steps)
    steady: dict[str, int] = {}
    between: dict[str, int] = {}
    cycle = ResuCycle(model, optimizer, config, loss=lambda m, x: m(x).square().mean())
    for _ in range(12):
        stage = cycle.stage
        torch.cuda.reset_peak_memory_stats()
        cycle.on_step(lambda e: (steady.update({e.stage: torch.cuda.max_memory_allocated()}),
                                 torch.cuda.reset_peak_memory_stats()))  # fmt: skip
        cycle.step(torch.randn(16, 4096, device="cuda"))
        if cycle.stage != stage or cycle.finished:
            between[stage] = torch.cuda.max_memory_allocated()
        cycle._listeners["step"].clear()
    assert steady["resu"] < 0.7 * steady["train"], (steady, between)
    assert max(between.values()) <= steady["train"], (steady, between)
    assert state_of(model).base == "sparse"
