"""Traces of deep models from those of two short ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxresu.caching_allocator import GRAIN, CachingAllocator
from fxresu.rehearsal import Trace
from fxresu.trace_unrolling import lives, peak_of, unrolled


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What a block does, in bytes.

    Attributes:
        saved: kept for the block's backward; every other block keeps one more, as compilers do.
        passing: freed by the next allocation but one.
        stream: of the residual stream, which the next block frees.
        gradients: of the block's weights, freed at the step's end.
        head: behind the last block, freed first in the backward.
        before: gradients are there before the step, from earlier micro-batches.
        copies: of all blocks' weights, made before the first block and kept for its backward.
    """

    saved: tuple[int, ...]
    passing: tuple[int, ...]
    stream: int
    gradients: tuple[int, ...]
    head: int
    before: bool
    copies: int = 0


class _Step:
    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self._sizes: list[int] = []

    def come(self, size: int) -> int:
        self._sizes.append(size)
        self.events.append((len(self._sizes) - 1, size))
        return len(self._sizes) - 1

    def go(self, *numbers: int) -> None:
        self.events += [(number, -self._sizes[number]) for number in numbers]


def _trace(recipe: _Recipe, blocks: int) -> Trace:
    step, saved = _Step(), list[list[int]]()
    gradients = [step.come(size) for size in recipe.gradients * blocks] if recipe.before else []
    sections = [len(step.events)]
    step.come(8 * blocks)  # seeds
    copies = [step.come(recipe.copies) for _ in range(blocks if recipe.copies else 0)]
    first = step.come(recipe.head + GRAIN)  # of the first block alone
    stream = step.come(recipe.stream)
    for block in range(blocks):
        kept = [step.come(size) for size in recipe.saved]
        kept += [step.come(recipe.stream + GRAIN) for _ in range(block % 2)]
        for size in recipe.passing:
            number = step.come(size)
            step.go(number)
        fresh = step.come(recipe.stream)
        step.go(stream)
        stream, saved = fresh, [*saved, kept]
    head = step.come(recipe.head)
    step.go(first)
    sections.append(len(step.events))
    gradient = step.come(recipe.stream)
    step.go(head, stream)
    for kept in reversed(saved):
        for size in recipe.gradients if not recipe.before else ():
            gradients.append(step.come(size))
        fresh = step.come(recipe.stream)
        step.go(gradient, *kept, *copies[-1:])
        copies = copies[:-1]
        gradient = fresh
    step.go(gradient)
    sections.append(len(step.events))
    number = step.come(7 * blocks)  # all blocks' together
    step.go(number)
    step.go(*gradients)
    return Trace(tuple(step.events), sections[-1], tuple(sections))


def _steady(trace: Trace) -> Iterator[tuple[int, ...]]:
    """Sizes that come, and between them those that go, whose order says nothing."""
    for comes, sizes in itertools.groupby((size for _, size in trace.events), lambda size: size > 0):
        found = list(sizes)
        yield tuple(found if comes else sorted(found))


_SIZES = st.integers(1, 6).map(lambda n: n << 20)
_RECIPES = st.builds(
    _Recipe,
    saved=st.lists(_SIZES, min_size=1, max_size=4).map(tuple),
    passing=st.lists(_SIZES, max_size=3).map(tuple),
    stream=_SIZES,
    gradients=st.lists(_SIZES, min_size=1, max_size=3).map(tuple),
    head=_SIZES.map(lambda size: size + 2 * GRAIN),
    before=st.booleans(),
    copies=st.sampled_from([0, 5 << 20]),
)


@settings(max_examples=150, deadline=None)
@given(recipe=_RECIPES, short=st.integers(2, 5), copies=st.integers(0, 6))
def test_a_deep_trace_is_that_of_the_deep_model(recipe: _Recipe, short: int, copies: int) -> None:
    found = unrolled(_trace(recipe, short), _trace(recipe, short + 2), copies)
    whole = _trace(recipe, short + 2 * copies)
    assert found is not None and peak_of(found) == peak_of(whole)
    assert list(_steady(found)) == list(_steady(whole))
    assert found.update == whole.update and found.sections == whole.sections


def test_tensors_keep_their_lives() -> None:
    mib = 1 << 20
    recipe = _Recipe((3 * mib, 5 * mib), (9 * mib,), 2 * mib, (11 * mib, 13 * mib), 17 * mib, before=False)
    found, whole = unrolled(_trace(recipe, 3), _trace(recipe, 5), 5), _trace(recipe, 13)
    assert found is not None and sorted(lives(found)) == sorted(lives(whole))
    assert _reserved(found) == _reserved(whole)


def _reserved(trace: Trace) -> int:
    allocator, held = CachingAllocator(), {}
    for number, size in trace.events:
        if size > 0:
            held[number] = allocator.allocate(size)
        else:
            allocator.free(held.pop(number))
    return allocator.peak_reserved


@pytest.mark.parametrize("change", ["another size", "one less", "other sections"])
def test_traces_that_do_not_fit_are_refused(change: str) -> None:
    recipe = _Recipe((3 << 20, 5 << 20), (9 << 20,), 2 << 20, (11 << 20, 13 << 20), 17 << 20, before=False)
    shorter, longer = _trace(recipe, 3), _trace(recipe, 5)
    if change == "another size":
        shorter = _trace(dataclasses.replace(recipe, head=19 << 20, stream=4 << 20), 3)
    elif change == "one less":
        shorter, longer = longer, shorter
    else:
        longer = dataclasses.replace(longer, sections=())
    assert unrolled(shorter, longer, 2) is None
