"""θ updated inside the backward: the bits of the ordinary order, gradients that do not wait, and what is refused."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxresu_cycles import WIDTH, Net, batch, make, run, until
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import fxresu
from fxresu import (
    CheckpointError,
    ConfigError,
    CycleConfig,
    PartialStepWarning,
    PhaseError,
    ResuCycle,
    StreamedAdamW,
    ThetaOptimizer,
    stream_blocks,
)
from fxresu.model_state import managed_weights
from fxresu.theta import theta_gradients

SHORT = {"cycles": 2, "train_steps": 2, "stabilize_steps": 1, "resu_steps": 4, "sparsity_start": 0.5}
IN = {"theta_in_backward": True}
INT4 = {"storage": "packed", "packed_values": "int4"}


def numbers(cycle: ResuCycle) -> list[dict]:
    """What the summaries measured, but for the time."""
    return [{k: v for k, v in s.to_dict().items() if k != "seconds"} for s in cycle.summaries]


def end_of(cycle: ResuCycle, steps: int | None = None) -> tuple[Any, ...]:
    losses = run(cycle, cycle.total_steps * cycle.config.accumulation if steps is None else steps)
    return losses, numbers(cycle), cycle.model.state_dict(), cycle.theta_optimizer.last_stats


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:2] == b[:2] and all(torch.equal(v, b[2][k]) for k, v in a[2].items()) and torch.equal(a[3], b[3])


def grads_of(model: nn.Module) -> list[Tensor]:
    return theta_gradients(managed_weights(model).values())


# --- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"candidates": 0.5, "rule": "adam", "theta_moments": "8bit"}, {"accumulation": 3, "theta_schedule": "cosine"},
    {"rule": "adam", "train_rest": True}, {"rule": "momentum", "granularity": "global", "autocast": "bf16"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("storage", [{}, {"storage": "packed"}, INT4], ids=str)
def test_same_bits_as_the_ordinary_order(storage: dict, options: dict) -> None:
    ends = [end_of(make(transform=storage, **SHORT, **options, theta_in_backward=now)) for now in (False, True)]
    assert same(*ends)
    assert sum(s["theta_updates"] for s in ends[0][1]) == 8


@pytest.mark.parametrize("storage, candidates", [({}, 1.0), ({"storage": "packed", "packed_values": "int8"}, 0.5)])
def test_compiled_as_a_whole(storage: dict, candidates: float) -> None:
    torch.compiler.reset()
    transform = {"compile": {"backend": "aot_eager"}, **storage}
    ends = [
        end_of(make(transform=transform, **SHORT, candidates=candidates, theta_in_backward=now))
        for now in (False, True)
    ]
    assert same(*ends)


def test_bfloat16_weights_and_the_compute_copy() -> None:
    """A float32 θ beside the weight, and a bfloat16 copy that is written with it."""
    torch.compiler.reset()
    ends = []
    for now in (False, True):
        torch.manual_seed(0)
        model = fxresu.transform(Net().bfloat16(), sparsity=0.5, compile=False)
        config = CycleConfig(**SHORT, rule="adam", theta_in_backward=now)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        cycle = ResuCycle(model, optimizer, config, loss=lambda m, b: m(b[0].bfloat16(), b[1]).float())
        ends.append(end_of(cycle))
    assert same(*ends)
    plans = {fxresu.Phase.RESU: fxresu.PhasePlan("resu", "resu", compute_copy="bf16")}
    compiled = {"compile": {"backend": "aot_eager"}, "plans": plans}
    ends = [end_of(make(transform=compiled, **SHORT, autocast="bf16", theta_in_backward=now)) for now in (False, True)]
    assert same(*ends)


@pytest.mark.parametrize("storage, compiled, weights", [
    ("resident", False, 2), ("resident", True, 0), ("packed", False, 2), ("packed", True, 2),
])  # fmt: skip
def test_streamed_blocks_and_optimizer(
    storage: str, compiled: bool, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, recomputed, beside an optimizer that updates in the backward as well, weights away."""
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)
    torch.compiler.reset()
    ends = []
    for now in (False, True):
        model = fxresu.transform(Deep(3), sparsity=0.5, include=["layers.*"], compile=False, storage=storage)
        optimizer = StreamedAdamW(model.parameters(), lr=0.01, chunk=4096, moments="fp32")
        compile = {"backend": "aot_eager"} if compiled else False
        stream_blocks(model, compile=compile, weights=weights, optimizer=optimizer)
        cycle = ResuCycle(model, optimizer, CycleConfig(**SHORT, accumulation=2, rule="adam", theta_in_backward=now))
        losses = [float(cycle.step(batch(i))) for i in range(2 * cycle.total_steps)]
        ends.append((losses, numbers(cycle), model.state_dict(), cycle.theta_optimizer.last_stats))
        assert cycle.finished
    assert same(*ends)


def test_schedulers_and_rates_that_follow() -> None:
    ends = []
    for now in (False, True):
        own = make(**SHORT, rule="sgd", theta_lr=0.5, theta_in_backward=now)
        scheduler = lr_scheduler.ExponentialLR(own.theta_optimizer, 0.7)
        followed = make(**SHORT, rule="adam", theta_in_backward=now)
        other = lr_scheduler.ExponentialLR(followed.optimizer, 0.7)
        for i in range(own.total_steps):
            own.step(batch(i))
            scheduler.step()
            followed.step(batch(i))
            other.step()
        ends.append([*own.model.state_dict().values(), *followed.model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_resume_is_bit_exact_and_the_order_may_change(tmp_path, storage: str) -> None:
    transform = {"storage": storage}
    through = end_of(make(transform=transform, **SHORT, **IN))
    cycle = make(transform=transform, **SHORT, **IN)
    losses = run(cycle, 5)
    cycle.save(tmp_path / "c")
    for now in (True, False):
        other = make(transform=transform, **SHORT, theta_in_backward=now)
        other.load(tmp_path / "c")
        assert other.stage == "resu"
        rest = end_of(other, other.total_steps - 5)
        assert same(through, (losses + rest[0], *rest[1:]))


def test_a_loop_of_ones_own() -> None:
    """Accumulated micro-batches are announced; what they have not announced is named."""
    ends = []
    for now in (False, True):
        model, optimizer, step = by_hand(now)
        for i in range(4):
            with step.accumulate():
                model(*batch(2 * i)).backward()
            before = [m.parameter.detach().clone() for m in managed_weights(model).values()]
            model(*batch(2 * i + 1)).backward()
            moved = [not torch.equal(b, m.parameter) for b, m in zip(before, managed_weights(model).values())]
            assert all(moved) == any(moved) == now and bool(grads_of(model)) != now
            step.step()
            optimizer.zero_grad()
        ends.append((model.state_dict(), step.last_stats))
    assert torch.equal(ends[0][1], ends[1][1])
    assert all(torch.equal(v, ends[1][0][k]) for k, v in ends[0][0].items())


def by_hand(now: bool = True) -> tuple[nn.Module, torch.optim.Optimizer, ThetaOptimizer]:
    torch.manual_seed(0)
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fxresu.set_phase(model, "resu", optimizer=optimizer)
    return model, optimizer, ThetaOptimizer(model, CycleConfig(theta_in_backward=now))


# --- memory ----------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Blocks alike, recomputed in the backward if so wanted."""

    def __init__(self, blocks: int = 6, recomputed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = lambda: nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))  # noqa: E731
        self.layers, self.recomputed = nn.ModuleList(Block(parts()) for _ in range(blocks)), recomputed
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputed else layer(x)
        return nn.functional.cross_entropy(self.head(x), y)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class GradientsAlive(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of storages of θ's shapes that operations make, at the highest point."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        entries = [m.entry for m in managed_weights(model).values()]
        self.shapes = {e.theta_shape for e in entries}
        self.known = {t.untyped_storage()._cdata for e in entries for t in (e.theta, e.m, e.v) if t is not None}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) in self.shapes:
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known and key not in self.live and storage.nbytes() > 8:  # not an anchor's one element
            self.live[key] = storage.nbytes()
            self.peak = max(self.peak, sum(self.live.values()))
            weakref.finalize(storage, self.live.pop, key)


def peak(model: nn.Module, now: bool, compile: object = None) -> tuple[int, list[int]]:
    """(bytes of dθ at the highest point of a backward, bytes of each weight's)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if compile is not None:
        stream_blocks(model, compile=compile, recompute=0.0)  # recomputing would compile under the mode
    fxresu.set_phase(model, "resu", optimizer=optimizer, rule="adam")
    step = ThetaOptimizer(model, CycleConfig(rule="adam", theta_lr=1e-3, theta_in_backward=now))
    for _ in range(2):  # the first one compiles
        loss = model(*batch(0))
        alive = GradientsAlive(model)
        with alive:
            loss.backward()
        step.step()
        del loss
    return alive.peak, [4 * m.entry.theta_shape[0] * m.entry.theta_shape[1] for m in managed_weights(model).values()]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("storage", [{}, {"storage": "packed"}, {"storage": "packed", "candidates": 0.5}], ids=str)
def test_one_gradient_of_theta_is_alive_at_a_time(storage: dict, recomputed: bool) -> None:
    """In eager code; the ordinary order has all of them at the backward's end."""
    for now in (False, True):
        model = fxresu.transform(Deep(recomputed=recomputed), compile=False, include=["layers.*"], **storage)
        highest, each = peak(model, now)
        assert max(each) <= highest <= 2 * max(each) if now else highest >= sum(each)


@pytest.mark.parametrize("storage", ["resident", "packed"])
def test_one_block_s_are_where_blocks_are_compiled(storage: str) -> None:
    torch.compiler.reset()
    for now in (False, True):
        model = fxresu.transform(Deep(), compile=False, include=["layers.*"], storage=storage)
        highest, each = peak(model, now, {"backend": "aot_eager"})
        assert highest <= 1.5 * sum(each) / 6 if now else highest >= sum(each)


def test_compiled_as_a_whole_nothing_is_saved() -> None:
    """All gradients come when the one backward graph ends."""
    torch.compiler.reset()
    model = fxresu.transform(Deep(), compile={"backend": "aot_eager"}, include=["layers.*"])
    highest, each = peak(model, True)
    assert highest >= sum(each)


# --- steps that are not whole ----------------------------------------------------------------------------------------


class Fails(torch.autograd.Function):
    """The identity, whose backward may fail."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Fails.armed:
            raise RuntimeError("out of luck")
        return grad


def test_a_backward_that_fails_says_what_it_has_done() -> None:
    cycle = make(**SHORT, **IN, rule="adam")
    until(cycle, "resu")
    first = cycle.model.up[1]
    first.register_forward_hook(lambda module, args, out: Fails.apply(out))
    weights = managed_weights(cycle.model)
    before = {n: m.parameter.detach().clone() for n, m in weights.items()}
    Fails.armed = True
    step = cycle.global_step
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        cycle.step(batch(9))
    Fails.armed = False
    (note,) = caught.value.__notes__
    assert f"θ of 1 of 4 managed weights had been updated when the backward of step {step} failed" in note
    assert "(down.1.weight)" in note
    assert [n for n, m in weights.items() if not torch.equal(before[n], m.parameter)] == ["down.1.weight"]
    assert cycle.theta_optimizer.abandoned == 1 and not grads_of(cycle.model)
    assert cycle.global_step == step and cycle.accumulated == 0
    run(cycle, cycle.total_steps - step)
    assert cycle.finished and sum(s.theta_updates for s in cycle.summaries) == 8


def test_a_loss_that_is_not_finite_updates_nothing() -> None:
    cycle = make(**SHORT, **IN, accumulation=2)
    until(cycle, "resu")
    before = copy.deepcopy(cycle.model.state_dict())
    cycle.step(batch(1))
    x, y = batch(2)
    with pytest.raises(fxresu.cycle.NonFiniteLossError):
        cycle.step((x * torch.inf, y))
    assert all(torch.equal(v, before[k]) for k, v in cycle.model.state_dict().items())
    assert not grads_of(cycle.model) and cycle.theta_optimizer.abandoned == 0


def test_a_second_gradient_in_one_step_is_an_error() -> None:
    model, _, step = by_hand()
    model(*batch(0)).backward()
    assert set(step.updated) == set(managed_weights(model))
    with pytest.raises(PhaseError, match=r"got a second gradient after this step had updated it.*accumulate\(\)"):
        model(*batch(1)).backward()
    with pytest.raises(CheckpointError, match="has updated θ of 4 weights and is not complete"):
        step.state_dict()
    with pytest.warns(PartialStepWarning, match="updated θ of 4 weights"):
        step.zero_grad()
    assert not grads_of(model) and step.abandoned == 1
    model(*batch(1)).backward()
    step.step()
    assert step.last_stats.shape == (4, 4)


def test_a_step_that_a_loop_skips_is_told() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = fxresu.attach(model, optimizer, {**SHORT, **IN}, transform={"compile": False})
    while run.cycle.stage != "resu":
        model(*batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model(*batch(0)).backward()
    with pytest.warns(PartialStepWarning):
        optimizer.zero_grad()
    run.detach()
    before = copy.deepcopy(model.state_dict())
    model(*batch(0)).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "detached, nothing is updated"


def test_a_step_with_a_scale_comes_too_late() -> None:
    model, _, step = by_hand()
    model(*batch(0)).backward()
    with pytest.raises(ConfigError, match=r"grad_scale=0.5: the backward has updated θ of 4 weights without it"):
        step.step(grad_scale=0.5)
    step.step()
    with step.accumulate():
        model(*batch(0)).backward()
    step.step(grad_scale=0.5)


def test_the_norm_of_a_streamed_optimizer_is_taken_without_an_update() -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = StreamedAdamW(model.parameters(), lr=1e-3, moments="fp32", max_norm=1.0)
    fxresu.set_phase(model, "resu", optimizer=optimizer)
    step = ThetaOptimizer(model, CycleConfig(**IN), follow=optimizer)
    before = copy.deepcopy(model.state_dict())
    with optimizer.measure():
        model(*batch(0)).backward()
    assert not step.updated and not grads_of(model)
    with optimizer.accumulate():
        model(*batch(0)).backward()
    assert not step.updated and len(grads_of(model)) == 4
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- who updates -----------------------------------------------------------------------------------------------------


def test_the_last_optimizer_made_is_the_one() -> None:
    model, _, first = by_hand()
    plain = ThetaOptimizer(model, CycleConfig())
    model(*batch(0)).backward()
    assert not first.updated and len(grads_of(model)) == 4
    plain.step()
    second = ThetaOptimizer(model, CycleConfig(**IN))
    model(*batch(0)).backward()
    assert len(second.updated) == 4 and not first.updated
    second.step()
    del second
    model(*batch(0)).backward()
    assert len(grads_of(model)) == 4, "gone with it"
    assert fxresu.clip_grad_norm_(model, 1.0) > 0


def test_copies_are_not_followed() -> None:
    model, _, step = by_hand()
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    other(*batch(0)).backward()
    assert not step.updated and len(grads_of(other)) == 4
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_statistics_for_scores_update_nothing() -> None:
    """A calibration's backward is not the step's, also where weights are packed."""
    for storage in ("resident", "packed"):
        ends = [
            end_of(make(transform={"storage": storage}, **SHORT, commit_score="gradient", theta_in_backward=now))
            for now in (False, True)
        ]
        assert same(*ends)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"grad_clip": 1.0}, r"theta_in_backward=True; grad_clip=1.0 needs the norm of all gradients first"),
    ({"autocast": "fp16"}, r"theta_in_backward=True; autocast='fp16' scales the loss.*use 'bf16'"),
])  # fmt: skip
def test_the_configuration_refuses(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CycleConfig(**{**IN, **options})


def refused_scaler(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    fxresu.transform(model, compile=False)
    ResuCycle(model, optimizer, CycleConfig(sparsity_end=0.5, **IN), scaler=torch.amp.GradScaler("cpu"))


def refused_plan(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    plan = fxresu.PhasePlan("sparse", "sparse", precision="fp16")
    fxresu.transform(model, compile=False, plans={"sparse": plan})
    ResuCycle(model, optimizer, CycleConfig(sparsity_end=0.5, **IN))


def refused_attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu")
    try:
        fxresu.attach(model, optimizer, {**SHORT, **IN, "train_rest": True}, scaler=scaler)
    finally:
        assert not hasattr(model, "_fxresu_model"), "untouched"


@pytest.mark.parametrize("case, message", [
    (refused_scaler, "config.theta_in_backward=True with scaler=: a scaled gradient cannot be unscaled in time"),
    (refused_plan, "config.theta_in_backward=True with precision='fp16' in a phase's plan"),
    (refused_attach, "scaler: fp16 loss scaling with config.theta_in_backward=True"),
])  # fmt: skip
def test_loss_scales_are_refused(case: Callable[[nn.Module, torch.optim.Optimizer], None], message: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=message):
        case(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def test_clipping_by_hand_is_refused_in_resu_alone() -> None:
    model, _, step = by_hand()
    model(*batch(0)).backward()
    with pytest.raises(ConfigError, match=r"clip_grad_norm_\(max_norm=1.0\) with theta_in_backward=True"):
        fxresu.clip_grad_norm_(model, 1.0)
    step.step()
    dense = fxresu.transform(Net(), compile=False)
    ThetaOptimizer(dense, CycleConfig(**IN))
    dense(*batch(0)).backward()
    assert fxresu.clip_grad_norm_(dense, 1.0) > 0


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "blocks"])
def test_same_bits_and_a_lower_peak_on_a_gpu(compile: bool, dtype: str) -> None:
    """Packed, a share of the inputs, moments in 8 bits: dθ of eight blocks, or of one."""
    ends, peaks, held = [], [], 0
    for now in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        blocks = (Block(nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024))) for _ in range(8))
        model = nn.Sequential(*blocks).to("cuda", torch.bfloat16)
        fxresu.transform(model, sparsity=0.5, candidates=0.5, compile=False, storage="packed", packed_values="int4")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        stream_blocks(model, list(model), compile=compile, recompute=1.0)
        fxresu.set_phase(model, "resu", optimizer=optimizer, rule="adam", moments="8bit", theta_dtype=dtype)
        config = CycleConfig(rule="adam", theta_lr=1e-3, theta_dtype=dtype, theta_in_backward=now)
        step = ThetaOptimizer(model, config)
        x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for i in range(3):
            if i == 2:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                level = torch.cuda.memory_allocated()
            model(x).float().square().mean().backward()
            step.step()
        peaks.append(torch.cuda.max_memory_allocated() - level)
        held = sum(m.entry.theta.nbytes for m in managed_weights(model).values())
        ends.append([m.entry.dense(m.parameter) for m in managed_weights(model).values()])
        del model, optimizer, step
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert peaks[1] < peaks[0] - 0.5 * held
