"""What a launch costs: from Python, as a node of a CUDA graph, and between two replays of graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from timing import Timing

import ddpm_fast
from ddpm_fast import ops
from ddpm_fast.backends import unavailable_reason
from ddpm_fast.noise import make_rng

from .clock import MOST_CALLS, Clock, in_turn
from .findings import Findings

NODES = 1000  # of the graph that tells what a node costs
GROUP = 10  # nodes of the graph that is compared with one of a single node
REPLAYS = 200


def small_works(device: torch.device) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Launches of one small kernel each, by name, and what has none here: torch's, and `ddpm_step` of one 3x32x32
    image on both backends."""
    one, some = torch.zeros(1, device=device), torch.zeros(2**14, device=device)
    works: dict[str, Callable[[], object]] = {
        "torch, 1 element": lambda: one.add_(1.0),
        "torch, 16384 elements": lambda: some.add_(1.0),  # reads what the one before wrote
    }
    missing = []
    x, m = torch.randn(1, 3, 32, 32, device=device), torch.randn(1, 3, 32, 32, device=device)
    table = torch.tensor([[1.2, 0.7, 0.6, 0.38, 0.0, 0.0, 0.2, 1.0]], device=device)
    t_of_row = torch.tensor([500], dtype=torch.int32, device=device)
    row, rng = torch.zeros(1, dtype=torch.int64, device=device), make_rng(1, 0, device)
    for backend in ("native", "triton"):
        why = unavailable_reason(backend, device)
        if why is not None:
            missing.append(f"launches of {backend}: {why}")
            continue

        def step(backend: str = backend) -> None:
            with ddpm_fast.use_backend(backend):
                ops.ddpm_step(x, m, table, t_of_row, row, rng)

        works[f"ddpm_step {backend}, 1 image"] = step
    return works, missing


def host_costs(clock: Clock, works: dict[str, Callable[[], object]], calls: int) -> dict[str, Timing]:
    """Seconds that a call from Python takes the host."""
    return in_turn({name: functools.partial(clock.host_seconds, work, calls) for name, work in works.items()}, 9)


def replayed(graph: torch.cuda.CUDAGraph, clock: Clock, times: int, nodes: int = 1) -> Callable[[], float]:
    """Measures the seconds of a node of a graph replayed so many times in a row."""
    return lambda: clock.seconds(graph.replay, times) / nodes


def captured(work: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls in a row; the device has run it twice."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return graph


def graph_costs(clock: Clock, works: dict[str, Callable[[], object]]) -> dict[str, Any]:
    """Seconds of a node in a chain of NODES; between two replays of a graph of one node; of the host for a replay."""
    nodes: dict[str, Timing] = {}
    gaps: dict[str, float] = {}
    host: dict[str, Timing] = {}
    for name, work in works.items():
        chain, single, group = (captured(work, times) for times in (NODES, 1, GROUP))
        times = in_turn(
            {
                "node": replayed(chain, clock, 3, NODES),
                "single": replayed(single, clock, REPLAYS),
                "group": replayed(group, clock, REPLAYS),
                "host": functools.partial(clock.host_seconds, single.replay, REPLAYS),
            },
            9,
        )
        nodes[name], host[name] = times["node"], times["host"]
        gaps[name] = times["single"].median - times["node"].median
        gaps[f"{name}, graph of {GROUP}"] = times["group"].median - GROUP * times["node"].median
    return {
        "node_seconds": {name: vars(timing) for name, timing in nodes.items()},
        "gap_seconds": gaps,
        "replay_host_seconds": {name: vars(timing) for name, timing in host.items()},
    }


def first_call(work: Callable[[], object], clock: Clock) -> bool:
    """Runs it once, so that a kernel that does not compile or launch is left out of what is timed."""
    work()
    clock.wait()
    return True


def launches(findings: Findings, clock: Clock) -> None:
    """The costs of launching."""
    works, missing = small_works(clock.device)
    for line in missing:
        findings.leave_out(line)
    for name, work in list(works.items()):
        if findings.attempt(f"the first {name}", first_call, work, clock) is None:
            del works[name]
    findings.say(f"{'launch':<48}{'us':>9}")
    calls = 5 if findings.rehearsal else MOST_CALLS
    if (host := findings.attempt("launches from Python", host_costs, clock, works, calls)) is not None:
        findings.add(eager_host_seconds={name: vars(timing) for name, timing in host.items()})
        findings.say(*[f"{f'{n}: a call from Python':<48}{t.median * 1e6:>9.2f}" for n, t in host.items()])
    if not clock.on_gpu:
        return
    if (found := findings.attempt("launches in a graph", graph_costs, clock, works)) is not None:
        findings.add(graph=found)
        for name, timing in found["node_seconds"].items():
            findings.say(f"{f'{name}: a node of a graph':<48}{timing['median'] * 1e6:>9.2f}")
        for name, seconds in found["gap_seconds"].items():
            findings.say(f"{f'{name}: between two replays':<48}{seconds * 1e6:>9.2f}")
        for name, timing in found["replay_host_seconds"].items():
            findings.say(f"{f'{name}: a replay, for the host':<48}{timing['median'] * 1e6:>9.2f}")
