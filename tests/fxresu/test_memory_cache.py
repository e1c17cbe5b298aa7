"""What the allocator of a GPU is predicted to hold beside tensors."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import fxresu
from fxresu import block_depth, memory_predict
from fxresu.memory_bill import CACHE, STAGES, MemoryBill
from fxresu.memory_cache import PHASES, _Device, cached_bytes, layout_of, traced_phases
from fxresu.memory_static import Standing, WeightBytes
from fxresu.models import GPT, GPTConfig
from fxresu.rehearsal import Trace
from fxresu.trace_unrolling import peak_of

_MIB = 1 << 20


def _gpt(layers: int = 2, vocabulary: int = 512, width: int = 128) -> tuple[GPT, tuple[torch.Tensor, ...]]:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocabulary, context=64, layers=layers, heads=4, width=width))
        tokens = torch.empty(4, 64, dtype=torch.int64)
    return model, (tokens, tokens)


def _bill(layers: int = 2, **options: object) -> MemoryBill:
    model, inputs = _gpt(layers)
    return fxresu.predict_memory(model, inputs, **{"compile": False, "device": "cuda", **options})


def test_the_bill_has_a_row() -> None:
    bill = _bill()
    rows = dict(bill.rows())
    assert rows[CACHE] == [s.cached for s in bill.stages] and all(s.cached > 0 for s in bill.stages)
    for stage in bill.stages:
        assert bill.total(stage) - bill.needed(stage) == stage.cached
        assert bill.needed(stage) == stage.tensors + sum(bill.overhead.values())
    assert any(line.startswith(CACHE) for line in str(bill).splitlines()) and "cache</td>" in bill._repr_html_()
    again = MemoryBill.from_dict(json.loads(json.dumps(bill.to_dict())))
    assert [s.cached for s in again.stages] == rows[CACHE] and str(again) == str(bill)


def test_a_cpu_has_none() -> None:
    assert all(s.cached == 0 for s in _bill(device="cpu").stages) and CACHE not in str(_bill(device="cpu"))


def test_a_stage_is_predicted_alike_alone_and_among_others() -> None:
    whole = _bill()
    for stage in STAGES:
        assert _bill(phases=stage)[stage] == whole[stage]


def test_a_budget_needs_no_room_for_the_cache() -> None:
    bill = _bill(phases="dense")
    dense = bill["dense"]
    assert dense.cached > 0 and bill.peak == bill.total(dense)
    fits = dataclasses.replace(bill, budget=bill.needed(dense))
    assert fits.over_budget == () and f"without the {CACHE}" in str(fits)
    assert dataclasses.replace(bill, budget=bill.needed(dense) - 1).over_budget == ("dense",)
    model, inputs = _gpt()
    plan = fxresu.plan_memory(model, int(1.001 * max(map(_bill().needed, _bill().stages))), inputs, compile=False,
                              device="cuda", optimizer_state="drop")  # fmt: skip
    assert all(s.cached == 0 for s in plan.bill.stages) and plan.costs == ()


@pytest.mark.parametrize("storage", ["resident", "packed", "offload"])
def test_tensors_that_are_replayed_are_those_of_the_bill(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Standing] = {}

    def keep(standings: dict[str, Standing], *rest: object) -> dict[str, int]:
        seen.update(standings)
        return dict.fromkeys(STAGES, 0)

    monkeypatch.setattr(memory_predict, "cached_bytes", keep)
    _bill(storage=storage, autocast="bf16", candidates=0.5, moments="8bit")
    assert set(seen) == set(PHASES)
    for standing in seen.values():
        assert sum(map(sum, layout_of(standing).values())) == sum(standing.parts.values())


def test_phases_before_a_stage_are_traced() -> None:
    assert traced_phases(["dense", "prune"]) == ("dense",)
    assert traced_phases(["commit"]) == ("dense", "sparse", "resu")
    assert traced_phases(STAGES) == PHASES


# A training by hand: one weight of 24 MiB, in pages of 20, and a step that takes 60 MiB, then 30 and 50.
_STEP = Trace(((0, 60 * _MIB), (0, -60 * _MIB), (1, 30 * _MIB), (2, 50 * _MIB), (1, -30 * _MIB), (2, -50 * _MIB)), 6)


def _standing(phase: str, weights: int = 1) -> Standing:
    found = tuple(
        WeightBytes(f"blocks.{i}.w", 6 * _MIB, 0, {"managed weights": 24 * _MIB},
                    tensors={"managed weights": (24 * _MIB,)})
        for i in range(weights)
    )  # fmt: skip
    return Standing(phase, {"managed weights": 24 * _MIB * weights}, found, {})


def test_gaps_of_a_step_by_hand() -> None:
    standings = {phase: _standing(phase) for phase in PHASES}
    found = cached_bytes(standings, {"dense": _STEP}, 0)
    # 24 + 60 = 84 of 100 MiB are mapped; 30 leave 30 of the 60, and 50 go there with what is mapped for them: 24 + 30
    # + 50 = 104 of 120.
    assert found == {"dense": 16 * _MIB, "prune": found["prune"]}


def test_compiled_steps_have_a_row() -> None:
    bill = _bill(compile=True, autocast="bf16")
    assert all(s.cached > 0 for s in bill.stages) and CACHE not in bill.settings


def test_copies_come_with_the_first_step_of_resu_and_stay_until_its_end() -> None:
    bill = _bill(compile=True, autocast="bf16")
    copies = {s.name for s in bill.stages if s.parts["compute copies"]}
    assert copies == {"resu", "predict", "correct", "commit", "drop masks"}


def test_steps_that_do_not_follow_from_short_ones_have_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_depth, "unrolled", lambda *traces: None)
    bill = _bill(layers=11, compile=True, phases="dense")
    assert bill["dense"].cached == 0 and "not predicted" in bill.settings[CACHE]
    assert not any(line.startswith(CACHE) for line in str(bill).splitlines()[3:])


@pytest.mark.parametrize("options", [{"autocast": "bf16"}, {"accumulation": 2}])
def test_a_deep_model_is_as_if_it_were_rehearsed_whole(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Trace]] = []
    monkeypatch.setattr(memory_predict, "cached_bytes", lambda standings, traces, workspace: found.append(traces))
    for rehearse in (memory_predict.rehearse_short, lambda model, run, *_: memory_predict.rehearse_whole(model, run)):
        monkeypatch.setattr(memory_predict, "rehearse_short", rehearse)
        model, inputs = _gpt(11, vocabulary=8192, width=512)
        with pytest.raises(TypeError, match="subscript"):  # of what stands for the replay's results
            fxresu.predict_memory(model, inputs, compile=True, device="cuda", phases="dense", **options)
    unrolled, whole = (traces["dense"] for traces in found)
    assert _allocations(unrolled) == _allocations(whole) and peak_of(unrolled) == peak_of(whole)
    device = [_Device(0, {}) for _ in found]
    for each, trace in zip(device, (unrolled, whole)):
        each.step(trace)
    assert device[0].allocator.peak_reserved == pytest.approx(device[1].allocator.peak_reserved, rel=0.02)


def _allocations(trace: Trace) -> list[int]:
    return [size for _, size in trace.events if size > 0]


# MB of the whole device, and of it what the allocator held beside tensors, as seen on an H200 with torch 2.11.
_SEEN = {
    "dense": (6879.5, 446.3), "prune": (2421.0, 73.4), "sparse": (6892.1, 447.6), "start RESU": (2718.8, 30.4),
    "resu": (6539.8, 457.4), "predict": (4455.2, 208.2), "correct": (3972.9, 307.8), "commit": (2748.1, 22.6),
    "drop masks": (2746.0, 23.5),
}  # fmt: skip


def test_gpt2_on_a_large_card() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(50304, context=1024, layers=12, heads=12, width=768))
        tokens = torch.empty(4, 1024, dtype=torch.int64)
    overhead = {"CUDA context and libraries": "718.1MB", "cuBLAS workspace": "32MiB"}
    bill = fxresu.predict_memory(
        model, (tokens, tokens), autocast="bf16", compile=False, device="cuda", overhead=overhead
    )
    for stage in bill.stages:
        device, cached = _SEEN[stage.name]
        assert bill.total(stage) / 1e6 == pytest.approx(device, rel=0.02), stage.name
        assert stage.cached / 1e6 == pytest.approx(cached, abs=45), stage.name
