"""Batches: order as a pure function of (seed, step), memory mapping, held-out windows, prefetching."""

import gc
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fxresu.corpus import TokenFile
from fxresu.data import Prefetcher, batch_at, batches, held_out_batches
from fxresu.errors import ConfigError, DataError


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    path = tmp_path / "train.bin"
    (np.arange(10_000) % 5003).astype("<u2").tofile(path)
    return TokenFile(path, 10_000)


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_windows_are_text_and_targets_are_one_token_later(tokens: TokenFile) -> None:
    inputs, targets = batch_at(tokens, 3, 8, 16, seed=1)
    assert inputs.shape == targets.shape == (8, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal((inputs + 1) % 5003, targets)


def test_resumed_run_sees_the_same_order(tokens: TokenFile) -> None:
    whole = list(itertools.islice(batches(tokens, 4, 16, seed=7), 10))
    resumed = list(batches(tokens, 4, 16, seed=7, start=6, stop=10))
    assert len(resumed) == 4
    assert all(same(a, b) for a, b in zip(whole[6:], resumed))
    assert same(whole[8], batch_at(tokens, 8, 4, 16, seed=7))


def test_order_ignores_and_keeps_the_global_generator(tokens: TokenFile) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = batch_at(tokens, 0, 4, 16, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, batch_at(tokens, 0, 4, 16, seed=7))


def test_steps_and_seeds_differ(tokens: TokenFile) -> None:
    # (0, 1) and (1, 0), (1, 11) and (11, 1) would collide under a careless mixing of the two numbers
    keys = [(0, 1), (1, 0), (1, 11), (11, 1), (0, 0), (-1, 1)]
    seen = {tuple(batch_at(tokens, step, 4, 16, seed=seed)[0].flatten().tolist()) for seed, step in keys}
    assert len(seen) == len(keys)


def test_every_start_is_reachable_and_none_is_out_of_range(tmp_path: Path) -> None:
    array = np.arange(20, dtype=np.uint16)
    starts = {int(s) for step in range(30) for s in batch_at(array, step, 8, 16, seed=0)[0][:, 0]}
    assert starts == {0, 1, 2, 3}
    assert {int(s) for s in batch_at(array, 0, 4, 19, seed=0)[0][:, 0]} == {0}


def test_tokens_stay_on_disk(tokens: TokenFile) -> None:
    assert isinstance(tokens[10:20], np.memmap)
    batch_at(tokens, 0, 4, 16, seed=0)
    assert isinstance(tokens.array, np.memmap) and not tokens.array.flags.writeable


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    with open(path, "wb") as file:
        file.truncate(400_000_000)  # sparse on disk, 400 MB when read
    code = (
        "import resource, pathlib, fxresu.data as d, fxresu.corpus as c\n"
        f"tokens = c.TokenFile(pathlib.Path({str(path)!r}), 200_000_000)\n"
        "d.batch_at(tokens, 0, 8, 128, 0)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for step in range(50): d.batch_at(tokens, step, 8, 128, 0)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown * 1024 < 40_000_000


def test_held_out_windows_are_fixed_and_spread(tokens: TokenFile) -> None:
    first, second = held_out_batches(tokens, 3, 4, 16), held_out_batches(tokens, 3, 4, 16)
    assert len(first) == 3 and all(same(a, b) for a, b in zip(first, second))
    array = np.arange(10_000, dtype=np.uint16)
    starts = sorted(int(s) for inputs, _ in held_out_batches(array, 3, 4, 16) for s in inputs[:, 0])
    assert starts[0] == 0 and starts[-1] == 10_000 - 17
    assert max(np.diff(starts)) - min(np.diff(starts)) <= 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: batch_at(t, 0, 4, 10_000, 0), DataError, r"train\.bin: 10,000 tokens .* seq_len=10000"),
        (lambda t: batch_at(t, 0, 0, 16, 0), ConfigError, "batch_size=0"),
        (lambda t: batch_at(t, 0, 4, 0, 0), ConfigError, "seq_len=0"),
        (lambda t: batches(t, 4, 16, seed=0, start=-1), ConfigError, "start=-1"),
        (lambda t: batches(t, 4, 10_000, seed=0), DataError, "window"),
        (lambda t: held_out_batches(t, 0, 4, 16), ConfigError, "n=0"),
        (lambda t: held_out_batches(t, 1, 4, 10_000), DataError, "window"),
        (lambda t: Prefetcher(batches(t, 4, 16, seed=0), depth=0), ConfigError, "depth=0"),
    ],
)
def test_bad_input(tokens: TokenFile, call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(tokens)


def test_prefetcher_gives_the_same_batches_and_ends(tokens: TokenFile) -> None:
    expected = list(batches(tokens, 4, 16, seed=0, stop=20))
    prefetcher = Prefetcher(batches(tokens, 4, 16, seed=0, stop=20))
    assert all(same(a, b) for a, b in itertools.zip_longest(prefetcher, expected))
    assert not prefetcher._thread.is_alive()
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_prefetcher_is_bounded(tokens: TokenFile) -> None:
    made = []

    def source():
        for batch in batches(tokens, 1, 4, seed=0):
            made.append(1)
            yield batch

    with Prefetcher(source(), depth=2) as prefetcher:
        next(prefetcher)
        time.sleep(0.3)
        assert 2 <= len(made) <= 4  # one taken, two in the queue, one in the thread's hand


def test_prefetcher_raises_the_error_in_its_place(tokens: TokenFile) -> None:
    def source():
        yield from batches(tokens, 1, 4, seed=0, stop=3)
        raise OSError("the disk went away")

    prefetcher = Prefetcher(source())
    for _ in range(3):
        next(prefetcher)
    with pytest.raises(OSError, match="the disk went away"):
        next(prefetcher)
    assert not prefetcher._thread.is_alive()
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_prefetcher_closes_with_a_full_queue_and_closes_its_source(tokens: TokenFile) -> None:
    closed = threading.Event()

    def source():
        try:
            yield from batches(tokens, 1, 4, seed=0)
        finally:
            closed.set()

    prefetcher = Prefetcher(source())
    next(prefetcher)
    start = time.monotonic()
    prefetcher.close()
    prefetcher.close()
    assert time.monotonic() - start < 2 and not prefetcher._thread.is_alive() and closed.is_set()
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_forgotten_prefetcher_stops_its_thread(tokens: TokenFile) -> None:
    prefetcher = Prefetcher(batches(tokens, 1, 4, seed=0))
    thread = prefetcher._thread
    del prefetcher
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.gpu
def test_batches_on_the_gpu(tokens: TokenFile) -> None:
    expected = list(batches(tokens, 4, 16, seed=0, stop=5))
    with Prefetcher(batches(tokens, 4, 16, seed=0, stop=5), device="cuda") as prefetcher:
        for got, want in itertools.zip_longest(prefetcher, expected):
            assert got[0].is_cuda and same((got[0].cpu(), got[1].cpu()), want)
    assert same(tuple(t.cpu() for t in batch_at(tokens, 0, 4, 16, seed=0, device="cuda")), expected[0])
