"""Numbers follow c10/cuda/CUDACachingAllocator.cpp of torch 2.11 with expandable segments."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxresu.caching_allocator import GRAIN, LARGE_PAGE, SMALL, SMALL_PAGE, Block, CachingAllocator, Pool

_MIB = 1 << 20


def test_sizes_are_rounded_and_pools_are_apart() -> None:
    device = CachingAllocator()
    small, edge, large = device.allocate(1), device.allocate(SMALL), device.allocate(SMALL + 1)
    assert (small.size, edge.size, large.size) == (GRAIN, SMALL, SMALL + GRAIN)
    assert (device.small.mapped, device.large.mapped) == (SMALL_PAGE, LARGE_PAGE)
    assert device.live == GRAIN + 2 * SMALL + GRAIN


def test_segments_grow_at_their_end() -> None:
    device = CachingAllocator()
    first, second = device.allocate(15 * _MIB), device.allocate(30 * _MIB)
    assert (first.start, second.start) == (0, 15 * _MIB)  # the tail of the first page is used
    assert device.reserved == 60 * _MIB


def test_a_freed_block_is_used_again_and_split() -> None:
    device = CachingAllocator()
    first, _ = device.allocate(40 * _MIB), device.allocate(20 * _MIB)
    device.free(first)
    parts = [device.allocate(30 * _MIB), device.allocate(10 * _MIB)]
    assert [p.start for p in parts] == [0, 30 * _MIB]
    assert device.reserved == 60 * _MIB


def test_best_fit_takes_the_smallest_then_the_lowest() -> None:
    device = CachingAllocator()
    blocks = [device.allocate(size * _MIB) for size in (8, 2, 4, 2, 4, 20)]
    for i in (0, 2, 4):
        device.free(blocks[i])
    assert device.allocate(3 * _MIB).start == blocks[2].start
    assert device.allocate(3 * _MIB).start == blocks[4].start
    assert device.allocate(3 * _MIB).start == 0


def test_a_block_that_can_grow_counts_as_large() -> None:
    device = CachingAllocator()
    first, _ = device.allocate(16 * _MIB), device.allocate(10 * _MIB)  # 14 MiB are left at the end
    device.free(first)
    assert device.allocate(12 * _MIB).start == 0  # though the end is the better fit


def test_neighbours_become_one() -> None:
    device = CachingAllocator()
    blocks = [device.allocate(10 * _MIB) for _ in range(4)]
    for i in (0, 2, 1):
        device.free(blocks[i])
    assert device.allocate(30 * _MIB).start == 0 and device.reserved == 40 * _MIB


def test_an_emptied_cache_keeps_pages_in_use() -> None:
    device = CachingAllocator()
    blocks = [device.allocate(size * _MIB) for size in (30, 10, 50, 10)]
    device.free(blocks[0])
    device.free(blocks[2])
    device.empty_cache()
    assert device.reserved == 40 * _MIB  # pages 20..40 and 80..100, each half empty
    again = device.allocate(45 * _MIB)
    assert again.start == 40 * _MIB and device.reserved == 100 * _MIB - LARGE_PAGE  # into the hole between the two
    assert device.allocate(25 * _MIB).start == 0  # the hole before the first, with the free half beside it


def test_a_hole_without_room_is_left() -> None:
    device = CachingAllocator()
    blocks = [device.allocate(20 * _MIB) for _ in range(3)]
    device.free(blocks[1])
    device.empty_cache()
    assert device.allocate(30 * _MIB).start == 60 * _MIB and device.reserved == 80 * _MIB


def test_peaks_are_the_highest_since_the_reset() -> None:
    device = CachingAllocator()
    first = device.allocate(100 * _MIB)
    device.free(first)
    assert (device.peak_live, device.peak_reserved) == (100 * _MIB, 100 * _MIB)
    device.empty_cache()
    device.reset_peaks()
    device.allocate(10 * _MIB)
    assert (device.live, device.peak_live, device.peak_reserved) == (10 * _MIB, 10 * _MIB, 20 * _MIB)


def test_fragments_are_reserved_beside_live_bytes() -> None:
    device = CachingAllocator()
    blocks = [device.allocate(20 * _MIB) for _ in range(6)]
    for block in blocks[::2]:
        device.free(block)
    device.allocate(40 * _MIB)
    assert device.reserved - device.live == 60 * _MIB


def _blocks(pool: Pool) -> list[Block]:
    found, block = [], pool.first
    while block.before is not None:
        block = block.before
    while block is not None:
        found.append(block)
        block = block.after  # type: ignore[assignment]
    return found


def _check(device: CachingAllocator, live: list[Block]) -> None:
    assert device.reserved >= device.live == sum(b.size for b in live)
    for pool in (device.small, device.large):
        blocks = _blocks(pool)
        for one, other in zip(blocks, blocks[1:]):
            assert one.start + one.size == other.start and other.before is one
            assert one.taken or other.taken or one.mapped != other.mapped, "free neighbours are one block"
        assert pool.mapped == sum(b.size for b in blocks if b.mapped) and pool.mapped % pool.page == 0
        assert all(b.mapped for b in blocks if b.taken)
    taken = [id(b) for pool in (device.small, device.large) for b in _blocks(pool) if b.taken]
    assert sorted(taken) == sorted(map(id, live))


_SIZES = st.one_of(st.integers(1, 4 * SMALL), st.integers(1, 200 * _MIB))
_ACTS = st.lists(st.one_of(_SIZES, st.integers(-50, -1), st.none()), max_size=60)


@settings(max_examples=150, deadline=None)
@given(_ACTS)
def test_blocks_never_overlap_and_all_comes_back(acts: list[int | None]) -> None:
    """A number is a size, or the block to free; None empties the cache."""
    device, live = CachingAllocator(), []
    for act in acts:
        if act is None:
            device.empty_cache()
        elif act > 0:
            live.append(device.allocate(act))
        elif live:
            device.free(live.pop(act % len(live)))
        _check(device, live)
        assert device.peak_reserved >= device.peak_live >= device.live
    for block in live:
        device.free(block)
    _check(device, [])
    for pool in (device.small, device.large):
        assert sum(b.mapped for b in _blocks(pool)) <= 1 + len(_holes(pool))
    device.empty_cache()
    assert device.reserved == 0
    assert all(len(_blocks(p)) == 1 for p in (device.small, device.large))


def _holes(pool: Pool) -> list[Block]:
    """Unmapped blocks before the end."""
    return [b for b in _blocks(pool) if not b.mapped and b.after is not None]


@settings(max_examples=60, deadline=None)
@given(st.lists(_SIZES, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_everything_freed_is_one_block(sizes: list[int], random: object) -> None:
    device = CachingAllocator()
    live = [device.allocate(size) for size in sizes]
    highest = device.reserved
    random.shuffle(live)  # type: ignore[attr-defined]
    for block in live:
        device.free(block)
    for pool in (device.small, device.large):
        free = [b for b in _blocks(pool) if b.mapped]
        assert [b.size for b in free] == ([pool.mapped] if pool.mapped else [])
    assert device.reserved == highest


@pytest.mark.gpu
def test_the_device_agrees() -> None:
    """The same sizes through torch's own allocator."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        device, theirs, ours = CachingAllocator(), {}, {}
        before, taken = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        if before:
            pytest.skip("other tests' tensors are there, which share pages")
        generator = torch.Generator().manual_seed(0)
        for i in range(400):
            if i % 3 == 2:
                key = sorted(ours)[int(torch.randint(len(ours), (), generator=generator))]
                device.free(ours.pop(key))
                del theirs[key]
            else:
                size = int(2 ** (10 + 17 * torch.rand((), generator=generator)))
                ours[i], theirs[i] = device.allocate(size), torch.empty(size, dtype=torch.uint8, device="cuda")
            if i == 200:
                device.empty_cache()
                torch.cuda.empty_cache()
            assert torch.cuda.memory_allocated() - taken == device.live, i
            assert torch.cuda.memory_reserved() - before == device.reserved, i
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
