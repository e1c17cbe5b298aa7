"""Peaks of stretches of a run, below the highest of the whole process."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch

from fxresu.memory_watch import MemoryWatch, children_bytes

_MB = 1_000_000


def _in_a_process(code: str) -> str:
    """What it prints, in a process whose heap no other test has filled and left."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_peak_below_the_process_s_highest_is_seen() -> None:
    code = """
import time, torch
from fxresu.memory_watch import MemoryWatch
def hold(size):
    held = torch.ones(size // 4)
    time.sleep(0.2)  # several looks
    del held
hold(300_000_000)  # so that the operating system's own highest says nothing of what follows
watch = MemoryWatch(torch.device("cpu"))
before = watch.take().host
hold(120_000_000)
now, highest = watch.step()
held, rest = watch.take(), watch.take()  # the next stretch knows nothing of it
assert held.device is None and held.whole_device is None and highest == held.host
print(held.host - before, now - before, rest.host - before)
"""
    held, now, rest = map(int, _in_a_process(code).split())
    assert 100 * _MB < held < 200 * _MB and now < 60 * _MB and rest < 60 * _MB


def test_a_short_peak_counts_where_it_is_the_highest_ever() -> None:
    code = """
import torch
from fxresu.memory_watch import MemoryWatch
watch = MemoryWatch(torch.device("cpu"))
watch.close()
before = watch.take().host
held = torch.ones(40_000_000)
del held
print(watch.take().host - before)
"""
    assert 150 * _MB < int(_in_a_process(code)) < 200 * _MB


def test_nobody_is_watched_who_is_gone() -> None:
    before = {t.ident for t in threading.enumerate()}
    watch = MemoryWatch(torch.device("cpu"))
    (mine,) = [t for t in threading.enumerate() if t.ident not in before and t.name == "fxresu-memory"]
    del watch
    gc.collect()
    mine.join(5)
    assert not mine.is_alive()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_children_are_counted() -> None:
    before = children_bytes()
    code = "held = bytearray(50_000_000); print(len(held), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 50 * _MB < children_bytes() - before < 90 * _MB
        child.stdin.close()


@pytest.mark.gpu
def test_peaks_of_a_device() -> None:
    watch = MemoryWatch(torch.device("cuda"))
    watch.take()
    held = torch.ones(50 * _MB, device="cuda")
    del held
    first, second = watch.take(), watch.take()
    assert first.device - second.device >= 200 * _MB and first.whole_device >= 200 * _MB
