"""What could be chosen otherwise, timed: every implementation of every layer, steps per graph, blocks of the ops.

    python -m gpu_check.tune --out FILE.json [--rehearse] [--minutes M]

In the order of predicted gain. Each table says what was predicted, which is a model's estimate and no measurement.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from candidate import Case, Problem
from ours import Ours
from timing import Timing, step_rounds

from ddpm_fast.backends import unavailable_reason
from ddpm_fast.inference.plan import listed
from ddpm_fast.sampling import graphs

from . import layer_times, limits
from .clock import Clock, setting
from .findings import Findings, parser, run
from .layer_times import Row
from .op_blocks import op_blocks
from .subjects import LUCIDRAINS, PAPER, REAL, TINY, TUTORIAL, Loops

PREDICTED = {
    "layers": "the epilogue inside the product saves up to 1.45x at n = 512, tile-quantised 1.25x to 1.35x from 256 on",
    "splits": "up to n = 64, 17 of 23 layers have fewer tiles than the GPU has multiprocessors: they need splitting",
    "strides": "1 to 5 us per boundary between replays: 1 % to 5 % of a step at n = 1, nothing from n = 64 on",
    "overlap": "2.8 us a kernel in a graph become 1.5: 86 us a step at n = 1 become 56, nothing from n = 64 on",
    "norms": "one pass over GroupNorm + SiLU: 15.7 MB an image and step in place of 35.4, up to 1.28x at n = 512",
    "ops": "12 bytes an element at 90 % of the copy rate; the updates are 1 % to 3 % of a step from n = 64 on",
}
STRIDES = (1, graphs.STRIDE, 50)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is timed. networks: (table, name, n, which candidates). strided: batches whose steps per graph vary.
    elements, dtypes, quads: of the elementwise ops, and of their programs in Triton. budget: seconds of a comparison.
    edge, copied: of the product and the copy whose rates the tables refer to."""

    networks: tuple[tuple[str, str, int, layer_times.Listed], ...]
    strided: tuple[int, ...]
    elements: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    quads: tuple[int, ...]
    budget: float
    edge: int
    copied: int


FULL = Plan(
    networks=(
        ("layers", TUTORIAL, 64, listed),
        ("layers", TUTORIAL, 256, listed),
        ("layers", TUTORIAL, 512, listed),
        ("splits", TUTORIAL, 1, layer_times.all_splits),
        ("splits", TUTORIAL, 16, layer_times.all_splits),
        ("norms", PAPER, 64, layer_times.all_blocks),
        ("norms", LUCIDRAINS, 64, layer_times.all_blocks),
    ),
    strided=(1, 64),
    elements=(2**26, 2**18),
    dtypes=(torch.float32, torch.bfloat16),
    quads=(128, 256, 512, 1024),
    budget=3.0,
    edge=8192,
    copied=2**30,
)
SMALL = Plan(
    networks=(
        ("layers", TUTORIAL, 2, listed),
        ("splits", TUTORIAL, 1, layer_times.all_splits),
        ("norms", PAPER, 1, layer_times.all_blocks),
        ("norms", LUCIDRAINS, 1, layer_times.all_blocks),
    ),
    strided=(1,),
    elements=(2**14,),
    dtypes=(torch.bfloat16,),
    quads=(128, 512),
    budget=0.02,
    edge=128,
    copied=2**20,
)


def table(rows: list[Row], rate: float, bandwidth: float) -> list[str]:
    """A line per sort of layer: the fastest, each group's best, rates as shares of those measured in the same run."""
    groups = sorted({group for row in rows for group in row.groups.values()})
    first = ["layer", "pixels", "fastest", "us", "trials apart", "next group", *(f"{group}, us" for group in groups)]
    heads = [*first, "TFLOP/s", "of product", "GB/s", "of copy"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        best = row.best()
        if best is None or row.like != row.layer:
            continue
        name, us = best
        others = []
        for group in groups:
            own = row.best(group)
            others.append("-" if own is None else f"{own[1]:.1f} ({own[0]})" if own[0] != name else f"{own[1]:.1f}")
        rivals = [row.best(group) for group in groups if group not in (row.groups[name], layer_times.BENCHMARK)]
        next_best = [own[1] for own in rivals if own is not None]
        products, memory = row.flop / us / 1e6, row.bytes / us / 1e3
        alike = sum(other.like == row.layer for other in rows)
        shown = [
            row.layer + (f" and {alike - 1} alike" if alike > 1 else ""),
            f"{row.pixels[0]}x{row.pixels[1]}",
            name,
            f"{us:.1f}",
            f"{row.spread:.0%}",
            f"{min(next_best) / us:.2f}x" if next_best else "-",
            *others,
            f"{products:.1f}" if row.flop else "-",
            f"{products * 1e12 / rate:.0%}" if row.flop else "-",
            f"{memory:.0f}",
            f"{memory * 1e9 / bandwidth:.0%}",
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def per_layer(
    findings: Findings, loops: Loops, which: tuple[str, str, int, layer_times.Listed], rates: tuple[float, float]
) -> tuple[dict[str, Any], list[str]]:
    """The layers of a network: the record, and the table with the sums."""
    kind, name, n, candidates = which
    _, h, w = loops.sizes.shape
    rows, wrong = layer_times.timed(loops.network(name), n, h, w, torch.bfloat16, candidates)
    for line in wrong:
        findings.fail(f"{name}, n = {n}: {line}")
    sums = layer_times.sums(rows)
    lines = table(rows, *rates)
    for group, found in sums.items():
        without = f", {found['without']:.0f} layers by others" if found["without"] else ""
        lines.append(f"sum, {group}: {found['us']:.1f} us{without}")
    left = {row.layer: row.left_out for row in rows if row.left_out}
    lines += [f"left out at {layer}: {', '.join(names)}" for layer, names in left.items()]
    record = {"table": kind, "network": name, "n": n, "rows": [dataclasses.asdict(row) for row in rows], "sums": sums}
    return record, lines


def steps_by(loops: Loops, n: int, budget: float, owner: Any, name: str, values: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of a step of the tutorial's network with owner.name at each of these values, in turn. A plan and its
    graphs are made for each."""
    case = Case(TUTORIAL, n, loops.sizes.shape)
    problem = Problem(case, loops.device, loops.network())

    def prepared(value: int) -> Callable[[int], float]:
        ours = Ours(torch.bfloat16, fused=True)
        with setting(owner, name, value):
            ours.prepare(problem)

        def seconds(steps: int) -> float:
            with setting(owner, name, value):
                return ours.seconds(steps)

        return seconds

    candidates = {str(value): prepared(value) for value in values}
    for seconds in candidates.values():
        for _ in range(2):  # a graph of one step, then that of several
            seconds(max(STRIDES))
    rounds = step_rounds(candidates, budget=budget, turn=min(0.3, budget), most_steps=problem.T)
    return {"n": n, "step_seconds": {value: vars(Timing.of(times)) for value, times in rounds.items()}}


def triton_launch() -> Any:
    """The module that decides how kernels are launched."""
    return importlib.import_module("ddpm_fast.backends.triton.launch")


def overlapping(findings: Findings) -> bool:
    """Whether Triton's kernels can start beside the end of the one before, on this device."""
    device = findings.device
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    if not able or unavailable_reason("triton", device) is not None:
        findings.leave_out("kernels that overlap: only a GPU of capability 9.0 and later has them, with Triton")
        return False
    return True


def measure(findings: Findings) -> list[str]:
    """Everything in turn; the sums once more, to stand last."""
    plan, sizes = (SMALL, TINY) if findings.rehearsal else (FULL, REAL)
    device, loops = findings.device, Loops(findings.device, sizes)
    clock = Clock(device)
    if findings.rehearsal:
        findings.leave_out("Triton's implementations and CUDA graphs: only a GPU has them")
    findings.leave_out("fp8: not built, so there is nothing to time")
    products = findings.attempt("the rate of a product", limits.products, clock, plan.edge)
    copies = findings.attempt("the rate of a copy", limits.copies, clock, [plan.copied])
    if not products or not copies:
        return []
    rate = next(row["flop_per_second"] for row in products if row["type"] == "bfloat16")
    bandwidth = max(copies[0]["bytes_per_second"][name] for name in ("copy", "copy by a kernel"))
    nothing = layer_times.between_events(device)
    findings.add(
        product_flop_per_second=rate,
        copy_bytes_per_second=bandwidth,
        between_events_us=nothing,
        predicted_by_a_model=PREDICTED,
    )
    findings.say(
        f"bfloat16 product {rate / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s; of every figure of a layer "
        f"{nothing:.1f} us are the timing itself"
    )
    last: list[str] = []
    measured: dict[str, list[dict[str, Any]]] = {"layers": [], "strides": [], "overlap": [], "ops": []}

    def title(text: str, kind: str) -> None:
        findings.say("", f"## {text}", f"predicted (a model's estimate, not measured): {PREDICTED[kind]}", "")

    def layers(which: tuple[str, str, int, layer_times.Listed]) -> None:
        kind, name, n, _ = which
        made = findings.attempt(f"{kind} of {name}, n = {n}", per_layer, findings, loops, which, (rate, bandwidth))
        if made is not None:
            measured["layers"].append(made[0])
            findings.add(**measured)
            title(f"{name}, n = {n}", kind)
            findings.say(*made[1])
            shown = (f"{group} {found['us']:.0f} us" for group, found in made[0]["sums"].items())
            last.append(f"{name}, n = {n}, sums over layers: {', '.join(shown)}")

    def variants(kind: str, what: str, n: int, owner: Any, name: str, values: tuple[int, ...]) -> None:
        made = findings.attempt(f"{what}, n = {n}", steps_by, loops, n, plan.budget, owner, name, values)
        if made is not None:
            measured[kind].append(made)
            findings.add(**measured)
            title(f"{what}, n = {n}", kind)
            for value, timing in made["step_seconds"].items():
                last.append(f"n = {n}, {what}: {value:>2}: {timing['median'] * 1e6:>9.1f} us a step")
                findings.say(last[-1])

    for which in (which for which in plan.networks if which[0] == "layers"):
        layers(which)
    for which in (which for which in plan.networks if which[0] == "splits"):
        layers(which)
    for n in plan.strided:
        variants("strides", "steps per graph", n, graphs, "STRIDE", STRIDES)
    for n in plan.strided if overlapping(findings) else ():
        variants("overlap", "kernels that overlap (0: no, 1: yes)", n, triton_launch(), "OVERLAP", (0, 1))
    for which in (which for which in plan.networks if which[0] == "norms"):
        layers(which)
    able = any(unavailable_reason(backend, device) is None for backend in ("native", "triton"))
    if not able:
        findings.leave_out("blocks of the ops: neither the extension nor Triton can serve this device")
    for elements in plan.elements if able else ():
        for dtype in plan.dtypes:
            what = f"blocks of the ops, {elements} elements, {dtype}"
            made = findings.attempt(what, op_blocks, device, elements, dtype, plan.quads, plan.budget / 6)
            if made is not None:
                measured["ops"].append(made)
                findings.add(**measured)
                title(what, "ops")
                for op, rates in made["ops"].items():
                    shown = ", ".join(f"{name} {r / 1e9:.0f} GB/s ({r / bandwidth:.0%})" for name, r in rates.items())
                    findings.say(f"{op}: {shown}")
    return last


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    return run("tune", parser("tune", __doc__).parse_args(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
