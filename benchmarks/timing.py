"""Timing that can be trusted on a noisy machine: candidates take turns, medians count, no GPU cache helps."""

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


HEAD_START, PER_CALL = 1_000_000, 120_000
"""For how long a GPU waits before it does what is timed, in its clock's cycles: about 0.5 ms, and 60 us for each call
that the host has to queue meanwhile. So nothing that is timed waits for the host."""


class _Clock:
    """Seconds of one call: wall clock on a CPU, CUDA events on a GPU, the launches queued beforehand.

    flush: on a GPU, clear the L2 cache before every call. Without it calls follow one another, which is right for what
    moves several times as much as the cache holds, and leaves the events' own microseconds out.
    """

    def __init__(self, device: torch.device, *, flush: bool) -> None:
        self.device, self.flush = device, flush
        if device.type == "cuda" and flush:
            # Larger than any L2 cache so far. Reading it evicts what the call before has left; writing it would, too,
            # but then the call that is timed would have to write these lines back to memory.
            self.other = torch.zeros(2**26, device=device)
            self.total = torch.zeros((), device=device)

    def seconds(self, run: Run, repeats: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats
        torch.cuda._sleep(HEAD_START + PER_CALL * repeats)
        pairs = []
        for _ in range(repeats if self.flush else 1):
            if self.flush:
                torch.sum(self.other, 0, out=self.total)
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            for _ in range(1 if self.flush else repeats):
                run()
            after.record()
            pairs.append((before, after))
        torch.cuda.synchronize(self.device)
        return float(sum(before.elapsed_time(after) for before, after in pairs)) / 1e3 / repeats


def interleaved_rounds(
    candidates: Mapping[str, Run], device: torch.device, *, rounds: int = 21, budget: float = 2.0, flush: bool = True
) -> dict[str, list[float]]:
    """Seconds of every round of each candidate, in turn, A B C A B C ..., so that a drifting machine does not decide.

    Args:
        candidates: name -> function without arguments; each is called three times first.
        rounds: how many turns at the most; at least 5 are done.
        budget: seconds for one candidate after its warm-up, roughly.
        flush: clear a GPU's L2 cache before every call; see `exceeds_cache`.
    """
    clock = _Clock(device, flush=flush)
    most = (
        1000 if device.type == "cpu" else 100
    )  # a GPU's queue holds about a thousand launches, of all kernels of a call
    repeats: dict[str, int] = {}
    for name, run in candidates.items():
        for _ in range(3):
            run()
        once = clock.seconds(run, 1)
        # Short calls are repeated within a turn, until a turn is well above the clock's resolution.
        repeats[name] = max(1, min(most, int(2e-3 / max(once, 1e-7))))
    slowest = max(clock.seconds(run, repeats[name]) * repeats[name] for name, run in candidates.items())
    turns = max(5, min(rounds, int(budget / max(slowest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            samples[name].append(clock.seconds(run, repeats[name]))
    return samples


def interleaved(
    candidates: Mapping[str, Run], device: torch.device, *, rounds: int = 21, budget: float = 2.0, flush: bool = True
) -> dict[str, Timing]:
    """The summary of `interleaved_rounds`."""
    samples = interleaved_rounds(candidates, device, rounds=rounds, budget=budget, flush=flush)
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


def exceeds_cache(device: torch.device, size: int) -> bool:
    """Whether a call that goes through tensors of `size` bytes leaves nothing in a GPU's L2 cache that the next one reads
    first, so that it need not be cleared between calls."""
    return device.type == "cuda" and size >= 2 * torch.cuda.get_device_properties(device).L2_cache_size


def copy_bandwidth(device: torch.device, elements: int = 2**26) -> float:
    """Bytes a second of a large float32 copy (read + write): what 100 % means for an op bound by memory. On a GPU the
    better of the library's copy and a kernel's."""
    source = torch.empty(elements, device=device).uniform_()
    target = torch.empty_like(source)
    copies: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    if device.type == "cuda":
        copies["kernel"] = lambda: torch.mul(source, 1.5, out=target)
    times = interleaved(copies, device, budget=1.0, flush=not exceeds_cache(device, 4 * elements))
    return 8 * elements / min(timing.median for timing in times.values())
