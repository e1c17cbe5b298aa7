"""A transition that fails in the middle leaves everything as it was."""

import pytest
import torch
from fxresu_phases import ADAM, batch, same, snapshot, train
from fxresu_testing import Net, check_gradients

import fxresu
from fxresu import mask_choice, resurrection, sparsify, theta_layout, weight_storage
from fxresu.errors import ConfigError
from fxresu.model_state import state_of
from fxresu.phases import current_phase, set_phase

SITES = {
    "prune": ("sparse", ["select_masks", "pack", "row_counts", "row_starts"]),
    "start_theta": ("resu", ["active_std", "theta_init", "scatter_", "drop_state", "_enter_resu"]),
    "commit": ("sparse", ["amnesty_masks", "pack", "row_starts", "transition_counts", "restore_dropped"]),
    "discard": ("sparse", ["restore_dropped"]),
}
CASES = [(k, site) for k, (_, sites) in SITES.items() for site in sites]
CASES += [("start_theta", "weight_storage.pack"), ("commit", "weight_storage.unpack_into")]
CASES += [("discard", "weight_storage.unpack_into"), ("drop_masks", "weight_storage.unpack_into")]


def _owner(site: str) -> tuple[object, str]:
    """The module whose name a transition looks up, and that name."""
    if "." in site:
        return weight_storage, site.partition(".")[2]
    modules = (sparsify, resurrection, theta_layout, mask_choice)
    return next(m for m in modules if hasattr(m, site)), site


class OutOfMemory(RuntimeError):
    pass


@pytest.mark.parametrize("storage", ["resident", "packed"])
@pytest.mark.parametrize(("transition", "site"), CASES, ids=":".join)
def test_a_failure_in_the_middle_changes_nothing(transition: str, site: str, storage: str, monkeypatch) -> None:
    if storage == "resident" and "weight_storage" in site:
        pytest.skip("nothing is packed")
    model = fxresu.transform(Net(), compile=False, storage=storage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    if transition != "prune":
        set_phase(model, "sparse", optimizer=optimizer)
        train(model, optimizer, 1)
    if transition in ("commit", "discard", "drop_masks"):
        set_phase(model, "resu", optimizer=optimizer, **ADAM)
        train(model, optimizer, 2)
    before, output = snapshot(model, optimizer), model(batch()).detach()
    target = {"start_theta": "resu", "drop_masks": "dense"}.get(transition, "sparse")
    leave = "discard" if transition == "discard" else "commit"

    owner, name = _owner(site)
    original, calls, limit = getattr(owner, name), [], 1 if site in ("select_masks", "amnesty_masks") else 4

    def failing(*args, **kwargs):
        calls.append(site)
        if len(calls) == limit:
            raise OutOfMemory("injected")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(OutOfMemory):
            set_phase(model, target, optimizer=optimizer, leave=leave, **ADAM)
    assert len(calls) >= limit
    after = snapshot(model, optimizer)
    different = [k for k in before if not same(before[k], after[k])]
    assert not different
    assert torch.equal(model(batch()), output)
    set_phase(model, target, optimizer=optimizer, leave=leave, **ADAM)
    assert current_phase(model) == target
    train(model, optimizer, 1)


def test_a_failure_on_the_way_from_dense_to_resu_leaves_a_sparse_model(monkeypatch) -> None:
    model = fxresu.transform(Net(), compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 1)

    def failing(*args, **kwargs):
        raise OutOfMemory

    with monkeypatch.context() as patch:
        patch.setattr(resurrection, "theta_init", failing)
        with pytest.raises(OutOfMemory):
            set_phase(model, "resu", optimizer=optimizer)
    assert current_phase(model) == "sparse"
    check_gradients(model, "sparse", batch())


def test_a_refused_sparsity_does_not_widen_the_capacity() -> None:
    model = fxresu.transform(Net(), compile=False)
    with pytest.raises(ConfigError):
        sparsify.prune(model, sparsity=1.5)
    assert state_of(model).capacity_sparsity == 0
