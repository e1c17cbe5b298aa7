"""The backend: cache keys, the user's own `torch.compile`, trace artifacts, mixed phases."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fxresu_testing import EAGER, Net, check_gradients, in_phase

import fxresu
from fxresu import kernels, passes
from fxresu.passes import DEFAULT_PASSES, DEFAULT_PLANS, MixedPlansError, Phase, backend
from fxresu.runner import runner_of


@pytest.mark.parametrize("changed", ["kernels/managed.py", "passes/insert_casts.py", "passes/_compat.py"])
def test_the_salt_changes_with_the_text_of_any_kernel_or_pass(changed: str, tmp_path: Path, monkeypatch) -> None:
    before = backend.salt()
    folders = {"kernels": Path(kernels.__file__).parent, "passes": Path(passes.__file__).parent}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def salted() -> str:
        kernels._salt.kernel_salt.cache_clear()
        backend.salt.cache_clear()
        monkeypatch.setattr(kernels._salt, "__file__", str(tmp_path / "kernels" / "_salt.py"))
        monkeypatch.setattr(backend, "__file__", str(tmp_path / "passes" / "backend.py"))
        return backend.salt()

    try:
        assert salted() == before, "the same text in another folder"
        with (tmp_path / changed).open("a") as file:
            file.write("# another formula\n")
        assert salted() != before
    finally:
        kernels._salt.kernel_salt.cache_clear()
        backend.salt.cache_clear()


def test_the_salt_reaches_inductors_cache_keys(monkeypatch) -> None:
    from torch._inductor import compile_fx

    seen = []

    def compiler(gm, inputs, **kwargs):
        seen.append(torch.compiler.config.cache_key_tag)
        return gm

    monkeypatch.setattr(compile_fx, "compile_fx", compiler)
    model = fxresu.transform(Net())
    model(torch.randn(2, 16))
    assert seen == [torch.compiler.config.cache_key_tag + backend.salt()]


@pytest.mark.parametrize("phase", ["dense", "sparse", "resu"])
def test_inductor_gives_the_gradients_of_the_float64_reference(phase: str) -> None:
    model = fxresu.transform(Net())
    in_phase(model, phase)
    check_gradients(model, phase, torch.randn(3, 16))
    (entry,) = runner_of(model).entries.values()
    assert len(entry.graphs) == 1
    assert entry.breaks == 0


def test_packed_with_inductor() -> None:
    model = in_phase(fxresu.transform(Net(), storage="packed"), "resu")
    check_gradients(model, "resu", torch.randn(3, 16))
    (entry,) = runner_of(model).entries.values()
    assert {r.after for r in entry.graphs[0].rewrites} == {"fxresu.linear_packed"}


@pytest.mark.parametrize("phase", ["sparse", "resu", "predict"])
def test_the_users_own_compile_gets_the_same_passes(phase: str) -> None:
    model = in_phase(fxresu.transform(Net()), phase)
    before = len(backend.user_records)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, 16)
    if phase == "predict":
        out = compiled(x)
        assert not out.requires_grad
        torch.testing.assert_close(out, model(x), rtol=0.05, atol=0.05)
    else:
        check_gradients(model, phase, x, run=compiled)
    (record,) = backend.user_records[before:]
    assert record.plan_tag == DEFAULT_PLANS[Phase(phase)].tag
    assert [r.after for r in record.rewrites] == ["fxresu.linear"] * 4
    assert [r.weight for r in record.rewrites] == [f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")]


def test_a_graph_that_comes_from_the_cache_is_recorded_too() -> None:
    from torch._dynamo.utils import counters

    model, x = in_phase(fxresu.transform(Net(), compile=False), "resu"), torch.randn(3, 16)
    before = len(backend.user_records)
    for runs in (1, 2):
        torch._dynamo.reset()
        counters.clear()
        check_gradients(model, "resu", x, run=torch.compile(model, fullgraph=True))
        assert len(backend.user_records) == before + runs
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert backend.salt() in torch.compiler.config.cache_key_tag, "a changed kernel must not get an old gradient"


def test_the_runners_graphs_are_not_recorded_as_the_users() -> None:
    before = len(backend.user_records)
    model = fxresu.transform(torch.nn.Sequential(torch.nn.Linear(3, 3)))
    model(torch.randn(2, 3))
    torch.compile(torch.nn.Linear(3, 3))(torch.randn(2, 3))
    assert len(backend.user_records) == before


def test_installing_the_hook_twice_keeps_one_and_the_users_own_pass() -> None:
    from torch._inductor import config

    from fxresu.passes import install_pre_grad_pass

    install_pre_grad_pass()
    first = config.pre_grad_custom_pass
    install_pre_grad_pass()
    assert config.pre_grad_custom_pass is first
    calls = []
    with config.patch(pre_grad_custom_pass=calls.append):
        install_pre_grad_pass()
        installed = config.pre_grad_custom_pass
        graph = torch.fx.symbolic_trace(torch.nn.ReLU()).graph
        installed(graph)
        assert calls == [graph]
        assert installed.uuid() is None, "the user's pass has no uuid, so caches must be bypassed"


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(), Net()

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_two_models_in_different_phases_in_one_graph_are_refused() -> None:
    pair = Pair()
    fxresu.transform(pair.first, compile=False)
    fxresu.transform(pair.second, compile=False)
    in_phase(pair.first, "sparse")
    x = torch.randn(2, 16)
    with pytest.raises(Exception, match="different phases.*dense/dense.*sparse/sparse") as info:
        torch.compile(pair)(x)
    causes = [info.value, info.value.__cause__, getattr(info.value, "inner_exception", None)]
    assert any(isinstance(c, MixedPlansError) for c in causes)
    in_phase(pair.second, "sparse")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(pair)(x), pair(x), rtol=1e-5, atol=1e-5)


def test_keep_text_keeps_the_code_of_passes_that_changed_something() -> None:
    model = fxresu.transform(Net(recompute="on"), compile={**EAGER, "keep_text": True})
    model(torch.randn(2, 16))
    (record,) = next(iter(runner_of(model).entries.values())).graphs
    first, _ = record.passes
    assert first.text_before.count(" = torch.ops.fxresu.managed(") == 4
    assert first.text_after.count(" = torch.ops.fxresu.linear.default(") == 4
    assert " = torch.ops.fxresu.managed(" not in first.text_after


def test_trace_artifacts_show_every_pass_that_changed_something(tmp_path: Path) -> None:
    script = """
        import torch, fxresu
        from fxresu.phases import set_phase
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        fxresu.transform(model, compile={"backend": "aot_eager"})
        set_phase(model, "predict")
        model(torch.randn(2, 8))
    """
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, timeout=300)
    text = "".join(p.read_text() for p in tmp_path.glob("*.log"))
    for index, name in enumerate(p.name for p in DEFAULT_PASSES):
        changed = name in ("rewrite_linear", "insert_casts", "discard_activations")
        for when in ("before", "after") if changed else ():
            assert f'"fxresu_{index:02d}_{name}_{when}"' in text
    assert "torch.ops.fxresu.managed" in text
    assert "torch.ops.fxresu.linear" in text
