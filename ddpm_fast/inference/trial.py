"""Which implementation of each layer is the fastest here: checked against float32, then timed in the network's order.

A layer timed on its own, again and again, has its weights and images in the cache, which in a network they are not. So
whole passes are made, each with other candidates, and every layer is timed within them. Layers that differ in nothing
but their weights are timed as one: each tries another candidate in the same pass.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch

from .candidate import Bound, Candidate, Frame, Place
from .check import serving
from .native import Native
from .network import Layer

ROUNDS = 5  # timings per candidate that is still in
SECONDS, AT_LEAST = 1.2, 3  # for all rounds, but every candidate still in is timed so often whatever it takes
HOPELESS, SLOWER = 2.0, 1.5  # times the best run: out before the rounds, out after two of them
SECOND_CHANCES = 2  # runs before something is found hopeless
GPU_ENTRIES = 3  # first runs of each on a GPU, in turn: while kernels were compiled its clock may have slowed down
CLOSE = 1.05  # within this of the fastest, what is listed first is taken, so that noise decides less
APART = 1.15  # ours join up with their neighbours into one call, and wake no second set of threads: worth this much


@dataclasses.dataclass
class Ranking:
    """What was chosen for a layer: (candidate's name, microseconds) from the fastest on; one entry without times where
    nothing was measured."""

    layer: str
    times: list[tuple[str, float | None]]

    @property
    def chosen(self) -> str:
        return self.times[0][0]


@dataclasses.dataclass(eq=False)
class Contender:
    candidate: Candidate
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def samples(self) -> int:
        return len(self.seconds)


ATTEMPTS = 3  # at launching faster than a GPU's wait; not more, for a call may itself wait for the device

Timer = Callable[[Sequence[Bound], Frame], list[float]]


def timed_on_host(bounds: Sequence[Bound], frame: Frame) -> list[float]:
    """Seconds of each call, one after the other."""
    result = []
    for bound in bounds:
        start = time.perf_counter()
        bound(frame)
        result.append(time.perf_counter() - start)
    return result


def timed_on_gpu(bounds: Sequence[Bound], frame: Frame) -> list[float]:
    """Seconds of each call on the device."""
    return busy_seconds([functools.partial(bound, frame) for bound in bounds])


def busy_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds that each call keeps the current GPU busy, between events, one call after the other.

    The device waits until all are launched: how long the host takes says nothing of a captured step, where it does
    that once. Where it took longer than the device waited, they are run again and the device waits longer.
    """
    cycles = 2_000_000 + 200_000 * len(calls)  # of its clock: about 0.1 ms a layer
    for _ in range(ATTEMPTS):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda._sleep(cycles)
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        ahead = not events[0].query()
        events[-1].synchronize()
        if ahead:
            break
        cycles *= 4
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def timer_for(device: torch.device) -> Timer:
    """How calls are timed on this device."""
    return timed_on_gpu if device.type == "cuda" else timed_on_host


class Alike:
    """Layers of one shape, and how the candidates fare at any of them."""

    def __init__(self) -> None:
        self.contenders: list[Contender] = []
        self.entered: list[Candidate] = []
        self.ranking: dict[str, float] = {}

    def settle(self, limit: float) -> None:
        """Records times; drops what is more than `limit` times slower than the best."""
        best = min(contender.best for contender in self.contenders)
        self.ranking |= {contender.candidate.name: contender.best for contender in self.contenders}
        self.contenders = [contender for contender in self.contenders if contender.best <= limit * best]

    def enter(self, served: list[tuple[Candidate, Bound]], timer: Timer, frame: Frame) -> None:
        """All that serve the first such layer, timed once or a few times; the hopeless leave at once."""
        self.entered = [candidate for candidate, _ in served]
        self.contenders = [Contender(candidate) for candidate, _ in served]
        for _ in range(GPU_ENTRIES if timer is timed_on_gpu else 1):
            for contender, (_, bound) in zip(self.contenders, served, strict=True):
                contender.seconds += timer([bound], frame)
        for _ in range(SECOND_CHANCES):
            limit = HOPELESS * min(contender.best for contender in self.contenders)
            for contender, (_, bound) in zip(self.contenders, served, strict=True):
                if contender.best > limit:  # or something came in between
                    contender.seconds += timer([bound], frame)
        self.settle(HOPELESS)
        for contender in self.contenders:
            contender.seconds.clear()

    @property
    def undecided(self) -> bool:
        return len(self.contenders) > 1 and self.contenders[-1].samples < ROUNDS

    def decide(self) -> None:
        """The winner becomes the first contender."""
        ours = [contender for contender in self.contenders if isinstance(contender.candidate, Native)]
        if ours and min(one.best for one in ours) <= APART * min(one.best for one in self.contenders):
            self.contenders = ours
        self.settle(CLOSE)

    def ranked(self, layer: str, chosen: str) -> Ranking:
        order = sorted(self.ranking.items(), key=lambda item: (item[0] != chosen, item[1]))
        return Ranking(layer, [(name, seconds * 1e6) for name, seconds in order])


def fastest(
    layers: Sequence[Layer],
    places: Sequence[Place],
    frame: Frame,
    listed: Callable[[Layer, Place], list[Candidate]],
    marks: Sequence[Hashable],
) -> list[Ranking]:
    """Per layer the fastest of the listed implementations that compute the right thing, and how the others fared.

    marks: equal for layers that differ in nothing but their weights. Every implementation was checked at the first of
    them, and what is chosen at each.
    """
    timer = timer_for(frame.x.device)
    groups: dict[Hashable, Alike] = {}
    bounds: list[dict[str, Bound]] = []
    checked: list[set[str]] = []
    for layer, place, mark in zip(layers, places, marks, strict=True):
        if mark not in groups:
            served = serving(layer, place, frame, listed(layer, place))
            groups[mark] = Alike()
            groups[mark].enter(served, timer, frame)
            bounds.append({candidate.name: bound for candidate, bound in served})
            checked.append({candidate.name for candidate, _ in served})
        else:
            first = groups[mark].contenders[0].candidate  # what comes after needs something to read
            bounds.append({first.name: first.prepare(layer, place)})
            bounds[-1][first.name](frame)
            checked.append(set())
    alike = [groups[mark] for mark in marks]

    start, passes = time.perf_counter(), 0
    while passes < 2 or any(group.undecided for group in groups.values()):
        late = time.perf_counter() - start > SECONDS
        if late and all(one.samples >= AT_LEAST for group in groups.values() for one in group.contenders):
            break
        turn: list[Contender] = []
        given: Counter[int] = Counter()  # samples that earlier layers of this pass will bring
        for layer, place, group, known in zip(layers, places, alike, bounds, strict=True):
            chosen = min(group.contenders, key=lambda one: one.samples + given[id(one)])
            given[id(chosen)] += 1
            turn.append(chosen)
            if chosen.candidate.name not in known:
                known[chosen.candidate.name] = chosen.candidate.prepare(layer, place)
        calls = [known[one.candidate.name] for known, one in zip(bounds, turn, strict=True)]
        for contender, seconds in zip(turn, timer(calls, frame), strict=True):
            contender.seconds.append(seconds)
        for group in groups.values():
            if len(group.contenders) > 1 and all(one.samples > 1 for one in group.contenders):
                group.settle(SLOWER)
        passes += 1
    for group in groups.values():
        group.decide()
    return [
        group.ranked(layer.name, _checked(layer, place, frame, group, done, known))
        for layer, place, group, done, known in zip(layers, places, alike, checked, bounds, strict=True)
    ]


def _checked(
    layer: Layer, place: Place, frame: Frame, group: Alike, checked: set[str], bounds: dict[str, Bound]
) -> str:
    """The name of the fastest candidate that computes this layer, too, the right thing; the layer has run with it."""
    winner = group.contenders[0].candidate
    if winner.name in checked:
        bounds[winner.name](frame)
        return winner.name
    order = sorted(group.ranking, key=lambda name: (name != winner.name, group.ranking[name]))
    candidates = {candidate.name: candidate for candidate in group.entered}
    ((chosen, _),) = serving(layer, place, frame, [candidates[name] for name in order], wanted=1)
    return chosen.name
