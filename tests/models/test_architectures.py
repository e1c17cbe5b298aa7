"""Architectures of the zoo: correct in the phases, and with the counts that docs/MODELS.md shows."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import pytest
from fxresu_coverage import FORWARD, TRAINING, Coverage, cover
from fxresu_zoo import Architecture, architectures

MEASURED = json.loads((Path(__file__).parents[2] / "tools" / "coverage" / "measured.json").read_text())
ZOO = {a.name: a for a in architectures()}
# Rows in the phases other than RESU: cheap ones, each with a pass, an operand or a break of its own.
ALL_PHASES = (
    "GPT-2", "Mixtral", "ResNet", "nn.MultiheadAttention", "nn.LSTM between linears", "Shared and tied weights",
    "Graph breaks", "Experts by bmm and baddbmm",
)  # fmt: skip
INDUCTOR = (("nn.MultiheadAttention", "sparse"), ("nn.MultiheadAttention", "predict"), ("GPT (the demo's)", "resu"))


def _same_versions() -> bool:
    """Counts are those of the versions that were measured: a later transformers may have other modules."""
    of = MEASURED["versions"]
    return all(importlib.metadata.version(p).partition("+")[0] == of[p] for p in ("torch", "transformers"))


def _check(architecture: Architecture, found: dict[str, Coverage]) -> None:
    measured = MEASURED["rows"].get(architecture.name, {}).get("phases", {})
    for phase, coverage in found.items():
        if phase not in measured:
            pytest.skip(f"not measured yet: tools/coverage/measure --only '{architecture.name}'")
        want = {k: v for k, v in measured[phase].items() if k != "error"}
        if _same_versions():
            counts = coverage.counts()
            if architecture.by_values:
                counts |= {k: want[k] for k in ("graphs", "breaks", "compiles")}
            assert counts == want, "tools/coverage/measure --only measures a row again"
        else:
            assert coverage.rewritten * want["managed"] >= coverage.managed * want["rewritten"]


def _get(name: str) -> Architecture:
    if ZOO[name].missing:
        pytest.skip(ZOO[name].missing)
    return ZOO[name]


@pytest.mark.parametrize("name", ZOO)
def test_resu(name: str) -> None:
    architecture = dataclasses.replace(_get(name), inductor=False)
    _check(architecture, cover(architecture, ("resu",)))


@pytest.mark.parametrize("name", ALL_PHASES)
def test_other_phases(name: str) -> None:
    architecture = dataclasses.replace(_get(name), inductor=False)
    _check(architecture, cover(architecture, tuple(p for p in TRAINING + FORWARD if p != "resu")))


@pytest.mark.parametrize(("name", "phase"), INDUCTOR)
def test_compiled_by_inductor(name: str, phase: str) -> None:
    architecture = dataclasses.replace(_get(name), inductor=True)
    _check(architecture, cover(architecture, (phase,)))
