"""A case of the sampling benchmark: every candidate built, checked against float64, timed in turns with the others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from baselines import Eager16, Eager32, Graph16
from candidate import Candidate, Case, Problem, check
from inductor import Compiled
from lucidrains import Lucidrains
from machine import progress
from ours import Ours
from packages import Missing
from peers import Diffusers, OpenVINO
from results import LUCIDRAINS, PAPER, TUTORIAL, best_baseline, finite, ours, speed, speed_up
from timing import Timing, interleaved_rounds, step_rounds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast import ops
from ddpm_fast.noise import make_rng

CANDIDATES: dict[str, Callable[[], Candidate]] = {
    "F16": lambda: Ours(torch.bfloat16, fused=True),
    "F32": lambda: Ours(torch.float32, fused=True),
    "S16": lambda: Ours(torch.bfloat16, fused=False),
    "S32": lambda: Ours(torch.float32, fused=False),
    "E32": Eager32,
    "E16": Eager16,
    "G16": Graph16,
    "C16": Compiled,
    "C32": lambda: Compiled(torch.float32),
    "OV16": OpenVINO,
    "OV16t": lambda: OpenVINO(time_inside=True),
    "OV32": lambda: OpenVINO(torch.float32),
    "D32": Diffusers,
    "D16": lambda: Diffusers(torch.bfloat16),
    "L32": Lucidrains,
    "L16": lambda: Lucidrains(torch.bfloat16),
}
MOST = {"cpu": 200, "cuda": 1000}  # steps in a turn
ON_CPU = ("F16", "F32", "S16", "E32", "E16", "C16", "OV16", "D32")
ON_GPU = ("F16", "F32", "S16", "E32", "E16", "G16", "C16", "D32", "D16")
FOR_VARIANTS = ("F16", "E16", "G16", "C16", "OV16")
# A step of the paper's network is ten times as long. Without E32, which D32 is, too; in large batches on a CPU only
# what a target names or what may be the best.
PAPER_ON_CPU = ("F16", "F32", "S16", "E16", "C16", "OV16", "D32", "D16")
PAPER_IN_LARGE = ("F16", "C16", "OV16", "D32", "D16")
PAPER_QUICK = ("F16", "E16", "OV16", "D32", "D16")
LUCIDRAINS_ON_CPU = ("F16", "F32", "S16", "E32", "E16", "C16", "OV16", "L32", "L16")
LUCIDRAINS_ON_GPU = ("F16", "F32", "S16", "E32", "E16", "G16", "C16", "L32", "L16")
LUCIDRAINS_IN_LARGE = ("F16", "C16", "OV16", "L32", "L16")
LUCIDRAINS_QUICK = ("F16", "E16", "OV16", "L32", "L16")


def tutorial(n: int) -> Case:
    """The tutorial's network at its own size."""
    return Case(TUTORIAL, n)


def paper(n: int) -> Case:
    """The network of google/ddpm-cifar10-32, which baselines run as diffusers' own UNet2DModel."""
    return Case(PAPER, n, network=PAPER)


def lucidrains(n: int) -> Case:
    """The network of denoising_diffusion_pytorch's first example, dim 64, which baselines run as its own Unet."""
    return Case(LUCIDRAINS, n, network="lucidrains")


def for_paper(n: int, device: torch.device, *, quick: bool = False) -> tuple[str, ...]:
    """The candidates that run by default at this batch of the paper's network."""
    if device.type == "cuda":
        return ON_GPU
    return PAPER_QUICK if quick else PAPER_ON_CPU if n <= 16 else PAPER_IN_LARGE


def for_lucidrains(n: int, device: torch.device, *, quick: bool = False) -> tuple[str, ...]:
    """The candidates that run by default at this batch of lucidrains' network."""
    if device.type == "cuda":
        return LUCIDRAINS_ON_GPU
    return LUCIDRAINS_QUICK if quick else LUCIDRAINS_ON_CPU if n <= 16 else LUCIDRAINS_IN_LARGE


def variants(n: int) -> list[Case]:
    """The same at other widths, depths, sizes and with labels: a plan must not win at one shape only."""
    return [
        *(Case(f"width {width}", n, options={"width": width}) for width in (32, 48, 96)),
        Case("depth 3", n, options={"depth": 3}),
        Case("1 channel", n, (1, 32, 32)),
        Case("3x16x16", n, (3, 16, 16)),
        Case("3x48x32", n, (3, 48, 32)),
        Case("10 classes", n, options={"num_classes": 10}),
    ]


def run_case(
    case: Case, device: torch.device, names: Sequence[str], *, budget: float = 3.0, turn: float = 0.3
) -> dict[str, Any]:
    """Build, check and time the named candidates; the case as a result file has it."""
    problem = Problem(case, device)
    records: list[dict[str, Any]] = []
    running: dict[str, Candidate] = {}
    for name in names:
        candidate = CANDIDATES[name]()
        progress(f"{case.name}, n = {case.n}: building {candidate.id}")
        record = prepare(candidate, problem)
        records.append(record)
        if record["status"] in ("ok", "inaccurate"):
            running[name] = candidate
    progress(f"{case.name}, n = {case.n}: timing {', '.join(running)}")
    timed = {name: candidate.seconds for name, candidate in running.items()}
    # A whole run in a turn, where it is as short as on a GPU: beginning and end then weigh as they do for a user.
    rounds = step_rounds(timed, budget=budget, turn=turn, most_steps=MOST[device.type]) if running else {}
    layers = ""
    for record in records:
        record["rounds_s"] = rounds.get(record["id"], [])
        made = running.get(record["id"])
        if isinstance(made, Ours):
            record["fixed_s"] = dataclasses.asdict(Timing.of(made.fixed))
            layers = layers or made.layers()
    return {
        **dataclasses.asdict(case),
        "shape": list(case.shape),
        "macs": multiply_adds(problem),
        "parameters": sum(p.numel() for p in problem.unet.parameters()),
        "candidates": records,
        "update_s": dataclasses.asdict(update_time(problem)),
        "layers": layers,
    }


def prepare(candidate: Candidate, problem: Problem) -> dict[str, Any]:
    """Build one candidate and check it; its record, without times."""
    began = time.perf_counter()
    error, status, reason = float("nan"), "missing", ""
    try:
        candidate.prepare(problem)
        built = time.perf_counter() - began
        error, status = check(candidate, problem)
        if status == "wrong":
            reason = f"relative error {error:.2g} against float64"
    except Missing as missing:
        built, reason = 0.0, str(missing)
    except Exception as failure:  # one candidate that fails must not take the others' figures with it
        built, reason = 0.0, f"failed: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        progress(f"  {candidate.id} {reason}")
    return {
        "id": candidate.id,
        "what": candidate.what,
        "flags": candidate.flags,
        "dtype": str(candidate.dtype).removeprefix("torch."),
        "notes": candidate.notes,
        "status": status,
        "reason": reason,
        "error": finite(error),
        "prepare_s": round(built, 3),
    }


def multiply_adds(problem: Problem) -> int:
    """Of one image and one step of the network, counted by torch, which does not know of every fused attention."""
    counter = FlopCounterMode(display=False)
    labels = None if problem.labels is None else problem.labels[:1]
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        problem.unet(problem.x[:1], torch.zeros(1, device=problem.device), labels)
    return int(counter.get_total_flops()) // 2


def update_time(problem: Problem) -> Timing:
    """Seconds of the reverse update alone, `ops.ddpm_step` with its noise: what of a step is not the network."""
    x, m = problem.x.clone(), torch.zeros_like(problem.x)
    t_of_row, row, rng = problem.t_of_row.int(), problem.rows[500:501], make_rng(0, 0, problem.device)
    with torch.inference_mode():
        rounds = interleaved_rounds(
            {"update": lambda: ops.ddpm_step(x, m, problem.table, t_of_row, row, rng)}, problem.device, budget=0.2
        )
    return Timing.of(rounds["update"])


def lines(case: dict[str, Any]) -> list[str]:
    """The case as a table for a terminal. A candidate whose check failed has a reason in place of a speed."""
    fast = ours(case)
    found = [
        f"{case['name']}, n = {case['n']}; a step, median of paired rounds (20 to 80 % of them); error: of m, relative"
    ]
    found.append(
        f"  {'':<6}{'ms/step':>9}{'(20 - 80 %)':>20}{'ms/image':>10}{'built in s':>11}{'error':>9}{'  against ours':<}"
    )
    for record in case["candidates"]:
        if not record["rounds_s"]:
            found.append(f"  {record['id']:<6}{record['status']}: {record['reason']}")
            continue
        time_, factor = speed(record), speed_up(case, record["id"], fast)
        spread = f"({time_.p20 * 1e3:.2f} - {time_.p80 * 1e3:.2f})"
        text = f"  {record['id']:<6}{time_.median * 1e3:>9.2f}{spread:>20}{time_.median * 1e3 / case['n']:>10.3f}"
        text += f"{record['prepare_s']:>11.1f}{record['error']:>9.1e}"
        if factor is not None and record["id"] != fast:
            text += f"  {factor.median:.2f}x ({factor.p20:.2f} - {factor.p80:.2f})"
        found.append(text + ("  INACCURATE" if record["status"] == "inaccurate" else ""))
    best = best_baseline(case)
    if fast is not None and best is not None:
        factor = speed_up(case, best, fast)
        assert factor is not None
        found.append(f"  {fast} against the best baseline, {best}: {factor.median:.2f}x")
    return found
