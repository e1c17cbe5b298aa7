"""`attach`: a loop that keeps forward, backward and step trains to the same bits as the cycle's own `step`."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fxresu_cycles import Net, batch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import fxresu
from fxresu import ConfigError, CycleConfig, PhaseError, ResuCycle
from fxresu.model_state import managed_weights
from fxresu.runner import runner_of

SHORT = {"cycles": 2, "train_steps": 4, "stabilize_steps": 2, "resu_steps": 4, "sparsity_start": 0.5}


def parts(lr: float = 3e-3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def loop(model, optimizer, steps: int, micro: int = 1, scaler=None, scheduler=None, set_to_none: bool = True) -> None:
    """A training loop as people write it."""
    for step in range(steps):
        for part in range(micro):
            loss = model(*batch(step * micro + part)) / micro
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)
        if scheduler is not None:
            scheduler.step()


def driven(options: dict, micro: int = 1, steps: int = 23) -> tuple[nn.Module, ResuCycle]:
    """The same run by `cycle.step`."""
    model, optimizer = parts()
    config = CycleConfig(**SHORT | options | {"accumulation": micro})
    fxresu.transform(model, sparsity=config.sparsity(1), compile=False)
    cycle = ResuCycle(model, optimizer, config)
    for i in range(steps * micro):
        cycle.step(batch(i))
    return model, cycle


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def attached(options: dict | None = None, **kwargs) -> tuple[nn.Module, torch.optim.Optimizer, fxresu.Attached]:
    model, optimizer = parts()
    kwargs = {"transform": {"compile": False}} | kwargs
    return model, optimizer, fxresu.attach(model, optimizer, SHORT | (options or {}), **kwargs)


def global_hooks() -> list[int]:
    gc.collect()
    return [len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)]


def numbers(cycle: ResuCycle) -> list[dict]:
    """What the summaries measured, but for the time."""
    found = [s.to_dict() for s in cycle.summaries]
    return [{k: v for k, v in s.items() if k != "seconds" and not isinstance(v, dict)} for s in found]


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_same_bits_as_the_cycles_own_step(micro: int, rest: bool, clip: float | None) -> None:
    options = {"train_rest": rest, "grad_clip": clip, "rule": "adam"}
    reference, cycle = driven(options, micro)
    model, optimizer, run = attached(options)
    loop(model, optimizer, 23, micro)
    assert same_weights(model, reference)
    assert run.cycle.finished and run.cycle.global_step == 23
    for a, b in zip(numbers(run.cycle), numbers(cycle), strict=True):
        assert a == pytest.approx(b)  # losses as well, read from what the model returned
    assert sum(s.theta_updates for s in run.cycle.summaries) == 8


@pytest.mark.parametrize("micro", [1, 3])
def test_theta_inside_the_backward(micro: int) -> None:
    """The loop says which backward is not the last of its step: the same bits."""
    reference, _ = driven({"rule": "adam", "theta_schedule": "linear"}, micro)
    options = {"rule": "adam", "theta_schedule": "linear", "theta_in_backward": True}
    model, optimizer, run = attached(options)
    for step in range(23):
        for part in range(micro):
            with run.accumulate(part < micro - 1):
                (model(*batch(step * micro + part)) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_weights(model, reference)


def test_scores_with_statistics() -> None:
    """From batches given for it, or from those that the loop trains on."""
    wanda = {"prune_score": "wanda", "calibration_batches": 2}
    for calibration in ([batch(i) for i in (2, 3)], None):
        model, optimizer, run = attached(wanda, calibration=calibration)
        loop(model, optimizer, 23)
        assert run.cycle.finished


def test_zeroed_gradients_do_not_move_frozen_weights() -> None:
    reference, _ = driven({})
    model, optimizer, _ = attached()
    loop(model, optimizer, 23, set_to_none=False)
    assert same_weights(model, reference)


def test_a_skipped_step_leaves_no_gradient_of_theta() -> None:
    model, optimizer, run = attached()
    loop(model, optimizer, 7)
    assert run.cycle.stage == "resu"
    for clear in (optimizer.zero_grad, model.zero_grad):
        model(*batch(0)).backward()
        assert all(m.entry.grad_of_theta() is not None for m in managed_weights(model).values())
        clear()
        assert all(m.entry.grad_of_theta() is None for m in managed_weights(model).values())


def test_a_schedule_of_the_optimizer_is_followed_by_theta() -> None:
    model, optimizer, run = attached({"rule": "adam", "theta_weight_decay": 0.0})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 6 else 0.0)
    loop(model, optimizer, 6, scheduler=scheduler)
    before = {n: m.parameter.clone() for n, m in managed_weights(model).items()}
    assert run.cycle.stage == "resu"
    loop(model, optimizer, 2, scheduler=scheduler)
    assert all(torch.equal(before[n], m.parameter) for n, m in managed_weights(model).items())


@pytest.mark.parametrize("clip", [None, 0.05])
def test_scaled_losses_change_nothing(clip: float | None) -> None:
    """A power of two scales exactly: the run with a GradScaler has the bits of the one without."""
    options = {"train_rest": True, "grad_clip": clip}
    reference, _ = driven(options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    model, optimizer, run = attached(options, scaler=scaler)
    loop(model, optimizer, 23, scaler=scaler)
    assert same_weights(model, reference)
    assert run.cycle.summaries[0].loss_first == pytest.approx(2.4, abs=0.5)


def test_an_overflow_of_theta_alone_is_not_written() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer, run = attached({"train_rest": True}, scaler=scaler)
    loop(model, optimizer, 7, scaler=scaler)
    before = [m.parameter.clone() for m in managed_weights(model).values()]
    scaler.scale(model(*batch(0))).backward()
    next(iter(managed_weights(model).values())).entry.anchor.grad.fill_(float("inf"))
    scaler.step(optimizer)
    assert all(torch.equal(a, m.parameter) for a, m in zip(before, managed_weights(model).values()))
    assert run.cycle.global_step == 8


def test_fp16_without_its_scaler_is_refused() -> None:
    model, _, _ = attached({"train_rest": True})
    with pytest.raises(ConfigError, match="float16 needs scaler="), torch.autocast("cpu", dtype=torch.float16):
        model(*batch(0))


def test_a_compiled_model_is_trained_through_its_own_compilation() -> None:
    model, optimizer = parts()
    compiled = torch.compile(model, backend="aot_eager")
    run = fxresu.attach(compiled, optimizer, SHORT)
    loop(compiled, optimizer, 23)
    reference, _ = driven({})
    assert run.cycle.finished and not runner_of(model).entries
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_steps_fitted_to_the_loop() -> None:
    run = attached({"train_steps": None, "stabilize_steps": None, "resu_steps": None, "cycles": 3}, total_steps=100)[2]
    assert run.cycle.config.steps_per_cycle == 33 and run.cycle.total_steps == 99
    with pytest.raises(ConfigError, match="total_steps=19 is less than the 20 steps of 2 cycles"):
        attached(total_steps=19)


def test_detached_or_untransformed_nothing_is_left() -> None:
    hooks = global_hooks()
    model, optimizer, run = attached()
    names = set(torch.optim.AdamW(Net().parameters()).__dict__)
    loop(model, optimizer, 3)
    with run:
        pass
    assert set(optimizer.__dict__) == names
    assert global_hooks() == hooks
    step = run.cycle.global_step
    loop(model, optimizer, 1)
    assert run.cycle.global_step == step
    again = fxresu.attach(model, optimizer, SHORT)
    fxresu.untransform(model)
    loop(model, optimizer, 1)  # the hooks find a plain model and let it be
    assert again.cycle.global_step == 0
    gone = weakref.ref(again)
    del again, run, model, optimizer
    gc.collect()  # the model, its runner and the run refer to each other
    assert gone() is None
    assert global_hooks() == hooks


def test_resume_in_a_loop_of_ones_own(tmp_path) -> None:
    def go(run: fxresu.Attached, to: int) -> None:
        while run.cycle.global_step < to:
            loss = run.cycle.model(*batch(run.cycle.global_step))
            run.cycle.optimizer.zero_grad()
            loss.backward()
            run.cycle.optimizer.step()

    through = attached()[2]
    go(through, 7)
    through.save(tmp_path / "c", extra={"epoch": 3})
    go(through, 23)
    resumed = attached()[2]
    assert resumed.load(tmp_path / "c") == {"epoch": 3}
    assert resumed.cycle.stage == "resu"
    go(resumed, 23)
    assert same_weights(resumed.cycle.model, through.cycle.model)


@pytest.mark.parametrize(
    "options, kwargs, message",
    [
        ({"accumulation": 2}, {}, "config.accumulation=2: the training loop itself accumulates"),
        ({"autocast": "bf16"}, {}, "config.autocast='bf16': the training loop itself sets autocast"),
        ({"sparsity": 0.5}, {}, "unknown option 'sparsity'"),
        ({}, {"scaler": torch.amp.GradScaler("cpu")}, "needs train_rest=True"),
        ({}, {"transform": {"include": "nothing"}}, "include='nothing' matches no parameter"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_untouched(options: dict, kwargs: dict, message: str) -> None:
    model, optimizer = parts()
    with pytest.raises(ConfigError, match=message):
        fxresu.attach(model, optimizer, SHORT | options, **kwargs)
    assert type(model) is Net and not optimizer._optimizer_step_post_hooks


def test_wrong_partners_are_refused() -> None:
    model, optimizer = parts()
    with pytest.raises(ConfigError, match="model=DataParallel: distributed wrappers"):
        fxresu.attach(nn.DataParallel(model), optimizer, SHORT)
    with pytest.raises(ConfigError, match="holds no parameter of model=Net"):
        fxresu.attach(model, parts()[1], SHORT)
    with pytest.raises(ConfigError, match="does not hold 4 managed weights"):
        fxresu.attach(model, torch.optim.AdamW(model.head.parameters()), SHORT)
    with pytest.raises(ConfigError, match="optimizer=str: expected a torch.optim.Optimizer"):
        fxresu.attach(model, "adamw", SHORT)
    assert type(model) is Net
    fxresu.attach(model, optimizer, SHORT)
    with pytest.raises(ConfigError, match="drives a cycle already"):
        fxresu.attach(model, optimizer, SHORT)


def test_clipping_in_the_loop_sees_theta_too() -> None:
    reference, _ = driven({"grad_clip": 0.05, "train_rest": True, "rule": "adam"})
    model, optimizer, run = attached({"train_rest": True, "rule": "adam"})
    for i in range(23):
        optimizer.zero_grad()
        model(*batch(i)).backward()
        fxresu.clip_grad_norm_(model, 0.05)
        optimizer.step()
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_closure_cannot_be_clipped_from_outside() -> None:
    model, optimizer, _ = attached({"grad_clip": 1.0})

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(*batch(0))
        loss.backward()
        return loss

    with pytest.raises(PhaseError, match=r"grad_clip=1.0: optimizer.step\(closure\)"):
        optimizer.step(closure)
    model, optimizer, run = attached()
    for _ in range(20):
        optimizer.step(closure)
    assert run.cycle.finished


def test_a_forward_only_phase_takes_no_step() -> None:
    model, optimizer, _ = attached()
    fxresu.set_phase(model, "predict")
    with pytest.raises(PhaseError, match="in phase predict, which trains nothing"):
        optimizer.step()
