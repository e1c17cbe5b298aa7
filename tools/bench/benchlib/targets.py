"""The suite's targets for speed, and all targets in the order of the document. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from .figures import Document, Figure, Target, best, latest_first, peak_at_speed, ratio, value_of
from .memory_targets import MEMORY_TARGETS

_MIB = 2**20
_PRECISIONS = {"AMP": "AMP", "bf16": "bf16 throughout, bf16 moments"}


def amount(benchmark: str, case: str, metric: str) -> Callable[[Sequence[Document]], Figure | None]:
    """A number of bytes as it is, in MiB."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, benchmark):
            if (found := value_of(document["cases"].get(case), metric)) is not None:
                return Figure(found / _MIB, case, "", f"{found:,.0f} bytes", document["file"])
        return None

    return find


def of_copy(case: str) -> Callable[[Sequence[Document]], Figure | None]:
    """Useful bytes/s of a kernel over those of the device copy of its run."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, "kernels"):
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
    for document in latest_first(documents, "layer"):
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
        for document in latest_first(documents, "compile_time"):
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
        for document in latest_first(documents, "few_tokens"):
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


# Dense cases that a run needs: a drained loop takes longer over a compiled layer than over an eager one, in every run
# that has both.
_NEEDED = {"loop": 1, "graph": 2}


def _layer_targets() -> list[Target]:
    rows = []
    names = {"loop": "eager Python loop, as published", "graph": "CUDA graph, cold caches"}
    for kind, words in names.items():
        dense = [f"published/{kind}/dense/{mode}" for mode in ("eager", "compiled")]
        ours = [f"published/{kind}/resu/{mode}" for mode in ("eager", "compiled", "few tokens")]
        work = f"Published layer, forward and backward, RESU; {words}"
        figure = ratio("layer", dense[: _NEEDED[kind]], ours, also=dense)
        rows.append(Target(f"1 {kind}", work, 1.2, True, figure))
    graphed = "Python loop that replays CUDA graphs, drained after each"
    dense = [f"published/loop/dense/{mode}" for mode in ("eager", "compiled", "graphed")]
    figure = ratio("layer", dense, ["published/loop/resu/graphed*"])
    rows.append(Target("1 loop, graphed", f"Published layer, forward and backward, RESU; {graphed}", 1.2, True, figure))
    ours = ratio("layer", ["published/graph/dense/few tokens"], ["published/graph/resu/*"])
    rows.append(Target("1 own", f"The same against dense with fxresu's own kernels; {words}", 1.2, True, ours))
    updates = [("sparse", 1.0), ("resu, fp32 moments", 1.35), ("resu, 8-bit moments", 1.8)]
    for name, bound in updates:
        for kind, words in reversed(names.items()):
            dense = [f"step/{kind}/dense/eager", f"step/{kind}/dense"]
            ours = [f"step/{kind}/{name}{form}" for form in ("", ", few tokens", "/eager")]
            figure = ratio("layer", dense[: _NEEDED[kind]], ours, also=dense)
            rows.append(Target(f"2 {name}, {kind}", f"The same with the update, {name}; {words}", bound, True, figure))
        dense = [f"step/loop/dense{mode}" for mode in ("", "/eager", "/graphed")]
        figure = ratio("layer", dense, [f"step/loop/{name}/graphed", f"step/loop/{name}, few tokens/graphed"])
        rows.append(Target(f"2 {name}, loop, graphed", f"The same, {name}; {graphed}", bound, True, figure))
        both = [f"step/graph/{name}", f"step/graph/{name}, few tokens"]
        ours = ratio("layer", ["step/graph/dense, few tokens"], both)
        work = f"The same with the update, {name}, against dense with fxresu's own kernels; {names['graph']}"
        rows.append(Target(f"2 {name}, own", work, bound, True, ours))
    for alpha, bound in (("1", 1.07), ("0.25", 1.35)):
        for precision in ("AMP", "bf16"):
            ours = f"tokens/{precision}/resu, a={alpha}"
            figure = ratio("layer", [f"tokens/{precision}/dense"], [ours, f"{ours}, θ bf16"])
            words = f"4096 x 4096, 8192 tokens, full step, {_PRECISIONS[precision]}: RESU with α = {alpha}"
            rows.append(Target(f"3 a={alpha}, {precision}", words, bound, True, figure))
    return rows


def _model_targets() -> list[Target]:
    rows = []
    bounds = {"124M": {"1": (1.09, 1.0, 0.80), "0.25": (1.18, 1.09, 0.62)},
              "350M": {"1": (1.09, 1.0, 0.80), "0.25": (1.20, 1.09, 0.52)}}  # fmt: skip
    for size, alphas in bounds.items():
        for alpha, (amp, low, _) in alphas.items():
            for number, precision, bound in (("4", "AMP", amp), ("5", "bf16", low)):
                dense, ours = f"dense/{precision}/compiled", f"resu/{precision}/*/a={alpha}/frozen"
                figure = ratio(f"model {size}", [dense], [ours, f"{ours}/tiled"], also=[f"{dense}/tiled"])
                work = f"GPT-2 {size}, 16 x 1024, full step, {_PRECISIONS[precision]}: RESU with α = {alpha}"
                rows.append(Target(f"{number} {size}, a={alpha}", work, bound, True, figure))
    for size, alphas in bounds.items():
        for alpha, (amp, low, bound) in alphas.items():
            groups = [
                (f"dense/{precision}/compiled", [f"resu/{precision}/*/a={alpha}/frozen*"], least)
                for precision, least in (("AMP", amp), ("bf16", low))
            ]
            figure = peak_at_speed(f"model {size}", "dense/AMP/compiled", groups)
            work = f"GPT-2 {size}: peak memory of such a step, RESU with α = {alpha}, against AMP dense"
            rows.append(Target(f"6 {size}, a={alpha}", work, bound, False, figure))
    for precision in ("AMP", "bf16"):
        dense, ours = [f"dense/{precision}/compiled"], [f"resu/{precision}/*/a=0.25/frozen*"]
        work = f"Llama 1.24B, 8192 tokens, {precision} against {precision}, RESU with α = 0.25"
        speed = ratio("model 1.24B", dense, ours, also=[f"{dense[0]}/tiled"])
        rows.append(Target(f"7 {precision}", f"{work}: full step", 1.2, True, speed))
        peak = peak_at_speed("model 1.24B", dense[0], [(dense[0], ours, 1.2)])
        rows.append(Target(f"7 {precision}, peak", f"{work}: peak memory of such a step", 0.5, False, peak))
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
    for precision in ("AMP", "bf16"):
        ours = [f"sparse, 2:4/{precision}", f"sparse, 2:4, */{precision}"]
        figure = ratio("semistructured", [f"dense/{precision}"], ours, captured=True)
        work = f"2:4 sparse phase, full step of 4096-wide blocks, {_PRECISIONS[precision]}"
        rows.append(Target(f"11 {precision}", work, 1.08, True, figure))
    for case in ("sparse", "resu, a=1", "resu, a=0.25"):
        cold = ratio("compile_time", ["dense, plain"], [case], "cold.compile_s", inverse=True)
        rows.append(Target(f"12 {case}", f"Compile time of {case} against dense", 1.2, False, cold))
        work = f"Compile time of {case} in a second process, of the first's"
        rows.append(Target(f"12 {case}, warm", work, 0.5, False, warm_over_cold(case)))
    for pattern, words, bound in (("0.5", "50 %", 1.2), ("0.9", "90 %", 2.0), ("2:4", "2:4", 1.2)):
        work = f"Linear for up to 16 tokens, {words}, against cuBLAS (worst shape)"
        rows.append(Target(f"13 {words}", work, bound, True, slowest_pattern(pattern)))
    return rows


TARGETS: tuple[Target, ...] = (*_layer_targets(), *_model_targets(), *_other_targets(), *MEMORY_TARGETS)
