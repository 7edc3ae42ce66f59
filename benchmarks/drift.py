"""How far whole runs drift from float32: the same seed, the same noise, final images compared.

x0 is clipped to [-1, 1] in every step, as diffusers does by default, so the images stay images whatever the network.
Every candidate's network goes through `ddpm_fast.Sampler`, which gives all of them the same noise; nothing differs but
the network's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from candidate import Candidate, Case, Problem
from machine import progress
from ours import Ours
from packages import Missing
from sampler import CANDIDATES
from torch import Tensor

from ddpm_fast import Sampler

SEED = 7


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]; infinity where they are equal."""
    error = float((images.double() - reference.double()).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


def final_images(candidate: Candidate, problem: Problem, steps: int | None) -> Tensor:
    """What the candidate's network makes of the seed in `steps` reverse steps (None: all T)."""
    options: dict[str, Any] = {"steps": steps, "clip": 1.0}
    if isinstance(candidate, Ours):
        sampler = Sampler(
            candidate.sampler.model, problem.schedule, fused=candidate.fused, dtype=candidate.dtype, **options
        )
    else:

        def predict(x: Tensor, t: Tensor) -> Tensor:  # a baseline has its labels already
            with torch.inference_mode(False):  # compiled ones are made for ordinary tensors
                return candidate.predict(int(t[0]), x.clone())

        sampler = Sampler(predict, problem.schedule, device=problem.device, **options)
    labels = problem.labels if isinstance(candidate, Ours) else None
    images: Tensor = sampler.sample(problem.case.n, problem.case.shape, seed=SEED, labels=labels, progress=False)
    return images.cpu()


def run_drift(case: Case, device: torch.device, names: Sequence[str], steps: int | None = None) -> dict[str, Any]:
    """PSNR and largest difference of each candidate's final images against float32 without a plan (S32)."""
    problem = Problem(case, device)
    progress(f"drift, n = {case.n}: S32, the reference")
    reference = CANDIDATES["S32"]()
    reference.prepare(problem)
    expected = final_images(reference, problem, steps)
    rows = []
    for name in names:
        candidate = CANDIDATES[name]()
        progress(f"drift, n = {case.n}: {name}")
        row: dict[str, Any] = {"id": name, "what": candidate.what, "psnr_db": None, "max_abs": None, "reason": ""}
        try:
            candidate.prepare(problem)
            images = final_images(candidate, problem, steps)
            quality = psnr(images, expected)
            # None in a result file: not measured, or equal in every bit, which the largest difference tells apart.
            row |= {"psnr_db": quality if math.isfinite(quality) else None}
            row |= {"max_abs": float((images - expected).abs().max())}
        except (Missing, RuntimeError) as error:  # RuntimeError: a value stopped being finite
            row["reason"] = str(error).splitlines()[0]
        rows.append(row)
    count = problem.T if steps is None else steps
    return {"case": case.name, "n": case.n, "steps": count, "seed": SEED, "clip": 1.0, "reference": "S32", "rows": rows}


def lines(drift: dict[str, Any]) -> list[str]:
    """The drift as a table for a terminal."""
    found = [
        f"drift from {drift['reference']} (float32): {drift['n']} final images, {drift['steps']} steps, the same noise",
        f"  {'':<6}{'PSNR dB':>9}{'largest difference':>20}",
    ]
    for row in drift["rows"]:
        if row["max_abs"] is None:
            found.append(f"  {row['id']:<6}{row['reason']}")
        else:
            quality = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
            found.append(f"  {row['id']:<6}{quality:>9}{row['max_abs']:>20.2e}")
    return found
