"""Phases of a model whose weights wait in host memory: every transition against the one with all weights at hand."""

from __future__ import annotations

import copy
import random
import weakref
from typing import Any

import pytest
import torch
from fxresu_faults import FailAt, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxresu
from fxresu import ConfigError, CycleConfig, ResuCycle, StreamedAdamW, stream_blocks
from fxresu.lanes import HostLanes
from fxresu.model_state import managed_weights, state_of
from fxresu.phases import set_phase
from fxresu.weight_stream import WeightStream

RESIDENT: dict[str, Any] = {}
PACKED = {"storage": "packed"}
PANEL = {"storage": "packed", "candidates": 0.5}
FORMS = [RESIDENT, PACKED, PANEL, {"candidates": 0.5}, {**PANEL, "packed_values": "int4"}]


@pytest.fixture(autouse=True)
def _stream_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(8, width), nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return nn.functional.mse_loss(self.head(h).float(), y.float())


class Run:
    """A transformed model with its optimizer, and weights of the last `away` blocks in host memory."""

    def __init__(
        self, away: int | dict[str, int], blocks: int = 4, dtype: torch.dtype = torch.float32, slots: int = 2,
        compile: object = False, first: bool = False, device: str = "cpu", width: int = 96, **form: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model, self.dtype = Net(blocks, width).to(device, dtype), dtype
        if first:
            self._transform(form)
        self.optimizer = StreamedAdamW(self.model.parameters(), lr=0.01, chunk=4096, moments="fp32")
        self.blocks = stream_blocks(
            self.model, optimizer=self.optimizer, compile=compile, weights=away, slots=slots
        )  # fmt: skip
        if not first:
            self._transform(form)

    def _transform(self, form: dict[str, Any]) -> None:
        fxresu.transform(self.model, sparsity=0.5, include=["layers.*"], compile=False, **form)

    @property
    def stream(self) -> WeightStream:
        assert self.blocks.weights is not None
        return self.blocks.weights

    def cycle(self, **options: Any) -> ResuCycle:
        record = state_of(self.model)
        config = CycleConfig(cycles=2, train_steps=2, stabilize_steps=2, resu_steps=2, sparsity_end=0.5,
                             schedule="constant", candidates=record.candidates, **options)  # fmt: skip
        return ResuCycle(self.model, self.optimizer, config)

    def train(self, count: int = 2) -> None:
        for batch in data(count, self.dtype):
            self.model(*batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def phase(self, name: str, **options: Any) -> None:
        set_phase(self.model, name, optimizer=self.optimizer, **options)

    def values(self) -> dict[str, Tensor]:
        """Weights, masks, θ, moments."""
        found = {n: v.clone() for n, v in self.model.state_dict().items()}
        for name, managed in managed_weights(self.model).items():
            for field in ("bits", "columns", "theta", "m", "v"):
                if (value := getattr(managed.entry, field)) is not None:
                    found[f"{name}.{field}"] = value.detach().clone()
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{i}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
        return found


def data(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    xs = [torch.randn(16, 8) for _ in range(count)]
    return [(x.to(dtype), x[:, :3].sin().to(dtype)) for x in xs]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class OnDevice(TorchDispatchMode):
    """Nothing computes with host memory of weights, as a GPU would not: they are copied, or seen through views. Counts
    the bytes that are allocated inside and alive."""

    def __init__(self, stream: WeightStream | None) -> None:
        super().__init__()
        blocks = [] if stream is None else stream._blocks
        self._hosts = {b.host.untyped_storage().data_ptr() for b in blocks}
        self._known: set[int] = set()
        self.level = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not aliases and func not in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
            for tensor in pytree.tree_leaves((args, kwargs)):
                assert not self._is_host(tensor), f"{func} on host memory"
        result = func(*args, **(kwargs or {}))
        if any(r.alias_info is None for r in func._schema.returns):
            for tensor in pytree.tree_leaves(result):
                self._count(tensor)
        return result

    def _is_host(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._hosts

    def _count(self, tensor: object) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or self._is_host(tensor):
            return
        self._known.add(storage._cdata)
        self.level += storage.nbytes()
        self.peak = max(self.peak, self.level)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.level -= nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())) or "resident")
def test_two_cycles_are_those_with_all_weights_at_hand(form: dict, dtype: torch.dtype) -> None:
    """Losses, weights, masks, θ and moments, bit for bit; and nothing but copies touches the host's memory."""
    whole, away, later, by_phase = (
        Run(0, dtype=dtype, **form),
        Run(4, dtype=dtype, **form),
        Run(3, dtype=dtype, first=True, **form),
        Run({"dense": 1, "sparse": 2, "resu": 4}, dtype=dtype, **form),
    )
    cycles = [r.cycle() for r in (whole, away, later, by_phase)]
    for step, batch in enumerate(data(14, dtype)):
        want = cycles[0].step(batch)
        with OnDevice(away.stream):
            got = cycles[1].step(batch)
        with OnDevice(by_phase.stream):
            assert torch.equal(want, cycles[3].step(batch)), step
        assert torch.equal(want, got) and torch.equal(want, cycles[2].step(batch)), step
        if step in (3, 5, 7):
            assert_same(whole.values(), away.values())
    for run in (away, later, by_phase):
        assert_same(whole.values(), run.values())
    assert all(c.finished for c in cycles)


@pytest.mark.gpu
@pytest.mark.parametrize("number", [4, {"dense": 1, "sparse": 2, "resu": 4}], ids=["all", "by phase"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())) or "resident")
def test_two_cycles_on_a_gpu(form: dict, number: int | dict[str, int]) -> None:
    """Host memory is another device there: what reads a weight that nobody brought fails."""
    whole, away = (Run(n, dtype=torch.bfloat16, device="cuda", **form) for n in (0, number))
    cycles = whole.cycle(), away.cycle()
    for step, (x, y) in enumerate(data(14, torch.bfloat16)):
        want, got = (c.step((x.cuda(), y.cuda())) for c in cycles)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3, msg=lambda m, step=step: f"step {step}: {m}")
    assert all(c.finished for c in cycles)
    for one, other in zip(whole.values().values(), away.values().values(), strict=True):
        torch.testing.assert_close(other.float().cpu(), one.float().cpu(), rtol=0.1, atol=0.02)


@pytest.mark.gpu
def test_peak_of_transitions_on_a_gpu() -> None:
    """Sixteen blocks of 8.4 MB in bfloat16, all away: no transition comes near what all of them would take."""
    torch.cuda.empty_cache()
    run = Run(16, blocks=16, dtype=torch.bfloat16, device="cuda", width=1024, **PANEL, packed_values="int4")
    weights = sum(m.entry.numel for m in managed_weights(run.model).values()) * 2
    for name in ("sparse", "resu", "sparse", "resu", "dense"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.phase(name)
        torch.cuda.synchronize()
        held = max(before, torch.cuda.memory_allocated())
        assert torch.cuda.max_memory_allocated() - held < weights / 2, name


@pytest.mark.parametrize("form", [RESIDENT, PANEL], ids=["resident", "panel"])
def test_every_move_between_phases(form: dict) -> None:
    runs = Run(0, **form), Run(4, **form), Run({"dense": 1, "resu": 4, "predict": 3}, **form)
    moves = [("sparse", {}), ("sparse", {"sparsity": 0.7}), ("resu", {}), ("predict", {}), ("resu", {}),
             ("sparse", {"leave": "discard"}), ("resu", {"moments": "bf16"}), ("dense", {}),
             ("resu", {"sparsity": 0.4}), ("sparse", {"amnesty": 0.3, "sparsity": 0.6}), ("dense", {})]  # fmt: skip
    for name, options in moves:
        for run in runs:
            with OnDevice(run.blocks.weights):
                run.phase(name, **options)
                if name in ("dense", "sparse"):
                    run.train(1)
        for run in runs[1:]:
            assert_same(runs[0].values(), run.values())


@pytest.mark.parametrize("form", [RESIDENT, PANEL], ids=["resident", "panel"])
def test_every_phase_has_its_number_of_blocks_away(form: dict) -> None:
    run = Run({"dense": 1, "sparse": 2, "resu": 4}, **form)
    for name, away in (("dense", 1), ("sparse", 2), ("resu", 4), ("sparse", 2), ("predict", 4), ("sparse", 2)):
        run.phase(name)
        assert run.stream.away == 4, name  # the transition has all the room
        if name != "predict":
            run.train(1)
        with torch.no_grad():  # an evaluation is no other phase
            run.model(*data(1)[0])
        assert run.stream.away == away, name
        assert sum(run.stream.comes_and_goes(b) for b in run.blocks.blocks) == away, name


@pytest.mark.parametrize("form", FORMS[:3], ids=["resident", "packed", "panel"])
def test_a_transition_takes_a_few_weights_beside_what_the_phases_hold(form: dict) -> None:
    """Twenty-four blocks. References on the CPU need up to 60 bytes for each coordinate of one weight."""
    run = Run(24, blocks=24, **form)
    run.train(1)
    weight = 96 * 192
    for name, options in (("sparse", {}), ("resu", {}), ("sparse", {}), ("resu", {}), ("dense", {})):
        with OnDevice(run.stream) as tape:
            run.phase(name, **options)
            after = tape.level
        # All weights are 48 times as large, in four bytes.
        assert tape.peak - max(after, 0) <= 64 * weight, name
        run.stream.send_home()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 4), st.sampled_from([RESIDENT, PANEL]))
def test_order_of_copies_does_not_matter(seed: int, slots: int, form: dict) -> None:
    results = []
    for eager in (None, random.Random(seed)):
        run = Run(4, slots=slots, **form)
        run.stream.lanes = HostLanes(lambda eager=eager: 0 if eager is None else eager.randrange(3))
        cycle = run.cycle()
        for batch in data(8):
            cycle.step(batch)
            for slot in run.stream._vacant:
                poison(run.stream.lanes, slot)
        results.append(run.values())
    assert_same(*results)


@pytest.mark.parametrize("form", [RESIDENT, PANEL, FORMS[-1]], ids=["resident", "panel", "int4"])
@pytest.mark.parametrize(("start", "target", "options"), [
    ("dense", "sparse", {}), ("sparse", "resu", {}), ("resu", "sparse", {}), ("resu", "sparse", {"leave": "discard"}),
    ("resu", "dense", {}),
])  # fmt: skip
def test_memory_that_runs_out_leaves_the_phase_before(form: dict, start: str, target: str, options: dict) -> None:
    # Writing moments is the part of a transition that does not fail on a GPU, whose allocator has its memory ready.
    run = Run(4, blocks=4, **form)
    run.train(1)
    if start != "dense":
        run.phase(start)
    want = run.values()
    twin = Run(4, blocks=4, **form)
    twin.train(1)
    if start != "dense":
        twin.phase(start)
    with FailAt(caching=True) as count:
        twin.phase(target, **options)
    assert count.seen or options, "giving θ up takes no memory"
    for number in {min(1, count.seen), min(2, count.seen), count.seen // 3, count.seen // 2} - {0}:
        with pytest.raises(torch.OutOfMemoryError), FailAt(number, caching=True):
            run.phase(target, **options)
        assert str(state_of(run.model).state.plan.phase) == start
        assert_same(want, run.values())
    run.phase(target, **options)
    assert_same(twin.values(), run.values())


@pytest.mark.parametrize("form", [RESIDENT, PANEL, FORMS[-1]], ids=["resident", "panel", "int4"])
@pytest.mark.parametrize("stop", [3, 5, 9])
def test_a_checkpoint_goes_on_bit_for_bit(form: dict, stop: int, tmp_path) -> None:
    batches = data(14)
    first = Run(4, **form)
    cycle = first.cycle()
    for batch in batches[:stop]:
        cycle.step(batch)
    cycle.save(tmp_path / "run")
    for batch in batches[stop:]:
        cycle.step(batch)
    second = Run(4, **form)
    other = second.cycle()
    other.load(tmp_path / "run")
    for batch in batches[stop:]:
        other.step(batch)
    assert_same(first.values(), second.values())


def test_a_warm_start_looks_at_one_weight_after_another() -> None:
    runs = Run(0), Run(4)
    state = {n: v * (torch.rand(v.shape) < 0.6) for n, v in runs[0].model.state_dict().items()}
    for run in runs:
        run.model.load_state_dict(state)
        with OnDevice(run.blocks.weights):
            fxresu.warm_start(run.model, run.optimizer)
        run.phase("sparse")
        run.train(1)
    assert_same(runs[0].values(), runs[1].values())


def test_state_dicts_and_untransform_while_weights_are_away() -> None:
    for form in (RESIDENT, PANEL):
        run, whole = Run(4, **form), Run(0, **form)
        for one in (run, whole):
            one.train(1)
            one.phase("resu")
        state = copy.deepcopy(whole.model.state_dict())
        with OnDevice(run.stream):
            run.model.load_state_dict(state)
        assert_same(state, run.model.state_dict())
        run.phase("sparse")
        whole.phase("sparse")
        assert_same(whole.values(), run.values())
        run.phase("resu")
        whole.phase("resu")
        for one in (run, whole):
            fxresu.untransform(one.model)
        run.train(2)
        whole.train(2)
        assert_same(dict(whole.model.state_dict()), dict(run.model.state_dict()))
        run.blocks.remove()
        assert_same(dict(whole.model.state_dict()), dict(run.model.state_dict()))


def test_removed_blocks_give_their_weights_back_in_resu() -> None:
    run, whole = Run(4, **PANEL), Run(0, **PANEL)
    for one in (run, whole):
        one.phase("resu")
    run.blocks.remove()
    assert all(m.entry.stream is None for m in managed_weights(run.model).values())
    for one in (run, whole):
        one.phase("sparse")
        one.train(1)
    assert_same(whole.values(), run.values())


def test_blocks_alike_share_a_compilation_in_every_phase() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = Run(4, compile={"backend": counter, "fullgraph": True}, **PANEL)
    cycle, seen = run.cycle(), []
    whole = Run(0, **PANEL).cycle()
    for batch in data(14):
        torch.testing.assert_close(cycle.step(batch), whole.step(batch), rtol=1e-4, atol=1e-5)
        seen.append((cycle.stage, counter.frame_count))
    assert cycle.finished and counter.frame_count == 4, seen
    # Dense, sparse, RESU, and RESU of the first block, whose input needs no gradient.


def test_what_needs_several_weights_at_a_time_is_refused() -> None:
    for options, message in (
        ({"granularity": "global"}, "granularity='global' with stream_blocks"),
        ({"storage": "offload"}, "storage='offload' with stream_blocks"),
    ):
        run = Run(4, **options)
        before = run.values()
        with pytest.raises(ConfigError, match=message):
            run.phase("sparse")
        with pytest.raises(ConfigError, match=message):
            ResuCycle(run.model, run.optimizer)
        if "granularity" in options:
            with pytest.raises(ConfigError, match=message):
                fxresu.prune(run.model, run.optimizer)
        assert_same(before, run.values())
        run.blocks.remove()
        run.phase("sparse")
    run = Run(2)
    with pytest.raises(ConfigError, match="statistics of inputs or gradients"):
        fxresu.calibrate(run.model, data(1), score="wanda")
    with pytest.raises(ConfigError, match="statistics of inputs or gradients"):
        run.cycle(prune_score="wanda")
    packed = Run(0, **PACKED)
    packed.phase("resu")
    packed.blocks.remove()
    with pytest.raises(ConfigError, match="packed weights have nothing to bring"):
        stream_blocks(packed.model, optimizer=packed.optimizer, compile=False, weights=2)
