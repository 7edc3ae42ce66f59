"""Timing that can be trusted on a noisy machine: candidates take turns, medians count, GPU caches are cleared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]
Seconds = Callable[[int], float]  # how many steps in a row -> seconds of one of them


@dataclass(frozen=True)
class Timing:
    """Of one candidate's rounds: the median and the 20th and 80th percentile, in seconds or as a ratio."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def ratios(baseline: Sequence[float], ours: Sequence[float]) -> Timing:
    """baseline / ours of each round, paired: what slows both in a round does not count."""
    return Timing.of([b / o for b, o in zip(baseline, ours, strict=True)])


class _Clock:
    """Seconds of one call: wall clock on a CPU, CUDA events with a cleared L2 cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Larger than any L2 cache so far; writing it evicts what the call before has left there.
        self.flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def seconds(self, run: Run, repeats: int) -> float:
        if self.flush is None:
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats
        total = 0.0
        for _ in range(repeats):
            self.flush.zero_()
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            run()
            after.record()
            torch.cuda.synchronize(self.device)
            total += before.elapsed_time(after) / 1e3
        return total / repeats


def interleaved_rounds(
    candidates: Mapping[str, Run], device: torch.device, *, rounds: int = 21, budget: float = 2.0
) -> dict[str, list[float]]:
    """Seconds of every round of each candidate, in turn, A B C A B C ..., so that a drifting machine does not decide.

    Args:
        candidates: name -> function without arguments; each is called three times first.
        rounds: how many turns at the most; at least 5 are done.
        budget: seconds for one candidate after its warm-up, roughly.
    """
    clock = _Clock(device)
    repeats: dict[str, int] = {}
    for name, run in candidates.items():
        for _ in range(3):
            run()
        once = clock.seconds(run, 1)
        # Short calls are repeated within a turn, until a turn is well above the clock's resolution.
        repeats[name] = max(1, min(1000, int(2e-3 / max(once, 1e-7))))
    slowest = max(clock.seconds(run, repeats[name]) * repeats[name] for name, run in candidates.items())
    turns = max(5, min(rounds, int(budget / max(slowest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            samples[name].append(clock.seconds(run, repeats[name]))
    return samples


def interleaved(
    candidates: Mapping[str, Run], device: torch.device, *, rounds: int = 21, budget: float = 2.0
) -> dict[str, Timing]:
    """The summary of `interleaved_rounds`."""
    samples = interleaved_rounds(candidates, device, rounds=rounds, budget=budget)
    return {name: Timing.of(values) for name, values in samples.items()}


def step_rounds(
    candidates: Mapping[str, Seconds],
    *,
    budget: float = 3.0,
    turn: float = 0.3,
    rounds: int = 41,
    most_steps: int = 200,
) -> dict[str, list[float]]:
    """Seconds per sampling step of every round of each candidate, in turn; every round begins with another one.

    Args:
        candidates: name -> function that does so many steps in a row and returns the seconds of one.
        budget: seconds for each candidate after its warm-up, roughly; at least 5 rounds and at most `rounds`.
        turn: seconds of one turn; at least one step. Switching candidates costs caches and thread pools their warmth,
            which a turn has to outlast.
        most_steps: in a turn.
    """
    steps: dict[str, int] = {}
    longest = turn
    for name, seconds in candidates.items():
        once = seconds(1)
        if once < turn:  # not yet warm, perhaps
            once = max(min(seconds(2), seconds(2)), 1e-6)
        steps[name] = max(1, min(most_steps, round(turn / once)))
        longest = max(longest, once * steps[name])
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(max(5, min(rounds, int(budget / longest)))):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(candidates[name](steps[name]))
    return samples


def copy_bandwidth(device: torch.device, elements: int = 2**26) -> float:
    """Bytes a second of a large float32 copy (read + write): what 100 % means for an op bound by memory."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, budget=1.0)["copy"]
    return 8 * elements / timing.median
