"""Every command and every snippet of docs/GUIDE.md runs, page by page, in the order in which it is read."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "GUIDE.md").read_text()
PAGES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE))
NEEDS = {"Hugging Face Trainer": "accelerate", "Lightning": "lightning", "Accelerate": "accelerate"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    return re.findall(r"```(\w+)\n(.*?)```", PAGES[page], re.DOTALL)


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fxresu.cli import main

    if words[0] == "fxresu":
        assert main(words[1:]) == 0
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
    else:
        assert words[:2] == ["pip", "install"], f"{words}: a command that this test cannot run"
        (extra,) = re.fullmatch(r"fxresu\[(.*)\]", words[2]).groups()
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason="needs pip install 'fxresu[integrations]'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    if page == "Logs and reports":
        (tmp_path / "runs" / "script").mkdir(parents=True)
        step = '{"event": "step", "step": 1, "phase": "dense", "cycle": 0, "loss": 1.0, "sparsity": 0.0}\n'
        (tmp_path / "runs" / "script" / "log.jsonl").write_text(step)
    names: dict = {"__name__": "guide"}
    # What is compiled is compiled in other tests; here it is only slow. torch's own switch, as a user would set it.
    with torch._dynamo.config.patch(disable=True):
        for language, text in blocks(page):
            if language == "python":
                exec(compile(text, f"GUIDE.md, {page}", "exec"), names)
                continue
            assert language == "sh"
            for line in text.strip().splitlines():
                run_command(shlex.split(line), monkeypatch)


def test_every_kind_of_user_has_a_page() -> None:
    assert list(PAGES)[:3] == ["A plain PyTorch loop", "Hugging Face Trainer", "Lightning"]
    assert all(any(language == "python" for language, _ in blocks(page)) for page in list(PAGES)[:3])
    assert GUIDE.count("```") == 2 * sum(len(blocks(page)) for page in PAGES)


def test_links_and_messages_are_true() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / "docs" / path).exists(), target
        assert not anchor or anchor in {re.sub(r"[^\w ]", "", p).lower().replace(" ", "-") for p in PAGES}, target
    sources = "".join(p.read_text() for p in (ROOT / "fxresu").glob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    for message in re.findall(r"^\| `(.*?)` \|", PAGES["When something is refused"], re.MULTILINE):
        for part in filter(None, (p.strip(" '=") for p in re.split("…", message))):
            words = part.removeprefix("config.grad_clip").removeprefix("max_steps").split("(")[0].strip("= ")
            assert not words or words.replace("max_grad_norm", "").strip() in sources, part


def test_the_options_exist_with_the_defaults_that_are_told() -> None:
    from fxresu import CycleConfig

    config = CycleConfig()
    for names, defaults in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \| ", GUIDE.split("## ")[0], re.MULTILINE):
        values = [getattr(config, n) for n in re.findall(r"`(\w+)`", names)]
        words = {"None": "none", "False": "false"}
        shown = [f'"{v}"' if isinstance(v, str) else words.get(str(v), str(v)) for v in values]
        assert ", ".join(shown) == defaults
