"""What was measured: a JSON file with the versions and one line an architecture."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

Document = dict[str, Any]
_PACKAGES = ("torch", "transformers", "timm", "peft")


def versions() -> dict[str, str]:
    """Versions that decide what a model's graph looks like; of packages that are installed."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def same(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two sets of versions agree on every package that both have."""
    return all(a[name] == b[name] for name in a.keys() & b.keys())


def load(path: Path) -> Document:
    """The document; an empty one if there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else {"versions": {}, "rows": {}}


def put(path: Path, versions: dict[str, str], name: str, row: dict[str, Any], order: list[str]) -> None:
    """Put one row into the document; several processes may. Rows measured with other versions go."""
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        document = load(path)
        if not same(document["versions"], versions):
            document["rows"] = {}
        known = {k: v for k, v in document["rows"].get(name, {}).items() if k != "failed"}
        row = {**known, **row, "uses": {**known.get("uses", {}), **row.get("uses", {})}}
        rows = {**document["rows"], name: row}
        save(path, {"versions": {**document["versions"], **versions}, "rows": {n: rows[n] for n in order if n in rows}})
    finally:
        os.close(lock)


def save(path: Path, document: Document) -> None:
    """Write the document, whole or not at all."""
    rows = ",\n".join(f"  {json.dumps(name)}: {_row(row)}" for name, row in document["rows"].items())
    text = f'{{\n "versions": {json.dumps(document["versions"])},\n "rows": {{\n{rows}\n }}\n}}\n'
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def _row(row: dict[str, Any]) -> str:
    """A row, with a line for each phase."""
    rest = {k: v for k, v in row.items() if k != "phases"}
    phases = ",\n".join(f"    {json.dumps(p)}: {json.dumps(c)}" for p, c in row.get("phases", {}).items())
    return json.dumps(rest)[:-1] + (f', "phases": {{\n{phases}\n  }}}}' if phases else "}")
