"""Whole-loop sampling on the device: nothing waits for the host, bits do not depend on the company, seconds of a run.

    python -m gpu_check.loop --out FILE.json [--rehearse] [--minutes M]

Proofs: (a) a profile of the steps shows no synchronisation and as many graph launches as promised, and PyTorch itself
raises at none; (b) with deterministic=True an image has the same bits alone, among others, and after a restart; (c) a
captured graph gives the bits of eager steps for new seeds and labels, and one of several steps those of single steps;
(d) fused plans stay as close to float32 as the network without one. Then the seconds of 1000 steps of ours alone; what
they are compared with comes from benchmarks/run.py.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from timing import Timing

from ddpm_fast import Sampler
from ddpm_fast.sampling import graphs

from .findings import Findings, parser, run
from .same_bits import CHUNK, determinism, distances, far, replays
from .subjects import PAPER, REAL, SEED, TINY, TUTORIAL, Loops, T
from .trace import GRAPH, Steps, counted, marked, problems, profiled

GOALS = {
    **{(TUTORIAL, n): seconds for n, seconds in ((1, 0.10), (16, 0.135), (64, 0.26), (512, 1.40))},
    **{(PAPER, n): seconds for n, seconds in ((1, 0.55), (64, 2.1))},
}
"""Seconds of 1000 steps that are to be reached on an H100."""


PROFILE = f"{'profile':<34}{'steps':>6}{'waits':>6}{'graphs':>7}{'works/step':>11}{'us/step':>9}{'busy':>6}"


# -- (a) nothing waits -------------------------------------------------------------------------------------------------


def profile_of(loops: Loops, sampler: Sampler, n: int, steps: int, graphed: bool) -> tuple[Steps, list[str]]:
    """What the steps did, and what of it is not as promised."""
    sample = functools.partial(sampler.sample, **loops.start(n, steps))
    for _ in range(2):  # the plan and a graph of one step; the graph of several
        sample()
    found = counted(profiled(sample, loops.device), steps)
    stride = graphs.STRIDE
    on_gpu = loops.device.type == "cuda"
    return found, problems(found, steps // stride + steps % stride if graphed else 0, on_gpu)


def one_profile(findings: Findings, loops: Loops, fused: bool, graphed: bool, n: int, steps: int) -> None:
    """Its record and its lines."""
    what = f"{'fused' if fused else 'no plan'}, {'graph' if graphed else 'eager'}, n = {n}"
    sampler = loops.usual(fused=fused, graphed=graphed)
    found, wrong = profile_of(loops, sampler, n, steps, graphed)
    for line in wrong:
        findings.fail(f"profile of {what}: {line}")
    record = {"what": what, "n": n, "fused": fused, "graph": graphed, **dataclasses.asdict(found), "failures": wrong}
    findings.add(profiles=[*findings.figures.get("profiles", []), record])
    device = "" if found.device_us is None else f"{found.device_us:>9.1f}{found.busy or 0:>6.0%}"
    waits, launches = sum(found.waits.values()), found.calls.get(GRAPH, 0)
    findings.say(PROFILE, f"{what:<34}{steps:>6}{waits:>6}{launches:>7}{found.works_per_step:>11.1f}{device}")
    for k in found.kernels[:5]:
        findings.say(f"    {k['us_per_step']:>8.2f} us  {k['per_step']:>5.1f} x {k['name']}")


def strict(loops: Loops, fused: bool, graphed: bool) -> None:
    """Raises RuntimeError where PyTorch waits for the device during a step."""
    n, steps = loops.sizes.profiled
    sampler = loops.usual(fused=fused, graphed=graphed)
    sample = functools.partial(sampler.sample, **loops.start(n, steps))
    for _ in range(2):
        sample()
    with marked(strict=loops.device.type == "cuda"):
        sample()


def duration(loops: Loops, name: str, n: int) -> dict[str, Any]:
    """Seconds of `sample` with T steps, by the clock on the wall, after two runs that prepare; and what the plan is."""
    began = time.perf_counter()
    sampler = loops.sampler(loops.network(name))
    steps = loops.sizes.timed_steps
    what = loops.start(n, steps) if steps < T else {"n": n, "shape": loops.sizes.shape, "seed": SEED, "progress": False}
    call = functools.partial(sampler.sample, **what)
    for _ in range(2):
        call()
    prepared = time.perf_counter() - began
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 1.0 and len(seconds) < 9):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    plans, (_, h, w) = sampler.compiled, loops.sizes.shape
    assert plans is not None
    plan = plans.plan(n, h, w)
    return {
        "network": name,
        "n": n,
        "steps": steps,
        "seconds": vars(Timing.of(seconds)),
        "prepare_seconds": prepared,
        "one_pass": plan.step is not None,
        "model_itself": plan.module is not None,
        "plan": str(plan),
    }


# -- all of it ---------------------------------------------------------------------------------------------------------


def measure(findings: Findings) -> list[str]:
    """The proofs and the seconds, so that what is named first in the goals comes first."""
    sizes = TINY if findings.rehearsal else REAL
    loops = Loops(findings.device, sizes)
    if findings.rehearsal:
        findings.leave_out("graph launches, kernels, synchronisation: only a GPU has them")
    n, steps = sizes.profiled

    def profile(fused: bool, graphed: bool, n: int, steps: int) -> None:
        what = f"profile, {'fused' if fused else 'no plan'}, {'graph' if graphed else 'eager'}, n = {n}"
        findings.attempt(what, one_profile, findings, loops, fused, graphed, n, steps)

    for fused in (True, False):
        for graphed in (True, False):
            profile(fused, graphed, n, steps if graphed else sizes.eager)
            what = f"{'fused' if fused else 'no plan'}, {'graph' if graphed else 'eager'}"
            findings.attempt(f"{what}: PyTorch never waits in a step", strict, loops, fused, graphed)

    timed: list[dict[str, Any]] = []
    findings.say(
        f"{f'{sizes.timed_steps} steps':<24}{'n':>5}{'seconds':>10}{'20 %':>10}{'80 %':>10}{'goal on an H100':>17}"
    )

    def time_one(name: str, n: int) -> None:
        row = findings.attempt(f"seconds of {name}, n = {n}", duration, loops, name, n)
        if row is None:
            return
        timed.append(row)
        findings.add(seconds=timed)
        median, p20, p80 = (row["seconds"][key] for key in ("median", "p20", "p80"))
        goal = "" if findings.rehearsal else f"{GOALS[name, n]:>17.3f}"
        note = "  the model itself, no plan" if row["model_itself"] else ""
        findings.say(f"{name:<24}{n:>5}{median:>10.4f}{p20:>10.4f}{p80:>10.4f}{goal}{note}")

    bits: dict[str, dict[str, bool]] = {}

    def compare(what: str, part: Callable[..., dict[str, bool]], *arguments: Any) -> None:
        made = findings.attempt(what, part, loops, *arguments)
        if made is None:
            return
        bits[what] = made
        findings.add(same_bits=bits)
        for case, equal in made.items():
            if not equal:
                findings.fail(f"{what}: {case}: not so")
        findings.say(f"{what}: {sum(made.values())} of {len(made)} hold")

    first, *others = sizes.timed
    time_one(*first)
    compare("deterministic, fused", determinism, True)
    for name, n in others[:2]:
        time_one(name, n)
    profile(True, True, 1, steps)
    compare("graph against eager", replays)
    for name, n in others[2:]:
        time_one(name, n)
    compare("deterministic, no plan", determinism, False)
    found = findings.attempt("distances from float32", distances, loops)
    if found is not None:
        findings.add(distances={"n": CHUNK, "steps": sizes.distance, "relative_error": found})
        for line in far(found):
            findings.fail(line)
        for name, error in found.items():
            findings.say(f"{name:<34}{error:>10.2e} from float32 after {sizes.distance} steps")
    return []


def main(argv: list[str] | None = None) -> int:
    """Prove, measure, print; the exit code."""
    return run("loop", parser("loop", __doc__).parse_args(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
