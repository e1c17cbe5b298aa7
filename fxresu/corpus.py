"""Text corpora as memory-mapped token files.

A corpus is a folder with `train.bin` and `held_out.bin` (little-endian uint16 tokens, no header), `meta.json`, and for
the BPE tokenizer `tokenizer.json`. `build_corpus` collects source code and documentation that any Python machine has;
`corpus_from_file` takes the user's own text. Both write into a temporary folder beside the target and rename it when it
is complete, so that a corpus is either whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, DataError
from .files import sha256, sync
from .text_sources import Span, collect, installed_roots, line_cut, sample_text, scan_user_file, uniform
from .text_tokenizers import TOKEN_DTYPE, ByteTokenizer, Tokenizer, open_tokenizer, train_bpe

__all__ = ["Corpus", "TokenFile", "build_corpus", "corpus_from_file", "load_corpus"]

FORMAT, FORMAT_VERSION = "fxresu-corpus", 1
_FILES = ("train.bin", "held_out.bin", "meta.json", "tokenizer.json")


@dataclass(frozen=True)
class TokenFile:
    """One split: `count` uint16 tokens at `path`, mapped into memory at first use and read page by page.

    Pickles as its path, never as its tokens.
    """

    path: Path
    count: int

    @cached_property
    def array(self) -> npt.NDArray[np.uint16]:
        """The tokens, uint16 [count], as a read-only memory map."""
        return np.memmap(self.path, dtype=TOKEN_DTYPE, mode="r", shape=(self.count,))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: slice) -> npt.NDArray[np.uint16]:
        return self.array[index]

    def __reduce__(self) -> tuple[type[TokenFile], tuple[Path, int]]:
        return TokenFile, (self.path, self.count)


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: two token files, the vocabulary size and what `meta.json` says about their making."""

    train: TokenFile
    held_out: TokenFile
    vocab_size: int
    meta: dict[str, Any] = field(repr=False)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.meta["tokenizer"], self.train.path.parent)

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Tokens of `text`, uint16 [n], without an end-of-document token."""
        return self._tokenizer.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; end-of-document tokens vanish, broken UTF-8 sequences become U+FFFD."""
        return self._tokenizer.decode([int(t) for t in tokens])


# ------------------------------------------------------------------------------------------------------------- writing


def _write_tokens(path: Path, spans: Iterable[Span], tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokenise documents into `path`, an end-of-document token after each; returns counts and checksum."""
    digest, tokens, source_bytes = hashlib.sha256(), 0, 0
    ending = np.array([tokenizer.end_of_document], TOKEN_DTYPE)
    with open(path, "wb") as file:
        for span in spans:
            source_bytes += span.stop - span.start
            for part in _chain_encoded(span, tokenizer, ending):
                data = part.tobytes()
                digest.update(data)
                file.write(data)
                tokens += part.size
        file.flush()
        os.fsync(file.fileno())
    return {"tokens": tokens, "source_bytes": source_bytes, "sha256": digest.hexdigest()}


def _chain_encoded(span: Span, tokenizer: Tokenizer, ending: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.uint16]]:
    for text in span.pieces():
        yield tokenizer.encode(text)
    yield ending


def _check_parameters(tokenizer: str, vocab_size: int, held_out_fraction: float, window: int) -> None:
    if tokenizer not in ("bytes", "bpe"):
        raise ConfigError(f"tokenizer={tokenizer!r}: must be 'bytes' or 'bpe'")
    if tokenizer == "bpe" and not 258 <= vocab_size <= 65536:
        raise ConfigError(f"vocab_size={vocab_size}: must be from 258 (256 bytes, end of document, one merge) to 65536")
    if not 0 < held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction={held_out_fraction}: must be between 0 and 1, for example 0.05")
    if window < 2:
        raise ConfigError(f"window={window}: must be at least 2 tokens (sequence length + 1)")


def _check_target(out: Path) -> None:
    """Refuse to replace anything that is not a corpus of ours."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; give a folder for the corpus")
    if foreign := sorted(set(os.listdir(out)) - set(_FILES)):
        raise DataError(f"{out}: holds other files ({', '.join(foreign[:3])}); give an empty or a new folder")
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # absent or damaged: the names are ours, so it is ours to replace
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{out / 'meta.json'}: not the description of a corpus; give an empty or a new folder")


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and vanishes when it does not."""
    work = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        sync(work)
        old = out.parent / f".{out.name}.{os.getpid()}.old"
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(work, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        message = f"{error.strerror or error}; the corpus needs a writable folder with space for two bytes per token"
        raise OSError(error.errno, message, str(out)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_corpus(
    out: Path,
    train: Sequence[Span],
    held_out: Sequence[Span],
    parameters: dict[str, Any],
    facts: dict[str, Any],
    window: int,
) -> Corpus:
    with _new_folder(out) as work:
        tokenizer: Tokenizer = ByteTokenizer()
        if parameters["tokenizer"] == "bpe":
            tokenizer = train_bpe(sample_text(train), parameters["vocab_size"], work / "tokenizer.json")
        splits = {
            "train": _write_tokens(work / "train.bin", train, tokenizer),
            "held_out": _write_tokens(work / "held_out.bin", held_out, tokenizer),
        }
        splits["train"]["files"], splits["held_out"]["files"] = len(train), len(held_out)
        _check_window(_source(parameters, out), splits, window)
        meta = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "tokenizer": parameters["tokenizer"],
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "dtype": "uint16",
            "source_bytes": splits["train"]["source_bytes"] + splits["held_out"]["source_bytes"],
            "splits": splits,
            "parameters": parameters,
            **facts,
        }
        with open(work / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
    return load_corpus(out)


def _source(parameters: dict[str, Any], out: Path) -> str:
    """What a message names: the user's files, or the corpus folder where there are none."""
    return ", ".join(file["path"] for file in parameters.get("files", ())) or str(out)


def _check_window(out: str, splits: dict[str, dict[str, Any]], window: int) -> None:
    for split, facts in splits.items():
        if facts["tokens"] < window:
            raise DataError(
                f"{out}: the {split} part has {facts['tokens']:,} tokens, fewer than one window of {window}; give more "
                "text, a shorter sequence length, or another held_out_fraction"
            )


def _reusable(out: Path, parameters: dict[str, Any]) -> Corpus | None:
    """The corpus at `out` if it is intact and was made with these parameters."""
    if not (out / "meta.json").exists():
        return None
    try:
        corpus = load_corpus(out, verify=True)
    except DataError:
        return None  # damaged: the caller builds it again from the sources
    return corpus if corpus.meta["parameters"] == parameters else None


def _build(
    out_dir: str | os.PathLike[str],
    parameters: dict[str, Any],
    window: int,
    spans: Callable[[], tuple[list[Span], list[Span], dict[str, Any]]],
) -> Corpus:
    out = Path(out_dir)
    _check_target(out)
    if (corpus := _reusable(out, parameters)) is not None:
        _check_window(_source(parameters, out), corpus.meta["splits"], window)
        return corpus
    train, held_out, facts = spans()
    return _write_corpus(out, train, held_out, parameters, facts, window)


# ---------------------------------------------------------------------------------------------------------- public API


def build_corpus(
    out_dir: str | os.PathLike[str],
    *,
    min_bytes: int = 24_000_000,
    tokenizer: str = "bytes",
    vocab_size: int = 2048,
    held_out_fraction: float = 0.05,
    window: int = 2,
) -> Corpus:
    """Corpus of source code and documentation from the standard library and the installed packages.

    Files (.py, .rst, .txt, .md) are valid UTF-8, distinct by SHA-256, no test data, no tables. The standard library
    comes first, then packages' files in the order of a hash of their path until `min_bytes` (bytes of text) are
    reached. A file belongs to the held-out split if the hash of its path says so. An intact corpus with the same
    parameters that is already at `out_dir` is checked (SHA-256) and used again; otherwise it is replaced.

    tokenizer: "bytes" (257 tokens) or "bpe" (byte-level BPE of `vocab_size` tokens learnt from a sample of the train
    split).
    window: tokens that one training window takes (sequence length + 1); both splits must have at least that many.

    Raises ConfigError for a wrong argument, DataError when the machine has too little text or `out_dir` holds something
    else, OSError when the folder cannot be written. Nothing half-written is left.
    """
    _check_parameters(tokenizer, vocab_size, held_out_fraction, window)
    if min_bytes < 1:
        raise ConfigError(f"min_bytes={min_bytes}: must be a positive number of bytes")
    parameters = {
        "source": "installed",
        "min_bytes": min_bytes,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer == "bpe" else ByteTokenizer.vocab_size,
        "held_out_fraction": held_out_fraction,
    }

    def spans() -> tuple[list[Span], list[Span], dict[str, Any]]:
        roots = installed_roots()
        files = collect(roots, min_bytes)
        if len(files) < 2:
            raise DataError(f"min_bytes={min_bytes:,}: reached with one file, and a split needs two; raise min_bytes")
        ranked = sorted(files, key=lambda item: uniform(item[0]))
        # At least one file on either side, whatever the fraction.
        share = sum(uniform(name) < held_out_fraction for name, _ in files)
        held = {name for name, _ in ranked[: min(max(share, 1), len(files) - 1)]}
        facts = {
            "split": "by file: a hash of the relative path",
            "roots": [str(root) for _, root in roots],
            "held_out_files": sorted(held),
        }
        return [s for n, s in files if n not in held], [s for n, s in files if n in held], facts

    return _build(out_dir, parameters, window, spans)


def corpus_from_file(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: str = "bytes",
    vocab_size: int = 2048,
    held_out_fraction: float = 0.05,
    window: int = 2,
) -> Corpus:
    """Corpus from the user's own UTF-8 text file or files.

    Held out is the *last* `held_out_fraction` of every file, cut at a line start (at a character if the file is one
    line); `meta["split"]` says so. Bytes that are not UTF-8 become U+FFFD with a warning when they are fewer than
    0.1 %, and are an error when they are more. Used again while content, path and parameters are the same.

    Raises DataError for a file that is missing, empty, not text or too short for one `window` (tokens), ConfigError
    for a wrong argument, OSError when `out_dir` cannot be written. Nothing half-written is left.
    """
    _check_parameters(tokenizer, vocab_size, held_out_fraction, window)
    paths = [Path(p) for p in ([path] if isinstance(path, str | os.PathLike) else path)]
    if not paths:
        raise DataError("path=[]: give at least one text file")
    scans = [scan_user_file(p) for p in paths]
    parameters = {
        "source": "files",
        "files": [{"path": str(p.resolve()), "bytes": size, "sha256": sha} for p, (size, sha, _) in zip(paths, scans)],
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer == "bpe" else ByteTokenizer.vocab_size,
        "held_out_fraction": held_out_fraction,
    }

    def spans() -> tuple[list[Span], list[Span], dict[str, Any]]:
        for p, (_, _, invalid) in zip(paths, scans):
            if invalid:
                warnings.warn(f"{p}: {invalid} bytes are not UTF-8 and become U+FFFD", stacklevel=4)
        cuts = [line_cut(p, size, held_out_fraction) if size > 1 else 1 for p, (size, _, _) in zip(paths, scans)]
        train = [Span(p, 0, cut) for p, cut in zip(paths, cuts)]
        held_out = [Span(p, cut, size) for p, cut, (size, _, _) in zip(paths, cuts, scans)]
        facts = {
            "split": f"by position: the last {held_out_fraction:.3g} of every file is held out, cut at a line start",
            "replaced_bytes": sum(invalid for _, _, invalid in scans),
        }
        return train, held_out, facts

    return _build(out_dir, parameters, window, spans)


def load_corpus(folder: str | os.PathLike[str], *, verify: bool = False) -> Corpus:
    """Open a corpus folder; tokens are mapped at first use. `verify=True` also compares the SHA-256 of both splits.

    Raises DataError when the folder is no corpus, of another format version, truncated, or (with `verify`) altered.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    files = {}
    for split in ("train", "held_out"):
        path, facts = folder / f"{split}.bin", meta["splits"][split]
        size, expected = path.stat().st_size if path.exists() else 0, facts["tokens"] * TOKEN_DTYPE.itemsize
        if size != expected:
            raise DataError(f"{path}: {size:,} bytes where meta.json says {expected:,}; build the corpus again")
        if verify and sha256(path) != facts["sha256"]:
            raise DataError(f"{path}: the SHA-256 differs from meta.json's; build the corpus again")
        files[split] = TokenFile(path.resolve(), facts["tokens"])
    if meta["tokenizer"] == "bpe" and not (folder / "tokenizer.json").exists():
        raise DataError(f"{folder / 'tokenizer.json'}: missing; build the corpus again")
    return Corpus(files["train"], files["held_out"], meta["vocab_size"], meta)


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{folder}: no corpus here (meta.json: {error.strerror}); build one with build_corpus"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); build the corpus again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{path}: not the description of a corpus; give another folder")
    if meta.get("version") != FORMAT_VERSION:
        raise DataError(f"{path}: version {meta.get('version')!r}, this release reads {FORMAT_VERSION}; build it again")
    if missing := {"splits", "tokenizer", "vocab_size", "parameters"} - set(meta):
        raise DataError(f"{path}: lacks {', '.join(sorted(missing))}; build the corpus again")
    return meta
