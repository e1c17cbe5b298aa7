"""Any sequence of transitions and steps keeps what must be kept; resident and packed storage agree bit for bit."""

from __future__ import annotations

import torch
from fxresu_testing import loss_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import fxresu
from fxresu import CycleConfig, ThetaOptimizer
from fxresu.calibration import calibrate
from fxresu.mask_change import total_sparsity
from fxresu.masks import kept_total
from fxresu.model_state import managed_weights, state_of
from fxresu.optimizer_state import state_tensors
from fxresu.phases import set_phase

SCORES = ["magnitude", "random", "wanda", "snip"]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return loss_of(model(x)) / 10


class Transitions(RuleBasedStateMachine):
    """Two models, the same but for their storage, through the same operations."""

    @initialize(
        granularity=st.sampled_from(["row", "layer", "global", "2:4-rows", "2:4", "block:4x4"]),
        state=st.sampled_from(["drop", "keep"]),
        rule_=st.sampled_from(["adam", "selective", "momentum", "sgd"]),
        candidates=st.sampled_from([1.0, 0.5]),
        seed=st.integers(0, 1000),
    )
    def build(self, granularity: str, state: str, rule_: str, candidates: float, seed: int) -> None:
        self.pattern, self.keep, self.steps = granularity.startswith("2:4"), state, 0
        self.config = CycleConfig(
            rule=rule_, theta_lr=0.05, granularity=granularity, schedule="constant", sparsity_end=0.5
        )
        self.sides = []
        for storage in ("resident", "packed"):
            torch.manual_seed(seed)
            self.width = 12 if candidates == 1 else 96  # a block of 64 columns, and a short one
            net = nn.Sequential(nn.Linear(self.width, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
            options = {"granularity": granularity, "candidates": candidates, "include": ["0", "4"]}
            model = fxresu.transform(net, storage=storage, compile=False, **options)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
            self.sides.append((model, optimizer, ThetaOptimizer(model, self.config)))
        self.active: list[Tensor] | None = None
        self.train()
        self.prune(0.5, "magnitude")

    @property
    def base(self) -> str:
        return state_of(self.sides[0][0]).base

    def data(self) -> Tensor:
        self.steps += 1
        return torch.randn(5, self.width, generator=torch.Generator().manual_seed(self.steps))

    def statistics(self, model: nn.Module, score: str, x: Tensor):
        return calibrate(model, [x], score=score, loss=loss) if score in ("wanda", "snip") else None

    def target(self, sparsity: float) -> float:
        return 0.5 if self.pattern else sparsity

    @rule()
    def train(self) -> None:
        x = self.data()
        for model, optimizer, theta in self.sides:
            loss(model, x).backward()
            if self.base == "resu":
                theta.step()
            else:
                optimizer.step()
            optimizer.zero_grad()

    @precondition(lambda self: self.base != "resu")
    @rule(sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.9]), score=st.sampled_from(SCORES))
    def prune(self, sparsity: float, score: str) -> None:
        x, sparsity = self.data(), self.target(sparsity)
        for model, optimizer, _ in self.sides:
            old = [m.entry.mask() for m in managed_weights(model).values()]
            before = state_of(model).nominal_sparsity
            statistics = self.statistics(model, score, x)
            change = fxresu.prune(model, optimizer, sparsity=sparsity, score=score, statistics=statistics, seed=3)
            set_phase(model, "sparse", optimizer=optimizer)
            shapes = {n: (m.entry.rows, m.entry.k) for n, m in managed_weights(model).items()}
            assert change.kept + change.resurrected == kept_total(shapes, sparsity, self.config.granularity)
            if old[0] is not None and sparsity >= before:
                assert change.resurrected == 0
            assert change.sparsity == total_sparsity(model)

    @precondition(lambda self: self.base == "sparse")
    @rule(init=st.sampled_from(["normal", "zero", "uniform"]))
    def resurrect(self, init: str) -> None:
        for model, optimizer, _ in self.sides:
            kind = self.config.rule
            set_phase(model, "resu", optimizer=optimizer, theta_init=init, rule=kind, optimizer_state=self.keep)
        self.active = self.active_values(self.sides[0][0])

    @precondition(lambda self: self.base == "resu")
    @rule(method=st.sampled_from(["amnesty", "compare", "wanda"]), score=st.sampled_from(SCORES),
          sparsity=st.sampled_from([0.3, 0.5, 0.8]), ratio=st.sampled_from([0.0, 0.2, 1.0]))  # fmt: skip
    def commit(self, method: str, score: str, sparsity: float, ratio: float) -> None:
        x, sparsity = self.data(), self.target(sparsity)
        for model, optimizer, _ in self.sides:
            before = {n: m.entry.dense(m.parameter).clone() for n, m in managed_weights(model).items()}
            statistics = self.statistics(model, "wanda" if method == "wanda" else score, x)
            change = fxresu.commit(
                model, optimizer, method=method, ratio=ratio, sparsity=sparsity, score=score, statistics=statistics,
                seed=5, rule=self.config.rule, betas=self.config.resolved_theta_betas(),
            )  # fmt: skip
            set_phase(model, "sparse", optimizer=optimizer)
            shapes = {n: (m.entry.rows, m.entry.k) for n, m in managed_weights(model).items()}
            assert change.kept + change.resurrected == kept_total(shapes, sparsity, self.config.granularity)
            for name, managed in managed_weights(model).items():
                mask = managed.entry.mask()
                assert torch.equal(managed.parameter.detach(), before[name] * mask), "what stays keeps its value"
        self.active = None

    @precondition(lambda self: self.base == "resu")
    @rule()
    def discard(self) -> None:
        for model, optimizer, _ in self.sides:
            set_phase(model, "sparse", optimizer=optimizer, leave="discard")
        assert all(torch.equal(a, b) for a, b in zip(self.active, self.active_values(self.sides[0][0])))
        self.active = None

    @precondition(lambda self: self.base != "dense")
    @rule()
    def densify(self) -> None:
        for model, optimizer, _ in self.sides:
            want = {n: m.entry.dense(m.parameter).clone() for n, m in managed_weights(model).items()}
            set_phase(model, "dense", optimizer=optimizer)
            assert all(torch.equal(m.parameter, want[n]) for n, m in managed_weights(model).items())
        self.active = None

    def active_values(self, model: nn.Module) -> list[Tensor]:
        return [m.entry.dense(m.parameter)[m.entry.mask()].clone() for m in managed_weights(model).values()]

    @invariant()
    def both_storages_agree(self) -> None:
        if not hasattr(self, "sides"):
            return
        (a, first, _), (b, second, _) = self.sides
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.equal(x, y), name
        for p, q in zip(a.parameters(), b.parameters()):
            s, t = first.state.get(p, {}), second.state.get(q, {})
            assert s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s)

    @invariant()
    def pruned_are_zero_and_active_ones_frozen(self) -> None:
        if not hasattr(self, "sides"):
            return
        for model, optimizer, _ in self.sides:
            for managed in managed_weights(model).values():
                entry = managed.entry
                if self.base == "sparse":
                    assert managed.parameter[~entry.mask()].eq(0).all()
                    for key, tensor in state_tensors(optimizer, managed.parameter):
                        assert tensor[~entry.mask()].eq(0).all(), key
                if self.base == "resu":
                    self.check_theta(entry)
        if self.base == "resu":
            model = self.sides[0][0]
            assert all(torch.equal(a, b) for a, b in zip(self.active, self.active_values(model)))

    def check_theta(self, entry) -> None:
        """Tensors of θ's shape have room for every candidate, and padding is zero."""
        candidates = int((~entry.mask() & entry.covered()).sum())
        used = entry.gather_theta(torch.ones(entry.rows, entry.k), torch.float32)
        assert int(used.sum()) == candidates <= used.numel() and tuple(used.shape) == entry.theta_shape
        full = used == 0
        for tensor in (entry.theta, entry.m, entry.v):
            assert tensor is None or tensor.detach()[full].eq(0).all()


TestTransitions = Transitions.TestCase
TestTransitions.settings = settings(max_examples=40, stateful_step_count=14)
