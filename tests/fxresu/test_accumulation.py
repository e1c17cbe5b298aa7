"""Gradient accumulation: exact against one batch, in every phase, whatever a window holds when it closes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fxresu_cycles import Net, batch, make, until
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig, ResuCycle
from fxresu.accumulation import Window
from fxresu.errors import ConfigError
from fxresu.losses import NonFiniteLossError
from fxresu.model_state import managed_weights
from fxresu.passes import Phase, PhasePlan
from fxresu.phases import set_phase

STAGES = ["train", "stabilize", "resu"]


def double(compile: object = False, **options: object) -> ResuCycle:
    """In float64, with plain gradient descent for the weights and for θ."""
    torch.manual_seed(0)
    model = fxresu.transform(Net().double(), sparsity=0.5, compile=compile)
    defaults = dict(cycles=1, train_steps=2, stabilize_steps=2, resu_steps=2, schedule="constant", sparsity_end=0.5,
                    rule="sgd", train_rest=True, theta_lr=0.1, theta_weight_decay=0.0)  # fmt: skip
    return ResuCycle(model, torch.optim.SGD(model.parameters(), lr=0.1), CycleConfig(**defaults | options))


def data(step: int, size: int = 48) -> tuple[Tensor, Tensor]:
    x, y = batch(step, size)
    return x.double(), y


def steps(cycle: ResuCycle, sizes: list[int], count: int, weighted: bool = False) -> None:
    """`count` updates of micro-batches of these sizes."""
    for number in range(count):
        x, y = data(number, sum(sizes))
        for part in torch.arange(sum(sizes)).split(sizes):
            cycle.step((x[part], y[part]), **({"weight": len(part)} if weighted else {}))


def equal(first: ResuCycle, second: ResuCycle) -> None:
    # dθ is gathered in float32; everything else is float64 throughout.
    tolerance = 1e-12 if first.meter.theta_updates == 0 and first.stage == "stabilize" else 1e-7
    other = second.model.state_dict()
    for key, value in first.model.state_dict().items():
        torch.testing.assert_close(value, other[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("updates", [2, 4, 6], ids=["dense", "sparse", "resu"])
@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_equal_micro_batches_are_one_batch(updates: int, compile: object) -> None:
    whole, parts = double(compile), double(compile, accumulation=4)
    steps(whole, [48], updates)
    steps(parts, [12] * 4, updates)
    assert parts.global_step == whole.global_step == updates
    equal(whole, parts)
    first, second = ([s.loss_last for s in c.summaries] for c in (whole, parts))
    assert first == pytest.approx(second, rel=1e-6) and len(first) == updates // 2


@pytest.mark.parametrize("updates", [2, 4, 6], ids=["dense", "sparse", "resu"])
def test_micro_batches_of_different_sizes_by_their_tokens(updates: int) -> None:
    whole = double()
    parts = double(accumulation=3, accumulation_normalization="tokens")
    steps(whole, [48], updates)
    steps(parts, [4, 30, 14], updates, weighted=True)
    equal(whole, parts)
    plain = double(accumulation=3)
    steps(plain, [4, 30, 14], updates)
    different = max((v - plain.model.state_dict()[k]).abs().max() for k, v in whole.model.state_dict().items())
    assert different > 1e-4, "a plain mean is another gradient"


@pytest.mark.parametrize("updates", [2, 4, 6], ids=["dense", "sparse", "resu"])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_partial_window_is_normalised_by_what_it_holds(updates: int, tokens: bool) -> None:
    whole = double()
    parts = double(accumulation=4, accumulation_normalization="tokens" if tokens else "mean")
    sizes = [20, 28] if tokens else [24, 24]
    for number in range(updates):
        whole.step(data(number))
        x, y = data(number)
        for part in torch.arange(48).split(sizes):
            assert parts.accumulated < 2
            parts.step((x[part], y[part]), **({"weight": len(part)} if tokens else {}))
        assert parts.accumulated == 2 and parts.global_step == number
        assert parts.flush() and not parts.flush()
    equal(whole, parts)


def test_sums_are_scaled_and_not_normalised() -> None:
    whole = double()
    summed = double(accumulation=4, accumulation_normalization="sum", accumulation_scale=1 / 48)
    summed.loss = lambda model, b: model(*b) * len(b[1])
    steps(whole, [48], 2)
    steps(summed, [10, 12, 20, 6], 2)
    equal(whole, summed)
    assert summed.summaries[0].loss_last == pytest.approx(whole.summaries[0].loss_last)


def test_clipping_and_moments_see_the_gradient_of_the_step() -> None:
    for clip in (None, 1e-2):
        results = []
        for parts in (1, 4):
            cycle = make(accumulation=parts, cycles=1, rule="adam", train_rest=True, grad_clip=clip)
            while cycle.stage != "resu" or cycle.meter.steps < 3:
                x, y = batch(cycle.global_step)
                for part in torch.arange(64).chunk(parts):
                    cycle.step((x[part], y[part]))
            results.append(copy.deepcopy(cycle.model.state_dict()))
        for key, value in results[0].items():
            torch.testing.assert_close(value, results[1][key], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_float16_scales_once_however_many_micro_batches(stage: str) -> None:
    results = []
    for parts in (1, 4):
        options = {"accumulation": parts, "rule": "sgd", "train_rest": True, "autocast": "fp16"}
        cycle = make(cycles=1, optimizer=torch.optim.SGD, **options)
        cycle.updates.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        until_stage(cycle, stage, parts)
        x, y = batch(5)
        for part in torch.arange(64).chunk(parts):
            cycle.step((x[part], y[part]))
        assert cycle.scaler.get_scale() == 1024.0 and cycle.meter.skipped_updates == 0
        results.append(cycle.model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-2, atol=1e-3)


def until_stage(cycle: ResuCycle, stage: str, parts: int) -> None:
    while cycle.stage != stage:
        x, y = batch(cycle.global_step)
        for part in torch.arange(64).chunk(parts):
            cycle.step((x[part], y[part]))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_resu_accumulates_in_compact_form(compile: object) -> None:
    cycle = make(accumulation=3, cycles=1, transform={"compile": compile})
    until(cycle, "resu")
    cycle.step(batch(0))
    cycle.step(batch(1))
    weights = managed_weights(cycle.model)
    assert cycle.accumulated == 2 and all(m.parameter.grad is None for m in weights.values())
    grads = [m.entry.grad_of_theta() for m in weights.values()]
    assert [tuple(g.shape) for g in grads] == [m.entry.theta_shape for m in weights.values()]
    assert {g.dtype for g in grads} == {torch.float32}
    held = sum(g.nbytes for g in grads)
    dense = sum(m.parameter.nbytes for m in weights.values())
    assert held < dense * 0.8
    found = fxresu.inspect(cycle.model, batch(0), phase="resu", sparsity=0.5)
    (row,) = (r for r in found.memory if r.component == "gradients")
    assert row.phase == held and row.plain == dense


def test_bf16_gradients_are_kept_in_float32_where_resu_accumulates() -> None:
    for accumulation, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        plan = PhasePlan(Phase.RESU, "resu", activations="needed", optimizer_state="drop", accumulation=accumulation)
        cycle = make(cycles=1, autocast="bf16", transform={"plans": {"resu": plan}})
        until(cycle, "resu")
        assert {m.entry.anchor.dtype for m in managed_weights(cycle.model).values()} == {dtype}


# --- windows and phases ----------------------------------------------------------------------------------------------


def test_each_phase_has_its_own_window() -> None:
    plans = {
        "dense": PhasePlan(Phase.DENSE, "dense", accumulation=2),
        "sparse": PhasePlan(Phase.SPARSE, "sparse", accumulation=3),
    }
    model = fxresu.transform(Net(), plans=plans, compile=False)
    steps = {"train_steps": 2, "stabilize_steps": 1, "resu_steps": 2}
    config = CycleConfig(cycles=1, schedule="constant", sparsity_end=0.5, **steps)
    cycle = ResuCycle(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    seen = []
    while not cycle.finished:
        seen.append((cycle.stage, cycle.accumulated))
        cycle.step(batch(len(seen)))
    assert seen == [
        ("train", 0), ("train", 1), ("train", 0), ("train", 1),
        ("stabilize", 0), ("stabilize", 1), ("stabilize", 2), ("resu", 0), ("resu", 0),
    ]  # fmt: skip
    assert [s.steps for s in cycle.summaries] == [2, 1, 2]


def test_a_phase_changed_by_hand_drops_the_window() -> None:
    cycle = make(accumulation=3, cycles=1)
    cycle.step(batch(0))
    cycle.step(batch(1))
    before = copy.deepcopy(cycle.model.head.weight.detach())
    set_phase(cycle.model, "sparse", optimizer=cycle.optimizer, sparsity=0.5)
    cycle.step(batch(2))
    assert cycle.accumulated == 1 and cycle.global_step == 0
    assert torch.equal(cycle.model.head.weight, before), "nothing of the dropped window was applied"
    grad = cycle.model.head.weight.grad.clone()
    cycle.model.zero_grad()
    (cycle.model(*batch(2)) / 3).backward()
    torch.testing.assert_close(cycle.model.head.weight.grad, grad)
    assert cycle.meter.read()["dropped_micro_batches"] == 2


def test_a_loss_that_is_no_number_drops_the_window() -> None:
    cycle = make(accumulation=3, cycles=1)
    cycle.step(batch(0))
    x, y = batch(1)
    with pytest.raises(NonFiniteLossError):
        cycle.step((x * float("nan"), y))
    assert cycle.accumulated == 0 and all(p.grad is None for p in cycle.model.parameters())


@pytest.mark.parametrize(
    ("options", "weight", "said"),
    [
        ({"accumulation": 2}, 3, r"weight=3: accumulation_normalization='mean' takes none"),
        ({"accumulation_normalization": "tokens"}, None, r"weight=None: .*needs the tokens of each micro-batch"),
        ({"accumulation_normalization": "tokens"}, 0, r"weight=0: "),
        ({"accumulation_normalization": "tokens"}, True, r"weight=True: "),
        ({"accumulation_normalization": "tokens"}, float("inf"), r"weight=inf: "),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(options: dict, weight: object, said: str) -> None:
    cycle = make(**options)
    before = copy.deepcopy(cycle.model.state_dict())
    with pytest.raises(ConfigError, match=said):
        cycle.step(batch(0), weight=weight)
    assert cycle.accumulated == 0 and all(torch.equal(v, before[k]) for k, v in cycle.model.state_dict().items())


@pytest.mark.parametrize("normalization", ["mean", "tokens"])
def test_scaling_and_normalizing_both_is_refused(normalization: str) -> None:
    with pytest.raises(ConfigError, match=rf"accumulation_scale=0.5.*'{normalization}' divides already"):
        CycleConfig(accumulation=2, accumulation_normalization=normalization, accumulation_scale=0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": {"accumulation_normalization": "tokens"}}, "config.accumulation_normalization='tokens'"),
        ({"transform": {"plans": {"dense": PhasePlan(Phase.DENSE, "dense", accumulation=4)}}},
         r"plans\['dense'\].accumulation=4: the training loop itself accumulates"),
    ],
    ids=str,
)  # fmt: skip
def test_a_loop_of_ones_own_accumulates_by_itself(options: dict, said: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=said):
        fxresu.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    assert not hasattr(type(model), "fxresu_base")


def test_windows_weigh_losses_like_gradients() -> None:
    window = Window("here", 3, "tokens")
    scaled = [float(window.add(torch.tensor(v, dtype=torch.float64), w)) for v, w in ((1.0, 10), (2.0, 30), (4.0, 20))]
    assert window.full
    assert sum(scaled) * window.remedy == pytest.approx((10 + 60 + 80) / 60) == float(window.loss())


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_accumulation_under_cuda_graphs() -> None:
    results = []
    for compile in (False, {"mode": "reduce-overhead"}):
        torch.manual_seed(0)

        class Wide(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 10)

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(self.down(F.gelu(self.up(x))), y)

        model = fxresu.transform(Wide().cuda(), sparsity=0.5, compile=compile, include="*.weight")
        config = CycleConfig(cycles=1, train_steps=3, stabilize_steps=3, resu_steps=3, schedule="constant",
                             sparsity_end=0.5, rule="sgd", train_rest=True, accumulation=4)  # fmt: skip
        cycle = ResuCycle(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
        generator = torch.Generator().manual_seed(1)
        for _ in range(9 * 4):
            x = torch.randn(32, 64, generator=generator)
            cycle.step((x.cuda(), x.argmax(1).remainder(10).cuda()))
        assert cycle.finished
        results.append(copy.deepcopy(model.state_dict()))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=2e-3, atol=2e-4)
