"""The chooser's pass: what it measures, what it sets, what it refuses, and what it leaves for `inspect`."""

import json
import warnings

import pytest
import torch
from fxresu_testing import EAGER, Net, in_phase

import fxresu
from fxresu.errors import ConfigError
from fxresu.kernels import choose
from fxresu.passes import CONSIDERED, DEFAULT_PLANS, Considered, Phase, measure_apart
from fxresu.passes._compat import isolated_inductor
from fxresu.passes.choose_kernels import problem_of
from fxresu.runner import runner_of


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second candidate of `linear` that is as right as the first and says so when it runs."""
    monkeypatch.setattr(choose, "_REGISTRY", {op: dict(known) for op, known in choose._REGISTRY.items()})

    def supports(problem: choose.Problem, device: torch.device) -> str | None:
        return f"rows={problem.rows}: must be a multiple of 16" if problem.rows % 16 else None

    def run(x, weight, bias, *rest):
        return choose.implementation("linear", "mm")(x, weight, bias, *rest) * 1

    choose.register("linear", "doubled", supports, run)
    return "doubled"


class Nodes:
    """A backend that keeps the rewritten linears."""

    def __init__(self) -> None:
        self.found: list[torch.fx.Node] = []

    def __call__(self, module, inputs):
        self.found += [n for n in module.graph.nodes if "fxresu.linear" in str(n.target)]
        return module.forward


def _linears(phase: str, **options) -> list[torch.fx.Node]:
    nodes = Nodes()
    model = in_phase(fxresu.transform(Net(), compile={"backend": nodes}, **options), phase)
    model(torch.randn(3, 16))
    return nodes.found


def test_every_candidate_is_listed_and_the_default_runs_on_a_cpu(doubled: str) -> None:
    nodes = _linears("sparse")
    assert len(nodes) == 4
    for node in nodes:
        assert "how" not in node.kwargs
        by_name = {c.name: c for c in node.meta[CONSIDERED]}
        assert by_name["mm"] == Considered("mm", "", None, True)
        assert not by_name[doubled].chosen and by_name[doubled].microseconds is None


def test_a_shape_that_a_candidate_cannot_take_is_listed_with_the_reason(doubled: str) -> None:
    model = fxresu.transform(torch.nn.Sequential(torch.nn.Linear(16, 10)), compile={"backend": (nodes := Nodes())})
    in_phase(model, "sparse")(torch.randn(2, 16))
    reasons = {c.name: c.reason for c in nodes.found[0].meta[CONSIDERED]}
    assert reasons["mm"] == "" and reasons[doubled] == "rows=10: must be a multiple of 16"


def test_a_forced_choice_runs_and_gives_the_same(doubled: str) -> None:
    torch.manual_seed(0)
    plain = in_phase(fxresu.transform(Net(), compile=False), "sparse")
    forced = fxresu.transform(Net(), compile=EAGER, kernels={"blocks.0.*": doubled})
    forced.load_state_dict(plain.state_dict())
    in_phase(forced, "sparse")
    x = torch.randn(5, 16)
    torch.testing.assert_close(forced(x), plain(x))
    (record,) = runner_of(forced).entries[DEFAULT_PLANS[Phase.SPARSE].tag].graphs
    assert {p.name: p.matches for p in record.passes}["choose_kernels"] == 2
    hows = [n.kwargs.get("how", "") for n in _linears("sparse", kernels={"blocks.0.*": doubled})]
    assert sorted(hows) == ["", "", doubled, doubled]


def test_the_environment_forces_where_the_argument_does_not(doubled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXRESU_KERNELS", doubled)
    hows = [n.kwargs.get("how", "") for n in _linears("sparse", kernels={"blocks.1.*": "mm"})]
    assert sorted(hows) == ["", "", doubled, doubled]


def test_a_forced_choice_that_cannot_run_is_refused_with_the_reason(doubled: str) -> None:
    model = fxresu.transform(torch.nn.Sequential(torch.nn.Linear(16, 10)), compile=EAGER, kernels={"0": doubled})
    with pytest.raises(Exception, match="'doubled' was asked for.*rows=10: must be a multiple of 16"):
        in_phase(model, "sparse")(torch.randn(2, 16))


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"blocks.*": "fast"}, r"kernels\['blocks.\*'\]='fast' is unknown; use one of mm"),
        ({"nothing.*": "mm"}, "matches no managed weight"),
        ("mm", "use a mapping"),
    ],
)
def test_bad_overrides_are_refused_at_once(kernels: object, message: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=message):
        fxresu.transform(model, kernels=kernels)
    assert type(model) is Net


@pytest.mark.parametrize("text", ["=mm", "a=", "a=mm,=x"])
def test_a_bad_environment_is_refused(text: str) -> None:
    with pytest.raises(choose.KernelChoiceError, match="FXRESU_KERNELS"):
        choose.parse_override(text)


def test_the_environment_is_read_as_patterns() -> None:
    assert choose.parse_override("a.*=mm, b = compose,") == {"a.*": "mm", "b": "compose"}
    assert choose.parse_override("mm") == {"*": "mm"}


def test_problems_say_what_the_nodes_compute() -> None:
    plan = DEFAULT_PLANS[Phase.RESU]
    (first, *_) = _linears("resu")
    found = problem_of(first, plan, None, False)
    assert (found.op, found.mode, found.tokens, found.dtype, found.layout) == ("linear", "resu", 3, "float32", "rows")
    assert problem_of(first, plan, torch.bfloat16, True).dtype == "bfloat16"
    (packed, *_) = _linears("resu", storage="packed")
    found = problem_of(packed, plan, None, False)
    assert (found.op, found.mode, found.sparsity) == ("linear_packed", "resu", 0.5)


def test_a_choice_is_measured_compiled_in_the_middle_of_a_compilation(doubled: str) -> None:
    """What the pass does on CUDA, with the CPU's clock: candidates compile by themselves and agree."""
    from fxresu.kernels import _measure

    results = []

    def backend(module, inputs):
        problem = choose.Problem("linear", "sparse", 32, 48, 5, "float32", "float32")
        work = _measure.operands(problem, torch.device("cpu"))
        from fxresu.passes._compat import real_tensors

        with real_tensors(), torch.enable_grad():
            for how in ("mm", doubled):
                results.append(work.step(isolated_inductor(work.module(how), work.tensors)))
        return module.forward

    model = in_phase(fxresu.transform(Net(), compile={"backend": backend}), "sparse")
    model(torch.randn(2, 16)).sum().backward()
    _measure.check(results[1], results[0])
    assert all(p.grad is not None for p in model.parameters())


REQUEST = [
    (choose.Problem("linear", "sparse", 32, 48, 5, "float32", "float32"), ["mm"]),
    (choose.Problem("linear", "resu", 32, 48, 5, "float32", "float32", layout="rows"), ["few_tokens"]),
]


def test_a_process_of_its_own_measures_several_problems() -> None:
    figures = measure_apart.measure_apart(REQUEST, torch.device("cpu"))
    assert [list(f) for f in figures] == [names for _, names in REQUEST]
    assert all(isinstance(t, float) and t > 0 for f in figures for t in f.values()), figures


@pytest.mark.parametrize("executable, reason", [("", "no Python executable"), ("/none/python", "FileNotFoundError"),
                                                ("/bin/false", "exit status 1")])  # fmt: skip
def test_without_a_process_the_default_runs_with_one_warning(
    executable: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_apart, "_failure", "")
    monkeypatch.setattr("sys.executable", executable)
    with pytest.warns(RuntimeWarning, match=reason), pytest.raises(choose.UnmeasuredError, match=reason):
        measure_apart.measure_apart(REQUEST, torch.device("cpu"))
    with warnings.catch_warnings(), pytest.raises(choose.UnmeasuredError, match=reason):
        warnings.simplefilter("error")
        measure_apart.measure_apart(REQUEST, torch.device("cpu"))


def test_all_problems_of_a_graph_are_asked_for_at_once(doubled: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is measured (here: the CPU with figures of ours), one question serves a graph and its file."""
    asked = []

    def figures(wanted, device):
        asked.append([problem.rows for problem, _ in wanted])
        return [{name: 10.0 if name == doubled else 100.0 for name in names} for _, names in wanted]

    monkeypatch.setenv("FXRESU_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "asked", lambda device: True)
    monkeypatch.setattr(choose, "measurable", lambda device: True)
    monkeypatch.setattr("fxresu.passes.choose_kernels.measure_apart", figures)
    nodes = _linears("sparse")
    assert [n.kwargs.get("how") for n in nodes] == [doubled] * 4
    assert len(asked) == 1 and len(asked[0]) == len(set(asked[0])) == 2, asked
    assert [n.kwargs.get("how") for n in _linears("sparse")] == [doubled] * 4 and len(asked) == 1


def test_a_failed_measurement_is_shown_on_the_node(doubled: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(wanted, device):
        raise choose.UnmeasuredError("no process")

    monkeypatch.setenv("FXRESU_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "asked", lambda device: True)
    monkeypatch.setattr(choose, "measurable", lambda device: True)
    monkeypatch.setattr("fxresu.passes.choose_kernels.measure_apart", fails)
    for node in _linears("sparse"):
        by_name = {c.name: c for c in node.meta[CONSIDERED]}
        assert by_name["mm"].chosen and by_name[doubled].reason == "not measured: no process"


@pytest.mark.gpu
def test_on_cuda_the_faster_one_is_chosen_and_kept(doubled: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxresu.kernels import _choice_cache

    monkeypatch.setenv("FXRESU_CACHE", str(tmp_path))
    monkeypatch.setenv("FXRESU_MEASURE", "1")
    monkeypatch.setattr(_choice_cache, "_OPEN", {})
    nodes = Nodes()
    model = fxresu.transform(Net().cuda(), compile={"backend": nodes})
    in_phase(model, "sparse")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    x = torch.randn(64, 16, device="cuda")
    model(x)
    del x
    considered = nodes.found[0].meta[CONSIDERED]
    times = {c.name: c.microseconds for c in considered if c.microseconds}
    assert {"mm", "few_tokens", "grad_masked"} <= times.keys()
    assert "no such candidate" in {c.name: c.reason for c in considered}[doubled], "a name that only this process knows"
    assert torch.cuda.memory_allocated() - before < 2**26, "what measuring took has gone with its process"
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["problems"]
