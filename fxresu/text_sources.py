"""Where the text of a corpus comes from: files that the Python installation holds, or the user's own."""

from __future__ import annotations

import codecs
import hashlib
import os
import site
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError

__all__ = ["Span", "collect", "installed_roots", "line_cut", "sample_text", "scan_user_file", "uniform"]

_SUFFIXES = (".py", ".rst", ".txt", ".md")
# Tests and fixtures are full of literal data, encodings and locales are tables, vendored trees repeat other packages.
_SKIPPED_FOLDERS = frozenset(
    ["__pycache__", "site-packages", "dist-packages", "_vendor", "_vendored", "vendor", "vendored"]
    + ["test", "tests", "idle_test", "testing", "test_data", "testdata", "fixtures", "benchmarks"]
    + ["data", "encodings", "locale", "locales", "generated", "pydoc_data"]
)
_SMALLEST_FILE, _LARGEST_FILE = 128, 300_000  # bytes; larger single files are mostly generated or tables
_PIECE = 1 << 20  # bytes of text held in memory at a time
_SAMPLE = 4_000_000  # bytes that the BPE merges are learnt from; more changes 2048 merges very little
_NOT_LETTERS = bytes(b for b in range(128) if not chr(b).isalpha())  # bytes above 127 are letters of other scripts
_INVALID_LIMIT = 0.001  # share of bytes that are not UTF-8 above which a file is binary or of another encoding


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file: one document of a split."""

    path: Path
    start: int
    stop: int

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about 1 MB that end at a line end where there is one."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        rest = ""
        left = self.stop - self.start
        while left > 0:
            data = self._read(self.stop - left, min(_PIECE, left))
            left -= len(data)
            text = rest + decoder.decode(data, final=left == 0)
            cut = text.rfind("\n") + 1 or len(text)
            rest = text[cut:]
            yield text[:cut]
        if rest:
            yield rest

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); build the corpus again") from error
        if len(data) < size:
            raise DataError(f"{self.path}: became shorter while it was read; build the corpus again")
        return data


def installed_roots() -> list[tuple[str, Path]]:
    """Labelled folders of the standard library and of installed packages, standard library first."""
    paths = sysconfig.get_paths()
    found: dict[Path, str] = {}
    for label, folder in [
        ("stdlib", paths["stdlib"]),
        ("packages", paths["purelib"]),
        ("packages", paths["platlib"]),
        *(("packages", folder) for folder in site.getsitepackages()),
    ]:
        found.setdefault(Path(folder).resolve(), label)
    return [(label, folder) for folder, label in found.items() if folder.is_dir()]


def uniform(name: str) -> float:
    """A number in [0, 1) that depends on `name` only: the same file lands in the same split on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()) / 2**64


def _candidates(root: Path) -> list[str]:
    """Relative POSIX paths of the text files under `root`, sorted, without the skipped folders."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and not f.endswith((".dist-info", ".egg-info"))]
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(_SUFFIXES)]
    return sorted(names)


def _looks_like_text(data: bytes) -> bool:
    """Valid UTF-8 prose or code, not a table of numbers or one long line."""
    if b"\0" in data or len(data) > 400 * (data.count(b"\n") + 1):
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    visible = data.translate(None, b" \t\r\n")
    return len(visible.translate(None, _NOT_LETTERS)) >= 0.5 * len(visible)


def collect(roots: Sequence[tuple[str, Path]], min_bytes: int) -> list[tuple[str, Span]]:
    """(name, span) of distinct text files worth at least `min_bytes`, sorted by name."""
    chosen: list[tuple[str, Span]] = []
    seen: set[bytes] = set()
    total = 0
    for label, root in roots:
        # In the order of a hash, so that the part taken of a big installation is spread over all of its packages.
        for relative in sorted(_candidates(root), key=uniform):
            if total >= min_bytes:
                return sorted(chosen)
            path = root / relative
            try:
                if not _SMALLEST_FILE <= path.stat().st_size <= _LARGEST_FILE:
                    continue
                data = path.read_bytes()
            except OSError:  # dangling links and unreadable files are no material
                continue
            digest = hashlib.sha256(data).digest()
            if digest in seen or not _looks_like_text(data):
                continue
            seen.add(digest)
            chosen.append((f"{label}/{relative}", Span(path, 0, len(data))))
            total += len(data)
    if total < min_bytes:
        looked = ", ".join(str(root) for _, root in roots)
        raise DataError(
            f"min_bytes={min_bytes:,}: only {total:,} bytes of distinct text in {len(chosen)} files under {looked}; "
            "install more packages, lower min_bytes, or use corpus_from_file on your own text"
        )
    return sorted(chosen)


def scan_user_file(path: Path) -> tuple[int, str, int]:
    """(bytes, sha256, bytes that are not UTF-8) of a user's file; DataError if it is missing, empty or not text."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a regular file; give one text file, or a list of them")
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(errors="ignore")
    size = valid = 0
    with open(path, "rb") as file:
        while data := file.read(_PIECE):
            if (nul := data.find(b"\0")) >= 0:
                raise DataError(
                    f"{path}: not text, it holds a NUL byte at offset {size + nul:,}; give a UTF-8 text file "
                    "(convert UTF-16 with: iconv -f UTF-16 -t UTF-8)"
                )
            digest.update(data)
            size += len(data)
            valid += len(decoder.decode(data).encode())
    if size == 0:
        raise DataError(f"{path}: empty; give a UTF-8 text file")
    invalid = size - valid
    if invalid > max(_INVALID_LIMIT * size, 3):  # 3: a file cut inside its last character is still text
        raise DataError(
            f"{path}: not UTF-8 text, {invalid:,} of {size:,} bytes ({invalid / size:.1%}) do not decode; convert it, "
            "for example with: iconv -f LATIN1 -t UTF-8"
        )
    return size, digest.hexdigest(), invalid


def line_cut(path: Path, size: int, held_out_fraction: float) -> int:
    """Byte offset where the held-out part starts: the first line start after the wanted position, else before it."""
    wanted = min(size - 1, max(1, round(size * (1 - held_out_fraction))))
    with open(path, "rb") as file:
        file.seek(wanted - 1)
        after = file.read(_PIECE)
        cut = after.find(b"\n") + 1
        if cut and wanted - 1 + cut < size:
            return wanted - 1 + cut
        begin = max(0, wanted - _PIECE)
        file.seek(begin)
        if cut := file.read(wanted - begin).rfind(b"\n") + 1:
            return begin + cut
    # A file that is one line: cut between two characters (continuation bytes are 10xxxxxx).
    skip = next((i for i, byte in enumerate(after[1:5]) if byte & 0xC0 != 0x80), 0)
    return wanted + skip


def sample_text(spans: Sequence[Span]) -> Iterator[str]:
    """Evenly spread pieces of the documents, about `_SAMPLE` bytes."""
    total = sum(s.stop - s.start for s in spans)
    share = min(1.0, _SAMPLE / max(1, total))
    passed = taken = 0
    for span in spans:
        for text in span.pieces():
            for block in _blocks(text):
                passed += len(block)
                if taken <= share * passed:
                    taken += len(block)
                    yield block


def _blocks(text: str, size: int = 16384) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", min(len(text), start + size)) + 1 or len(text)
        yield text[start:stop]
        start = stop
