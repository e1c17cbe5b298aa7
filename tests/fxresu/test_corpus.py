"""Corpus building: splits, tokenizers, checksums, atomicity, and bad input."""

import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest

from fxresu import corpus as corpus_module
from fxresu import text_sources
from fxresu.corpus import TokenFile, build_corpus, corpus_from_file, load_corpus
from fxresu.errors import ConfigError, DataError

TEXT = "".join(f"line {i}: the quick brown fox jumps over naïve café {i * i}\n" for i in range(2000))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small fake installation: 40 files of prose, and things that must be skipped."""
    root = tmp_path / "lib"
    for i in range(40):
        path = root / f"pkg{i % 3}" / f"mod{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {i}\n" + f"def function_{i}(argument):\n    return argument + {i}\n" * 20)
    (root / "pkg0" / "copy.py").write_bytes((root / "pkg0" / "mod0.py").read_bytes())
    (root / "pkg0" / "table.txt").write_text("0.123 4.567 8.901\n" * 200)
    (root / "pkg0" / "binary.txt").write_bytes(b"abc\0def\n" * 100)
    (root / "pkg0" / "latin.txt").write_bytes("déjà vu\n".encode("latin-1") * 100)
    (root / "pkg0" / "image.png").write_bytes(b"letters and letters\n" * 100)
    (root / "pkg0" / "tests").mkdir()
    (root / "pkg0" / "tests" / "test_mod.py").write_text("assert True, 'letters'\n" * 100)
    monkeypatch.setattr(corpus_module, "installed_roots", lambda: [("stdlib", root)])
    return root


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith((".partial", ".old"))]


def test_build_takes_every_text_file_once_and_nothing_else(installation: Path, tmp_path: Path) -> None:
    size = sum(p.stat().st_size for p in installation.glob("pkg*/mod*.py"))
    corpus = build_corpus(tmp_path / "out", min_bytes=size)
    splits = corpus.meta["splits"]
    assert splits["train"]["files"] + splits["held_out"]["files"] == 40
    assert corpus.meta["source_bytes"] == size
    text = corpus.decode(corpus.train.array) + corpus.decode(corpus.held_out.array)
    for i in range(40):
        assert text.count(f"# module {i}\n") == 1
    assert "0.123" not in text and "assert True" not in text and "letters and" not in text


def test_held_out_is_whole_files_and_disjoint(installation: Path, tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "out", min_bytes=30_000, held_out_fraction=0.2)
    end = corpus.meta["end_of_document"]

    def documents(file: TokenFile) -> set[str]:
        parts = np.split(file.array, np.flatnonzero(file.array == end) + 1)
        return {corpus.decode(part) for part in parts if len(part)}

    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert held_out and not train & held_out
    on_disk = {p.read_text() for p in installation.glob("pkg*/mod*.py")}
    assert train <= on_disk and held_out <= on_disk
    names = corpus.meta["held_out_files"]
    assert len(names) == len(held_out) == corpus.meta["splits"]["held_out"]["files"]


def test_membership_of_a_file_does_not_depend_on_the_others(installation: Path, tmp_path: Path) -> None:
    first = set(build_corpus(tmp_path / "a", min_bytes=30_000, held_out_fraction=0.3).meta["held_out_files"])
    (installation / "pkg1" / "new.py").write_text("something entirely new here\n" * 50)
    second = set(build_corpus(tmp_path / "b", min_bytes=31_000, held_out_fraction=0.3).meta["held_out_files"])
    assert first <= second


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_build_is_deterministic_and_reuses(installation: Path, tmp_path: Path, tokenizer: str) -> None:
    first = build_corpus(tmp_path / "a", min_bytes=30_000, tokenizer=tokenizer, vocab_size=300)
    second = build_corpus(tmp_path / "b", min_bytes=30_000, tokenizer=tokenizer, vocab_size=300)
    assert first.meta == second.meta
    stamp = os.stat(tmp_path / "a" / "train.bin").st_mtime_ns
    build_corpus(tmp_path / "a", min_bytes=30_000, tokenizer=tokenizer, vocab_size=300)
    assert os.stat(tmp_path / "a" / "train.bin").st_mtime_ns == stamp
    build_corpus(tmp_path / "a", min_bytes=20_000, tokenizer=tokenizer, vocab_size=300)
    assert os.stat(tmp_path / "a" / "train.bin").st_mtime_ns != stamp
    assert not leftovers(tmp_path)


def test_damaged_corpus_is_built_again(installation: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = build_corpus(out, min_bytes=30_000).meta["splits"]["train"]["sha256"]
    data = bytearray((out / "train.bin").read_bytes())
    data[1000] ^= 1
    (out / "train.bin").write_bytes(data)
    load_corpus(out)  # the size is right: only verify=True sees it
    with pytest.raises(DataError, match="SHA-256"):
        load_corpus(out, verify=True)
    assert build_corpus(out, min_bytes=30_000).meta["splits"]["train"]["sha256"] == good
    load_corpus(out, verify=True)
    (out / "meta.json").write_text("{")
    build_corpus(out, min_bytes=30_000)
    load_corpus(out, verify=True)


def test_the_real_installation_holds_enough_text(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "out", min_bytes=3_000_000)
    assert 3_000_000 <= corpus.meta["source_bytes"] < 3_400_000
    held_out = corpus.meta["splits"]["held_out"]["source_bytes"] / corpus.meta["source_bytes"]
    assert 0.01 < held_out < 0.12
    assert max(corpus.train.array) <= 256 and np.count_nonzero(corpus.train.array == 256) > 50


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_text_survives_tokenising(text_file: Path, tmp_path: Path, tokenizer: str) -> None:
    corpus = corpus_from_file(text_file, tmp_path / "out", tokenizer=tokenizer, vocab_size=400)
    assert corpus.decode(corpus.train.array) + corpus.decode(corpus.held_out.array) == TEXT
    assert max(corpus.train.array) < corpus.vocab_size
    sample = f"naïve café {'<|end_of_document|>'}\n"
    assert corpus.decode(corpus.encode(sample)) == sample
    if tokenizer == "bpe":
        assert len(corpus.train) < 0.6 * len(TEXT.encode())
        assert (tmp_path / "out" / "tokenizer.json").exists()


def test_user_file_is_cut_at_a_line_and_the_end_is_held_out(text_file: Path, tmp_path: Path) -> None:
    corpus = corpus_from_file(text_file, tmp_path / "out", held_out_fraction=0.1)
    held_out = corpus.decode(corpus.held_out.array)
    assert TEXT.endswith(held_out) and held_out.startswith("line ")
    assert 0.09 < len(held_out.encode()) / len(TEXT.encode()) < 0.11
    assert "last 0.1 of every file" in corpus.meta["split"]


def test_one_line_and_several_files(tmp_path: Path) -> None:
    line, other = tmp_path / "line.txt", tmp_path / "other.txt"
    line.write_text("é" * 5000, encoding="utf-8")
    other.write_text(TEXT, encoding="utf-8")
    corpus = corpus_from_file([line, other], tmp_path / "out", held_out_fraction=0.25)
    train, held_out = corpus.decode(corpus.train.array), corpus.decode(corpus.held_out.array)
    assert "\ufffd" not in train + held_out
    assert train.startswith("é" * 3740) and held_out.startswith("é" * 1240)
    assert train.count("é") + held_out.count("é") == 5000 + TEXT.count("é")


def test_pieces_join_to_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "_PIECE", 777)  # cuts characters and lines
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    size = path.stat().st_size
    assert "".join(text_sources.Span(path, 0, size).pieces()) == TEXT
    assert text_sources.scan_user_file(path)[2] == 0


def test_changed_file_is_tokenised_again(text_file: Path, tmp_path: Path) -> None:
    first = corpus_from_file(text_file, tmp_path / "out")
    text_file.write_text(TEXT.replace("fox", "cat"), encoding="utf-8")
    second = corpus_from_file(text_file, tmp_path / "out")
    assert first.meta["splits"]["train"]["tokens"] == second.meta["splits"]["train"]["tokens"]
    assert "cat" in second.decode(second.train[:200])


def test_few_bad_bytes_warn_and_many_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(TEXT.encode() + b"bad: \xff\xfe end\n")
    with pytest.warns(UserWarning, match="2 bytes are not UTF-8"):
        corpus = corpus_from_file(path, tmp_path / "out")
    assert corpus.meta["replaced_bytes"] == 2
    assert corpus.decode(corpus.held_out.array).endswith("bad: \ufffd\ufffd end\n")
    path.write_bytes(TEXT.encode("latin-1"))
    with pytest.raises(DataError, match="iconv -f LATIN1"):
        corpus_from_file(path, tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"abc\0def", "NUL byte at offset 3"), (TEXT.encode("utf-16"), "UTF-16"), (b"short\n", "window")],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        corpus_from_file(path, tmp_path / "out", window=129)
    assert str(tmp_path) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["t.txt"]


def test_missing_file_folder_and_empty_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        corpus_from_file(tmp_path / "nothing.txt", tmp_path / "out")
    with pytest.raises(DataError, match="not a regular file"):
        corpus_from_file(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="at least one"):
        corpus_from_file([], tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer='words'"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size=100"),
        ({"tokenizer": "bpe", "vocab_size": 70000}, "vocab_size=70000"),
        ({"held_out_fraction": 0.0}, "held_out_fraction=0.0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
        ({"window": 1}, "window=1"),
        ({"min_bytes": 0}, "min_bytes=0"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_corpus(tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_too_little_text_on_the_machine(installation: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"min_bytes=9,000,000,000: only .* 40 files"):
        build_corpus(tmp_path / "out", min_bytes=9_000_000_000)
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_never_replaced(text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        corpus_from_file(text_file, target)
    assert os.listdir(target) == ["thesis.txt"]
    (target / "thesis.txt").rename(target / "meta.json")
    (target / "meta.json").write_text('{"name": "another project"}')
    with pytest.raises(DataError, match="not the description of a corpus"):
        corpus_from_file(text_file, target)
    with pytest.raises(DataError, match="is a file"):
        corpus_from_file(text_file, text_file)
    assert text_file.read_text(encoding="utf-8") == TEXT


def test_full_disk_leaves_the_old_corpus_and_no_rest(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = corpus_from_file(text_file, out)
    text_file.write_text(TEXT * 4, encoding="utf-8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (200_000, hard)
    )  # the kernel refuses larger files in the middle of a write
    try:
        with pytest.raises(OSError, match="writable folder with space") as caught:
            corpus_from_file(text_file, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(out)
    assert not leftovers(tmp_path)
    assert load_corpus(out, verify=True).meta == before.meta


def test_unwritable_parent(text_file: Path) -> None:
    with pytest.raises(OSError, match="writable folder") as caught:
        corpus_from_file(text_file, "/proc/fxresu/out")
    assert caught.value.filename == "/proc/fxresu/out"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "meta.json").unlink(), "no corpus here"),
        (lambda out: (out / "meta.json").write_text("{"), "damaged"),
        (lambda out: (out / "meta.json").write_text("[]"), "not the description"),
        (lambda out: os.truncate(out / "train.bin", 100), "100 bytes where meta.json says"),
        (lambda out: (out / "held_out.bin").unlink(), "0 bytes where"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    ],
)
def test_load_names_the_damage(text_file: Path, tmp_path: Path, damage, message: str) -> None:
    out = tmp_path / "out"
    corpus_from_file(text_file, out, tokenizer="bpe", vocab_size=300)
    damage(out)
    with pytest.raises(DataError, match=message):
        load_corpus(out)


def test_load_refuses_another_version(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    corpus_from_file(text_file, out)
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        load_corpus(out)
    del meta["splits"]
    (out / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="lacks splits"):
        load_corpus(out)


def test_token_file_is_lazy_and_pickles_as_a_path(text_file: Path, tmp_path: Path) -> None:
    corpus = corpus_from_file(text_file, tmp_path / "out")
    assert "array" not in vars(corpus.train)
    assert isinstance(corpus.train.array, np.memmap)
    assert len(pickle.dumps(corpus.train)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(corpus.train)).array, corpus.train.array)
