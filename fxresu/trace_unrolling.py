"""The trace of a deep model's step from those of two short ones.

What the longer of two short models allocates and the shorter does not is the part of a few blocks: one stretch of the
forward, one of the backward, and one of the update. Repeated, these give the allocations of the deep model. What is
left to know is when each of them is freed. Blocks have an order, which forward and update go up and the backward goes
down, and a tensor of a block goes in that block, in the next of the order, in the one before, or behind all of them.
Which of these it is the two short models tell.

Frees that follow one another have no order here: a caching allocator is in the same state after them either way.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence

from .caching_allocator import GRAIN
from .rehearsal import Trace

_BACKWARD, _UPDATE = 2, 3  # of a trace's sections; the backward alone goes down the blocks


@dataclasses.dataclass(frozen=True, order=True)
class _Place:
    """A place in a step: just before an allocation, or at a section's end.

    Attributes:
        section: of the trace.
        repeated: within the part that is repeated.
        at: allocations before it, of the section's other part if it is not repeated, else of one copy.
    """

    section: int
    repeated: bool
    at: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A storage that comes and goes in a step; `size` in bytes, `end` None if it outlives the step."""

    size: int
    begin: _Place
    end: _Place | None


@dataclasses.dataclass(frozen=True)
class _Section:
    """How the longer trace's section is made: `length` allocations, from number `start` on, are the repeated part; the
    section has `whole` without them."""

    start: int
    length: int
    whole: int

    def place(self, section: int, at: int) -> _Place:
        """Of the longer trace's allocation number `at`."""
        if self.start <= at < self.start + self.length:
            return _Place(section, True, at - self.start)
        return _Place(section, False, at if at < self.start else at - self.length)

    def number(self, place: _Place, copy: int, copies: int) -> int:
        """Of the allocation in the deep model's section."""
        if place.repeated:
            return self.start + copy * self.length + place.at
        return place.at if place.at < self.start else place.at + copies * self.length


def unrolled(shorter: Trace, longer: Trace, copies: int) -> Trace | None:
    """The trace of a model that has `copies` times the blocks more than the shorter that the longer has; None where
    the two traces are not periodic in the one way that is understood here."""
    if len(shorter.sections) != _UPDATE or len(longer.sections) != _UPDATE:
        return None
    kinds = list(range(_UPDATE + 1))
    for section in reversed(kinds):
        cuts = _cuts(_tokens(lives(shorter), section, _UPDATE), _tokens(lives(longer), section, _UPDATE))
        shorter, longer = (_cut(t, section, [pair[i] for pair in cuts]) for i, t in enumerate((shorter, longer)))
        kinds[section : section + 1] = [section] * (len(cuts) + 1)
    short, long, update = lives(shorter), lives(longer), kinds.index(_UPDATE)
    choices = [_aligned(_tokens(short, s, update), _tokens(long, s, update)) for s in range(len(kinds))]
    if not all(choices):
        return None
    # A repeated stretch may begin anywhere within a block, and for equal sizes it may seem to begin elsewhere.
    tried = []
    best = _Unrolling([c[0] for c in choices], kinds, short, long)
    for section in reversed(range(len(choices))):
        other = [_Unrolling(_with(best.sections, section, c), kinds, short, long) for c in choices[section]]
        best = min(other, key=_Unrolling.doubts)
        tried += other
    tried.sort(key=_Unrolling.doubts)
    return next((trace for u in tried if (trace := u.trace(copies)) is not None), None)


def _with(sections: Sequence[_Section], number: int, other: _Section) -> list[_Section]:
    return [other if i == number else section for i, section in enumerate(sections)]


def peak_of(trace: Trace) -> int:
    """The highest sum of bytes that have come and not gone."""
    return max(itertools.accumulate((size for _, size in trace.events), initial=0))


_Raw = tuple[int, tuple[int, int], tuple[int, int] | None]
"""Bytes, and section and number of the allocation before which a storage comes and goes."""


def lives(trace: Trace) -> list[_Raw]:
    """Storages of a step in the order in which they come."""
    ends = [*trace.sections, len(trace.events)]
    births: dict[int, tuple[int, tuple[int, int]]] = {}
    deaths: dict[int, tuple[int, int]] = {}
    section, count = 0, 0
    for i, (number, size) in enumerate(trace.events):
        while i >= ends[section]:
            section, count = section + 1, 0
        if size > 0:
            births[number] = size, (section, count)
            count += 1
        elif number in births:  # others were there before the step
            deaths[number] = section, count
    return [(size, begin, deaths.get(number)) for number, (size, begin) in births.items()]


def _passing(raw: _Raw, update: int) -> bool:
    """Whether it goes before anything else comes, in the update: θ's is of all weights together, and grows."""
    _, (section, number), end = raw
    return section >= update and end == (section, number + 1)


def _tokens(raws: Iterable[_Raw], section: int, update: int) -> list[int]:
    """Sizes as an allocator rounds them, in which a few bytes for every block (seeds of dropout) do not show."""
    return [0 if _passing(raw, update) else -(-raw[0] // GRAIN) for raw in raws if raw[1][0] == section]


def _cuts(shorter: Sequence[int], longer: Sequence[int]) -> list[tuple[int, int]]:
    """Where to cut both sections in two or more that have one stretch more each, as where copies of all blocks' weights
    come before the first block: halfway between the fewest stretches that there can be. None where there is no way."""
    if _aligned(shorter, longer):
        return []
    more = len(longer) - len(shorter)
    # Fewest stretches up to number i of the shorter and i + d of the longer, the last of them ending there or not.
    fewest: dict[tuple[int, int], tuple[float, float]] = {}
    for i in range(len(shorter) + 1):
        for d in range(more + 1):
            same = i > 0 and shorter[i - 1] == longer[i - 1 + d]
            kept = min(fewest[i - 1, d]) if same else 0.0 if i == d == 0 else math.inf
            fewest[i, d] = kept, min(fewest[i, d - 1][0] + 1, fewest[i, d - 1][1]) if d else math.inf
    i, d = len(shorter), more
    if more < 0 or min(fewest[i, d]) == math.inf:
        return []
    stretches: list[tuple[int, int]] = []  # where one comes in the shorter, and how much the longer is ahead behind it
    inside = fewest[i, d][1] < fewest[i, d][0]
    while i or d:
        if inside:
            if not (stretches and stretches[-1][0] == i):
                stretches.append((i, d))
            d -= 1
            inside = fewest[i, d][1] <= fewest[i, d][0] + 1
        else:
            i -= 1
            inside = fewest[i, d][1] < fewest[i, d][0]
    stretches.reverse()
    middles = [(first + then) // 2 for (first, _), (then, _) in itertools.pairwise(stretches)]
    return [(middle, middle + ahead) for middle, (_, ahead) in zip(middles, stretches)]


def _cut(trace: Trace, section: int, numbers: Sequence[int]) -> Trace:
    """With the section cut before these of its allocations."""
    begin = (0, *trace.sections)[section]
    end = (*trace.sections, len(trace.events))[section]
    allocations = [i for i in range(begin, end) if trace.events[i][1] > 0]
    sections = (*trace.sections[:section], *(allocations[n] for n in numbers), *trace.sections[section:])
    return dataclasses.replace(trace, sections=sections)


def _aligned(shorter: Sequence[int], longer: Sequence[int]) -> list[_Section]:
    """Where the longer may have a stretch more, so that both are the same before and behind it."""
    whole, length = len(shorter), len(longer) - len(shorter)
    first, last = whole - _common(shorter[::-1], longer[::-1]), _common(shorter, longer)
    if length <= 0:
        return [_Section(whole, 0, whole)] * (length == 0 and last == whole)
    return [_Section(start, length, whole) for start in range(first, last + 1)]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


class _Unrolling:
    """Two traces of short models, storage by storage, with a choice of the stretches that are repeated.

    Attributes:
        moved: tensors beside these stretches that go at another place than in the shorter model.
    """

    def __init__(
        self, sections: Sequence[_Section], kinds: Sequence[int], shorter: Sequence[_Raw], longer: Sequence[_Raw]
    ) -> None:
        self.sections, self.kinds = sections, kinds
        plain = [_Section(s.whole, 0, s.whole) for s in sections]
        self.short = {t.begin: t for t in (_tensor(plain, raw) for raw in shorter)}
        self.long = [_tensor(sections, raw) for raw in longer]
        self.moved = [t for t in self.long if not t.begin.repeated and t.end != self.short[t.begin].end]

    def doubts(self) -> tuple[int, int]:
        """How much more, or less, goes beside the repeated stretches than in the shorter model; then, how much goes
        elsewhere there, which is the least where forward and backward repeat the same blocks."""
        ends = Counter((t.end, t.size) for t in self.long if t.end is None or not t.end.repeated)
        ends.subtract(Counter((t.end, t.size) for t in self.short.values()))
        return sum(map(abs, ends.values())), len(self.moved)

    def trace(self, copies: int) -> Trace | None:
        """With so many copies of the repeated stretches."""
        found: list[_Raw] = []
        rest = [t for t in self.long if t.begin.repeated or t.end == self.short[t.begin].end]
        for size in dict.fromkeys(t.size for t in self.moved):
            group = self._group(size)
            paired = self._group_lives(group, copies)
            if paired is None:
                return None
            found += paired
            rest = [t for t in rest if t not in group]
        for tensor in rest:
            grown = tensor.size if tensor.begin.repeated else self._grown(tensor, copies)
            for block, at in enumerate(self._all(tensor.begin, copies)):
                end = None if tensor.end is None else self._at(tensor.end, block, copies)
                found.append((grown, at, end))
        return _events(found, [s.whole + copies * s.length for s in self.sections], self.kinds)

    def _group(self, size: int) -> list[_Tensor]:
        """Tensors of a size that change roles: those that go elsewhere than in the shorter model, and the repeated ones
        that go where these went, or go."""
        moved = [t for t in self.moved if t.size == size]
        ends = {self.short[t.begin].end for t in moved} | {t.end for t in moved}
        ends = {end for end in ends if end is None or not end.repeated}
        return [*moved, *(t for t in self.long if t.begin.repeated and t.size == size and t.end in ends)]

    def _group_lives(self, group: Sequence[_Tensor], copies: int) -> list[_Raw] | None:
        """Which of a group goes when: the last that came, or the first, as it is in the short models."""
        ways = [[self._paired(group, n, last) for n in (0, 1, copies)] for last in (True, False)]
        truth = [
            {(t.begin, self.short[t.begin].end) for t in group if not t.begin.repeated},
            {(t.begin, t.end) for t in group},
        ]
        known = [
            {(self._at(b, 0, n), None if e is None else self._at(e, 0, n)) for b, e in pairs}
            for n, pairs in enumerate(truth)
        ]

        def right(way: Sequence[list[_Raw] | None]) -> int:
            return sum(len(k & {(b, e) for _, b, e in found}) for k, found in zip(known, way) if found is not None)

        return max((way for way in ways if way[-1] is not None), key=right, default=[None])[-1]

    def _paired(self, group: Sequence[_Tensor], copies: int, last: bool) -> list[_Raw] | None:
        """The group's lives where the last that has come goes first, or the first one."""
        ends = Counter(t.end for t in group)
        ends_short = Counter(self.short[t.begin].end for t in group if not t.begin.repeated)
        moments = [(at, 1) for t in group for at in self._all(t.begin, copies)]
        for place in {*ends, *ends_short} - {None}:
            assert place is not None
            each = ends[place]
            if not place.repeated:
                each = ends_short[place] + copies * (each - ends_short[place])
            if each < 0:
                return None
            moments += [(at, 0) for at in self._all(place, copies) for _ in range(each)]
        waiting: deque[tuple[int, int]] = deque()
        found: list[_Raw] = []
        for at, comes in sorted(moments):  # what goes before an allocation, and then that
            if comes:
                waiting.append(at)
            elif waiting:
                found.append((group[0].size, waiting.pop() if last else waiting.popleft(), at))
            else:
                return None
        return found + [(group[0].size, at, None) for at in waiting]

    def _grown(self, tensor: _Tensor, copies: int) -> int:
        """Bytes, which are not the same in both models for what is of all blocks together."""
        short = self.short[tensor.begin].size
        return short + copies * (tensor.size - short)

    def _all(self, place: _Place, copies: int) -> list[tuple[int, int]]:
        """Where the place is in the deep model, block by block."""
        return [self._at(place, block, copies) for block in range(copies if place.repeated else 1)]

    def _at(self, place: _Place, block: int, copies: int) -> tuple[int, int]:
        copy = copies - 1 - block if self.kinds[place.section] == _BACKWARD else block
        return place.section, self.sections[place.section].number(place, copy, copies)


def _tensor(sections: Sequence[_Section], raw: _Raw) -> _Tensor:
    size, begin, end = raw
    places = [None if at is None else sections[at[0]].place(*at) for at in (begin, end)]
    assert places[0] is not None
    return _Tensor(size, places[0], places[1])


def _events(raws: Iterable[_Raw], counts: Sequence[int], kinds: Sequence[int]) -> Trace | None:
    """The trace in which storages come and go so, with `counts` allocations in the sections, which are of `kinds`."""
    comes: dict[tuple[int, int], tuple[int, int]] = {}
    goes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, (size, begin, end) in enumerate(raws):
        if end is not None:
            if end <= begin:  # it would go before it has come
                return None
            goes[end].append((number, -size))
        comes[begin] = number, size
    if len(comes) != sum(counts):
        return None
    events: list[tuple[int, int]] = []
    ends: dict[int, int] = {}
    for section, count in enumerate(counts):
        for at in range(count + 1):
            events += goes[section, at]
            if at < count:
                events.append(comes[section, at])
        ends[kinds[section]] = len(events)
    return Trace(tuple(events), ends[_BACKWARD], tuple(ends[kind] for kind in range(_UPDATE)))
