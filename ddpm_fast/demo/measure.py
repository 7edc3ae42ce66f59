"""What the demo measures: quality against bars, and seconds against the textbook loop."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import metrics, noise, ops
from ..nn import UNet
from ..sampler import Sampler
from ..schedule import Schedule
from ..viz import to_uint8
from .textbook import plain_unet, textbook_loop

RECOGNISED_AT_LEAST = 0.95
ENERGY_RATIO_AT_MOST = 1.5

# What the table compares with the eager loop.
OURS: dict[str, dict[str, Any]] = {
    "Sampler": {},
    "Sampler, fused=True": {"fused": True},
    "Sampler, fused=True, bfloat16": {"fused": True, "dtype": torch.bfloat16},
}


def energy(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Distances of samples to the real images, both (N, C, H, W), clamped to [-1, 1]."""
    samples, real = samples.cpu().clamp(-1, 1), real.cpu()
    return {
        "energy_ratio": metrics.energy_ratio(samples, real),
        "nearest_real_distance": metrics.nearest_distance(samples, real),
        "nearest_real_distance_of_real": metrics.nearest_distance(real, real),
    }


def verdicts(quality: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """Prints the quality beside its bars and returns which bars were missed."""
    recognised, ratio = quality["recognised"], quality["energy_ratio"]
    say(
        f"recognised: {100 * recognised:.1f} % of {quality['guided_samples']} samples (guidance "
        f"{quality['guidance']:g}; {quality['method']}) are read by the SVM as the digit asked "
        f"for; at least {100 * RECOGNISED_AT_LEAST:g} % wanted"
    )
    say(
        f"energy distance: {quality['unguided_samples']} unguided samples to the real digits, "
        f"{ratio:.2f} times that of as many real digits to the rest; at most "
        f"{ENERGY_RATIO_AT_MOST:g} wanted (nearest real digit at "
        f"{quality['nearest_real_distance']:.2f}, of the real ones among themselves "
        f"{quality['nearest_real_distance_of_real']:.2f})"
    )
    missed = []
    # Written so that NaN misses.
    if not recognised >= RECOGNISED_AT_LEAST:
        missed.append(f"recognised {100 * recognised:.1f} %")
    if not ratio <= ENERGY_RATIO_AT_MOST:
        missed.append(f"energy distance {ratio:.2f} times")
    return missed


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def compare_speed(
    net: UNet,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    n: int = 10,
    seed: int,
    first_sample: int = 0,
    seconds: float = math.inf,
    bar: Any = None,
    pairs: int = 3,
    ways: Mapping[str, Mapping[str, Any]] = OURS,
) -> dict[str, Any]:
    """n images, of one class after the other, by the eager textbook loop and by Sampler in some ways, in turns.

    All use the same weights, all T steps, no clipping, no guidance and the same noise. The eager
    loop finds its noise ready in memory; Sampler draws its own, inside the time measured. A short
    run of each goes first, untimed; with `fused` it is the one that makes the plan.

    Args:
        net: in eval mode; shape: (C, H, W) of its images.
        n, seed, first_sample: which images.
        seconds: no further round is begun after so many seconds; one is always made.
        bar: a tqdm bar of 100 percent, or None.
        pairs: at most so many rounds.
        ways: name: the options of a `Sampler`.

    Returns:
        images, steps, and rows: name, seconds of each round, speed-up over the eager loop (medians),
        max_abs_difference of the images, clamped to [-1, 1], from the eager loop's, and pixels_that_differ of them all
        (`pixels`), as uint8.

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 image to compare, got {n}")
    device = net.device
    labels = None if net.num_classes is None else torch.arange(n, device=device) % net.num_classes
    draw = functools.partial(ops.normal, n, shape, seed=seed, first_sample=first_sample, device=device)
    x_t = draw(stream=noise.STREAM_X_T)
    noises = [draw(stream=1 + t) for t in range(schedule.num_timesteps - 1, 0, -1)]
    model = functools.partial(plain_unet, net, labels=labels)
    loops: dict[str, Callable[[int], Tensor]] = {
        "eager textbook loop": lambda rows: textbook_loop(model, schedule.betas[:rows], x_t, noises)
    }
    for name, options in ways.items():
        sampler = Sampler(net, schedule, **options)
        loops[name] = functools.partial(_last_rows, sampler, labels, x_t, seed=seed, first_sample=first_sample)

    short = min(20, schedule.num_timesteps - 1)
    for loop in loops.values():
        loop(short)
    times: dict[str, list[float]] = {name: [] for name in loops}
    difference, pixels = dict.fromkeys(loops, 0.0), dict.fromkeys(loops, 0)
    rounds = 0
    while rounds < pairs and (not rounds or sum(map(sum, times.values())) < seconds):
        expected = torch.empty(0)
        for name, loop in loops.items():
            elapsed, images = _timed(functools.partial(loop, schedule.num_timesteps), device)
            times[name].append(elapsed)
            images = images.clamp(-1, 1)
            expected = images if not expected.numel() else expected
            difference[name] = max(difference[name], float((images - expected).abs().max()))
            pixels[name] = max(pixels[name], int((to_uint8(images) != to_uint8(expected)).sum()))
            if bar is not None:
                bar.update(100 / len(loops) / pairs)
        rounds += 1
    eager = statistics.median(next(iter(times.values())))
    rows = [
        {
            "name": name,
            "seconds": spent,
            "speed_up": eager / statistics.median(spent),
            "max_abs_difference": difference[name],
            "pixels_that_differ": pixels[name],
        }
        for name, spent in times.items()
    ]
    return {"images": n, "steps": schedule.num_timesteps, "pixels": x_t.numel(), "rows": rows}


def _last_rows(
    sampler: Sampler, labels: Tensor | None, x_t: Tensor, rows: int, *, seed: int, first_sample: int
) -> Tensor:
    """The last `rows` steps from x_t, or the whole run from the seed."""
    start = len(sampler) - rows
    images: Tensor = sampler.sample(
        len(x_t),
        tuple(x_t.shape[1:]),
        seed=seed,
        first_sample=first_sample,
        labels=labels,
        x=x_t if start else None,
        start=start,
        output="model",
        progress=False,
    )
    return images
