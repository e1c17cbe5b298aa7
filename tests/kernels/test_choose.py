"""The chooser by itself: choices from figures, and the figures on disk."""

import json
import multiprocessing
import warnings
from pathlib import Path

import pytest
import torch

from fxresu.kernels import _choice_cache, _measure, choose
from fxresu.kernels._choice_cache import ChoiceCache
from fxresu.kernels.choose import Problem

PROBLEM = Problem("thing", "sparse", 64, 64, 8, "float32", "float32")
VERSIONS = {"fxresu": "a", "torch": "2", "triton": "3", "device": "H"}
CUDA = torch.device("cuda")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Candidates first, fast and picky, whose figures the test sets; returns the dict and the count of measurements."""
    given: dict[str, float | str] = {"first": 100.0, "fast": 50.0}
    calls = []
    monkeypatch.setattr(choose, "_REGISTRY", {})
    choose.register("thing", "first", lambda p, d: None, lambda: "first")
    choose.register("thing", "fast", lambda p, d: None, lambda: "fast")
    choose.register("thing", "picky", lambda p, d: "K=64: must be 65", lambda: "picky")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_choice_cache, "versions", lambda device: VERSIONS)
    monkeypatch.setattr(_choice_cache, "_OPEN", {})
    monkeypatch.setenv("FXRESU_CACHE", str(tmp_path))
    monkeypatch.setenv("FXRESU_MEASURE", "1")

    def compare(problem, device, names):
        calls.append(tuple(names))
        return {n: given[n] for n in names}

    monkeypatch.setattr(_measure, "compare", compare)
    return given, calls


def test_the_fastest_that_can_run_wins_and_is_measured_once(figures, tmp_path: Path) -> None:
    first = choose.choose(PROBLEM, CUDA)
    assert (first.chosen, first.default, first.microseconds) == ("fast", False, {"first": 100.0, "fast": 50.0})
    assert first.reasons == {"picky": "K=64: must be 65"}
    _choice_cache._OPEN.clear()  # another process
    assert choose.choose(PROBLEM, CUDA) == first
    assert figures[1] == [("first", "fast")]
    assert [p.name for p in tmp_path.iterdir()] == ["kernels-h.json"]


def test_the_default_stays_for_less_than_the_margin(figures) -> None:
    figures[0]["fast"] = 98.0
    assert choose.choose(PROBLEM, CUDA).chosen == "first"


def test_a_candidate_that_fails_is_listed_and_not_chosen(figures) -> None:
    figures[0]["fast"] = "failed: result 0 differs"
    found = choose.choose(PROBLEM, CUDA)
    assert found.chosen == "first" and found.reasons["fast"] == "failed: result 0 differs"


def test_nothing_replaces_a_default_that_could_not_be_checked_against(figures) -> None:
    figures[0]["first"] = "failed: out of memory"
    assert choose.choose(PROBLEM, CUDA).chosen == "first"
    figures[0]["first"] = 100.0
    assert choose.choose(PROBLEM, CUDA).chosen == "fast", "running out of memory is not remembered"


def test_forcing(figures) -> None:
    assert choose.choose(PROBLEM, CUDA, "fast").chosen == "fast"
    assert figures[1] == []
    with pytest.raises(choose.KernelChoiceError, match="'picky' was asked for.*K=64: must be 65"):
        choose.choose(PROBLEM, CUDA, "picky")
    with pytest.raises(choose.KernelChoiceError, match="no such candidate; use one of first, fast, picky"):
        choose.choose(PROBLEM, CUDA, "unknown")


def test_on_a_cpu_the_default_is_taken_and_said_so(figures) -> None:
    found = choose.choose(PROBLEM, torch.device("cpu"))
    assert (found.chosen, found.note) == ("first", "nothing is measured on cpu: the default")
    assert figures[1] == []


def test_a_name_is_registered_once(figures) -> None:
    with pytest.raises(ValueError, match="registered already"):
        choose.register("thing", "first", lambda p, d: None, lambda: None)


def test_what_could_not_be_measured_runs_the_default_says_why_and_is_not_remembered(figures, tmp_path: Path) -> None:
    def fails(problem, device, names):
        raise choose.UnmeasuredError("no process")

    assert choose.missing(PROBLEM, CUDA) == ["first", "fast"] and choose.missing(PROBLEM, CUDA, "fast") == []
    found = choose.choose(PROBLEM, CUDA, measure=fails)
    assert (found.chosen, found.default, found.note) == ("first", True, "not measured: no process")
    assert found.reasons == {"picky": "K=64: must be 65", "fast": "not measured: no process"}
    assert list(tmp_path.iterdir()) == []
    assert choose.choose(PROBLEM, CUDA).chosen == "fast" and choose.missing(PROBLEM, CUDA) == []


# --- disk ------------------------------------------------------------------------------------------------------------

GOOD = {"versions": VERSIONS, "problems": {"p": {"first": 1.0, "fast": "failed: x"}}}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"versions": {}, "problems": []}', '{"versions": 1, "problems": {"p": 3}}',
     '{"versions": {}, "problems": {"p": {"a": -1.0}}}', '{"versions": {}, "problems": {"p": {"a": NaN}}}',
     '{"versions": {}, "problems": {"p": {"a": null}}}', b"\xff\xfe"],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_one_warning_and_rebuilt(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "kernels.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(RuntimeWarning, match="kernels.json") as caught:
        cache = ChoiceCache(path, VERSIONS)
        assert cache.get("p", ["first"]) is None
        cache.put("q", {"first": 2.0})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ChoiceCache(path, VERSIONS).get("q", ["first"]) == {"first": 2.0}


@pytest.mark.parametrize("name", VERSIONS)
def test_a_file_from_other_versions_is_ignored_with_one_warning(tmp_path: Path, name: str) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(GOOD))
    assert ChoiceCache(path, VERSIONS).get("p", ["first"]) == {"first": 1.0}
    with pytest.warns(RuntimeWarning, match=f"from another {name}") as caught:
        other = ChoiceCache(path, {**VERSIONS, name: "new"})
        assert other.get("p", ["first"]) is None
        other.put("p", {"first": 3.0})
    assert len(caught) == 1
    assert json.loads(path.read_text())["versions"][name] == "new"


def test_an_unwritable_folder_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be kept") as caught:
        cache = ChoiceCache(tmp_path / "file" / "kernels.json", VERSIONS)
        cache.put("p", {"first": 1.0})
        cache.put("q", {"first": 1.0})
    assert len(caught) == 1
    assert cache.get("p", ["first"]) == {"first": 1.0}


def test_a_new_candidate_is_measured_again(tmp_path: Path) -> None:
    cache = ChoiceCache(tmp_path / "kernels.json", VERSIONS)
    cache.put("p", {"first": 1.0})
    assert cache.get("p", ["first", "new"]) is None


def _write(path: Path, key: str) -> None:
    ChoiceCache(path, VERSIONS).put(key, {"first": 1.0})


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(path, str(i))) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 8
    assert json.loads(path.read_text())["problems"]
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.json"]


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FXRESU_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _choice_cache.folder() == tmp_path / "fxresu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _choice_cache.folder() == Path.home() / ".cache" / "fxresu"


# --- operands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_random_masks(pattern: str) -> None:
    mask = _measure.random_mask(8, 16, 0.5, pattern, torch.Generator().manual_seed(0))
    assert mask.sum(1).tolist() == [8] * 8
    if pattern:
        blocks = mask.view(2, 4, 4, 4).transpose(1, 2)
        assert (blocks.sum(2) == 2).all() and (blocks.sum(3) == 2).all()


@pytest.mark.parametrize("mode", ["dense", "sparse", "resu", "frozen"])
@pytest.mark.parametrize("op", ["linear", "linear_packed"])
def test_operands_run_and_leave_the_random_state(op: str, mode: str) -> None:
    if op == "linear_packed" and mode in ("dense", "sparse"):
        pytest.skip("packed storage holds weights in RESU")
    before = torch.get_rng_state()
    layout = "rows" if mode == "resu" else ""
    problem = Problem(op, mode, 12, 40, 3, "float32", "float32", layout=layout, input_grad=mode != "frozen")
    work = _measure.operands(problem, torch.device("cpu"))
    first, again = (work.step(work.module(choose.candidates(op)[0].name)) for _ in range(2))
    _measure.check(first, again)
    assert len(first) == {"dense": 3, "sparse": 3, "resu": 3, "frozen": 1}[mode]
    assert torch.equal(before, torch.get_rng_state())


FAKE = torch.device("cpu")
MIXED = [
    Problem("linear", "sparse", 128, 256, 64, "bfloat16", "float32", pattern="2:4"),
    Problem("linear", "sparse", 128, 256, 64, "bfloat16", "float32", pattern="2:4", transposed=True),
    Problem("linear", "frozen", 128, 256, 64, "bfloat16", "bfloat16", pattern="2:4"),
    Problem("linear", "resu", 128, 256, 8, "float32", "float32", layout="rows"),
    Problem("linear", "resu", 128, 256, 8, "bfloat16", "bfloat16", layout="flat", transposed=True, input_grad=False),
    Problem("linear_packed", "resu", 128, 256, 3, "bfloat16", "bfloat16", layout="rows", pattern="2:4"),
    Problem("linear_packed", "frozen", 128, 256, 3, "bfloat16", "float32", layout="flat", input_grad=False),
    Problem("linear_packed", "resu", 128, 256, 3, "bfloat16", "int8", layout="rows", values="int8"),
    Problem("linear_packed", "resu", 128, 256, 3, "bfloat16", "uint8", layout="flat", values="int4"),
]


@pytest.mark.parametrize("problem", MIXED, ids=lambda p: p.key.replace(" ", ","))
def test_all_candidates_that_say_they_can_run_give_what_the_default_gives(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_measure, "_time", lambda step, graphed, device: (step(), 1.0)[1])
    able = [c.name for c in choose.candidates(problem.op) if c.supports(problem, FAKE) is None]
    assert _measure.compare(problem, FAKE, able) == dict.fromkeys(able, 1.0)


def test_a_wrong_result_is_found() -> None:
    right = (torch.ones(3), torch.ones(2, dtype=torch.bfloat16))
    _measure.check((torch.ones(3) + 1e-6, right[1] * 1.005), right)
    for wrong in ((torch.ones(3) * 1.001, right[1]), (right[0] * float("nan"), right[1]), (right[0], right[1].float())):
        with pytest.raises(_measure.WrongResultError):
            _measure.check(wrong, right)


def test_nothing_is_measured_unasked(figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXRESU_MEASURE")
    choice = choose.choose(PROBLEM, CUDA)
    assert (choice.chosen, choice.default) == ("first", True) and "FXRESU_MEASURE=1" in choice.note
    assert not figures[1]
