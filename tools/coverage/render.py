"""docs/MODELS.md from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PHASES = ("dense", "sparse", "resu", "predict", "correct")
_TRAINING, _FORWARD = PHASES[:3], PHASES[3:]
Row = Mapping[str, Any]

_HEAD = """# Models

Rendered by `tools/coverage/table` from `tools/coverage/measured.json`, which `tools/coverage/measure` writes; do not
edit.

Every architecture is built from its configuration, small (mostly two layers, 32 to 64 wide), in training mode without
dropout. In each phase it is compiled and called twice, with its backward where the phase trains, as one graph where the
model allows that. Outputs and the gradient of every managed weight are compared with the plain model's, run eager in
float64. Tests repeat it: `tests/models` takes its expectations from the same file.
"""

_TABLE = """## Architectures

*Weights*: managed weights, a tied one once. *Rewritten*: of them, those all of whose consumers a pass rewrote, in
dense, sparse, RESU, predict and correct. *Graphs*, *breaks*: of a first call. *Compiles*: graphs after two calls. (One
number: the same in every phase.) *Gradients*, *outputs*: the largest difference from float64 in units of the tensor's
largest element, over the phases that train and over predict (which computes in bfloat16) and correct. Tolerances of
gradients: 2e-3 in float32, 0.06 in float16, 0.25 in bfloat16; of outputs in predict: 0.25. ⁱ: compiled by Inductor; the
others stop at AOTAutograd, which has no part in what passes do.
"""

_LEFT = """## What is not rewritten

It computes the right values and gradients all the same.
"""

_LEFT_REMARKS = """
- Experts in a loop choose their weights by values: Dynamo leaves such a loop to Python, whatever is in it. The same
  models run as one graph with `model.set_experts_implementation("grouped_mm")` (the default of most) or `"batched_mm"`.
- RNN, GRU and LSTM are not managed, and are left to Python with one graph break each; the linears around them are
  rewritten.
"""

_USES = """## What people do with models

Tried in RESU on one model of each family. `yes`: it works, and outputs, and gradients where there are any, are right. A
number: neither does the plain model, for the reason below. *functional_call*: with other values, and `torch.func.grad`
through it. *export*: `torch.export`, without strict mode and with it, without a trace of fxresu in the program.
*meta*: transformed on the meta device, then `to_empty` and `load_state_dict`. *sizes change*: four combinations of
batch and length, at most one recompilation; *sizes declared*: the same with `dynamic=True`, none. *checkpoint*:
`torch.utils.checkpoint` compiled and eager. *LoRA*: adapters of peft on every linear of the transformed model. The last
two: weights in that type.
"""


def document(measured: Mapping[str, Any]) -> str:
    """The whole document."""
    rows = measured["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    parts = [_HEAD, f"{summary(rows)} Measured with {versions}.\n", _TABLE, _architectures(rows), _left(rows)]
    return "\n".join([*parts, *_uses(rows)]).rstrip() + "\n"


def share_rewritten(rows: Mapping[str, Row]) -> tuple[int, int]:
    """(managed weights rewritten, managed weights) over all architectures and phases."""
    cells = [cell for row in rows.values() for cell in row.get("phases", {}).values()]
    return sum(c["rewritten"] for c in cells), sum(c["managed"] for c in cells)


def right(row: Row) -> bool:
    """Whether every phase ran and was right."""
    return set(row.get("phases", {})) == set(PHASES)


def summary(rows: Mapping[str, Row]) -> str:
    """What it comes to, in a sentence or two."""
    done, managed = share_rewritten(rows)
    correct = sum(map(right, rows.values()))
    return (
        f"**{len(rows)} architectures and situations; {done:,} of {managed:,} managed weights rewritten, all phases"
        f" taken together ({done / max(managed, 1):.1%}); {correct} of {len(rows)} right in every phase.**"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _architectures(rows: Mapping[str, Row]) -> str:
    header = ["architecture", "weights", "rewritten", "graphs", "breaks", "compiles", "gradients", "outputs"]
    return _table(header, [_architecture(name, row) for name, row in rows.items()])


def _architecture(name: str, row: Row) -> list[str]:
    label = name + ("ⁱ" if row["backend"] == "inductor" else "")
    if not right(row):
        return [label, *[""] * 6, f"**wrong**: {row.get('failed', 'not measured')}"]
    columns = [_numbers(row, key) for key in ("managed", "rewritten", "graphs", "breaks", "compiles")]
    worst = [f"{max(row['phases'][p]['error'] for p in phases):.0e}" for phases in (_TRAINING, _FORWARD)]
    return [label, *columns, *worst]


def _numbers(row: Row, key: str) -> str:
    values = [str(row["phases"][phase][key]) for phase in PHASES]
    return values[0] if len(set(values)) == 1 else " ".join(values)


def _left(rows: Mapping[str, Row]) -> str:
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, row in rows.items():
        for phase, cell in row.get("phases", {}).items():
            for line in cell["left"]:
                weight, _, reason = line.partition(": ")
                found.setdefault((name, weight, reason), []).append(phase)
    if not found:
        return "\n".join([_LEFT, "Nothing: every consumer of every managed weight is rewritten.\n"])
    lines = [
        [name, f"`{weight}`", reason, "all" if len(phases) == len(PHASES) else ", ".join(phases)]
        for (name, weight, reason), phases in found.items()
    ]
    return "\n".join([_LEFT, _table(["architecture", "weight", "why", "phases"], lines) + _LEFT_REMARKS])


def _uses(rows: Mapping[str, Row]) -> list[str]:
    tried = {name: row["uses"] for name, row in rows.items() if row.get("uses")}
    if not tried:
        return []
    uses = list(dict.fromkeys(use for results in tried.values() for use in results))
    notes: dict[str, int] = {}
    table = [[name, *(_use(results.get(use), notes) for use in uses)] for name, results in tried.items()]
    told = [f"{number}. {note}" for note, number in notes.items()]
    return [_USES, _table(["", *uses], table), "\n".join(told)]


def _use(result: str | None, notes: dict[str, int]) -> str:
    if result is None:
        return ""
    if not result:
        return "yes"
    number = notes.setdefault(_escaped(result), len(notes) + 1)
    return f"**no** ({number})" if result.startswith("failed") else f"({number})"


def _escaped(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"
