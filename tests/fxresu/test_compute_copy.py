"""RESU in bfloat16 without casting the weight in every forward, and with the float32 weight in host memory."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import fxresu
from fxresu import CycleConfig
from fxresu.model_state import managed_weights, state_of
from fxresu.passes import DEFAULT_PLANS, Phase
from fxresu.phases import set_phase
from fxresu.runner import runner_of

CONFIG = CycleConfig(rule="adam", theta_lr=0.01)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))


def train(model: nn.Module, steps: int, device: str, autocast: bool = True) -> list[float]:
    losses = []
    record = state_of(model)
    for i in range(steps):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(i)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean()
        loss.backward()
        record.theta_steps += 1
        fxresu.step_theta(managed_weights(model).values(), CONFIG, 0.01, record.theta_steps)
        for p in model.parameters():
            p.grad = None
        losses.append(float(loss.detach()))
    return losses


def in_resu(
    device: str, compile: bool | dict = True, copies: bool = True, **options
) -> tuple[nn.Module, torch.optim.Optimizer]:
    plans = {} if copies else {"resu": dataclasses.replace(DEFAULT_PLANS[Phase.RESU], compute_copy="none")}
    model = fxresu.transform(net().to(device), sparsity=0.5, compile=compile, plans=plans, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    set_phase(model, "resu", optimizer=optimizer, rule="adam")
    return model, optimizer


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def test_the_copy_is_what_autocast_would_make_and_stays_so(device: str) -> None:
    model, _ = in_resu(device)
    with_copy = train(model, 4, device)
    entries = [m for m in managed_weights(model).values()]
    for m in entries:
        assert torch.equal(m.entry.low, m.parameter.detach().to(torch.bfloat16))
    plain, _ = in_resu(device, copies=False)
    without = train(plain, 4, device)
    assert all(m.entry.low is None for m in managed_weights(plain).values())
    assert with_copy == pytest.approx(without, rel=1e-3)
    graph = runner_of(model).entries[state_of(model).state.tag].graphs[0]
    assert [r.weight for r in graph.rewrites] == ["0.weight", "2.weight"], "copies keep the weights' names"


def test_no_copy_without_low_precision(device: str) -> None:
    model, _ = in_resu(device)
    train(model, 1, device, autocast=False)
    assert all(m.entry.low is None for m in managed_weights(model).values())


def test_the_copy_follows_whatever_writes_the_weight(device: str) -> None:
    model, _ = in_resu(device)
    train(model, 1, device)
    managed = next(iter(managed_weights(model).values()))
    address = managed.entry.low.data_ptr()
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    assert torch.equal(managed.entry.low, managed.parameter.detach().to(torch.bfloat16))
    with torch.no_grad():
        managed.parameter.mul_(0.5)
    train(model, 1, device)
    assert torch.equal(managed.entry.low, managed.parameter.detach().to(torch.bfloat16))
    assert managed.entry.low.data_ptr() == address, "graphs hold the copy's address"


def test_cycles_compile_once(device: str) -> None:
    model, optimizer = in_resu(device)
    for _ in range(3):
        train(model, 2, device)
        set_phase(model, "sparse", optimizer=optimizer, rule="adam")
        assert all(m.entry.low is None for m in managed_weights(model).values())
        set_phase(model, "resu", optimizer=optimizer, rule="adam")
    assert [e.recompiles for e in runner_of(model).entries.values()] == [0]


@pytest.mark.parametrize("compile", [False, True])
def test_offload_is_the_same_training(device: str, compile: bool) -> None:
    """Weights that wait in host memory come back exactly: the commit of both storages is equal bit for bit."""
    results = {}
    for storage in ("resident", "offload"):
        model, optimizer = in_resu(device, compile=compile, storage=storage)
        train(model, 4, device)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        away = [m.entry.packed for m in managed_weights(model).values()]
        assert away == [storage == "offload"] * 2
        set_phase(model, "sparse", optimizer=optimizer, rule="adam")
        results[storage] = state, {k: v.clone() for k, v in model.state_dict().items()}
    for mine, theirs in zip(results["offload"], results["resident"]):
        for name in mine:
            if compile:
                assert torch.equal(mine[name], theirs[name]), name
            else:  # eager autocast multiplies by the same bfloat16 values, but sums dθ in another precision
                torch.testing.assert_close(mine[name], theirs[name], rtol=0.02, atol=0.02)


def test_offload_gives_the_device_memory_back(device: str) -> None:
    model, optimizer = in_resu(device, storage="offload")
    bill = fxresu.memory_bill(model, optimizer)
    numel = sum(m.entry.numel for m in managed_weights(model).values())
    assert bill["managed weights"] <= 64 and bill["compute copies"] == 2 * numel
    for m in managed_weights(model).values():
        assert m.entry.host.is_pinned() == (device == "cuda")
        assert bool(torch.isnan(m.parameter).all()), "nobody takes stale values for weights"


def test_offloaded_weights_serve_forward_only_phases_in_full_precision(device: str) -> None:
    model, optimizer = in_resu(device, storage="offload")
    train(model, 2, device)
    reference = net().to(device)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(4, 24, device=device)
    set_phase(model, "correct", optimizer=optimizer)
    torch.testing.assert_close(model(x), reference(x))
    set_phase(model, "resu", optimizer=optimizer)
    assert all(m.entry.packed for m in managed_weights(model).values())
    train(model, 1, device)


def test_offload_survives_copies_and_untransform(device: str) -> None:
    model, _ = in_resu(device, storage="offload")
    train(model, 1, device)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    twin = copy.deepcopy(model)
    assert all(torch.equal(v, state[k]) for k, v in twin.state_dict().items())
    fxresu.untransform(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(torch.isnan(p).any() for p in model.parameters())


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
@pytest.mark.parametrize("rule", ["adam", "selective"])
def test_moments_in_fewer_bytes(device: str, rule: str, moments: str) -> None:
    """They train, count in the bill, and hand their values to the optimizer at the commit."""
    bills = {}
    for storage in ("fp32", moments):
        model = fxresu.transform(net().to(device), sparsity=0.5, compile=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        config = CycleConfig(
            rule=rule,
            theta_moments=storage,
            theta_lr=0.01,
            sparsity_start=0.5,
            sparsity_end=0.5,
            cycles=1,
            steps_per_cycle=30,
            autocast=None,
        )
        cycle = fxresu.ResuCycle(model, optimizer, config, loss=lambda m, x: (m(x) - x[:, :16]).square().mean())
        while cycle.phase is not Phase.RESU:
            cycle.step(torch.randn(8, 24, device=device))
        for _ in range(3):
            cycle.step(torch.randn(8, 24, device=device))
        bills[storage] = fxresu.memory_bill(model, optimizer)["θ moments"]
        while not cycle.finished:
            cycle.step(torch.randn(8, 24, device=device))
        moment = optimizer.state[model[0].weight]["exp_avg_sq"]
        assert torch.isfinite(moment).all() and (moment >= 0).all()
    assert bills[moments] < bills["fp32"] * (0.55 if moments == "bf16" else 0.33)  # tiny rows: scales count


def test_other_values_for_one_call_are_read_and_forgotten(device: str) -> None:
    """Values of functional_call stand where the Parameters do; tensors of one version may hold different values."""
    model, _ = in_resu(device, {"backend": "aot_eager"})
    train(model, 1, device)
    plain, x = fxresu.untransform(copy.deepcopy(model)), torch.randn(8, 24).to(device)

    def check(run) -> None:
        with torch.autocast(device, torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(run(model), run(plain), rtol=2e-2, atol=2e-2)

    for factor in (1.0, 5.0, 7.0):
        values = {name: p.detach() * factor for name, p in plain.named_parameters()}
        check(lambda module, values=values: torch.func.functional_call(module, values, (x,)))
        del values  # the next ones may take their place in memory
    check(lambda module: module(x))


def test_a_step_does_not_hide_what_was_written_before_it(device: str) -> None:
    model, _ = in_resu(device, {"backend": "aot_eager"})
    x = torch.randn(8, 24).to(device)
    with torch.autocast(device, torch.bfloat16):
        model(x).float().square().mean().backward()
    with torch.no_grad():
        for managed in managed_weights(model).values():
            managed.parameter.mul_(3)  # after the copy was made
    fxresu.step_theta(managed_weights(model).values(), CONFIG, 0.01, 1)
    plain = fxresu.untransform(copy.deepcopy(model))
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("storage", ["packed", "offload"])
def test_other_values_for_one_call_are_read_where_weights_are_elsewhere(storage: str, compile: object) -> None:
    model = fxresu.transform(net(), sparsity=0.5, compile=compile, storage=storage)
    set_phase(model, "resu")
    plain, x = fxresu.untransform(copy.deepcopy(model)), torch.randn(8, 24)
    values = {name: p.detach() * 3 for name, p in plain.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = torch.func.functional_call(plain, values, (x,))
        torch.testing.assert_close(torch.func.functional_call(model, values, (x,)), want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_offloaded_float32_weights_take_no_part_in_float32_products(compile: object) -> None:
    model = fxresu.transform(net(), sparsity=0.5, compile=compile, storage="offload")
    set_phase(model, "resu")
    with pytest.raises(fxresu.PhaseError, match=r"keeps float32 weights like 0\.weight .* under torch\.autocast"):
        model(torch.randn(8, 24))
    set_phase(model, "predict")  # in bfloat16 by its plan
    model(torch.randn(8, 24))


def test_averaged_weights_put_in_place_through_data_are_evaluated(device: str) -> None:
    model, _ = in_resu(device, {"backend": "aot_eager"})
    train(model, 1, device)
    weights, x = [m.parameter for m in managed_weights(model).values()], torch.randn(8, 24).to(device)

    def out(module: nn.Module) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16), torch.no_grad():
            return module(x)

    trained = out(model)
    kept, counts = [w.data.clone() for w in weights], [w._version for w in weights]
    for w in weights:
        w.data.mul_(2)
    assert [w._version for w in weights] == counts, "then this test says nothing"
    model.eval()
    torch.testing.assert_close(out(model), out(fxresu.untransform(copy.deepcopy(model))), rtol=2e-2, atol=2e-2)
    for w, values in zip(weights, kept):
        w.data.copy_(values)
    model.train()
    torch.testing.assert_close(out(model), trained, rtol=0, atol=0)


def test_values_exchanged_through_data_are_read(device: str) -> None:
    """As `torch.nn.utils.vector_to_parameters` does."""
    model, _ = in_resu(device, {"backend": "aot_eager"})
    train(model, 1, device)
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    plain, x = fxresu.untransform(copy.deepcopy(model)), torch.randn(8, 24).to(device)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)
