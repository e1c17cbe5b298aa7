"""SIGKILL in each phase, in each transition, at each place of a save, and at any time: the resumed run ends with the
bits of the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[1] / "support" / "fxresu_kill.py"
VARIANTS = {
    "resident": {},
    "pinned": {"optimizer_state": "pinned", "restore_lookahead": 2, "rule": "adam"},
    "compress": {"optimizer_state": "compress", "rule": "adam"},
    "packed": {"storage": "packed", "rule": "adam", "optimizer_state": "keep", "train_rest": True},
}
STAGES = [(c, s) for c in (0, 1) for s in ("train", "stabilize", "resu")]
MOMENTS = ("forward", "backward", "update")
STEPS = [("resident", (*s, m)) for s in STAGES for m in MOMENTS]
STEPS += [("packed", (*s, MOMENTS[i % 3])) for i, s in enumerate(STAGES)]
# In the middle of a transfer: calls for every tensor of the state; RESU sends 14 or more away.
MOVES = [("pinned", (name, n)) for name in ("leave", "depart", "come_back", "arrive") for n in (3, 11)]
MOVES += [("pinned", ("begin", 1)), ("pinned", ("begin", 2))]
MOVES += [("compress", ("compress", 3)), ("compress", ("depart", 2))]
# Calls a weight: three weights, so the second call is in the middle of a transition.
PLACES = [(n, 2) for n in ("mask_state", "drop_state", "commit_state")]
PLACES += [("mask_state", 5), ("activate", 1), ("activate", 3)]
TRANSITIONS = [("resident", p, w) for p in PLACES for w in ("before", "after")]
TRANSITIONS += [("packed", p, "after") for p in PLACES if p[0] != "drop_state"]  # it keeps the optimizer's state
PARTS = [
    *(("save_file", n, w) for n in (1, 5) for w in ("before", "after")),
    *(("_write_document", 4, w) for w in ("before", "after")),
    *(("sync", n, "after") for n in (7, 10, 11, 12)),
]
RENAMES = [
    *(("rename", n, w) for n in (2, 3) for w in ("before", "after")),  # the second save: away, and in its place
    *(("_remove", n, w) for n in (3, 4) for w in ("before", "after")),
]
SAVES = [(1, p) for p in PARTS + RENAMES] + [(3, p) for p in RENAMES]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., int]]:
    """`run(**spec)`: exit status of one run in a child of its own."""
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def one(**spec: object) -> int:
            server.stdin.write(json.dumps(spec) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield one
        server.stdin.close()


@pytest.fixture(scope="module")
def digests(run, folder_factory) -> dict[str, str]:
    """Digest of the run that nothing disturbs, by variant."""
    found = {}
    for name, variant in VARIANTS.items():
        folders = folder_factory(), folder_factory()
        for folder in folders:
            assert run(folder=str(folder / "c"), variant=variant, result=str(folder / "r")) == 0
        one, other = ((folder / "r").read_text() for folder in folders)
        assert one == other  # deterministic, or nothing below means anything
        found[name] = one
    return found


@pytest.fixture(scope="module")
def folder_factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """New folders, in memory where the system has such: the runs sync their checkpoints to it all the time."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory, prefix="fxresu-kill-") as base:
            yield lambda: Path(tempfile.mkdtemp(dir=base))
    else:
        yield lambda: tmp_path_factory.mktemp("kill")


@pytest.fixture
def folder(folder_factory) -> Path:
    return folder_factory()


def killed_and_resumed(run, folder: Path, variant: str, must_die: bool = True, **spec: object) -> str:
    common = {"folder": str(folder / "c"), "variant": VARIANTS[variant], "result": str(folder / "r")}
    status = run(**common, **spec)
    assert status == -signal.SIGKILL or not must_die, status
    assert run(**common, **{k: v for k, v in spec.items() if k == "keep_last"}) == 0
    return (folder / "r").read_text()


@pytest.mark.parametrize("variant, place", STEPS, ids=str)
def test_killed_in_a_phase(run, digests: dict, folder: Path, variant: str, place: tuple) -> None:
    assert killed_and_resumed(run, folder, variant, kill=["step", *place]) == digests[variant]


@pytest.mark.parametrize("variant, place, when", TRANSITIONS, ids=str)
def test_killed_in_a_transition(run, digests: dict, folder: Path, variant: str, place: tuple, when: str) -> None:
    assert killed_and_resumed(run, folder, variant, kill=["transition", *place, when]) == digests[variant]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("variant, place", MOVES, ids=str)
def test_killed_in_a_transfer(run, digests: dict, folder: Path, variant: str, place: tuple, when: str) -> None:
    assert killed_and_resumed(run, folder, variant, kill=["move", *place, when]) == digests[variant]


def test_where_state_waits_changes_no_bit(run, digests: dict, folder: Path) -> None:
    kept = {"optimizer_state": "keep", "rule": "adam"}
    assert run(folder=str(folder / "c"), variant=kept, result=str(folder / "r")) == 0
    assert (folder / "r").read_text() == digests["pinned"] != digests["compress"]


@pytest.mark.parametrize("keep_last, place", SAVES, ids=str)
def test_killed_in_a_save(run, digests: dict, folder: Path, place: tuple, keep_last: int) -> None:
    end = killed_and_resumed(run, folder, "resident", kill=["save", *place], keep_last=keep_last)
    assert end == digests["resident"]
    kept = ["c"] if keep_last == 1 else ["c", "c-00000012", "c-00000014"]
    assert sorted(p.name for p in folder.iterdir()) == [*kept, "r"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("after", [0.02 + 0.023 * i for i in range(5)])
def test_killed_at_any_time(run, digests: dict, folder: Path, variant: str, after: float) -> None:
    assert killed_and_resumed(run, folder, variant, must_die=False, after=after) == digests[variant]
