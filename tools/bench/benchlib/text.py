"""A text of a given size from what is installed, for benchmarks that train on text. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch

from fxresu.corpus import Corpus, corpus_from_file
from fxresu.text_sources import collect, installed_roots


def write_text(path: Path, size: int) -> None:
    """The standard library's and installed packages' source and documentation, `size` bytes of it, whole lines.

    The same packages give the same text: files come in the order of their names.
    """
    roots = installed_roots()
    packages = Path(torch.__file__).resolve().parents[1]  # a virtual environment may only point at them
    if packages not in (root for _, root in roots):
        roots.append(("base", packages))
    left = size
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for _, span in collect(roots, size):
            for piece in span.pieces():
                data = piece.encode()
                data = data if len(data) <= left else data[: data.rfind(b"\n", 0, left) + 1]
                file.write(data)
                left -= len(data)
    part.rename(path)


def text_corpus(folder: Path, size: int, vocabulary: int, window: int) -> Corpus:
    """The text as tokens of a byte-level BPE; made once in `folder`."""
    text = folder / f"text-{size}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    if not text.is_file():
        write_text(text, size)
    return corpus_from_file(text, folder / "corpus", tokenizer="bpe", vocab_size=vocabulary, window=window)
