"""θ as an optimizer: schedulers, clipping, accumulation, float16 with a scaler, bfloat16 weights."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from fxresu_cycles import Net, batch, make, run, until
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import fxresu
from fxresu import CycleConfig, MissingGradientWarning, PhaseError, ResuCycle, ThetaOptimizer
from fxresu.cycle import NonFiniteGradientError
from fxresu.errors import ConfigError
from fxresu.model_state import managed_weights
from fxresu.theta import theta_gradients

RESU = {"train_steps": 1, "stabilize_steps": 1, "resu_steps": 12, "cycles": 1, "schedule": "constant",
        "sparsity_end": 0.5}  # fmt: skip


def theta(model: nn.Module) -> torch.Tensor:
    return torch.cat([m.parameter.detach()[~m.entry.mask()].flatten() for m in managed_weights(model).values()])


def rates(cycle: ResuCycle, scheduler: lr_scheduler.LRScheduler | None = None) -> list[float]:
    """Rates at which `sgd` has moved θ, step by step."""
    until(cycle, "resu")
    found = []
    while cycle.stage == "resu" and not cycle.finished:
        before, grads = theta(cycle.model), []
        pull = cycle.theta_optimizer.step

        def step(*args, grads=grads, pull=pull, **kwargs):
            grads.append(torch.cat([g.flatten() for g in theta_gradients(managed_weights(cycle.model).values())]))
            return pull(*args, **kwargs)

        cycle.theta_optimizer.step = step
        last = cycle.meter.steps == cycle.stage_steps(cycle.cycle)["resu"] - 1
        after: list[torch.Tensor] = []
        cycle.on_phase(lambda e, after=after: after.append(theta(cycle.model)) if e.when == "end" else None)
        cycle.step(batch(cycle.global_step))
        cycle.theta_optimizer.step = pull
        moved = before - (after[0] if last else theta(cycle.model))
        found.append(float(moved.norm() / grads[0].norm()))
        if scheduler is not None:
            scheduler.step()
    return found


def options(**changes) -> dict:
    return {**RESU, "rule": "sgd", "theta_weight_decay": 0.0, "theta_lr": 0.5, **changes}


# --- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "callable"])
def test_the_phases_own_schedule(name: str) -> None:
    shape = {
        "constant": lambda i, n: 1.0,
        "linear": lambda i, n: 1 - i / n,
        "cosine": lambda i, n: (1 + math.cos(math.pi * i / n)) / 2,
        "callable": lambda i, n: 0.5**i,
    }[name]
    cycle = make(**options(theta_schedule=shape if name == "callable" else name))
    assert rates(cycle) == pytest.approx([0.5 * shape(i, 12) for i in range(12)], rel=1e-2)


@pytest.mark.parametrize("kind", ["step", "lambda", "cosine", "onecycle", "sequential"])
def test_torchs_schedulers_drive_theta(kind: str, recwarn) -> None:
    cycle = make(**options())
    optimizer = cycle.theta_optimizer
    scheduler = {
        "step": lambda: lr_scheduler.StepLR(optimizer, 4, 0.1),
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i)),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 12),
        "onecycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.7, total_steps=13, cycle_momentum=False),
        "sequential": lambda: lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.8)], [3]
        ),
    }[kind]()
    twin = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    twin_scheduler = {
        "step": lambda: lr_scheduler.StepLR(twin, 4, 0.1),
        "lambda": lambda: lr_scheduler.LambdaLR(twin, lambda i: 1 / (1 + i)),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(twin, 12),
        "onecycle": lambda: lr_scheduler.OneCycleLR(twin, 0.7, total_steps=13, cycle_momentum=False),
        "sequential": lambda: lr_scheduler.SequentialLR(
            twin, [lr_scheduler.ConstantLR(twin, 0.5, 3), lr_scheduler.ExponentialLR(twin, 0.8)], [3]
        ),
    }[kind]()
    expected = []
    for _ in range(12):
        expected.append(twin.param_groups[0]["lr"])
        twin.step()
        twin_scheduler.step()
    assert rates(cycle, scheduler) == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_adam_follows_the_weights_rate_and_its_scheduler() -> None:
    cycle = make(**{**RESU, "rule": "adam", "train_rest": True})
    scheduler = lr_scheduler.LambdaLR(cycle.optimizer, lambda i: 1 / (1 + i))
    seen = []
    while not cycle.finished:
        expected = cycle.optimizer.param_groups[0]["lr"]
        in_resu = cycle.stage == "resu"
        cycle.step(batch(cycle.global_step))
        if in_resu:
            seen.append((cycle.theta_optimizer.param_groups[0]["lr"], expected))
        scheduler.step()
    assert len(seen) == 12 and all(a == b for a, b in seen) and seen[0] != seen[-1]


def test_a_scheduler_on_a_rate_that_follows_is_refused() -> None:
    cycle = make(**{**RESU, "rule": "adam"})
    lr_scheduler.StepLR(cycle.theta_optimizer, 4)
    with pytest.raises(ConfigError, match="theta_lr=None makes θ follow.*give theta_lr"):
        run(cycle)
    with pytest.raises(ConfigError, match="theta_lr=None follows an optimizer with rule='adam'"):
        ThetaOptimizer(cycle.model, CycleConfig(rule="adam"))


def test_the_scheduled_rate_is_in_the_checkpoint(tmp_path) -> None:
    def scheduled() -> tuple[ResuCycle, lr_scheduler.LRScheduler]:
        cycle = make(**options())
        return cycle, lr_scheduler.ExponentialLR(cycle.theta_optimizer, 0.8)

    ends = []
    for stop in (None, 6):
        cycle, scheduler = scheduled()
        for i in range(cycle.total_steps):
            if i == stop:
                cycle.save(tmp_path / "c")
                state = scheduler.state_dict()
                cycle, scheduler = scheduled()
                cycle.load(tmp_path / "c")
                scheduler.load_state_dict(state)
            cycle.step(batch(i))
            scheduler.step()
        ends.append(cycle.model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


# --- clipping and accumulation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_rest", [False, True])
def test_clipping_counts_theta(train_rest: bool) -> None:
    """The step with a clip is the step without one times clip / norm, over θ and the rest together."""
    moves, norms = [], []
    for clip in (None, 1e-3):
        cycle = make(**options(grad_clip=clip, train_rest=train_rest), optimizer=torch.optim.SGD)
        until(cycle, "resu")
        if clip is None:
            state = copy.deepcopy((cycle.state_dict(), cycle.model.state_dict()))
        else:
            cycle.model.load_state_dict(state[1])
        loss = cycle.loss(cycle.model, batch(2))
        loss.backward()
        grads = theta_gradients(managed_weights(cycle.model).values())
        if train_rest:
            managed = {id(m.parameter) for m in managed_weights(cycle.model).values()}
            grads = grads + [p.grad for p in cycle.model.parameters() if p.grad is not None and id(p) not in managed]
        norms.append(float(nn.utils.get_total_norm(grads)))
        cycle.optimizer.zero_grad()
        cycle.theta_optimizer.zero_grad()
        before = theta(cycle.model), cycle.model.head.weight.detach().clone()
        cycle.step(batch(2))
        moves.append((theta(cycle.model) - before[0], cycle.model.head.weight.detach() - before[1]))
    factor = 1e-3 / norms[1]
    torch.testing.assert_close(moves[1][0], moves[0][0] * factor, rtol=0.05, atol=1e-7)
    if train_rest:
        torch.testing.assert_close(moves[1][1], moves[0][1] * factor, rtol=0.05, atol=1e-7)


def test_clip_grad_norm_for_loops_of_ones_own() -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fxresu.set_phase(model, "resu", optimizer=optimizer)
    step = ThetaOptimizer(model, CycleConfig(rule="sgd"))
    model(*batch(0)).backward()
    leaves = step.param_groups[0]["params"]
    every = [p.grad for p in (*model.parameters(), *leaves) if p.grad is not None]
    norm = nn.utils.get_total_norm(every)
    assert len(leaves) == 4
    assert torch.equal(fxresu.clip_grad_norm_(model, 0.01), norm)
    assert float(nn.utils.get_total_norm(every)) == pytest.approx(0.01, rel=1e-3)
    before = theta(model)
    step.step()
    optimizer.step()
    assert not torch.equal(before, theta(model))
    assert all(p.grad is None for p in leaves)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.inf

    for stage in ("train", "resu"):
        cycle = make(**options(grad_clip=1.0, train_rest=True))
        until(cycle, stage)
        before = copy.deepcopy(cycle.model.state_dict())
        plain = cycle.loss
        cycle.loss = lambda model, b, plain=plain: Spike.apply(plain(model, b))
        step = cycle.global_step
        with pytest.raises(NonFiniteGradientError, match=rf"the gradient at step {step} \(cycle 0, {stage}\)"):
            cycle.step(batch(0))
        assert all(torch.equal(v, before[k]) for k, v in cycle.model.state_dict().items())
        assert all(p.grad is None for p in cycle.model.parameters())
        cycle.loss = plain
        cycle.step(batch(0))
        assert cycle.global_step == step + 1


@pytest.mark.parametrize("rule", ["sgd", "adam", "selective"])
def test_accumulated_micro_batches_are_one_batch(rule: str) -> None:
    ends = []
    for parts in (1, 4):
        cycle = make(**options(rule=rule, accumulation=parts, grad_clip=0.5), optimizer=torch.optim.SGD)
        for i in range(10):
            x, y = batch(i, 64)
            for a in range(0, 64, 64 // parts):
                cycle.step((x[a : a + 64 // parts], y[a : a + 64 // parts]))
        assert cycle.global_step == 10
        ends.append(theta(cycle.model))
    torch.testing.assert_close(*ends, rtol=2e-3, atol=2e-4 if rule != "adam" else 2e-3)


# --- float16 and bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("rule", ["selective", "adam", "sgd"])
def test_float16_with_a_scaler_trains_as_float32_does(rule: str, rest: bool) -> None:
    losses = []
    for autocast in (None, "fp16"):
        cycle = make(autocast=autocast, train_rest=rest, rule=rule, grad_clip=1.0)
        losses.append(run(cycle))
        assert cycle.finished and all(s.skipped_updates == 0 for s in cycle.summaries)
        if autocast:
            assert cycle.scaler is not None and cycle.scaler.get_scale() == 65536
    assert losses[1][0] != losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_a_scale_that_is_too_large_is_halved_and_the_step_left_out() -> None:
    for stage in ("train", "stabilize", "resu"):
        cycle = make(autocast="fp16", train_rest=True, rule="adam")
        until(cycle, stage)
        cycle.step(batch(9))
        before, old = copy.deepcopy(cycle.model.state_dict()), cycle.global_step
        counted = cycle.meter.theta_updates
        cycle.scaler.update(2.0**60)
        cycle.step(batch(0))
        assert all(torch.equal(v, before[k]) for k, v in cycle.model.state_dict().items()), stage
        assert cycle.scaler.get_scale() == 2.0**59
        assert cycle.meter.skipped_updates == 1 and cycle.global_step == old + 1
        assert cycle.meter.theta_updates == counted
        cycle.scaler.update(1024.0)
        cycle.step(batch(1))
        assert not all(torch.equal(v, before[k]) for k, v in cycle.model.state_dict().items())
    cycle.scaler.update(2.0**60)
    run(cycle, cycle.total_steps - cycle.global_step)
    assert sum(s.skipped_updates for s in cycle.summaries) > 1, "counted, and shown"


def test_float16_with_frozen_theta_needs_no_scaler_step() -> None:
    """`GradScaler.step` asserts where no parameter has a gradient."""
    cycle = make(autocast="fp16", train_theta=False)
    run(cycle)
    assert cycle.finished


def test_the_loss_scale_is_in_the_checkpoint(tmp_path) -> None:
    cycle = make(autocast="fp16")
    run(cycle, 3)
    cycle.scaler.update(2048.0)
    cycle.save(tmp_path / "c")
    other = make(autocast="fp16")
    other.load(tmp_path / "c")
    assert other.scaler.get_scale() == 2048.0
    assert float(cycle.step(batch(3))) == float(other.step(batch(3)))


def test_a_scaler_of_the_users_own_and_float16_weights() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    cycle = make(**RESU)
    cycle = ResuCycle(cycle.model, cycle.optimizer, cycle.config.replace(autocast="fp16"), scaler=scaler)
    run(cycle, 2)
    assert cycle.scaler is scaler and scaler.get_scale() == 32.0
    half = fxresu.transform(Net().half(), compile=False)
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-3)
    with pytest.raises(ConfigError, match="parameter 'up.0.weight' is float16 itself; keep parameters in float32"):
        ResuCycle(half, optimizer, CycleConfig(autocast="fp16"))


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize("rule", ["selective", "adam", "momentum"])
def test_bfloat16_weights_have_a_float32_theta(rule: str, storage: str) -> None:
    """Steps far below bfloat16's resolution add up in θ, and reach the weights."""
    torch.manual_seed(0)
    model = fxresu.transform(Net().bfloat16(), sparsity=0.5, compile=False, storage=storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    config = CycleConfig(**{**RESU, "resu_steps": 20}, rule=rule, theta_lr=1e-4, theta_init="normal", theta_epsilon=1.0)
    cycle = ResuCycle(model, optimizer, config, loss=lambda m, b: m(b[0].bfloat16(), b[1]).float())
    until(cycle, "resu")
    entries = [m.entry for m in managed_weights(model).values()]
    assert all(e.theta.dtype == torch.float32 and e.m.dtype == torch.float32 for e in entries)
    start = [e.theta.detach().clone() for e in entries]
    for _ in range(19):
        cycle.step(batch(cycle.global_step))
    moved = [(e.theta.detach() - s) for e, s in zip(entries, start)]
    assert any((m != 0).any() for m in moved)
    tiny = torch.cat([(m.abs() < s.abs() * 2**-9)[m != 0] for m, s in zip(moved, start)])
    assert tiny.float().mean() > 0.05, "moves that bfloat16 would have lost"
    for managed in managed_weights(model).values():
        dense = managed.entry.dense(managed.parameter)
        assert dense.dtype == torch.bfloat16
    cycle.step(batch(cycle.global_step))
    assert cycle.finished and all(m.entry.theta is None for m in managed_weights(model).values())
    for managed in managed_weights(model).values():
        assert managed.parameter[~managed.entry.mask()].eq(0).all()


def test_state_dict_of_theta() -> None:
    cycle = make(**options())
    until(cycle, "resu")
    state = cycle.theta_optimizer.state_dict()
    assert state == {"state": {}, "param_groups": [{"lr": 0.5, "params": []}]}
    cycle.theta_optimizer.param_groups[0]["lr"] = 0.1
    cycle.theta_optimizer.load_state_dict(state)
    assert cycle.theta_optimizer.param_groups[0]["lr"] == 0.5
    run(cycle, 20)
    assert cycle.theta_optimizer.param_groups[0]["params"] == []


def test_weights_without_a_gradient_are_told_once() -> None:
    cycle = make(**options())
    until(cycle, "resu")
    cycle.loss = lambda model, b: model.norm(b[0] + model.down[0](model.up[0](b[0]))).square().mean()
    with pytest.warns(MissingGradientWarning) as told:
        cycle.step(batch(0))
        cycle.step(batch(1))
    (text,) = (str(w.message) for w in told if w.category is MissingGradientWarning)
    assert text.startswith("θ of 2 of 4 managed weights got no gradient")
    assert "down.1.weight, up.1.weight (no backward reached them" in text


class Recomputed(nn.Module):
    """Blocks on an embedding, some of which a reentrant checkpoint recomputes; RESU freezes the embedding."""

    def __init__(self, checkpointed: int) -> None:
        super().__init__()
        self.embedding, self.checkpointed = nn.Embedding(9, 16), checkpointed
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=True) if i < self.checkpointed else block(x)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(("checkpointed", "train_rest"), [(2, False), (3, False), (3, True)])
def test_reentrant_checkpoints_behind_a_frozen_embedding_are_told(checkpointed: int, train_rest: bool) -> None:
    model = fxresu.transform(Recomputed(checkpointed), compile=False)
    assert len(managed_weights(model)) == 3
    config = CycleConfig(
        cycles=1, steps_per_cycle=4, split=(0.25, 0.25, 0.5), sparsity_start=0.5, sparsity_end=0.5, rule="adam",
        train_rest=train_rest,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cycle = fxresu.ResuCycle(model, optimizer, config, loss=lambda m, b: m(b).square().mean())
    tokens = torch.randint(9, (2, 5))
    while cycle.stage != "resu":
        cycle.step(tokens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if checkpointed == 3 and not train_rest:
            with pytest.raises(PhaseError, match="no managed weight has a gradient of θ: .* reentrant checkpointing"):
                cycle.step(tokens)
        else:
            cycle.step(tokens)
            cycle.step(tokens)
    told = [str(w.message) for w in caught if w.category is MissingGradientWarning]
    assert len(told) == (checkpointed == 2)
    if told:
        assert "θ of 2 of 3 managed weights got no gradient" in told[0] and "use_reentrant=False" in told[0]
