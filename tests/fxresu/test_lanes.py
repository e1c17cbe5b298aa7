"""What lanes promise, on a CPU and on streams, and the pool of pinned memory over them."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from torch import Tensor

from fxresu import FxresuError
from fxresu.errors import HostMemoryError
from fxresu.lanes import CudaLanes, HostLanes, lanes_for
from fxresu.pinned_pool import PinnedPool

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def late() -> HostLanes:
    return HostLanes(lambda: 0)


def test_copies_are_put_off_and_keep_their_order() -> None:
    lanes, a, b, c = late(), torch.ones(2), torch.zeros(2), torch.zeros(2)
    out = lanes.copy("out", [(b, a)])
    back = lanes.copy("in", [(c, b)], [out])
    a.fill_(5)
    assert not c.any() and not lanes.reached(back) and lanes.pending == {"in": 1, "out": 1}
    lanes.wait(back)
    assert torch.equal(c, torch.full((2,), 5.0)) and lanes.reached(out)


def test_who_asks_again_and_again_sees_progress() -> None:
    lanes, a, b = HostLanes(), torch.ones(2), torch.zeros(2)
    mark = lanes.copy("out", [(b, a)])
    assert not b.any()
    assert lanes.reached(mark) and b.all()


@pytest.mark.parametrize("device", DEVICES)
def test_copies_given_together_have_a_mark_each_and_wait_for_their_own(device: str) -> None:
    lanes = lanes_for(torch.empty(0, device=device).device)
    values = [torch.full((1000,), float(i), device=device) for i in range(3)]
    hosts = [lanes.host(4 * 1000).view(torch.float32) for _ in values]
    left = lanes.copies("out", [([(h, v)], [lanes.mark(), None]) for h, v in zip(hosts, values, strict=True)])
    backs = [torch.empty_like(value) for value in values]
    made = lanes.mark()
    each = [([(b, h)], [made, m]) for b, h, m in zip(backs, hosts, left, strict=True)]
    for mark, back, value in zip(lanes.copies("in", each), backs, values, strict=True):
        lanes.wait(mark)
        assert torch.equal(back, value)
    assert len(left) == 3 and all(lanes.reached(mark) for mark in left) and lanes.copies("in", []) == []


@pytest.mark.parametrize("device", DEVICES)
def test_there_and_back_after_the_computation(device: str) -> None:
    """The computation writes, the values leave, the computation writes again, they come back; nothing overtakes."""
    lanes = lanes_for(torch.empty(0, device=device).device)
    square = torch.randn(1024, 1024, device=device)
    for _ in range(5):
        host, value = lanes.host(4 * 1000).view(torch.float32), torch.zeros(1000, device=device)
        if device == "cuda":
            for _ in range(20):
                square = square @ square / 1024
        value.add_(3)
        left = lanes.copy("out", [(host, value)], [lanes.mark(), None])
        lanes.wait(left)
        value.fill_(-1)
        back = torch.empty_like(value)
        lanes.wait(lanes.copy("in", [(back, host)], [lanes.mark(), left]))
        assert back.add(1).eq(4).all() and value.eq(-1).all()
        lanes.finish(left)
        assert lanes.reached(left) and lanes.reached(None) and host.eq(3).all()
    assert lanes.stalled() >= 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [0, 1, 4096, 5000])
def test_host_memory_is_zeros_and_pinned(device: str, size: int) -> None:
    lanes = lanes_for(torch.empty(0, device=device).device)
    for pooled in (False, True):
        memory = lanes.host(size, pooled)
        assert memory.shape == (size,) and memory.dtype is torch.uint8
        assert pooled or not memory.any()
        assert device == "cpu" or size == 0 or memory.is_pinned()


@pytest.mark.gpu
def test_stalls_are_measured_and_do_not_pile_up() -> None:
    lanes = CudaLanes(torch.empty(0, device="cuda").device)
    host, value = lanes.host(1 << 26), torch.empty(1 << 26, dtype=torch.uint8, device="cuda")
    for _ in range(200):
        lanes.wait(lanes.copy("in", [(value, host)], [lanes.mark()]))
    torch.cuda.synchronize()
    assert 200 * (1 << 26) / 1e12 < lanes.stalled() < 60  # no bus brings 1 TB/s
    assert not lanes._waits


@pytest.mark.gpu
def test_memory_that_could_not_be_pinned_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime remembers the error of a failed call, and the next kernel's check would find it."""
    from fxresu import pinned_memory

    register = torch.cuda.cudart().cudaHostRegister
    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda where, size, flags: register(0, size, flags))
    with pytest.raises(HostMemoryError, match="could not be pinned"):
        pinned_memory.PinnedMemory(torch.device("cuda"), []).take(5000)
    assert torch.ones(10, device="cuda").add(1).sum().item() == 20


@pytest.mark.gpu
def test_memory_is_unpinned_after_its_copies() -> None:
    lanes = CudaLanes(torch.empty(0, device="cuda").device)
    host, value = lanes.host((1 << 26) + 512), torch.full(((1 << 26) + 512,), 7, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        lanes.copy("out", [(host, value)], [lanes.mark()])
    del lanes
    gc.collect()
    assert host.eq(7).all() and not host.is_pinned()


def test_other_devices_are_refused() -> None:
    with pytest.raises(FxresuError, match="device=meta: .* need a CUDA device or a CPU"):
        lanes_for(torch.device("meta"))


# The pool


def test_pieces_are_not_given_out_again_before_their_copy_is_done() -> None:
    lanes = late()
    pool, target = PinnedPool(lanes, limit=1 << 16), torch.zeros(4096, dtype=torch.uint8)
    extent = pool.take(1 << 16)
    (piece,) = extent.pieces
    piece.fill_(1)
    extent.busy = lanes.copy("in", [(target, piece[:4096])])
    del extent
    assert pool.used == 1 << 16 and not target.any(), "the copy is still to read it"
    (again,) = pool.take(1 << 16).pieces  # no other room: the pool waits for the copy
    again.fill_(2)
    assert target.eq(1).all() and lanes.reached(lanes.copy("in", [(target, again[:4096])])) is False


def test_pieces_never_overlap_and_all_come_back() -> None:
    lanes, draw = HostLanes(), random.Random(0)
    pool, held = PinnedPool(lanes, chunk=1 << 17), {}
    for turn in range(300):
        if held and draw.random() < 0.5:
            number, extent = held.popitem()
            assert all(p.eq(number % 251).all() for p in extent.pieces)
            del extent
        else:
            extent = held[turn] = pool.take(draw.randint(1, 1 << 18))
            assert sum(p.numel() for p in extent.pieces) == extent.nbytes
            for piece in extent.pieces:
                piece.fill_(turn % 251)
            del extent, piece
    assert pool.used > 0
    held.clear()
    assert pool.used == 0 < pool.nbytes


def test_the_limit_holds_and_nothing_is_taken_then() -> None:
    pool = PinnedPool(HostLanes(), limit=100_000)
    kept = pool.take(60_000)
    with pytest.raises(HostMemoryError, match="pinned_limit=0.0001 GB"):
        pool.take(60_000)
    assert pool.nbytes <= 100_000 and pool.used == 60_416
    del kept
    assert pool.take(90_000).nbytes == 90_000


def test_a_host_without_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = HostLanes()

    def none(*args: object, **options: object) -> Tensor:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch, "zeros", none)
    with pytest.raises(HostMemoryError, match=r"the host gives no .* 65536 bytes of host memory: not enough memory"):
        PinnedPool(lanes).take(10)
