"""An `Inspection` as text: tables that fold the repeated blocks of a model into one row."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from fxresu.passes import Activation

from .inspection_data import Inspection, PhaseInspections, WeightRow

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_MIN_NAME, _MIN_WRAP = 24, 14  # characters
_PLAIN = 5  # columns that are never wrapped: name, number, shape, counts


def render(found: Inspection, *, every: bool = False, width: int | None = None, only_changed: bool = False) -> str:
    """The inspection for a terminal.

    Args:
        every: a row for each weight, instead of one for all that differ in block numbers only.
        width: columns of the terminal; names are shortened to fit. None: as wide as it needs.
        only_changed: leave out weights and passes that nothing happened to.
    """
    parts = [_head(found), _weights(found, every, width, only_changed), memory(found), activations(found, every)]
    parts.append(_passes(found, only_changed))
    if not only_changed:
        parts += [_left_alone(found, every), _breaks(found)]
    return "\n\n".join(filter(None, parts))


def render_phases(found: PhaseInspections, *, every: bool = False, width: int | None = None) -> str:
    """A line for each phase, and a table of weights by phases."""
    first = found.phases[0]
    notes: dict[str, str] = {}
    by_weight = {w: tuple(_cell(p, w, notes) for p in found) for w in dict.fromkeys(r.weight for r in first.rows)}
    shapes = {r.weight: r.shape for r in first.rows}
    alike: dict[Any, list[str]] = defaultdict(list)
    for weight, cells in by_weight.items():
        alike[(shapes[weight], cells)].append(weight)
    lines = []
    for (shape, cells), names in alike.items():
        for pattern, members in [(n, [0]) for n in names] if every else fold(names):
            lines.append([pattern, f"x{len(members)}" if len(members) > 1 else "", shape_text(shape), *cells])
    headers = ["weight", "", "shape", *(str(p.phase) for p in found)]
    limit = None
    table = tabulate(lines, headers, disable_numparse=True)
    if width is not None and (excess := _width(table) - width) > 0:
        limit = max(_MIN_NAME, max(len(line[0]) for line in lines) - excess)
        table = tabulate([[_shorten(n, limit), *rest] for n, *rest in lines], headers, disable_numparse=True)
    reasons = [f"  {mark} {reason}" for reason, mark in notes.items()]
    parts = [_model_line(found), _phase_lines(found), table, "\n".join(["not rewritten:", *reasons]) if reasons else ""]
    return "\n\n".join(filter(None, [*parts, _left_alone(first, every)]))


def _cell(found: Inspection, weight: str, notes: dict[str, str]) -> str:
    """What the weight's consumers became in one phase; what was not rewritten has a number that `notes` explains."""
    parts = []
    for row in found.rows:
        if row.weight != weight:
            continue
        if row.reason:
            mark = notes.setdefault(row.reason, f"({len(notes) + 1})")
            parts.append(f"{row.before or 'not read'} {mark}")
        else:
            parts.append(row.after.removeprefix("fxresu.") + (f" in {low}" if (low := computes_in(row)) else ""))
    counted = Counter(parts)
    return ", ".join(text if n == 1 else f"{text} x{n}" for text, n in counted.items())


def computes_in(row: WeightRow) -> str:
    """The dtype that a pass casts the consumer's operands to; "" without such a pass."""
    return next((c.rpartition(" ")[2] for c in row.casts if not c.startswith("result")), "")


def _phase_lines(found: PhaseInspections) -> str:
    lines = []
    for p in found:
        became = ", ".join(f"{n:,} {a} -> {b}" for (a, b), n in p.became.items()) or "-"
        breaks = sum(b.times for b in p.breaks)
        lines.append([p.phase, f"{p.rewritten:,} of {len(p.rows):,}", became, p.captured, breaks, _saving(p)])
    headers = ["phase", "rewritten", "into", "graphs", "breaks", "memory of a step, against plain dense training"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", "right", "left", "right", "right", "left"))


def size(n: int | None) -> str:
    """Bytes with three digits: 512 B, 1.23 kB, 45.6 MB."""
    if n is None:
        return "unknown"
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{n} B" if unit == "B" else f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def totals(found: Inspection) -> tuple[int, int] | None:
    """Bytes of all components in plain dense training and in the phase; None if one is unknown."""
    if any(r.plain is None or r.phase is None for r in found.memory):
        return None
    return sum(r.plain or 0 for r in found.memory), sum(r.phase or 0 for r in found.memory)


def _saving(found: Inspection) -> str:
    both = totals(found)
    if both is None:
        return f"activations unknown: {found.memory_unknown}"
    return f"{size(both[0])} -> {size(both[1])} ({percent(*both)})"


def percent(plain: int | None, phase: int | None) -> str:
    """The change as a percentage: -36%, +0%; "" where there is nothing to compare."""
    if plain is None or phase is None or plain == 0:
        return ""
    return f"{(phase - plain) / plain:+.0%}".replace("-0%", "+0%")


def memory(found: Inspection) -> str:
    """The table of what a training step holds."""
    lines = [[r.component, size(r.plain), size(r.phase), percent(r.plain, r.phase)] for r in found.memory]
    both = totals(found)
    if both is not None:
        lines.append(["total", size(both[0]), size(both[1]), percent(*both)])
    headers = ["memory of a step", "plain dense", str(found.phase), "change"]
    align = ("left", "right", "right", "right")
    text = tabulate(lines, headers, disable_numparse=True, colalign=align)
    note = "managed weights and all activations; optimizer state as of AdamW"
    if not found.activations:
        note += "; before the compiler's own recomputation"
    return f"{text}\n{note}" + (f"\nactivations unknown: {found.memory_unknown}" if found.memory_unknown else "")


def activations(found: Inspection, every: bool = False) -> str:
    """The table of what a policy for activations decides; "" without one."""
    if not found.activations:
        return ""
    alike: dict[Any, list[Activation]] = defaultdict(list)
    for row in (r for record in found.activations for r in record.rows):
        alike[(row.decision, row.op, row.shape, row.dtype, row.reason)].append(row)
    lines = []
    for (decision, op, shape, dtype, reason), rows in alike.items():
        names = [r.module for r in rows]
        for pattern, members in [(n, [i]) for i, n in enumerate(names)] if every else fold(names):
            total = sum(rows[i].bytes for i in members)
            number = f"x{len(members)}" if len(members) > 1 else ""
            lines.append((total, [decision, pattern, number, op, f"{dtype} {shape_text(shape)}", size(total), reason]))
    lines.sort(key=lambda line: -line[0])
    shown = [line for _, line in lines]
    headers = ["activation", "module", "", "operation", "value", "bytes", ""]
    align = ("left", "left", "left", "left", "left", "right", "left")
    table = tabulate(shown, headers, disable_numparse=True, colalign=align)
    sums = {d: sum(a.total(d) for a in found.activations) for d in ("save", "recompute", "offload")}
    return (
        f"{table}\nkept on the device: {size(sums['save'])}; waiting on the host: {size(sums['offload'])}; the compiler"
        f" alone would keep {size(sum(a.by_default for a in found.activations))}, and {size(sums['recompute'])} of it"
        f" are computed again; {plural(sum(a.repeated for a in found.activations), 'operation')} run twice"
    )


def fold(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Names that differ in numbers only as one pattern: "b.0.w", "b.1.w" and "c" as "b.{0..1}.w" and "c".

    A pattern stands for exactly its names: where the numbers of two places do not combine freely, only the last varies.

    Returns:
        (pattern, indices into `names`), in order of first appearance.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        groups[_NUMBER.sub("#", name)].append(i)
    folded: list[tuple[str, list[int]]] = []
    for skeleton, members in groups.items():
        numbers = {i: tuple(map(int, _NUMBER.findall(names[i]))) for i in members}
        parts = [members] if _is_product(list(numbers.values())) else _by_prefix(numbers)
        folded += [(_pattern(skeleton, [numbers[i] for i in part]), part) for part in parts]
    return sorted(folded, key=lambda f: f[1][0])


def _is_product(numbers: list[tuple[int, ...]]) -> bool:
    size = 1
    for place in zip(*numbers):
        size *= len(set(place))
    return len(set(numbers)) == len(numbers) == size


def _by_prefix(numbers: dict[int, tuple[int, ...]]) -> list[list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, own in numbers.items():
        groups[own[:-1]].append(i)
    return list(groups.values())


def _pattern(skeleton: str, numbers: list[tuple[int, ...]]) -> str:
    places = iter([sorted(set(place)) for place in zip(*numbers)])
    return re.sub("#", lambda _: _range(next(places)), skeleton)


def _range(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}{'es' if word.endswith(('s', 'ss')) else 's'}"


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _model_line(phases: PhaseInspections) -> str:
    found, sparsity = phases.phases[0], max(p.sparsity for p in phases)
    return (
        f"{found.model}: {plural(found.weights, 'managed weight')} hold {found.managed:,} of {found.parameters:,}"
        f" parameters ({found.managed / max(found.parameters, 1):.0%}); sparsity {sparsity:g}, granularity"
        f" {found.granularity}, candidates {found.candidates:g}, storage {found.storage}"
    )


def _head(found: Inspection) -> str:
    plan = found.plan
    pruned = (
        f"sparsity {found.sparsity:g}, granularity {found.granularity}, candidates {found.candidates:g}, "
        if found.sparsity
        else "nothing pruned, "
    )
    consumers = len(found.rows)
    source = "on the weights' values" if found.values else "from shapes alone, without allocating a weight,"
    return "\n".join(
        [
            f"{found.model} in phase {plan.phase}: {plural(found.weights, 'managed weight')} hold"
            f" {found.managed:,} of {found.parameters:,} parameters ({found.managed / max(found.parameters, 1):.0%})",
            f"rewritten: {found.rewritten} of {plural(consumers, 'consumer')}{_into(found)}",
            f"left:      {_not_rewritten(found)}",
            f"memory:    {_memory_line(found)}",
            f"graphs:    {plural(found.captured, 'graph')},"
            f" {plural(sum(b.times for b in found.breaks), 'graph break')},"
            f" {plural(found.recompiles, 'recompilation')}, {plural(found.markers_left, 'marker')} left",
            f"settings:  {pruned}storage {found.storage}; weights {plan.weights}, precision {plan.precision},"
            f" activations {plan.activations}"
            + (f", budget {plan.activation_budget}" if plan.activation_budget is not None else ""),
            f"captured {source} in {found.seconds:.1f} s",
        ]
    )


def _into(found: Inspection) -> str:
    became = ", ".join(f"{n:,} {a} -> {b}" for (a, b), n in found.became.items())
    return f": {became}" if became else ""


def _not_rewritten(found: Inspection) -> str:
    consumers = plural(sum(not r.rewritten for r in found.rows), "consumer")
    alone = plural(len(found.left_alone), "large parameter")
    return f"{consumers} not rewritten, {alone} not managed" + (" (reasons below)" if found.left_alone else "")


def _memory_line(found: Inspection) -> str:
    both = totals(found)
    if both is None:
        return f"activations unknown: {found.memory_unknown}"
    return (
        f"{size(both[1])} for the managed weights' training and all activations; plain dense training,"
        f" {size(both[0])} ({percent(*both)})"
    )


def _weights(found: Inspection, every: bool, width: int | None, only_changed: bool) -> str:
    headers = ["weight", "", "shape", "active", "candidates", "before -> after", "executes"]
    lines = []
    groups = grouped([r for r in found.rows if r.rewritten or not only_changed], every)
    if not groups:
        return "no weight's consumer was rewritten"
    for group, rows in groups:
        row = rows[0]
        change = "-" if not row.before else row.before if row.reason else f"{row.before} -> {row.after}"
        number = f"x{len(rows)}" if len(rows) > 1 else ""
        lines.append(
            [group, number, shape_text(row.shape), count_text([r.active for r in rows], row.active_exact),
             count_text([r.candidates for r in rows], row.candidates_exact), change, str(row.executed) or "-"]
        )  # fmt: skip
    if any(r.reason for _, rows in groups for r in rows):
        headers.append("why not rewritten")
        for line, (_, rows) in zip(lines, groups):
            line.append(rows[0].reason)
    table = _table(lines, headers, width)
    notes = []
    if found.engines:
        notes.append("executes: matrix products and kernels of the forward (fwd) and of the backward (bwd), in order")
    if any("~" in line[3] + line[4] for line in lines):
        notes.append("~ a mean: the number depends on the weights' values")
    by_engine: dict[str, list[str]] = defaultdict(list)
    for name, engine in found.engines.items():
        by_engine[engine].append(name)
    known = "; ".join(f"{', '.join(names)}: {engine}" for engine, names in by_engine.items())
    notes += [f"on {found.device}: {known}"] if known else []
    return "\n".join([table, *notes])


def count_text(numbers: Sequence[int], exact: bool) -> str:
    least, most = min(numbers), max(numbers)
    if most == 0:
        return "0"
    return f"{'' if exact else '~'}{least:,}" + (f"..{most:,}" if most > least else "")


def grouped(rows: Sequence[WeightRow], every: bool) -> list[tuple[str, list[WeightRow]]]:
    """Rows that say the same of weights that differ in block numbers only, with the pattern of their names."""
    if every:
        return [(r.weight, [r]) for r in rows]
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, r in enumerate(rows):
        reads = sum(1 for other in alike if other[0] == r.weight)
        alike[(reads, r.shape, r.before, r.after, r.executed, r.reason)].append(i)
    found = []
    for members in alike.values():
        for pattern, inside in fold([rows[i].weight for i in members]):
            found.append((members[inside[0]], pattern, [rows[members[j]] for j in inside]))
    return [(pattern, group) for _, pattern, group in sorted(found, key=lambda f: f[0])]


def _table(lines: list[list[str]], headers: list[str], width: int | None) -> str:
    """The table of weights; where it is too wide, names are shortened first, and then what was done is wrapped."""
    align = ["left", "left", "left", "right", "right", *["left"] * (len(headers) - _PLAIN)]

    def draw(limit: int | None, wrap: int | None) -> str:
        short = [[_shorten(line[0], limit), *line[1:]] for line in lines]
        widths = [None] * _PLAIN + [wrap] * (len(headers) - _PLAIN)
        return tabulate(short, headers, disable_numparse=True, colalign=align, maxcolwidths=widths)

    table = draw(None, None)
    if width is None or (excess := _width(table) - width) <= 0:
        return table
    limit = max(_MIN_NAME, max(len(line[0]) for line in lines) - excess)
    table = draw(limit, None)
    for wrap in range(48, _MIN_WRAP - 1, -2):
        if _width(table) <= width:
            break
        table = draw(limit, wrap)
    return table


def _width(table: str) -> int:
    return max(map(len, table.splitlines()))


def _shorten(name: str, limit: int | None) -> str:
    """`name` in at most `limit` characters: the middle goes, for the ends tell more."""
    if limit is None or len(name) <= limit:
        return name
    tail = (limit - 1) * 2 // 3
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"


def _passes(found: Inspection, only_changed: bool) -> str:
    lines = []
    for entry in found.passes:
        if only_changed and not entry.matches:
            continue
        changed = ", ".join(f"{op} {a:,} -> {b:,}" for op, (a, b) in entry.changed.items()) or (
            "no operation's count" if entry.matches else "-"
        )
        lines.append([entry.name, f"{entry.matches:,}", f"{entry.seconds * 1e3:.0f} ms", changed])
    headers = ["pass", "matches", "time", "changed"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", "right", "right", "left"))


def _left_alone(found: Inspection, every: bool) -> str:
    if not found.left_alone:
        return ""
    alike: dict[Any, list[str]] = defaultdict(list)
    for left in found.left_alone:
        alike[(left.shape, left.reason)].append(left.weight)
    lines = []
    for (shape, reason), names in alike.items():
        for pattern, members in [(n, [0]) for n in names] if every else fold(names):
            lines.append([f"  {pattern}", f"x{len(members)}" if len(members) > 1 else "", shape_text(shape), reason])
    return "not managed:\n" + tabulate(lines, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)


def _breaks(found: Inspection) -> str:
    if not found.breaks:
        return ""
    lines = []
    for entry in found.breaks:
        times = f" (x{entry.times})" if entry.times > 1 else ""
        lines.append(f"  {entry.where or 'a function that Dynamo leaves to Python'}{times}: {entry.reason}")
    return "\n".join(["graph breaks:", *lines])
