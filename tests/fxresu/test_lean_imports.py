"""The compiler is put off until something compiles; each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

EAGER = """
import sys
from fxresu.lean_imports import compiler_is_deferred, defer_compiler, hide_triton
assert defer_compiler() and hide_triton()
import torch
import fxresu
from fxresu.models import GPT, GPTConfig
torch.manual_seed(0)
model = fxresu.transform(GPT(GPTConfig(64, context=16, layers=2, heads=2, width=32)), sparsity=0.5, compile=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
config = fxresu.CycleConfig(cycles=1, steps_per_cycle=6, sparsity_start=0.5, sparsity_end=0.5)
cycle = fxresu.ResuCycle(model, optimizer, config)
tokens = torch.randint(64, (2, 16))
losses = [float(cycle.step((tokens, tokens)).detach()) for _ in range(6)]
assert losses[-1] < losses[0]
print([float(p.detach().double().sum()) for p in model.parameters()])
"""
LEAN = """
heavy = [name for name in ("sympy", "torch._inductor", "torch._dynamo.utils", "triton") if sys.modules.get(name)]
assert compiler_is_deferred() and not heavy, heavy
"""


def output(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_eager_cycle_never_loads_the_compiler_and_has_the_same_numbers() -> None:
    usual = EAGER.replace("assert defer_compiler() and hide_triton()", "")
    assert output(EAGER + LEAN) == output(usual)


@pytest.mark.parametrize("first", ["", "import torch._dynamo.utils", "import torch._inductor.compile_fx"])
def test_what_compiles_afterwards_finds_the_whole_compiler(first: str) -> None:
    code = f"""
{first}
import torch._dynamo
torch._dynamo.config.recompile_limit
graphs = []
compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
with torch.no_grad():
    got, want = compiled(tokens), model._call_impl(tokens)
assert graphs and torch.equal(got, want)
assert not compiler_is_deferred() and sys.modules["torch._dynamo"] is torch._dynamo
utils = sys.modules["torch._dynamo.utils"]
assert torch._dynamo.utils is utils and utils.__spec__.loader.__class__.__name__ == "SourceFileLoader"
assert type(torch._inductor.config.pre_grad_custom_pass).__name__ == "PreGradPass"
optimizer.zero_grad(); optimizer.step()
compiled = torch.compile(lambda x: (x.sin() + 1).sum(), fullgraph=True, backend="aot_eager")
assert torch.allclose(compiled(torch.ones(3)), torch.ones(3).sin().sum() + 3)
"""
    output(EAGER + LEAN + code)


def test_what_was_disabled_before_stays_outside_of_graphs() -> None:
    code = """
@torch.compiler.disable(reason="left to Python")
def aside(x):
    return x + (0 if torch.compiler.is_compiling() else 1)

@torch.compiler.disable
def plain(x):
    return x * 2

assert aside(torch.zeros(1)) == 1 and plain(torch.ones(1)) == 2 and aside.__name__ == "aside" and compiler_is_deferred()
graphs = []
compiled = torch.compile(lambda x: plain(aside(x.sin()).cos()), backend=lambda g, i: graphs.append(g) or g.forward)
x = torch.ones(3)
assert torch.equal(compiled(x), 2 * (x.sin() + 1).cos()) and len(graphs) == 2
"""
    output(EAGER + LEAN + code)


def test_a_submodule_imported_from_another_thread_is_loaded_once() -> None:
    code = """
import concurrent.futures, importlib
names = ["torch._dynamo.utils", "torch._dynamo.config", "torch._dynamo.eval_frame", "torch._dynamo"] * 2
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(importlib.import_module, names))
assert all(sys.modules[name] is module for name, module in zip(names, found)), found
"""
    output(EAGER + LEAN + code)


def test_too_late_is_said() -> None:
    code = "from fxresu.lean_imports import *\nimport torch._dynamo\nprint(defer_compiler(), compiler_is_deferred())"
    assert output(code).split() == ["False", "False"]


def test_triton_stays_where_its_interpreter_is_asked_for() -> None:
    code = "from fxresu.lean_imports import hide_triton\nprint(hide_triton())"
    assert output(code, TRITON_INTERPRET="1").strip() == "False" and output(code).strip() == "True"
