"""Packed storage in RESU with every product that the chooser knows, against the default one."""

import pytest
import torch
from fxresu_testing import EAGER

import fxresu
from fxresu.kernels.decode_linear import FORMS
from fxresu.model_state import managed_weights


def _run(how: str, phase: str, granularity: str, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8)).to(dtype)
    fxresu.transform(
        model, granularity=granularity, storage="packed", compile=EAGER, kernels={"*": how} if how else None, **options
    )
    fxresu.set_phase(model, "resu")
    if phase != "resu":
        fxresu.set_phase(model, phase)
    x = torch.randn(3, 40, dtype=dtype).requires_grad_()
    y = model(x)
    if phase == "predict":
        return [y.float()]
    y.float().square().sum().backward()
    thetas = [m.entry.grad_of_theta() for m in managed_weights(model).values()]
    return [y.float(), x.grad, model[0].bias.grad, *thetas]


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("phase", ["resu", "predict"])
def test_every_form_gives_what_composing_gives(how: str, phase: str) -> None:
    granularity = "2:4" if FORMS[how].pairs else "row"
    for wanted, got in zip(
        _run("compose", phase, granularity, torch.bfloat16), _run(how, phase, granularity, torch.bfloat16)
    ):
        assert (got.float() - wanted.float()).abs().max() <= 0.02 * wanted.float().abs().max()


def test_pairs_need_the_pattern() -> None:
    with pytest.raises(Exception, match="does not keep two of every four inputs"):
        _run("decode_pairs_16", "resu", "row", torch.bfloat16)
    with pytest.raises(Exception, match="values float32, product float32"):
        _run("decode_pairs_16", "resu", "2:4", torch.float32)
