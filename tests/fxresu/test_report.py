"""Tables, report.json and the picture."""

import json
import math
import os
from pathlib import Path

import pytest

from fxresu.errors import ConfigError
from fxresu.report import PhaseRow, StepRecord, phase_table, write_report
from fxresu.report_plot import plot

PHASES = [
    PhaseRow("dense", 0, 150, 7.5, 3.25, 7.6, 3.5, 9123.4, 0.0),
    PhaseRow("resu", 0, 60, 3.0, 2.5, None, 2.75, 12345.6, 0.5),
    PhaseRow("commit", 0, 0, sparsity=0.5, resurrected=12345, kept=1234567),
]
MEMORY = {"peak_bytes": 400_000_000, "bill": None}


def history(n: int = 120, **changes) -> list[StepRecord]:
    phases = ["dense"] * 20 + ["sparse"] * 10 + ["resu"] * 10
    return [
        StepRecord(
            **{
                "step": step,
                "phase": phases[step % 40],
                "cycle": step // 40,
                "loss": 2 + 5 * math.exp(-step / 30),
                "sparsity": 0.5 if step >= 20 else 0.0,
                "held_out": 3.0 if step % 10 == 0 else None,
                "rss": 600_000_000 + step,
            }
            | changes
        )
        for step in range(n)
    ]


def cells(table: str) -> list[str]:
    return [" ".join(line.split()) for line in table.splitlines()]


def test_phase_table() -> None:
    lines = cells(phase_table(PHASES))
    assert lines[0] == "cycle phase steps loss held-out tokens/s sparsity resurrected kept"
    assert lines[2] == "0 dense 150 7.500 -> 3.250 7.600 -> 3.500 9,123 0.0% - -"
    assert lines[3] == "0 resu 60 3.000 -> 2.500 - -> 2.750 12,346 50.0% - -"
    assert lines[4] == "0 commit 0 - - - 50.0% 12,345 1,234,567"
    assert phase_table([]).split()[:2] == ["cycle", "phase"]


def test_report_is_json_that_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    records = history(10)
    write_report(path, phases=PHASES, history=records, memory=MEMORY, info={"seed": 1})
    report = json.loads(path.read_text())
    assert [PhaseRow(**row) for row in report["phases"]] == PHASES
    assert [StepRecord(**row) for row in report["history"]] == records
    assert report["memory"] == MEMORY
    assert report["info"] == {"seed": 1}
    assert os.listdir(tmp_path) == ["report.json"]


def test_report_with_numbers_that_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    records = history(3, loss=math.nan, held_out=math.inf)
    write_report(path, phases=[], history=records, memory={}, info={"rate": (math.inf,)})
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["history"][0]["loss"] is None and report["info"] == {"rate": [None]}


def test_failed_write_keeps_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_report(path, phases=[], history=[], memory={}, info={"what": object()})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.json"]
    for call in (
        lambda p: write_report(p, phases=[], history=[], memory={}),
        lambda p: plot(p, history(3)),
    ):
        with pytest.raises(OSError, match="writable folder") as caught:
            call(tmp_path / "missing" / "file")
        assert caught.value.filename == str(tmp_path / "missing" / "file")


@pytest.mark.parametrize(
    "records",
    [
        history(),
        history(1),
        history(2, loss=3.0),
        history(40, bytes_allocated=7_000_000_000, rss_peak=8_000_000_000),
        history(40, rss=None, held_out=None),
        history(40, loss=math.nan, held_out=None),
        history(40, loss=0.0),
        history(400, phase="a phase of my own"),
    ],
    ids=["usual", "one step", "flat", "accelerator", "no memory", "nan", "zero loss", "own phase"],
)
def test_plot_writes_a_picture(tmp_path: Path, records: list[StepRecord], recwarn: pytest.WarningsRecorder) -> None:
    from PIL import Image  # a dependency of matplotlib

    path = tmp_path / "run.png"
    plot(path, records, title="a run")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width >= 1200 and image.height >= 800
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 20
    assert os.listdir(tmp_path) == ["run.png"]
    assert not [str(w.message) for w in recwarn if "matplotlib" in str(w.filename)]


def test_plot_shades_every_phase_and_draws_the_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    plot(tmp_path / "run.png", history(120))
    loss, sparsity, memory = figures[0].axes
    for axes in figures[0].axes:
        spans = [p for p in axes.patches if p.get_alpha()]
        assert len(spans) == 9 and len({to_hex(p.get_facecolor()) for p in spans}) == 3
        edges = sorted((p.get_x(), p.get_x() + p.get_width()) for p in spans)
        assert edges[0][0] == -0.5 and edges[-1][1] == 119.5
        assert all(a[1] == b[0] for a, b in zip(edges, edges[1:]))  # no gap, no overlap
    assert loss.get_yscale() == "log"
    assert list(loss.lines[0].get_ydata()) == [r.loss for r in history(120)]
    assert list(sparsity.lines[0].get_ydata()) == [100 * r.sparsity for r in history(120)]
    assert memory.lines[0].get_ydata()[0] == pytest.approx(600) and memory.get_ylabel() == "RSS (MB)"
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["dense", "sparse", "resu"]


def test_smoothed_line_keeps_the_jump_between_phases() -> None:
    from fxresu.report_plot import trend

    records = [StepRecord(i, "dense" if i < 300 else "sparse", 0, 1.0 if i < 300 else 2.0, 0.0) for i in range(600)]
    assert trend(records) == pytest.approx([1.0] * 300 + [2.0] * 300)


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no step"):
        plot(tmp_path / "run.png", [])
    assert os.listdir(tmp_path) == []
