"""Every script of tools/bench in a tiny form on the CPU, the formulas of its limits, and the rendered document."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
QUICK = ["--warmup", "2", "--steps", "2", "--compiler", "aot_eager"]


@pytest.fixture(autouse=True)
def _bench_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import `benchlib` from their own folder."""
    monkeypatch.syspath_prepend(str(BENCH))


def script(name: str) -> ModuleType:
    """A script under a name of its own: `kernels` would be taken for a package of that name."""
    key = f"bench_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, BENCH / f"{name}.py")
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    """The scripts set float32's precision for the process that is theirs."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def lib(name: str) -> ModuleType:
    return importlib.import_module(f"benchlib.{name}")


def cases_of(name: str, argv: list[str], tmp_path: Path) -> dict[str, Any]:
    """Rows of a run of the script, none of which failed."""
    out = tmp_path / "result.json"
    assert script(name).main([*argv, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["environment"]["torch"] == torch.__version__
    cases = document["cases"]
    assert cases and not any("error" in row for row in cases.values())
    return cases


LAYER = ["--size", "64", "--batch", "4", "--many", "16", "--copies", "2", *QUICK]


def test_layer_loops_and_graphs(tmp_path: Path) -> None:
    only = ["published/*/dense/eager", "published/*/resu/compiled", "published/loop/naive/compiled"]
    only += [f"step/graph/{name}" for name in ("dense", "sparse", "naive", "resu, 8-bit moments", "resu, selective")]
    only += ["published/graph/*/few tokens", "step/graph/*few tokens"]
    only += ["published/loop/resu/graphed", "step/loop/sparse/graphed"]
    cases = cases_of("layer", [*LAYER, "--groups", "published", "step", "--only", *only], tmp_path)
    assert {"published/loop/resu/compiled", "step/graph/sparse", "step/graph/resu, selective"} <= cases.keys()
    assert {"published/loop/resu/graphed", "step/loop/sparse/graphed"} <= cases.keys()
    for name, row in cases.items():
        assert row["median_ms"] > 0 and max(row["errors"].values()) < 1e-4, name
    loop = cases["published/loop/dense/eager"]
    assert loop["median_ms"] == pytest.approx(loop["forward"]["median_ms"] + loop["backward"]["median_ms"])


def test_what_only_names_first_runs_first(tmp_path: Path) -> None:
    only = ["published/loop/resu/eager", "published/loop/dense/*"]
    cases = cases_of("layer", [*LAYER, "--groups", "published", "--only", *only], tmp_path)
    assert list(cases)[0] == "published/loop/resu/eager" and list(cases)[1].startswith("published/loop/dense/")


def test_rounds_take_turns_and_the_middle_one_is_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["published/loop/dense/eager", "published/loop/resu/eager"]
    cases = cases_of("layer", [*LAYER, "--groups", "published", "--rounds", "3", "--only", *only], tmp_path)
    ran = [line.split(" {")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("published/")]
    assert ran == only * 3
    for row in cases.values():
        assert len(row["rounds_ms"]) == 3 and row["median_ms"] == sorted(row["rounds_ms"])[1]


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("layer").main(["--rounds", "0"])
    assert "--rounds 0: at least 1" in capsys.readouterr().err


def test_drained_loops_take_longer_over_a_compiled_layer() -> None:
    """Why a run of such loops needs no compiled dense case to be shown: it is so in every committed run with both."""
    seen = 0
    for document in lib("figures").load(BENCH / "results"):
        for group in ("published/loop/dense/compiled", "step/loop/dense"):
            eager = f"{group.removesuffix('/compiled')}/eager"
            times = [document["cases"].get(name, {}).get("median_ms") for name in (eager, group)]
            if document["benchmark"] == "layer" and None not in times:
                seen += 1
                assert times[0] < times[1], document["file"]
    assert seen >= 6


def test_a_round_that_fails_is_the_row() -> None:
    rows = [{"median_ms": 1.0}, {"error": "E: no"}, {"median_ms": 3.0}]
    assert lib("results").middle(rows) == {"error": "E: no"}


@pytest.mark.gpu
def test_bus_rates_are_those_of_a_bus() -> None:
    rates = lib("timing").bus_rates()
    assert rates.keys() == {"in", "out", "both"} and all(1e9 < rate < 1e12 for rate in rates.values())
    assert rates["both"] <= 1.1 * min(rates["in"], rates["out"])


def test_layer_of_many_tokens_state_and_sweep(tmp_path: Path) -> None:
    only = ["tokens/AMP/resu, a=1", "tokens/AMP/resu, a=1, packed*", "tokens/bf16/dense", "state/resu, fp32*"]
    only += ["tokens/bf16/resu, a=1, θ bf16"]
    only += ["state/resu, 8-bit*", "sweep/64/4/fp32/*"]
    groups = ["--groups", "tokens", "state", "sweep", "--widths", "64", "--tokens", "4", "--only", *only]
    shares = ["--sparsities", "0.5", "0.9", "--alphas", "1", "0.25"]
    cases = cases_of("layer", [*LAYER, *groups, *shares], tmp_path)
    assert {"tokens/AMP/resu, a=1, packed int4", "tokens/bf16/resu, a=1, θ bf16"} <= cases.keys()
    packed, resident = cases["tokens/AMP/resu, a=1, packed"]["bill"], cases["tokens/AMP/resu, a=1"]["bill"]
    assert packed["managed weights"] < resident["managed weights"]
    state = cases["state/resu, fp32 moments"]
    assert state["candidates"] == 64 * 64 // 2 and state["mask_bytes"] == 64 * 64 // 8
    low = cases["state/resu, 8-bit moments"]["bill"]
    assert low["θ moments"] < state["bill"]["θ moments"] / 3
    assert "sweep/64/4/fp32/resu, s=0.9, a=0.25" in cases
    assert all(row["limit_ms"] > 0 for name, row in cases.items() if name.startswith("sweep"))


def captured_and_eager(method: str, precision: str) -> tuple[Any, Any]:
    """The same number of steps of two equal layers: three and one before the capture, then three replays."""
    layers = lib("layers")
    layer = layers.Layer(method, 64, 96, 8, precision, "eager", copies=2, rule="sgd", input_gradient=True)
    replayed, eager = (layers.LayerStep(layer, capturable=True) for _ in range(2))
    replay = replayed.captured()
    for _ in range(3):
        replay()
    for _ in range(7):
        eager.full()
    return replayed, eager


def check_same_steps(method: str, precision: str) -> None:
    replayed, eager = captured_and_eager(method, precision)
    start = lib("layers").LayerStep(eager.layer)
    for index in range(2):
        got, want, before = (step._effective(index) for step in (replayed, eager, start))
        moved = (want - before).abs().max()
        assert moved > 0
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(moved))


@pytest.mark.parametrize("method", ["dense", "sparse", "resu"])
def test_what_is_captured_is_the_whole_step(method: str) -> None:
    check_same_steps(method, "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "AMP"])
@pytest.mark.parametrize("method", ["dense", "sparse", "resu"])
def test_what_is_captured_is_the_whole_step_on_a_gpu(method: str, precision: str) -> None:
    check_same_steps(method, precision)


def test_layer_detects_a_wrong_gradient() -> None:
    layers = lib("layers")
    step = layers.LayerStep(layers.Layer("resu", 64, 64, 4, mode="eager"))
    assert max(step.check().values()) < 1e-5
    entry = step.weights[0].entry
    accumulate = entry.accumulate
    entry.accumulate = lambda grad: accumulate(grad * 1.01)
    with pytest.raises(AssertionError, match="dW"):
        step.check()


SMALLEST = [
    "resu/AMP/compiled/a=0.25/frozen/8bit/offload/tiled",
    "resu/AMP/compiled/a=0.25/frozen/8bit/offload/recompute@0.8/tiled",
    "resu/bf16/compiled/a=0.25/frozen/8bit/tiled",
    "resu/bf16/compiled/a=0.25/frozen/8bit/θ bf16/tiled",
]


@pytest.mark.parametrize("size", ["tiny-gpt2", "tiny-llama", "tiny"])
def test_model(size: str, tmp_path: Path) -> None:
    # More on the small GPT; of the others what depends on the kind of model.
    only = ["naive/AMP/*", "resu/AMP/compiled/a=0.25/frozen"]
    if size == "tiny":
        only += ["dense/AMP/graphs", "sparse/bf16/*", "resu/AMP/*/a=1/trained", "*/selective", "*/AMP/*/packed"]
        only += ["resu/bf16/compiled/a=1/frozen", "resu/AMP/*/8bit/offload"]
    if size == "tiny-gpt2":  # transformers' models alone have the tiled loss
        only += SMALLEST
    cases = cases_of("model", ["--size", size, *QUICK, "--only", *only], tmp_path)
    assert {"naive/AMP/compiled", "resu/AMP/compiled/a=0.25/frozen"} <= cases.keys()
    assert size != "tiny-gpt2" or set(SMALLEST) <= cases.keys()
    for name, row in cases.items():
        assert row["losses"][1] < row["losses"][0] and row["errors"]["gradient"] < 0.1, name


@pytest.mark.gpu
def test_model_on_a_gpu(tmp_path: Path) -> None:
    """Compiled by Inductor, with peaks, captured, and with torch.compile's own CUDA graphs."""
    only = ["--only", "dense/AMP/compiled", "resu/AMP/*/a=0.25/frozen", "resu/bf16/compiled/a=1/frozen"]
    cases = cases_of("model", ["--size", "tiny", "--warmup", "4", "--steps", "3", *only], tmp_path)
    for name, row in cases.items():
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"] > 0, name
        assert "graph_error" not in row, name
        assert "/graphs/" in name or row["graph"]["median_ms"] > 0, name


def test_model_detects_a_wrong_gradient() -> None:
    steps, models = lib("steps"), lib("models")
    step = steps.ModelStep(steps.Variant("dense", mode="eager"), models.SIZES["tiny"], 2, 0.5, "aot_eager")
    assert step.check()["gradient"] < 0.1
    weight = step.model.get_parameter("model.blocks.0.attention.qkv.weight")
    weight.register_hook(lambda grad: grad * 1.2)
    with pytest.raises(AssertionError, match="gradient"):
        step.check()


def test_variants_of_models_have_names_of_their_own() -> None:
    names = [variant.name for variant in script("model").variants()]
    assert len(set(names)) == len(names) and set(SMALLEST) <= set(names)


def test_kernels(tmp_path: Path) -> None:
    cases = cases_of("kernels", ["--shapes", "64x96", "--sparsities", "0.5", "--rotated", "9999", *QUICK], tmp_path)
    assert len(cases) >= 7
    # Actives in bf16, θ in fp32, one bit a coordinate, and the bf16 result.
    assert cases["compose/64x96/s=0.5"]["useful_bytes"] == 64 * 96 * (1 + 2 + 1 / 8 + 2)


def test_few_tokens(tmp_path: Path) -> None:
    cases = cases_of("few_tokens", ["--shapes", "64x96", "--tokens", "2", "--rotated", "9999", *QUICK], tmp_path)
    assert {"cublas/64x96/2:4/2", "compose/64x96/0.9/2", "decode_16x4/64x96/0.5/2"} <= cases.keys()
    assert "decode_pairs_16/64x96/2:4/2" in cases and "decode_pairs_16/64x96/0.5/2" not in cases


def test_semistructured(tmp_path: Path) -> None:
    shape = ["--width", "64", "--hidden", "128", "--blocks", "2", "--tokens", "16"]
    cases = cases_of("semistructured", [*shape, "--only", "dense/AMP", "*2:4*/AMP", *QUICK], tmp_path)
    assert all(cases[f"sparse, 2:4{kernel}/AMP"]["graph"]["median_ms"] > 0 for kernel in ("", ", cusparselt"))


@pytest.mark.gpu
def test_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script("bus"), "PIECE", 2**20)
    cases = cases_of("bus", QUICK, tmp_path)
    assert len(cases) == 10 and all(row["median_ms"] > 0 for row in cases.values())


def test_bus_is_listed_as_a_run_without_targets(tmp_path: Path) -> None:
    names = _listed(script("bus"), [])
    text = render(tmp_path, run_of("bus", dict.fromkeys(names, {"median_ms": 2.5, "bytes_per_s": 5e10})))
    assert all(f"| `{name}` |" in text for name in names)


def test_compile_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The child's measurement here, and the processes that the parent would start."""
    module = script("compile_time")
    assert module.main(["--child", "resu, a=1", "--size", "tiny", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["compile_s"] > 0
    folders, threads = [], []

    def start(command: list[str], env: dict[str, str], **options: Any) -> Any:
        assert command[2] == "--child" and command[3] in ("resu, a=1", "sparse")
        folders.append((env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]))
        threads.append(env.get("TORCHINDUCTOR_COMPILE_THREADS"))
        return subprocess.CompletedProcess(command, 0, stdout=printed, stderr="")

    monkeypatch.setattr(subprocess, "run", start)
    row = cases_of("compile_time", ["--size", "tiny", "--only", "resu, a=1", *QUICK], tmp_path)["resu, a=1"]
    assert row["cold"]["compile_s"] > 0 and row["warm"]["compile_s"] > 0
    assert len(folders) == 2 and folders[0] == folders[1] and not Path(folders[0][0]).exists()
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    argv = ["--size", "tiny", "--jobs", "2", "--only", "resu, a=1", "sparse", *QUICK]
    assert list(cases_of("compile_time", argv, tmp_path)) == ["resu, a=1", "sparse"]
    assert len(set(folders[2:])) == 2 and threads[2:] == ["7"] * 4


def walk_of(name: str, size: str = "tiny-gpt2") -> dict[str, Any]:
    """The row that a variant's process would print."""
    module = script("memory")
    options = {"size": size, "batch": 4, "compiler": "aot_eager", "steps": 2, "cap": None, "before": 0}
    return module.walk(module.BY_NAME[name], argparse.Namespace(**options))


@pytest.mark.parametrize(
    "name",
    ["fxresu/bf16, pinned", "fxresu/streamed", "fxresu/streamed, accumulation of 4", "fxresu/streamed, weights away"],
)
def test_memory_walks_through_all_phases_and_transitions(name: str) -> None:
    row = walk_of(name)
    assert "error" not in row and row["phases"].keys() == {"dense", "sparse", "resu", "predict"}
    assert [s["stretch"] for s in row["stretches"]] == ["build", *script("memory").WALK]
    assert all(s["peak_device_bytes"] > 0 for s in row["stretches"])
    losses = [s["loss"] for s in row["stretches"] if "loss" in s]
    assert losses[-1] < losses[0]
    assert row["highest"] in ("build", *script("memory").WALK)


def test_memory_of_peers() -> None:
    row = walk_of("dense/AMP")
    assert row["phases"]["dense"]["tokens_per_s"] > 0 and row["tokens"] == 4 * 32


def test_memory_says_what_is_not_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the child, and what the parent makes of a child's row, of a crash, and of nothing installed."""
    module = script("memory")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    argv = ["--size", "tiny-gpt2", "--steps", "1", "--compiler", "aot_eager"]
    precision = torch.get_float32_matmul_precision()
    assert module.main([*argv, "--child", "bitsandbytes 8-bit"]) == 0
    torch.set_float32_matmul_precision(precision)
    printed = capsys.readouterr().out
    assert "bitsandbytes.optim is not installed here" in json.loads(printed)["row"]["skipped"]

    def start(command: list[str], **options: Any) -> Any:
        crashed = "dense/AMP" in command
        return subprocess.CompletedProcess(command, -9 if crashed else 0, "" if crashed else printed, "no memory left")

    monkeypatch.setattr(subprocess, "run", start)
    results = lib("results")
    monkeypatch.setattr(results.Run, "write", lambda self: written.update(self.cases))
    written: dict[str, Any] = {}
    assert module.main([*argv, "--only", "bitsandbytes 8-bit", "dense/AMP"]) == 1
    assert "not installed" in written["bitsandbytes 8-bit"]["skipped"]
    assert "status -9: no memory left" in written["dense/AMP"]["error"]


@pytest.mark.gpu
def test_memory_under_a_cap_on_a_gpu() -> None:
    """The whole device's peak is above the allocator's; a cap that is too small ends the walk with its stretch."""
    row = walk_of("fxresu/streamed")
    assert row["peak_device_bytes"] > row["peak_reserved_bytes"] >= row["peak_allocated_bytes"] > 0
    device = lib("whole_device")
    try:
        device.set_cap(0.02)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**26, device="cuda")
    finally:
        device.set_cap(None)


def test_host_memory(tmp_path: Path) -> None:
    """Plain PyTorch and `fxresu train` in processes of their own, step by step in turns."""
    out = tmp_path / "host.json"
    assert script("host_memory").main(["--size", "tiny", "--steps", "1", "--only", "eager", "--out", str(out)]) == 0
    cases = json.loads(out.read_text())["cases"]
    assert cases.keys() == {"plain/eager", "fxresu/eager", "resu/eager"}
    plain, ours = cases["plain/eager"], cases["fxresu/eager"]
    assert ours["loss"][0] == pytest.approx(plain["loss"][0], rel=1e-5)
    assert ours["held_out"] == pytest.approx(plain["held_out"], rel=1e-3)
    assert ours["peak_rss_bytes"] < plain["peak_rss_bytes"] and not ours["imported"]
    for row in cases.values():
        assert sum(row["components"].values()) == row["peak_rss_bytes"] and row["tokens_per_s"] > 0


def test_published_layer_in_its_loop(tmp_path: Path) -> None:
    """Against a stand-in with the interface of the published layer."""
    folder = tmp_path / "checkout" / "resu" / "modules"
    folder.mkdir(parents=True)
    (folder / "linear.py").write_text(
        "import torch\n"
        "class RESULinear(torch.nn.Linear):\n"
        "    def prune_by_magnitude(self, sparsity): self.pruned = sparsity\n"
        "    def enter_resu_mode(self, **options): self.options = options\n"
    )
    argv = [*LAYER, "--groups", "published", "--published", str(tmp_path / "checkout"), "--only", "*/theirs/*"]
    try:
        cases = cases_of("layer", argv, tmp_path)
    finally:
        for name in [n for n in sys.modules if n == "resu" or n.startswith("resu.")]:
            del sys.modules[name]
    assert len(cases) == 4 and all(row["median_ms"] > 0 for row in cases.values())


def test_a_case_that_fails_is_recorded_and_others_go_on(tmp_path: Path) -> None:
    results = lib("results")
    args = results.arguments("x").parse_args(["--out", str(tmp_path / "r.json")])

    def broken() -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    run = results.Run("layer", args, {})
    run.run({"a": broken, "b": lambda: {"median_ms": 1.0}})
    written = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert written["a"]["error"] == "RuntimeError: no such kernel" and written["b"]["median_ms"] == 1.0
    assert run.failed() == ["a"]


def test_budget_starts_no_further_case(tmp_path: Path) -> None:
    results = lib("results")
    args = results.arguments("x").parse_args(["--budget", "0"])
    run = results.Run("layer", args, {})
    run.run({"a": lambda: {"median_ms": 1.0}})
    assert "skipped" in run.cases["a"] and not run.failed()


def test_limits_of_the_published_layer() -> None:
    """The figures of the byte limit at 3.0 TB/s: 44.7 against 33.6 µs, and with the update 201, 134 and 101 µs."""
    limits = lib("limits")
    shape = limits.Shape(4096, 4096, 0, 4, 4, False)

    def microseconds(kernels: Any) -> float:
        return 1e3 * limits.limit_ms(kernels, 3.0e12, 1e30)

    mask = 1e6 * shape.numel / 8 / 3.0e12  # read once for dθ and once by the step; the figures leave it out
    assert microseconds(limits.dense_kernels(shape, False)) == pytest.approx(44.7, abs=0.1)
    assert microseconds(limits.resu_kernels(shape, False, 0.5, 1.0)) - mask == pytest.approx(33.6, abs=0.1)
    assert microseconds(limits.dense_kernels(shape, True)) == pytest.approx(201, abs=0.5)
    assert microseconds(limits.resu_kernels(shape, True, 0.5, 1.0)) - 2 * mask == pytest.approx(134, abs=0.5)
    assert microseconds(limits.resu_kernels(shape, True, 0.5, 1.0, 1.0)) - 2 * mask == pytest.approx(100.7, abs=0.5)


# --- the document ----------------------------------------------------------------------------------------------------


def run_of(
    benchmark: str, cases: dict[str, Any], device: str = "NVIDIA H100", date: str = "2026-01-01", **settings: Any
) -> dict[str, Any]:
    environment = {"device": device, "torch": "2.11.0", "python": "3.12.3", "date": date, "copy_bytes_per_s": 3e12}
    settings = {"compiler": "inductor", "batch": 16, "context": 1024, "sparsity": 0.5, **settings}
    return {"benchmark": benchmark, "environment": environment, "settings": settings, "cases": cases}


def dense_and(ours: float, key: str = "resu/AMP/compiled/a=1/frozen") -> dict[str, Any]:
    return {
        "dense/AMP/compiled": {"median_ms": 40.0, "peak_allocated_bytes": 10e9, "graph": {"median_ms": 39.0}},
        key: {"median_ms": ours, "peak_allocated_bytes": 7e9},
    }


def test_document_is_what_the_results_say() -> None:
    done = subprocess.run([str(BENCH / "table"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def render(tmp_path: Path, *runs: dict[str, Any], remarks: str = "") -> str:
    for index, run in enumerate(runs):
        (tmp_path / f"run{index}.json").write_text(json.dumps(run))
    (tmp_path / "remarks.md").write_text(remarks)
    return lib("render").document(tmp_path, tmp_path / "remarks.md")


def row_of(text: str, key: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {key} |"))


def test_figures_take_the_strongest_dense_and_the_latest_run(tmp_path: Path) -> None:
    old = run_of("model 124M", dense_and(20.0), date="2025-01-01")
    new = run_of("model 124M", dense_and(36.0))
    text = render(tmp_path, new, old)
    row = row_of(text, "4 124M, a=1")
    assert "1.08x (36 ms against 39 ms)" in row and "**missed**" in row and "run0.json" in row
    assert "0.7x" in row_of(text, "6 124M, a=1") and "none is fast enough" in row_of(text, "6 124M, a=1")
    assert "not measured" in row_of(text, "4 350M, a=1")
    assert "**4 124M, a=1** (missed): no remark yet." in text
    listed = [line for line in text.splitlines() if line.startswith("| `resu/AMP/compiled/a=1/frozen`")]
    assert len(listed) == 2 and "| 36 | 1.08 |" in listed[0] and "| 7.000 | 0.70 |" in listed[0]


def test_the_savings_that_cost_most_count_for_quality(tmp_path: Path) -> None:
    forms = {"dense/fp32": 5.0, "dense/savings": 4.9, "dense/savings, factored": 5.1, "cycle/savings": 9.0}
    cases = {form: {"mean": mean, "spread": 0.2} for form, mean in forms.items()}
    text = render(tmp_path, run_of("quality", cases, size="124M"))
    row, noise = row_of(text, "memory 9"), row_of(text, "memory 9, noise")
    assert "1.02x (5.1000 against 5.0000 nats)" in row and "factored" in row and "**missed**" in row
    assert "0.5x (+0.1000 against a spread of 0.2000 nats)" in noise and "| met |" in noise


def host_run(device: str = "CPU x86_64", **changes: Any) -> dict[str, Any]:
    parts = {"gradients": 20_000_000, "unaccounted": -5_000_000}
    row = {"tokens_per_s": 900.0, "speed": 0.95, "cpu_speed": 0.97, "peak_rss_bytes": 460_000_000, "components": parts}
    cases = {"plain/eager": {"peak_rss_bytes": 1_100_000_000}, "fxresu/eager": row,
             "fxresu/compiled/cold": row | {"peak_rss_bytes": 655_000_000}, "fxresu/compiled/warm": row}  # fmt: skip
    shape = {"layers": 6, "width": 256, "seq": 128, "batch": 32, "vocabulary": 788, "text_bytes": 24_000_000}
    return run_of("host_memory", cases, device, **(shape | changes))


def test_figures_of_the_host_come_from_a_cpu_and_the_worse_run_counts(tmp_path: Path) -> None:
    text = render(tmp_path, host_run())
    assert "460 MB (plain PyTorch 1100 MB)" in row_of(text, "host eager") and "| met |" in row_of(text, "host eager")
    cold = row_of(text, "host compiled")
    assert "655 MB" in cold and "**missed**" in cold and "fxresu/compiled/cold" in cold
    assert "0.95x (0.95x by wall time, 0.97x by CPU time)" in row_of(text, "host compiled, speed")
    assert "MB of the peak" in text and "| gradients | 20.0 | 20.0 | 20.0 |\n| unaccounted | -5.0 |" in text
    assert "not measured" in row_of(render(tmp_path, host_run("NVIDIA H100")), "host eager")
    assert "not measured" in row_of(render(tmp_path, host_run(batch=4)), "host eager")


def test_figures_of_the_ladder(tmp_path: Path) -> None:
    def row(peak: float, milliseconds: float, **more: Any) -> dict[str, Any]:
        phases = {"dense": {"peak_device_bytes": peak}, "resu": {"peak_device_bytes": peak / 2},
                  "predict": {"peak_device_bytes": peak / 2}}  # fmt: skip
        return {"peak_device_bytes": peak, "median_ms": milliseconds, "highest": "dense", "phases": phases, **more}

    cases = {"dense/bf16": row(11e9, 200.0), "dense/AMP": row(23e9, 220.0), "fxresu/bf16, keep": row(9e9, 190.0)}
    cases |= {"fxresu/streamed": row(6.8e9, 210.0), "fxresu/bf16, drop": row(2e9, 100.0, error="out of memory")}
    text = render(tmp_path, run_of("memory 1.24B", cases, batch=4))
    assert "6.8 GB (largest peak of its walk in 'dense'; uncapped dense 11 GB)" in row_of(text, "memory 2")
    assert "met" in row_of(text, "memory 2") and "0.952x" in row_of(text, "memory 2, speed")
    assert "met" in row_of(text, "memory 6") and "not measured" in row_of(text, "memory 3")

    # Steps of other numbers of tokens are not compared.
    cases["dense/bf16"]["tokens"] = cases["dense/AMP"]["tokens"] = cases["fxresu/streamed"]["tokens"] = 4096
    other = {
        "fxresu/other": row(1e9, 50.0, tokens=1024),
        "fxresu/bf16, keep": cases["fxresu/bf16, keep"] | {"tokens": 4096},
    }
    text = render(tmp_path, run_of("memory 1.24B", cases | other, batch=4))
    assert "6.8 GB" in row_of(text, "memory 2") and "0.148x" in row_of(text, "memory 6")
    assert "| `fxresu/other` | 50 |  |" in text
    for found in cases.values():
        found.pop("tokens", None)

    # One case has to keep to both bounds: a small one that is slow and a fast one that is large do not.
    cases |= {"fxresu/streamed": row(6.8e9, 400.0), "fxresu/streamed, bf16 moments": row(7.5e9, 190.0)}
    text = render(tmp_path, run_of("memory 1.24B", cases, batch=4))
    assert "6.8 GB" in row_of(text, "memory 2") and "met" in row_of(text, "memory 2")
    assert "0.5x (400 ms against 200 ms, at 6.8 GB)" in row_of(text, "memory 2, speed")
    assert "**missed**" in row_of(text, "memory 2, speed")


def test_memory_that_is_paid_for_with_speed_does_not_count(tmp_path: Path) -> None:
    def row(peak: float, milliseconds: float) -> dict[str, float]:
        return {"peak_allocated_bytes": peak, "median_ms": milliseconds}

    ours = "resu/AMP/compiled/a=0.25/frozen"
    cases = {"dense/AMP/compiled": row(10e9, 40.0), ours: row(6e9, 30.0), f"{ours}/recompute": row(4e9, 39.0)}
    found = row_of(render(tmp_path, run_of("model 124M", cases)), "6 124M, a=0.25")
    assert "0.6x (6 GB against 10 GB, at 1.33x the speed) | met" in found
    del cases[ours]
    found = row_of(render(tmp_path, run_of("model 124M", cases)), "6 124M, a=0.25")
    assert "0.4x" in found and "none is fast enough" in found and "**missed**" in found


@pytest.mark.parametrize(
    "changes", [{"device": "CPU x86_64"}, {"batch": 8}, {"compiler": "aot_eager"}], ids=["cpu", "batch", "compiler"]
)
def test_runs_at_other_settings_give_no_figure(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "not measured" in row_of(render(tmp_path, run_of("model 124M", dense_and(30.0), **changes)), "4 124M, a=1")


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_variants_count_for_the_targets_of_memory(tmp_path: Path, name: str) -> None:
    precision = name.split("/")[1]
    cases = {f"dense/{p}/compiled": {"median_ms": 40.0, "peak_allocated_bytes": 10e9} for p in ("AMP", "bf16")}
    cases |= {name: {"median_ms": 30.0, "peak_allocated_bytes": 4e9}}
    large = run_of("model 1.24B", cases, batch=4, context=2048)
    text = render(tmp_path, run_of("model 124M", cases), run_of("model 350M", cases), large)
    for key in ("6 124M, a=0.25", "6 350M, a=0.25", f"7 {precision}, peak", f"7 {precision}"):
        assert name in row_of(text, key), key


def test_a_run_without_a_dense_case_gives_no_figure_and_a_failed_one_is_named(tmp_path: Path) -> None:
    names = ("dense/eager", "dense/compiled", "resu/compiled")
    cases = {f"published/graph/{name}": {"median_ms": 1.0} for name in names}
    settings = {"size": 4096, "batch": 32, "many": 8192}
    failed = {**cases, "published/graph/dense/compiled": {"error": "OutOfMemoryError: CUDA"}}
    row = row_of(render(tmp_path, run_of("layer", failed, **settings)), "1 graph")
    assert "published/graph/dense/compiled failed" in row and "1x" in row
    del cases["published/graph/dense/compiled"]
    assert "not measured" in row_of(render(tmp_path, run_of("layer", cases, **settings)), "1 graph")


def test_remarks_appear_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    run = run_of("model 124M", dense_and(40.0))
    text = render(tmp_path, run, remarks="Intro.\n\n## 4 124M, a=1\nBound by launches.\n")
    assert "**4 124M, a=1** (missed): Bound by launches." in text and "Intro." not in text
    with pytest.raises(ValueError, match="## 4 7B"):
        render(tmp_path, run, remarks="## 4 7B\nx\n")


def test_every_missed_target_has_a_remark() -> None:
    assert "no remark yet" not in (BENCH.parents[1] / "docs" / "BENCHMARKS.md").read_text()


def test_a_peak_is_not_hidden_by_a_later_run_of_other_cases(tmp_path: Path) -> None:
    other = {"dense/AMP/compiled": {"median_ms": 40.0, "peak_allocated_bytes": 10e9},
             "resu/AMP/compiled/a=1/frozen/8bit": {"median_ms": 30.0, "peak_allocated_bytes": 9e9}}  # fmt: skip
    text = render(tmp_path, run_of("model 124M", other), run_of("model 124M", dense_and(20.0), date="2025-01-01"))
    assert "0.7x" in row_of(text, "6 124M, a=1") and "run1.json" in row_of(text, "6 124M, a=1")


def test_all_targets_find_their_figures(tmp_path: Path) -> None:
    """A run of every script with all names it gives its cases: each target but those of missing cases is measured."""
    targets = lib("targets")
    keys = [target.key for target in targets.TARGETS]
    assert len(set(keys)) == len(keys) and {key.split()[0] for key in keys} == {str(n) for n in range(1, 14)} | {
        "host",
        "memory",
    }
    row = {
        "median_ms": 1.0, "peak_allocated_bytes": 1e9, "bytes_per_s": 3e12, "mask_bytes": 2**21,
        "graph": {"median_ms": 1.0}, "cold": {"compile_s": 9.0}, "warm": {"compile_s": 3.0},
        "bill": {"θ moments": 2**24, "managed weights": 2**25}, "peak_device_bytes": 1e9, "peak_rss_bytes": 4e8,
        "phases": {phase: {"peak_device_bytes": 1e9} for phase in ("dense", "resu", "predict")},
        "speed": 1.0, "cpu_speed": 1.0, "tokens_per_s": 1000.0, "unaccounted": 0.01, "worst": "resu",
        "switch_steps": {"into RESU": 1.0}, "stall_share": 0.01, "mean": 4.0, "spread": 0.1,
    }  # fmt: skip
    host = script("host_memory")
    states = {"eager": [""], "compiled": ["/cold", "/warm"]}
    model, layer, kernels = script("model"), script("layer"), script("kernels")
    argv = ["--groups", "published", "step", "tokens", "state"]
    names = {
        "layer": list(_listed(layer, argv)),
        **{f"model {size}": [v.name for v in model.variants()] for size in ("124M", "350M", "1.24B")},
        "kernels": list(_listed(kernels, [])),
        "semistructured": list(_listed(script("semistructured"), [])),
        "compile_time": list(script("compile_time").VARIANTS),
        "few_tokens": list(_listed(script("few_tokens"), [])),
        **{f"memory {size}": list(script("memory").BY_NAME) for size in ("1.24B", "6.7B")},
        "bill": list(script("bill").CASES),
        "transfers 1.24B": list(script("transfers").CASES),
        "quality": list(script("quality").FORMS),
        "host_memory": [f"{case}{s}" for group, cases in host.GROUPS.items() for case in cases for s in states[group]],
    }
    settings = {"layer": {"size": 4096, "batch": 32, "many": 8192}, "model 1.24B": {"batch": 4, "context": 2048},
                "semistructured": {"width": 4096, "tokens": 8192}, "compile_time": {"size": "124M"},
                "memory 1.24B": {"batch": 4, "context": 1024}, "memory 6.7B": {"batch": 4, "context": 2048},
                "transfers 1.24B": {"mode": "compiled"}, "quality": {"size": "124M"},
                "host_memory": {**host.FULL, "device": "CPU x86_64"}}  # fmt: skip
    documents = [
        {**run_of(name, dict.fromkeys(cases, row), **settings.get(name, {})), "file": name}
        for name, cases in names.items()
    ]
    assert [t.key for t in targets.TARGETS if t.figure(documents) is None] == []


def test_jobs_of_the_suite_name_cases_that_there_are() -> None:
    suite = script("suite")
    for name, job in suite.JOBS.items():
        known = _listed(script(job.script), [*job.options, "--only", *job.cases] if job.cases else [*job.options])
        missing = [c for c in job.cases if not any(fnmatchcase(n, c) for n in known)]
        assert not missing, (name, missing)


def test_suite_runs_lanes_side_by_side(tmp_path: Path, monkeypatch, capsys) -> None:
    suite = script("suite")
    tiny = ("--size", "tiny", "--compiler", "aot_eager", "--steps", "2", "--warmup", "2")
    jobs = {"small": suite.Job("model", tiny, ("dense/AMP/compiled", "sparse/AMP/compiled"), compiled_ahead=True),
            "wrong": suite.Job("model", ("--size", "none")), "late": suite.Job("model", tiny)}  # fmt: skip
    monkeypatch.setattr(suite, "JOBS", jobs)
    for variable in suite.CACHES:
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert suite.main(["small", "+", "wrong", "--out", str(tmp_path), "--at-once", "1"]) == 1
    said = capsys.readouterr().out
    assert "GPU 1: wrong: ended with status 2" in said and "GPU 0: small: done" in said
    assert "GPU 0: small, compile sparse/AMP/compiled: done" in said
    cases = json.loads((tmp_path / "small.json").read_text())["cases"]
    assert set(cases) == {"dense/AMP/compiled", "sparse/AMP/compiled"}
    assert suite.main(["late", "--out", str(tmp_path), "--limit", "0.2"]) == 1
    assert "late: ran out of time" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        suite.main(["bill 2B"])


def test_bills_of_all_models_count_whichever_run_they_are_of(tmp_path: Path) -> None:
    small = run_of("bill", {n: {"unaccounted": u, "worst": "prune"} for n, u in (("124M", 0.01), ("350M", 0.03))})
    old = run_of("bill", {"350M": {"unaccounted": 0.2, "worst": "resu"}}, date="2025-01-01")
    large = run_of("bill", {"1.24B": {"unaccounted": 0.02, "worst": "dense"}, "124M, packed": {"error": "no"}})
    assert "not measured" in row_of(render(tmp_path, small), "memory 1")
    row = row_of(render(tmp_path, small, old, large), "memory 1")
    assert "3 %" in row and "in 'prune'; 124M, packed failed" in row and "| met |" in row


def _listed(module: ModuleType, argv: list[str]) -> list[str]:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        module.main([*argv, "--list"])
    return [line.partition("  (only")[0] for line in out.getvalue().splitlines()]


def test_transfers(tmp_path: Path) -> None:
    argv = ["--size", "tiny", "--mode", "eager", "--steps", "3", "--resu-steps", "4", "--only"]
    cases = cases_of("transfers", [*argv, "keep", "pinned/5", "compress"], tmp_path)
    keep, pinned, codes = cases["keep"], cases["pinned/5"], cases["compress"]
    assert keep["out_bytes"] == keep["stall_s"] == keep["pinned_bytes"] == 0
    assert 0 < pinned["out_bytes"] == pinned["ahead_bytes"] <= pinned["pinned_bytes"] and codes["ahead_bytes"] == 0
    for row in cases.values():
        assert min(row["step_ms"].values()) > 0 and min(row["switch_ms"].values()) > 0
        assert 0 <= row["stall_share"] < 1
        assert lib("figures").switch_steps(row).keys() == row["switch_steps"].keys()
    assert keep["losses"] == pinned["losses"] != codes["losses"]


def test_a_first_step_that_copies_hold_up_counts_as_the_switchs() -> None:
    row = {"step_ms": {"train": 100.0, "resu": 80.0}, "switch_steps": {"into RESU": 0.5, "out of RESU": 0.7},
           "first_resu_steps_ms": [180.0, 90.0]}  # fmt: skip
    steps = lib("figures").switch_steps
    assert steps(row) == {"into RESU": 1.5, "out of RESU": 0.7} and row["switch_steps"]["into RESU"] == 0.5
    assert steps(row | {"first_train_steps_ms": [90.0]})["out of RESU"] == 0.7
    assert steps(row | {"first_train_steps_ms": [130.0]})["out of RESU"] == pytest.approx(1.0)
    assert steps({}) == {}


def test_bill(tmp_path: Path) -> None:
    row = cases_of("bill", [*QUICK, "--only", "tiny"], tmp_path)["tiny"]
    stages = row["stages"]
    assert {"dense", "start RESU", "commit", "drop masks"} <= stages.keys()
    assert row["unaccounted"] == max(abs(s["share"]) for s in stages.values()) < 0.15
    assert all(s["predicted_bytes"] == sum(s["parts"].values()) for s in stages.values())


def test_quality(tmp_path: Path) -> None:
    argv = ["--size", "tiny-gpt2", "--batch", "4", "--context", "16", "--steps", "12", "--seeds", "2", "--lr", "3e-3",
            "--text-bytes", "60000", "--vocabulary", "300", "--held-out", "2", "--compiler", "aot_eager"]  # fmt: skip
    cases = cases_of("quality", [*argv, "--only", "dense/fp32", "dense/savings", "cycle/savings"], tmp_path)
    base, saved = cases["dense/fp32"], cases["dense/savings"]
    assert base["first_loss"] == pytest.approx(saved["first_loss"], rel=2e-2)
    assert base["held_out"] != saved["held_out"] and saved["mean"] == pytest.approx(base["mean"], rel=0.05)
    assert all(row["spread"] > 0 and len(row["held_out"]) == 2 for row in cases.values())


def test_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fxresu.streamed_moments._SMALL", 64)
    only = ["baseline/*", "streamed/8bit", "window/streamed", "cycle/*"]
    cases = cases_of("streamed", ["--size", "tiny", *QUICK, "--only", *only], tmp_path)
    assert len(cases) == 5
    assert cases.pop("cycle/streamed")["stages"].keys() == {"train", "stabilize", "resu"}
    first = [row["first_loss"] for row in cases.values()]
    assert max(first) == pytest.approx(min(first), rel=1e-2)
    row = cases["streamed/8bit"]
    assert row["fetched"] > 20 and row["weights_fetched"] > 0 and row["weights"] == 2
    assert "tokens/s" in capsys.readouterr().out


def test_bills_of_the_ladder_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Components add up to the device's peak, where it is highest; without a row there is no picture."""
    module = script("bills")

    def stretch(name: str, device: int, **bill: int) -> dict[str, Any]:
        return {"stretch": name, "peak_device_bytes": device, "peak_reserved_bytes": device - 8 * 10**8,
                "peak_allocated_bytes": device - 9 * 10**8, "bill": bill}  # fmt: skip

    weights = {"managed weights": 2 * 10**9}
    rows = [
        stretch("build", 9 * 10**9),
        stretch("dense", 5 * 10**9, **weights),
        stretch("> sparse", 3 * 10**9, **weights),
        stretch("sparse", 4 * 10**9, **weights, masks=10**8),
        stretch("dense", 6 * 10**9, **weights),
    ]
    bill = module.bill_of({"stretches": rows}, "a model", 7e9)
    assert [s.name for s in bill.stages] == ["dense", "to sparse", "sparse"]
    totals = [bill.total(s) for s in bill.stages]
    assert totals == [6 * 10**9, 3 * 10**9, 4 * 10**9] == [s.measured for s in bill.stages]
    assert bill["sparse"].parts["masks"] == 10**8 and bill["to sparse"].parts["managed weights"] == 2 * 10**9
    with pytest.raises(ValueError, match="no peaks of a GPU"):
        module.bill_of({"stretches": [{"stretch": "dense", "peak_device_bytes": 1}]}, "a model", 7e9)

    file, variant, *_ = module.DRAWN[0]
    assert variant in script("memory").BY_NAME
    assert module.main([str(tmp_path / "none.png"), "--results", str(tmp_path)]) == 1
    (tmp_path / file).write_text(json.dumps({"cases": {variant: {"stretches": rows}}}))
    assert module.main([str(tmp_path / "bills.png"), "--results", str(tmp_path)]) == 0
    assert (tmp_path / "bills.png").stat().st_size > 10_000 and module.DRAWN[1][1] in capsys.readouterr().err
