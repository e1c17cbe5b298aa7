"""A checkpoint folder: written whole or not at all, the earlier ones kept, verified before it is read.

Every folder holds safetensors files and `state.json`: format version, what is no tensor, and the SHA-256 of them all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError
from .files import sha256, sync

FORMAT = 2
_DOCUMENT = "state.json"
_STEP_DIGITS = 8


def write_folder(
    path: Path, contents: Mapping[str, Mapping[str, Tensor]], document: Mapping[str, Any], *, step: int, keep_last: int
) -> None:
    """Write files of tensors and a document beside `path`, sync them, rename the folder over `path`.

    Args:
        contents: tensors by name, by file name.
        step: kept in the document; earlier checkpoints are named after theirs.
        keep_last: 1 replaces the earlier checkpoint; N > 1 keeps N - 1 of them as `<path>-<step>`.

    Raises:
        CheckpointError: `path` is there and is no checkpoint, or keep_last < 1.
        OSError: it could not be written (disk full, permissions). Earlier checkpoints are intact, and it says so.
    """
    if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
        raise CheckpointError(f"keep_last={keep_last!r}: use the number of checkpoints to keep, at least 1")
    if path.exists() and not (path / _DOCUMENT).exists() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"path={str(path)!r} is there and is no checkpoint folder; choose another one")
    temporary = path.with_name(f".{path.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in contents.items():
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary / name)
            sync(temporary / name)
        _write_document(temporary, contents, {"format": FORMAT, "step": step, **document})
        sync(temporary)
        _replace(temporary, path, keep_last)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _not_written(path, error, contents) from error
        raise


def _write_document(folder: Path, files: Mapping[str, Any], document: dict[str, Any]) -> None:
    document["sha256"] = {name: sha256(folder / name) for name in files}
    document["sha256"][_DOCUMENT] = _digest(document)
    (folder / _DOCUMENT).write_text(json.dumps(document))
    sync(folder / _DOCUMENT)


def _digest(document: Mapping[str, Any]) -> str:
    """Digest of the document without its own digest."""
    rest = {**document, "sha256": {k: v for k, v in document["sha256"].items() if k != _DOCUMENT}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _not_written(path: Path, error: Exception, contents: Mapping[str, Mapping[str, Tensor]]) -> OSError:
    """The error with what became of the earlier checkpoint, and how much space is missing."""
    found = re.search(r"os error (\d+)", str(error))  # how safetensors reports the system's errors
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else errno.EIO
    cause = os.strerror(number) if number is not None else str(error)
    if number == errno.ENOSPC:
        need = sum(t.numel() * t.element_size() for tensors in contents.values() for t in tensors.values())
        cause += f" (it takes {need / 1e6:,.1f} MB beside the earlier one)"
    kept = newest(path)
    rest = "there is no earlier one" if kept is None else f"the earlier checkpoint {str(kept)!r} is intact"
    return OSError(number, f"{cause}: the checkpoint was not written; {rest}", str(path))


def _replace(temporary: Path, path: Path, keep_last: int) -> None:
    """Rename over an earlier checkpoint; at every moment a complete one is there, under this or an earlier name."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        kept = old if keep_last == 1 else _earlier_name(path)
        _remove(kept)
        path.rename(kept)
    temporary.rename(path)
    sync(path.parent)
    _remove(old)
    if keep_last > 1:
        for folder in earlier(path)[: 1 - keep_last or None]:
            _remove(folder)


def _earlier_name(path: Path) -> Path:
    try:
        step = int(json.loads((path / _DOCUMENT).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        step = 0  # damaged: kept for whoever wants to look, as the first to be deleted
    return path.with_name(f"{path.name}-{step:0{_STEP_DIGITS}d}")


def _remove(folder: Path) -> None:
    """Delete a checkpoint; one that is deleted by half is no longer taken for one."""
    (folder / _DOCUMENT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def earlier(path: Path) -> list[Path]:
    """Folders of the checkpoints before the one at `path`, that `keep_last` kept; oldest first."""
    pattern = re.compile(re.escape(path.name) + rf"-\d{{{_STEP_DIGITS},}}")
    siblings = path.parent.iterdir() if path.parent.is_dir() else iter(())
    found = [p for p in siblings if pattern.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def newest(path: Path) -> Path | None:
    """The checkpoint to read for `path`: itself, or the one before if a crash hit between two renames; else None."""
    old = path.with_name(f".{path.name}.old")
    return next((p for p in (path, old, *reversed(earlier(path))) if (p / _DOCUMENT).exists()), None)


def read_folder(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(document, tensors by file) of the newest checkpoint of `path`, verified as a whole.

    Raises:
        CheckpointError: missing, truncated, damaged, of a later format or of another kind.
    """
    folder = newest(path) if not path.exists() else path
    if folder is None or not (folder / _DOCUMENT).exists():
        raise CheckpointError(f"path={str(path)!r} holds no checkpoint (no {_DOCUMENT}){_hint(path)}")
    document = _read_document(folder, _hint(path))
    if document["kind"] != kind:
        raise CheckpointError(f"checkpoint {str(folder)!r} is a {document['kind']}'s, expected a {kind}'s")
    names = [n for n in document["sha256"] if n != _DOCUMENT]
    return document, {name: _read_tensors(folder / name, document["sha256"][name], _hint(path)) for name in names}


def _hint(path: Path) -> str:
    names = [str(p) for p in reversed(earlier(path)) if (p / _DOCUMENT).exists()]
    return f"; earlier checkpoints: {', '.join(names)}" if names else ""


def _read_document(folder: Path, hint: str) -> dict[str, Any]:
    file = folder / _DOCUMENT
    try:
        document = json.loads(file.read_text())
        version = document["format"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged or foreign ({error}); use an earlier checkpoint{hint}") from None
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {str(folder)!r} has format {version!r}; this fxresu reads format {FORMAT}")
    missing = {"kind", "step", "cycle", "sha256"} - document.keys()
    if missing:
        raise CheckpointError(f"{file} lacks {sorted(missing)[0]!r}: truncated or foreign{hint}")
    if document["sha256"].get(_DOCUMENT) != _digest(document):
        raise CheckpointError(f"{file} is damaged (SHA-256 differs); use an earlier checkpoint{hint}")
    return document


def _read_tensors(path: Path, digest: str, hint: str) -> dict[str, Tensor]:
    if not path.exists():
        raise CheckpointError(f"checkpoint file {str(path)!r} is missing; use an earlier checkpoint{hint}")
    if sha256(path) != digest:
        raise CheckpointError(
            f"checkpoint file {str(path)!r} is truncated or damaged (SHA-256 differs); use an earlier checkpoint{hint}"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint file {str(path)!r} cannot be read: {error}{hint}") from None


__all__ = ["FORMAT", "earlier", "newest", "read_folder", "write_folder"]
