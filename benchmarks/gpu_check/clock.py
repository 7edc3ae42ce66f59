"""Seconds of work on a device, its launches queued beforehand; candidates take turns and the median counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timing import Timing

Run = Callable[[], object]

CYCLES, CYCLES_PER_CALL = 1_000_000, 60_000
"""For how long the device waits before a turn, in its clock's cycles: about 0.5 ms, and 30 us for every call that the
host has to queue meanwhile. Nothing that is timed then waits for the host."""

MOST_CALLS = 500  # in a turn; the driver's queue holds about a thousand launches


class Clock:
    """Times work on one device: between CUDA events on a GPU, by the clock on the wall on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def on_gpu(self) -> bool:
        """Whether there are events, graphs and a queue of launches."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Run, calls: int = 1) -> float:
        """Of one call, out of so many one after the other. `run` only queues work; it must not wait for it."""
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(CYCLES + CYCLES_PER_CALL * calls)
        before.record()
        for _ in range(calls):
            run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3 / calls

    def host_seconds(self, run: Run, calls: int = MOST_CALLS) -> float:
        """What a call costs the host, which does not wait for the device."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken = time.perf_counter() - start
        self.wait()
        return taken / calls


def in_turn(times: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Medians of figures that each function measures anew, A B C A B C ..., so that a drifting clock hits all."""
    samples: dict[str, list[float]] = {name: [] for name in times}
    for _ in range(rounds):
        for name, measure in times.items():
            samples[name].append(measure())
    return {name: Timing.of(values) for name, values in samples.items()}


def interleaved(clock: Clock, runs: Mapping[str, Run], *, rounds: int = 9, turn: float = 5e-3) -> dict[str, Timing]:
    """Seconds of a call of each, warmed up; a turn is as many calls as fill `turn` seconds, and at least one."""

    def timed(run: Run) -> Callable[[], float]:
        for _ in range(3):
            run()
        calls = max(1, min(MOST_CALLS, round(turn / max(clock.seconds(run), 1e-7))))
        return lambda: clock.seconds(run, calls)

    return in_turn({name: timed(run) for name, run in runs.items()}, rounds)


@contextlib.contextmanager
def setting(owner: Any, name: str, value: object) -> Iterator[None]:
    """owner.name = value for a while: a flag of torch's, a constant of a module."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
