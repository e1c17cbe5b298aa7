"""The two tokenizers of a corpus: UTF-8 bytes, and a small byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import DataError

__all__ = ["TOKEN_DTYPE", "BpeTokenizer", "ByteTokenizer", "Tokenizer", "open_tokenizer", "train_bpe"]

END_OF_DOCUMENT = "<|end_of_document|>"
TOKEN_DTYPE = np.dtype("<u2")  # two bytes hold every vocabulary up to 65536


class Tokenizer(Protocol):
    """Text to uint16 tokens and back; every text is in the vocabulary."""

    vocab_size: int
    end_of_document: int

    def encode(self, text: str) -> npt.NDArray[np.uint16]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes 0..255 and 256 for the end of a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(TOKEN_DTYPE)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class BpeTokenizer:
    """Byte-level BPE of the `tokenizers` library (every byte is in the alphabet, so no text is out of vocabulary)."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size = inner.get_vocab_size()
        self.end_of_document = inner.token_to_id(END_OF_DOCUMENT)

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        # Lines in batches let the library use all cores, and no Encoding object of a whole document piles up.
        lines = text.splitlines(keepends=True)
        blocks = ["".join(lines[i : i + 64]) for i in range(0, len(lines), 64)]
        ids = [np.asarray(e.ids, dtype=TOKEN_DTYPE) for e in self._inner.encode_batch(blocks, add_special_tokens=False)]
        return np.concatenate(ids) if ids else np.empty(0, TOKEN_DTYPE)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(list(tokens), skip_special_tokens=True)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> BpeTokenizer:
    """BPE of at most `vocab_size` tokens (fewer when `texts` has fewer merges), saved as JSON at `path`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    # The text itself may spell the end-of-document token; it must then be ordinary characters.
    inner.encode_special_tokens = True
    inner.save(str(path))
    return BpeTokenizer(inner)


def open_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """The tokenizer "bytes", or "bpe" from `folder`/tokenizer.json; DataError when that file is missing or damaged."""
    if kind == "bytes":
        return ByteTokenizer()
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for a missing and for a damaged file
        raise DataError(f"{folder / 'tokenizer.json'}: cannot be read ({error}); build the corpus again") from error
    inner.encode_special_tokens = True
    return BpeTokenizer(inner)
