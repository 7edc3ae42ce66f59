"""What a profile says of a run of sampling steps: what waited for the device, what was launched, what the device did.

Pure functions over events, as torch.profiler gives them: names of CUDA's runtime and driver on the host, kernels and
copies on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ddpm_fast.sampling.run import Run

MARK, DONE = "ddpm_fast steps", "ddpm_fast done"
"""Stand around every call that launches steps, and around the time in which the device finishes the last of them."""

WAITS = frozenset(
    {
        *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaFree"),
        *("cudaMemcpy", "cudaMemcpy2D", "cudaMemcpyToSymbol", "cudaMemcpyFromSymbol", "cudaMemset"),
        *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize", "cuMemFree"),
        *("cuMemcpy", "cuMemcpyDtoH", "cuMemcpyHtoD", "cuMemcpyDtoD"),
    }
)
"""Calls that return only once the device has done something; the asynchronous ones end in Async."""

NO_WORK = ("Stream Sync", "Event Sync", "Context Sync", "Stream Wait Event", "Event Record")
"""Of the device's events those that are nothing it does."""

GRAPH = "cudaGraphLaunch"
KEPT_KERNELS = 40


@dataclasses.dataclass(frozen=True)
class Event:
    """A call on the host or a piece of work on the device; times in microseconds."""

    name: str
    start: float
    end: float
    on_device: bool = False


@dataclasses.dataclass(frozen=True)
class Steps:
    """A profile of so many steps.

    waits, calls: by name, of the host's calls between the beginning of the first step and the end of the last launch.
    to_host, from_host: copies on the device between the work of two steps. kernels: the device's work by name, per
    step: {"name", "per_step", "us_per_step"}, what takes longest first. device_us: of a step, from the first step's
    first work to the last one's end. busy: the share of that in which the device did something. None: nothing recorded.
    """

    steps: int
    marked: int
    waits: dict[str, int]
    calls: dict[str, int]
    to_host: int
    from_host: int
    kernels: list[dict[str, Any]]
    works_per_step: float
    device_us: float | None
    busy: float | None


def plain_name(name: str) -> str:
    """A call's name without the version of its interface: cudaGraphLaunch_v10000, cuMemcpyDtoH_v2, .._ptsz."""
    return re.sub(r"(_v\d+|_ptsz|_ptds)+$", "", name) if name.startswith("cu") else name


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def counted(events: Sequence[Event], steps: int) -> Steps:
    """What the events say of so many steps, run under `marked`. ValueError where its marks are missing."""
    marks = [event for event in events if event.name == MARK and not event.on_device]
    done = [event.end for event in events if event.name == DONE and not event.on_device]
    if not marks or not done:
        raise ValueError(f"the profile has no {MARK if done else DONE!r}: no whole run of steps was launched in it")
    begin, end = min(mark.start for mark in marks), max(mark.end for mark in marks)
    calls = Counter(
        plain_name(event.name)
        for event in events
        if not event.on_device and event.name.startswith("cu") and begin <= event.start <= end
    )
    nothing = (MARK, DONE, *NO_WORK)
    works = [event for event in events if event.on_device and event.name not in nothing]
    inside = [work for work in works if begin <= work.start <= max(done)]
    if not inside:
        return Steps(steps, len(marks), _waits(calls), dict(calls), 0, 0, [], 0.0, None, None)
    first, last = min(work.start for work in inside), max(work.end for work in inside)
    spans: dict[str, list[float]] = {}
    for work in inside:
        spans.setdefault(work.name, []).append(work.end - work.start)
    kernels = [
        {"name": name[:120], "per_step": len(times) / steps, "us_per_step": sum(times) / steps}
        for name, times in sorted(spans.items(), key=lambda item: -sum(item[1]))
    ]
    return Steps(
        steps,
        len(marks),
        _waits(calls),
        dict(calls),
        sum(work.name.startswith("Memcpy DtoH") for work in inside),
        sum(work.name.startswith("Memcpy HtoD") for work in inside),
        kernels[:KEPT_KERNELS],
        len(inside) / steps,
        (last - first) / steps,
        covered([(work.start, work.end) for work in inside]) / max(last - first, 1e-9),
    )


def _waits(calls: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in calls.items() if name in WAITS}


def problems(found: Steps, launches: int | None, on_gpu: bool) -> list[str]:
    """What is not as promised: no wait, no copy to or from the host, as many graph launches as the steps need.

    launches: of graphs; 0 for steps that run eagerly, which the profile has to show some other launches of.
    """
    lines = [f"{count} x {name} between the first and the last step" for name, count in sorted(found.waits.items())]
    if found.to_host:
        lines.append(f"{found.to_host} copies from the device to the host between the steps")
    if found.from_host:
        lines.append(f"{found.from_host} copies from the host to the device between the steps")
    if not on_gpu:
        return lines
    graphs = found.calls.get(GRAPH, 0)
    if graphs != launches:
        lines.append(f"{graphs} graph launches for {found.steps} steps, expected {launches}")
    if not launches and not any(name.startswith(("cudaLaunch", "cuLaunch")) for name in found.calls):
        lines.append("the profiler recorded no launch: it cannot show that nothing waits")
    return lines


@contextlib.contextmanager
def marked(strict: bool = False) -> Iterator[None]:
    """Puts MARK around every call of a sampler that launches steps, and waits before the first and, under DONE, after
    the last, so that on the device too everything between the marks is theirs.

    strict: a PyTorch call within it that waits for the device raises RuntimeError.
    """
    launch = Run.advance

    def advance(self: Run, row: int, rows: int = 1) -> None:
        if row == self.begin.start:
            _settle(self.plan.device)
        with record_function(MARK), no_waiting() if strict else contextlib.nullcontext():
            launch(self, row, rows)
        if row + rows == len(self.plan.steps):
            with record_function(DONE):
                _settle(self.plan.device)

    with mock.patch.object(Run, "advance", advance):
        yield


def _settle(device: torch.device) -> None:
    """Waits for the device, and a little more: its clock and the host's agree to some microseconds only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    time.sleep(1e-3)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Makes PyTorch raise where it would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def profiled(run: Callable[[], object], device: torch.device) -> list[Event]:
    """The events of a run, steps marked."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        # A second profile of CUDA graphs has been seen to crash where the library below was unloaded after the first.
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    with profile(activities=activities) as found, marked():
        run()
    return [
        Event(one.name, one.time_range.start, one.time_range.end, one.device_type != DeviceType.CPU)
        for one in found.events() or []
    ]
