"""Every architecture of the zoo in RESU: the gradient of every managed weight, and every weight rewritten."""

import dataclasses

import pytest
from fxresu_coverage import cover
from fxresu_zoo import Architecture, architectures

# Rows whose weights are left to Python or to the marker, and how many of them are rewritten.
LEFT = {"nn.LSTM between linears": 0, "Mixtral, experts in a loop": 4}


@pytest.mark.parametrize("architecture", architectures(), ids=lambda a: a.name)
def test_resu(architecture: Architecture) -> None:
    if architecture.missing:
        pytest.skip(architecture.missing)
    found = cover(dataclasses.replace(architecture, inductor=False), ("resu",))["resu"]
    assert found.rewritten == LEFT.get(architecture.name, found.managed)
    assert bool(found.left) == (architecture.name in LEFT)
    assert found.compiles == found.graphs, "a second call compiled again"
    assert (found.graphs, found.breaks) == (1, 0) or not architecture.fullgraph
