"""The suite's targets for memory: the bill, the ladder, transfers, quality, and the host. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .figures import Document, Figure, Target, as_many_tokens, best, latest_first, ratio, show, switch_steps, value_of

_Find = Callable[[Sequence[Document]], Figure | None]


def peak_of(benchmark: str, cases: Sequence[str], unit: float) -> _Find:
    """Largest peak of the host among runs of one case (cold, and warm where it was run), in units of `unit` bytes."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, benchmark):
            found = [(value_of(document["cases"].get(case), "peak_rss_bytes"), case) for case in cases]
            if found[0][0] is not None:
                value, case = max(pair for pair in found if pair[0] is not None)
                plain = "plain" + case[case.index("/") :]
                against = value_of(document["cases"].get(plain), "peak_rss_bytes")
                detail = "" if against is None else f"plain PyTorch {against / unit:.4g} MB"
                return Figure(value / unit, case, plain if detail else "", detail, document["file"])  # type: ignore
        return None

    return find


def slowest(benchmark: str, cases: Sequence[str]) -> _Find:
    """The least speed against plain PyTorch of some cases, by wall time (pairs of steps) or CPU time, whichever is
    less: on a machine that others use the first scatters."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, benchmark):
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


def ladder(size: str, pattern: str = "fxresu/*", metric: str = "peak_device_bytes") -> _Find:
    """The smallest peak of the device, in GB, among the cases that went their whole way."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, f"memory {size}"):
            whole = {name: row for name, row in document["cases"].items() if "error" not in row and row.get("phases")}
            own = best({**document, "cases": whole}, [pattern], metric)
            if own is not None:
                against = value_of(document["cases"].get("dense/bf16"), "peak_device_bytes")
                detail = f"largest peak of its walk in {whole[own[0]].get('highest')!r}"
                detail += "" if against is None else f"; uncapped dense {against / 1e9:.3g} GB"
                return Figure(own[1] / 1e9, own[0], "dense/bf16" if against else "", detail, document["file"])
        return None

    return find


def walked(size: str, bound: float, share: float, speed: bool) -> _Find:
    """Peak in GB, or speed of the dense phase against dense, of one case that went its whole way: of those that keep to
    both bounds the smallest; else the fastest that keeps to that of the peak; else the smallest."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, f"memory {size}"):
            rows, found = document["cases"], []
            dense = rows.get("dense/bf16")
            time, size_of_dense = value_of(dense, "median_ms"), value_of(dense, "peak_device_bytes")
            for name, row in rows.items():
                own, peak = value_of(row, "median_ms"), value_of(row, "peak_device_bytes")
                # A walk that begins on the host has no dense phase; accumulation has other steps.
                whole = "error" not in row and own and peak and "dense" in row["phases"]
                if name.startswith("fxresu/") and whole and as_many_tokens(row, dense):
                    ratio = time / own if time else 0.0
                    fits, fast = peak <= bound * 1e9, ratio >= share
                    found.append(((not (fits and fast), not fits, -ratio if fits and not fast else peak), name, ratio))
            if not found or time is None or size_of_dense is None:
                continue
            _, name, ratio = min(found)
            peak = rows[name]["peak_device_bytes"] / 1e9
            if speed:
                detail = f"{show(rows[name]['median_ms'], '_ms')} against {show(time, '_ms')}, at {peak:.3g} GB"
                return Figure(ratio, name, "dense/bf16", detail, document["file"])
            detail = f"largest peak of its walk in {rows[name].get('highest')!r}; uncapped dense"
            return Figure(peak, name, "dense/bf16", f"{detail} {size_of_dense / 1e9:.3g} GB", document["file"])
        return None

    return find


def _ladder_targets() -> list[Target]:
    work = "Bill against the measured device, every phase and transition, 124M to 1.24B: unaccounted (worst stage)"
    rows = [Target("memory 1", work, 5.0, False, unaccounted, "%")]
    for key, size, bound, share in _LADDER:
        work = f"Llama {size}, every phase and transition"
        walk = walked(size, bound, share, speed=False)
        rows.append(Target(key, f"{work}: peak of the device", bound, False, walk, "GB"))
        speed = walked(size, bound, share, speed=True)
        rows.append(Target(f"{key}, speed", f"{work}: dense step against uncapped bf16 AdamW", share, True, speed))
    predict, resu = "phases.predict.peak_device_bytes", "phases.resu.peak_device_bytes"
    figure = ladder("6.7B", "fxresu/frozen int4*", metric=predict)
    rows.append(Target("memory 4", "Llama 6.7B, predict phase: peak of the device", 7.5, False, figure, "GB"))
    figure = ladder("6.7B", "fxresu/frozen int4*", metric=resu)
    work = "Llama 6.7B, RESU phase, frozen part in 4 bits, from the host: peak of the device"
    rows.append(Target("memory 5", work, 8.0, False, figure, "GB"))
    work = "Llama 1.24B, RESU phase against fp32 dense AdamW: peak of the device"
    rows.append(Target("memory 6", work, 0.15, False, phase_share("1.24B", resu, "dense/AMP")))
    rows += [
        Target("memory 7", "Llama 1.24B, phase switches, in dense steps (the longer one)", 1.0, False, switch, "steps"),
        Target("memory 7, stall", "Stall of the async restore, of the RESU phase", 5.0, False, stall, "%"),
    ]
    work = "Llama 1.24B, moments in host memory, accumulation of 4, clipped, scheduled: dense step against on-device"
    figure = ratio("memory 1.24B", ["fxresu/bf16, accumulation of 4"], ["fxresu/streamed, accumulation of 4"])
    rows.append(Target("memory 8, speed", work, 1 / 1.1, True, figure))
    work = "GPT-2 124M on text, equal steps, held-out loss: all savings on against fp32 dense"
    rows.append(Target("memory 9", work, 1.01, False, quality))
    work = "The difference of these losses, in spreads of the fp32 runs over their seeds"
    rows.append(Target("memory 9, noise", work, 1.0, False, quality_in_noise))
    return rows


def unaccounted(documents: Sequence[Document]) -> Figure | None:
    """The largest share of a measured peak that the bill does not explain, in %, over the last run of every model:
    nothing is compared between them."""
    found: dict[str, tuple[float, str, str]] = {}
    failed = []
    for document in latest_first(documents, "bill"):
        for name, row in document["cases"].items():
            if name not in found and value_of(row, "unaccounted") is not None:
                found[name] = row["unaccounted"], row["worst"], document["file"]
            elif name not in found and "error" in row:
                failed.append(name)
    if not all(any(name.startswith(size) for name in found) for size in ("124M", "350M", "1.24B")):
        return None
    name = max(found, key=lambda n: found[n][0])
    value, worst, file = found[name]
    detail = f"in {worst!r}" + "".join(f"; {case} failed" for case in failed if case not in found)
    return Figure(100 * value, name, "", detail, file)


def _restored_ahead(documents: Sequence[Document], metric: str) -> tuple[float, str, Document] | None:
    """The smallest value among strategies that restore ahead of time, its case and the run."""
    for document in latest_first(documents, "transfers 1.24B"):
        found = best(document, ["pinned/[!0]*"], metric)
        if found is not None:
            return found[1], found[0], document
    return None


def switch(documents: Sequence[Document]) -> Figure | None:
    """The longer of both switches of the case whose phase stalls least."""
    if (found := _restored_ahead(documents, "stall_share")) is None:
        return None
    _, case, document = found
    steps = switch_steps(document["cases"][case])
    way = max(steps, key=steps.__getitem__)
    return Figure(steps[way], case, "", f"{way}; the other {min(steps.values()):.2f}", document["file"])


def stall(documents: Sequence[Document]) -> Figure | None:
    """The least stall, in % of the phase."""
    if (found := _restored_ahead(documents, "stall_share")) is None:
        return None
    value, case, document = found
    moved = document["cases"][case].get("out_bytes", 0) / 1e9
    return Figure(100 * value, case, "", f"{moved:.2f} GB moved", document["file"])


def _savings(documents: Sequence[Document]) -> tuple[str, float, float, Document] | None:
    """Of the last run with both: the form of the savings that loses most, its mean loss, float32's, and the run."""
    for document in latest_first(documents, "quality"):
        base = value_of(document["cases"].get("dense/fp32"), "mean")
        forms = {n: value_of(r, "mean") for n, r in document["cases"].items() if n.startswith("dense/savings")}
        own = {name: mean for name, mean in forms.items() if mean is not None}
        if own and base is not None:
            worst = max(own, key=own.__getitem__)
            return worst, own[worst], base, document
    return None


def quality(documents: Sequence[Document]) -> Figure | None:
    """Mean held-out loss of the savings over that of float32."""
    if (found := _savings(documents)) is None:
        return None
    name, own, base, document = found
    return Figure(own / base, name, "dense/fp32", f"{own:.4f} against {base:.4f} nats", document["file"])


def quality_in_noise(documents: Sequence[Document]) -> Figure | None:
    """How much worse the savings are, over the largest difference between two of float32's seeds."""
    if (found := _savings(documents)) is None:
        return None
    name, own, base, document = found
    spread = value_of(document["cases"]["dense/fp32"], "spread")
    if not spread:
        return None
    detail = f"{own - base:+.4f} against a spread of {spread:.4f} nats"
    return Figure(max(own - base, 0.0) / spread, name, "dense/fp32", detail, document["file"])


def phase_share(size: str, metric: str, against: str) -> _Find:
    """The smallest of fxresu's peaks by `metric` over the whole device's peak of a peer."""

    def find(documents: Sequence[Document]) -> Figure | None:
        for document in latest_first(documents, f"memory {size}"):
            rows = document["cases"]
            alike = {n: r for n, r in rows.items() if "error" not in r and as_many_tokens(r, rows.get(against))}
            own = best({**document, "cases": alike}, ["fxresu/*"], metric)
            reference = value_of(rows.get(against), "peak_device_bytes")
            if own is not None and reference is not None:
                detail = f"{own[1] / 1e9:.3g} against {reference / 1e9:.3g} GB"
                return Figure(own[1] / reference, own[0], against, detail, document["file"])
        return None

    return find


MEMORY_TARGETS: tuple[Target, ...] = (*_host_targets(), *_ladder_targets())
