"""What people do with models, on the cheapest rows of the zoo; docs/MODELS.md has it for every family."""

import pytest
from fxresu_uses import USES, try_use
from fxresu_zoo import architectures

ZOO = {a.name: a for a in architectures()}
TRIED = {
    "Shared and tied weights": tuple(USES),
    "nn.TransformerEncoder": ("functional_call", "export", "sizes change"),
    "Llama": ("export, strict", "meta", "LoRA"),
    "Mixtral": ("sizes declared",),  # as many sequences as the masks of its experts have words in a row
}


@pytest.mark.parametrize(("name", "use"), [(name, use) for name, uses in TRIED.items() for use in uses])
def test_use(name: str, use: str) -> None:
    if ZOO[name].missing:
        pytest.skip(ZOO[name].missing)
    assert try_use(ZOO[name], use) == ""


def test_what_fails_is_told_apart_from_what_fails_without_fxresu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def neither(row, plain):
        raise ValueError("no such\nthing")

    def only_transformed(row, plain):
        assert plain, "it is fxresu"

    monkeypatch.setitem(USES, "neither", neither)
    monkeypatch.setitem(USES, "only transformed", only_transformed)
    assert try_use(ZOO["Graph breaks"], "neither") == "ValueError: no such thing"
    with pytest.raises(AssertionError, match="it is fxresu"):
        try_use(ZOO["Graph breaks"], "only transformed")
