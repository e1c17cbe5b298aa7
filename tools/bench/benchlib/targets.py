"""The suite's targets, and the figure that committed results give for each. Plain data, no torch.

A figure compares cases of one run on a GPU, with the settings that the target names: the best of all dense cases
against the best case of what is measured. A run that lacks one of the dense cases gives no figure; one that failed is
named. Of several runs that hold all of them, the latest counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Document = dict[str, Any]
_MIB = 2**20

# Settings without which a run says nothing about the targets.
_GPT2 = {"batch": 16, "context": 1024, "sparsity": 0.5}
_SETTINGS: dict[str, dict[str, Any]] = {
    "layer": {"size": 4096, "batch": 32, "many": 8192, "sparsity": 0.5},
    "model 124M": _GPT2,
    "model 350M": _GPT2,
    "model 1.24B": {"batch": 4, "context": 2048, "sparsity": 0.5},
    "semistructured": {"width": 4096, "tokens": 8192},
    "compile_time": {"size": "124M"},
    "host_memory": {"layers": 6, "width": 256, "seq": 128, "batch": 32, "vocabulary": 788, "text_bytes": 24_000_000},
    "memory 1.24B": {"batch": 4, "context": 1024},
    "memory 6.7B": {"batch": 4, "context": 2048},
}
_ON_CPU = {"host_memory"}  # benchmarks whose figures come from a CPU


@dataclasses.dataclass(frozen=True)
class Figure:
    """What was measured for a target.

    Attributes:
        value: to hold against the bound.
        case, against: names of the cases behind it.
        detail: their values in words.
        source: name of the results file.
    """

    value: float
    case: str
    against: str
    detail: str
    source: str


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        key: short name; remarks refer to it.
        work: what is measured, in words.
        bound, at_least: the target, and its direction.
        unit: "x" for ratios, or a unit of bytes.
        figure: finds the figure in the results; None where nothing was measured.
    """

    key: str
    work: str
    bound: float
    at_least: bool
    figure: Callable[[Sequence[Document]], Figure | None]
    unit: str = "x"

    def met(self, figure: Figure) -> bool:
        """Whether the figure reaches the bound."""
        return figure.value >= self.bound if self.at_least else figure.value <= self.bound


def load(folder: Path) -> list[Document]:
    """Documents of the suite in a folder, by file name; other JSON files there are left alone."""
    found = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and "benchmark" in document:
            found.append({**document, "file": path.name})
    return found


def value_of(row: Any, metric: str) -> float | None:
    """A number of a case by its dotted path ("graph.median_ms"); None for cases that failed or lack it."""
    for part in metric.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return float(row) if isinstance(row, (int, float)) else None


def best(document: Document, patterns: Iterable[str], *metrics: str) -> tuple[str, float] | None:
    """(name, value) of the case with the smallest value of any of the metrics among those that match."""
    patterns = list(patterns)
    found = [
        (value, name)
        for name, row in document["cases"].items()
        for metric in metrics
        if any(fnmatchcase(name, p) for p in patterns) and (value := value_of(row, metric)) is not None
    ]
    return min(found)[::-1] if found else None


_GROUP = {"published": 2, "step": 2, "tokens": 2, "state": 1, "sweep": 4}  # leading parts of a layer's case name


def dense_like(benchmark: str, name: str) -> list[str]:
    """Patterns of the dense cases that a case is compared with in the listing of its run; empty if there are none."""
    parts = name.split("/")
    if benchmark.startswith("model "):
        return [f"dense/{parts[1]}/*"]
    if benchmark.startswith("memory "):
        return ["dense/bf16"]
    if benchmark == "layer":
        return ["/".join([*parts[: _GROUP[parts[0]]], "dense*"])]
    others = {"semistructured": f"dense/{parts[-1]}", "few_tokens": "/".join(["cublas", *parts[1:]])}
    return [others[benchmark]] if benchmark in others else []


def ratio(
    benchmark: str,
    dense: Sequence[str],
    ours: Sequence[str],
    metric: str = "median_ms",
    inverse: bool = False,
    captured: bool = False,
) -> Callable[[Sequence[Document]], Figure | None]:
    """Best of the cases `dense` over the best that match `ours` (a speed-up); with `inverse` ours over dense.

    Where a dense step was also timed in a CUDA graph, the better of both times counts; with `captured` for ours too.
    """
    strongest = (metric, "graph.median_ms") if metric == "median_ms" else (metric,)
    own_metrics = strongest if captured else (metric,)

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, benchmark):
            if any(name not in document["cases"] for name in dense):
                continue
            reference, own = best(document, dense, *strongest), best(document, ours, *own_metrics)
            if reference is None or own is None:
                continue
            value = own[1] / reference[1] if inverse else reference[1] / own[1]
            detail = f"{_show(own[1], metric)} against {_show(reference[1], metric)}"
            if inverse and (time := value_of(document["cases"][own[0]], "median_ms")) is not None:
                detail += f", at {_show(time, 'median_ms')} a step"
            failed = [name for name in dense if value_of(document["cases"][name], metric) is None]
            detail += "".join(f"; {name} failed" for name in failed)
            return Figure(value, own[0], reference[0], detail, document["file"])
        return None

    return find


def counts(document: Document) -> bool:
    """Whether a run is one that figures come from: on a GPU (or of the host's memory), compiled by Inductor, at the
    targets' sizes."""
    settings = document["settings"]
    wanted = {"compiler": "inductor", **_SETTINGS.get(document["benchmark"], {})}
    on_cpu = document["environment"]["device"].startswith("CPU")
    fits = on_cpu == (document["benchmark"] in _ON_CPU)
    return fits and all(settings.get(key) == value for key, value in wanted.items())


def _latest_first(documents: Sequence[Document], benchmark: str) -> list[Document]:
    mine = [d for d in documents if d["benchmark"] == benchmark and counts(d)]
    return sorted(mine, key=lambda d: d["environment"]["date"], reverse=True)


def _show(value: float, metric: str) -> str:
    if metric.endswith("_ms"):
        return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
    return f"{value / 1e9:.3g} GB" if metric.endswith("bytes") else f"{value:.3g} s"


def amount(benchmark: str, case: str, metric: str) -> Callable[[Sequence[Document]], Figure | None]:
    """A number of bytes as it is, in MiB."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, benchmark):
            if (found := value_of(document["cases"].get(case), metric)) is not None:
                return Figure(found / _MIB, case, "", f"{found:,.0f} bytes", document["file"])
        return None

    return find


def of_copy(case: str) -> Callable[[Sequence[Document]], Figure | None]:
    """Useful bytes/s of a kernel over those of the device copy of its run."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, "kernels"):
            if (rate := value_of(document["cases"].get(case), "bytes_per_s")) is not None:
                copy = document["environment"]["copy_bytes_per_s"]
                detail = f"{rate / 1e12:.2f} against {copy / 1e12:.2f} TB/s"
                if (same := value_of(document["cases"][case], "same_copy_bytes_per_s")) is not None:
                    detail += f"; a copy of as many bytes {same / 1e12:.2f}"
                return Figure(rate / copy, case, "device copy", detail, document["file"])
        return None

    return find


def saved_by_packing(documents: Sequence[Document]) -> Figure | None:
    """Bytes that packed storage saves in bf16, over those computed: 2 a candidate, less 8 a row for where it begins."""
    resident, packed = "tokens/bf16/resu, a=1", "tokens/bf16/resu, a=1, packed"
    for document in _latest_first(documents, "layer"):
        bills = [document["cases"].get(name, {}).get("bill") for name in (resident, packed)]
        if all(bills):
            saved = sum(bills[0].values()) - sum(bills[1].values())
            size = document["settings"]["size"]
            computed = 2 * document["settings"]["sparsity"] * size**2 - 8 * size
            detail = f"{saved / _MIB:.2f} against {computed / _MIB:.2f} MiB"
            return Figure(saved / computed, packed, resident, detail, document["file"])
    return None


def warm_over_cold(case: str) -> Callable[[Sequence[Document]], Figure | None]:
    """Compile time of a second process over that of the first."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, "compile_time"):
            row = document["cases"].get(case)
            warm, cold = value_of(row, "warm.compile_s"), value_of(row, "cold.compile_s")
            if warm is not None and cold is not None:
                return Figure(warm / cold, f"{case}, warm", f"{case}, cold", f"{warm:.3g} against {cold:.3g} s",
                              document["file"])  # fmt: skip
        return None

    return find


def slowest_pattern(pattern: str) -> Callable[[Sequence[Document]], Figure | None]:
    """cuBLAS's time over the best packed one, at the shape and number of tokens where that is least."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, "few_tokens"):
            ends = {n.partition("/")[2] for n in document["cases"] if fnmatchcase(n, f"*/*/{pattern}/*")}
            figures = [f for end in sorted(ends) if (f := _against_cublas(document, end)) is not None]
            if figures:
                return min(figures, key=lambda f: f.value)
        return None

    return find


def _against_cublas(document: Document, end: str) -> Figure | None:
    reference = best(document, [f"cublas/{end}"], "median_ms")
    ways = {n.partition("/")[0] for n in document["cases"]} - {"cublas"}
    own = best(document, [f"{way}/{end}" for way in ways], "median_ms")
    if reference is None or own is None:
        return None
    detail = f"{1e3 * own[1]:.1f} against {1e3 * reference[1]:.1f} µs"
    return Figure(reference[1] / own[1], own[0], reference[0], detail, document["file"])


def _layer_targets() -> list[Target]:
    rows = []
    names = {"loop": "eager Python loop, as published", "graph": "CUDA graph, cold caches"}
    for kind, words in names.items():
        dense = [f"published/{kind}/dense/{mode}" for mode in ("eager", "compiled", "few tokens")]
        figure = ratio("layer", dense, [f"published/{kind}/resu/*"])
        rows.append(Target(f"1 {kind}", f"Published layer, forward and backward, RESU; {words}", 1.2, True, figure))
    updates = [("sparse", 1.0), ("resu, fp32 moments", 1.35), ("resu, 8-bit moments", 1.8)]
    for name, bound in updates:
        for kind, words in reversed(names.items()):
            dense = [f"step/{kind}/dense{form}" for form in ("", "/eager", ", few tokens")]
            figure = ratio("layer", dense, [f"step/{kind}/{name}", f"step/{kind}/{name}, few tokens"])
            rows.append(Target(f"2 {name}, {kind}", f"The same with the update, {name}; {words}", bound, True, figure))
    for alpha, bound in (("1", 1.07), ("0.25", 1.35)):
        figure = ratio("layer", ["tokens/AMP/dense", "tokens/bf16/dense"], [f"tokens/*/resu, a={alpha}"])
        words = f"4096 x 4096, 8192 tokens, bf16, full step, RESU with α = {alpha}; strongest dense of AMP and bf16"
        rows.append(Target(f"3 a={alpha}", words, bound, True, figure))
    return rows


def _model_targets() -> list[Target]:
    rows = []
    bounds = {"124M": {"1": (1.09, 1.0, 0.80), "0.25": (1.18, 1.09, 0.62)},
              "350M": {"1": (1.09, 1.0, 0.80), "0.25": (1.20, 1.09, 0.52)}}  # fmt: skip
    for size, alphas in bounds.items():
        for alpha, (amp, low, _) in alphas.items():
            for number, precision, bound in (("4", "AMP", amp), ("5", "bf16", low)):
                dense = [f"dense/{precision}/compiled"]
                figure = ratio(f"model {size}", dense, [f"resu/{precision}/*/a={alpha}/frozen"])
                words = {"AMP": "AMP", "bf16": "bf16 throughout, bf16 moments"}[precision]
                work = f"GPT-2 {size}, 16 x 1024, full step, {words}: RESU with α = {alpha}"
                rows.append(Target(f"{number} {size}, a={alpha}", work, bound, True, figure))
    for size, alphas in bounds.items():
        for alpha, (*_, bound) in alphas.items():
            ours = [f"resu/*/a={alpha}/frozen*"]
            figure = ratio(f"model {size}", ["dense/AMP/compiled"], ours, "peak_allocated_bytes", True)
            work = f"GPT-2 {size}: peak memory of RESU with α = {alpha} (best form) against AMP dense"
            rows.append(Target(f"6 {size}, a={alpha}", work, bound, False, figure))
    for precision in ("AMP", "bf16"):
        dense, ours = [f"dense/{precision}/compiled"], [f"resu/{precision}/*/a=0.25/frozen*"]
        work = f"Llama 1.24B, 8192 tokens, {precision} against {precision}, RESU with α = 0.25"
        rows.append(Target(f"7 {precision}", f"{work}: full step", 1.2, True, ratio("model 1.24B", dense, ours)))
        peak = ratio("model 1.24B", dense, ours, "peak_allocated_bytes", True)
        rows.append(Target(f"7 {precision}, peak", f"{work}: peak memory", 0.5, False, peak))
    return sorted(rows, key=lambda row: row.key[0])


def _other_targets() -> list[Target]:
    low = "state/resu, 8-bit moments"
    peak = ratio("layer", ["state/dense", "state/dense/eager"], [low], "peak_allocated_bytes", True)
    moments = amount("layer", low, "bill.θ moments")
    rows = [
        Target("8 moments", "Published layer: θ's moments, 8-bit", 18, False, moments, "MiB"),
        Target("8 mask", "Published layer: the mask", 2, False, amount("layer", low, "mask_bytes"), "MiB"),
        Target("8 peak", "Published layer: peak of a full step against dense's", 1.0, False, peak),
    ]
    rates = (("compose", "compose", 0.9), ("gather", "gather fp32", 0.85), ("θ step", "theta step", 0.85))
    for name, case, bound in rates:
        work = f"{name}, 4096 x 4096: useful bytes/s against a device copy"
        rows.append(Target(f"9 {name}", work, bound, True, of_copy(f"{case}/4096x4096/s=0.5")))
    for precision in ("AMP", "bf16"):
        resident = f"tokens/{precision}/resu, a=1"
        figure = ratio("layer", [resident], [f"{resident}, packed"])
        work = f"Packed storage against resident, 8192 tokens, {precision}, full step"
        rows.append(Target(f"10 {precision}", work, 0.95, True, figure))
    work = "Bytes that packed storage saves in bf16, of those computed"
    rows.append(Target("10 saved", work, 0.99, True, saved_by_packing))
    figure = ratio("semistructured", ["dense/AMP", "dense/bf16"], ["sparse, 2:4*"], captured=True)
    rows.append(Target("11", "2:4 sparse phase, full step of 4096-wide blocks, strongest dense", 1.08, True, figure))
    for case in ("sparse", "resu, a=1", "resu, a=0.25"):
        cold = ratio("compile_time", ["dense, plain"], [case], "cold.compile_s", inverse=True)
        rows.append(Target(f"12 {case}", f"Compile time of {case} against dense", 1.2, False, cold))
        work = f"Compile time of {case} in a second process, of the first's"
        rows.append(Target(f"12 {case}, warm", work, 0.5, False, warm_over_cold(case)))
    for pattern, words, bound in (("0.5", "50 %", 1.2), ("0.9", "90 %", 2.0), ("2:4", "2:4", 1.2)):
        work = f"Linear for up to 16 tokens, {words}, against cuBLAS (worst shape)"
        rows.append(Target(f"13 {words}", work, bound, True, slowest_pattern(pattern)))
    return rows


def peak_of(benchmark: str, cases: Sequence[str], unit: float) -> Callable[[Sequence[Document]], Figure | None]:
    """Largest peak of the host among runs of one case (cold, and warm where it was run), in units of `unit` bytes."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, benchmark):
            found = [(value_of(document["cases"].get(case), "peak_rss_bytes"), case) for case in cases]
            if found[0][0] is not None:
                value, case = max(pair for pair in found if pair[0] is not None)
                plain = "plain" + case[case.index("/") :]
                against = value_of(document["cases"].get(plain), "peak_rss_bytes")
                detail = "" if against is None else f"plain PyTorch {against / unit:.4g} MB"
                return Figure(value / unit, case, plain if detail else "", detail, document["file"])  # type: ignore
        return None

    return find


def slowest(benchmark: str, cases: Sequence[str]) -> Callable[[Sequence[Document]], Figure | None]:
    """The least speed against plain PyTorch of some cases, by wall time (pairs of steps) or CPU time, whichever is
    less: on a machine that others use the first scatters."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, benchmark):
            rows = {case: document["cases"].get(case) for case in cases}
            found = [(value_of(row, kind), case) for case, row in rows.items() for kind in ("speed", "cpu_speed")]
            if found[0][0] is not None:
                value, case = min(pair for pair in found if pair[0] is not None)
                row = document["cases"][case]
                detail = f"{row['speed']:.2f}x by wall time, {row['cpu_speed']:.2f}x by CPU time"
                return Figure(value, case, "plain" + case[case.index("/") :], detail, document["file"])  # type: ignore
        return None

    return find


_STATES = ("cold", "warm")


def _host_targets() -> list[Target]:
    rows = []
    for mode, bound, cases in (
        ("eager", 472, ["fxresu/eager"]),
        ("compiled", 650, [f"fxresu/compiled/{state}" for state in _STATES]),
    ):
        work = f"Text trainer on a CPU, {mode}"
        peak = peak_of("host_memory", cases, 1e6)
        rows.append(Target(f"host {mode}", f"{work}: peak resident set of the process", bound, False, peak, "MB"))
        speed = slowest("host_memory", cases)
        rows.append(Target(f"host {mode}, speed", f"{work}: tokens/s against plain PyTorch", 0.9, True, speed))
    return rows


# Largest peak of a walk through all phases and transitions: target, size, cap on GB, share of the dense speed.
_LADDER = (("memory 2", "1.24B", 7.0, 0.9), ("memory 3", "6.7B", 14.5, 0.75))


def ladder(
    size: str, pattern: str = "fxresu/*", metric: str = "peak_device_bytes"
) -> Callable[[Sequence[Document]], Figure | None]:
    """The smallest peak of the device, in GB, among the cases that went their whole way."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, f"memory {size}"):
            whole = {name: row for name, row in document["cases"].items() if "error" not in row and row.get("phases")}
            own = best({**document, "cases": whole}, [pattern], metric)
            if own is not None:
                against = value_of(document["cases"].get("dense/bf16"), "peak_device_bytes")
                detail = f"largest peak of its walk in {whole[own[0]].get('highest')!r}"
                detail += "" if against is None else f"; uncapped dense {against / 1e9:.3g} GB"
                return Figure(own[1] / 1e9, own[0], "dense/bf16" if against else "", detail, document["file"])
        return None

    return find


def _ladder_targets() -> list[Target]:
    rows = []
    for key, size, bound, share in _LADDER:
        work = f"Llama {size}, every phase and transition"
        # A walk that begins on the host has no dense phase.
        walk = ladder(size, "fxresu/[!f]*")
        rows.append(Target(key, f"{work}: peak of the device", bound, False, walk, "GB"))
        speed = ratio(f"memory {size}", ["dense/bf16"], ["fxresu/streamed*"])
        rows.append(Target(f"{key}, speed", f"{work}: dense step against uncapped bf16 AdamW", share, True, speed))
    predict, resu = "phases.predict.peak_device_bytes", "phases.resu.peak_device_bytes"
    figure = ladder("6.7B", metric=predict)
    rows.append(Target("memory 4", "Llama 6.7B, predict phase: peak of the device", 7.5, False, figure, "GB"))
    figure = ladder("6.7B", "fxresu/frozen int4*", metric=resu)
    work = "Llama 6.7B, RESU phase, frozen part in 4 bits, from the host: peak of the device"
    rows.append(Target("memory 5", work, 8.0, False, figure, "GB"))
    work = "Llama 1.24B, RESU phase against fp32 dense AdamW: peak of the device"
    rows.append(Target("memory 6", work, 0.15, False, phase_share("1.24B", resu, "dense/AMP")))
    work = "Llama 1.24B, moments in host memory, accumulation of 4, clipped, scheduled: dense step against on-device"
    figure = ratio("memory 1.24B", ["fxresu/bf16, accumulation of 4"], ["fxresu/streamed, accumulation of 4"])
    rows.append(Target("memory 8, speed", work, 1 / 1.1, True, figure))
    return rows


def phase_share(size: str, metric: str, against: str) -> Callable[[Sequence[Document]], Figure | None]:
    """The smallest of fxresu's peaks by `metric` over the whole device's peak of a peer."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in _latest_first(documents, f"memory {size}"):
            own = best(document, ["fxresu/*"], metric)
            reference = value_of(document["cases"].get(against), "peak_device_bytes")
            if own is not None and reference is not None:
                detail = f"{own[1] / 1e9:.3g} against {reference / 1e9:.3g} GB"
                return Figure(own[1] / reference, own[0], against, detail, document["file"])
        return None

    return find


TARGETS: tuple[Target, ...] = (
    *_layer_targets(),
    *_model_targets(),
    *_other_targets(),
    *_host_targets(),
    *_ladder_targets(),
)
