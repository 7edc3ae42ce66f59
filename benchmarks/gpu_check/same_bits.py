"""What of whole-loop sampling must not change an image: its company, a restart, a captured graph; and how far plans go.

Each function returns what was looked at by name: whether it holds, or how far it is from float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.sampling import graphs

from .clock import setting
from .subjects import SEED, Loops, without_graphs

CHUNK = 16
CLOSE, NO_FURTHER = 1e-4, 1.5
"""Of images after some steps: relative error of a float32 plan; times that of the bfloat16 network without a plan."""


def determinism(loops: Loops, fused: bool) -> dict[str, bool]:
    """What -> whether an image of deterministic=True has the bits that it has among `sizes.among`."""
    n, shape, steps = loops.sizes.among, loops.sizes.shape, loops.sizes.steps
    sampler = loops.sampler(loops.network(), fused=fused, deterministic=True, chunk=CHUNK, steps=steps)
    sample = functools.partial(sampler.sample, seed=SEED, progress=False)
    whole = sample(n, shape)
    same: dict[str, bool] = {"the same call again": torch.equal(sample(n, shape), whole)}
    picked = sorted({0, 5, CHUNK - 1, CHUNK, n - 1})
    for i in picked:
        same[f"image {i} alone"] = torch.equal(sample(1, shape, first_sample=i)[0], whole[i])
    at = picked[2]
    for before, after in ((3, 2), (at, 1)):
        few = sample(before + 1 + after, shape, first_sample=at - before)
        same[f"image {at} in place {before} of {len(few)}"] = torch.equal(few[before], whole[at])
    middle = next(step for step in sampler.stream(n, shape, seed=SEED) if step.row == steps // 2)
    same["restarted in the middle"] = torch.equal(sampler.sample(n, progress=False, **middle.state()), whole)
    state = middle.state() | {"x": middle.x[at : at + 1].clone(), "first_sample": at}
    same[f"image {at} alone from the middle"] = torch.equal(sampler.sample(1, progress=False, **state)[0], whole[at])
    return same


def replays(loops: Loops) -> dict[str, bool]:
    """What -> whether a captured graph gives the bits of eager steps: new seeds and labels, guidance, long strides."""
    n, shape, steps = CHUNK, loops.sizes.shape, loops.sizes.steps
    sampler = loops.sampler(loops.network(num_classes=10), steps=steps)
    eager, same = without_graphs(sampler), dict[str, bool]()
    for guidance in (1.0, 3.0):
        singly: Tensor | None = None
        for turn, (seed, first_label) in enumerate(((1, 0), (2, 3), (1, 0))):
            call: dict[str, Any] = {
                "seed": seed,
                "labels": [(first_label + i) % 10 for i in range(n)],
                "guidance": guidance,
            }
            got = sampler.sample(n, shape, progress=False, **call)
            expected = eager.sample(n, shape, progress=False, **call)
            same[f"guidance {guidance:g}, seed {seed}, turn {turn}: as eager"] = torch.equal(got, expected)
            if singly is None:  # the first run of a size replays graphs of one step, later ones graphs of several
                singly = got
            elif seed == 1:
                same[f"guidance {guidance:g}: {graphs.STRIDE} steps a graph as one"] = torch.equal(got, singly)
            else:
                same[f"guidance {guidance:g}: other seeds, other images"] = not torch.equal(got, singly)
    return same


def distances(loops: Loops) -> dict[str, float]:
    """Relative errors of the final images, x0 clipped, against float32 without a plan and without TF32."""
    n, shape, steps = CHUNK, loops.sizes.shape, loops.sizes.distance

    def images(fused: bool, dtype: torch.dtype, tf32: bool = False) -> Tensor:
        with (
            setting(torch.backends.cudnn, "allow_tf32", tf32),
            setting(torch.backends.cuda.matmul, "allow_tf32", False),
        ):
            sampler = loops.sampler(loops.network(), fused=fused, dtype=dtype, steps=steps, clip=1.0)
            result: Tensor = sampler.sample(n, shape, seed=SEED, progress=False)
        return result.double()

    expected = images(False, torch.float32)
    found = {
        "fused, float32": images(True, torch.float32),
        "fused, bfloat16": images(True, torch.bfloat16),
        "no plan, bfloat16": images(False, torch.bfloat16),
        "fused, float32, TF32 allowed": images(True, torch.float32, tf32=True),
        "no plan, float32, TF32 allowed": images(False, torch.float32, tf32=True),
    }
    return {name: float((got - expected).norm() / expected.norm()) for name, got in found.items()}


def far(found: dict[str, float]) -> list[str]:
    """What is further from float32 than it may be."""
    lines = []
    if not found["fused, float32"] <= CLOSE:
        lines.append(f"the float32 plan is {found['fused, float32']:.2g} from the network, more than {CLOSE:g}")
    ours, theirs = found["fused, bfloat16"], found["no plan, bfloat16"]
    if not ours <= NO_FURTHER * theirs:
        lines.append(f"the bfloat16 plan is {ours:.2g} from float32, the bfloat16 network {theirs:.2g}")
    return lines
