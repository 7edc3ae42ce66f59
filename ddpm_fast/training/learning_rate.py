"""The learning rate as a function of how many images have been seen, and of nothing else."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine")


def factor(images_seen: int, *, images: int, warmup: int = 0, schedule: str = "constant") -> float:
    """What the learning rate of the step that begins after `images_seen` images is multiplied by, in [0, 1].

    During `warmup` images it rises linearly, (images_seen + 1) / warmup. Then it stays 1, or falls along half a cosine
    from 1 to 0 at `images`: (1 + cos(pi u)) / 2, u = (images_seen - warmup) / (images - warmup).
    """
    if images_seen < warmup:
        return (images_seen + 1) / warmup
    if schedule == "constant" or images <= warmup:
        return 1.0
    u = min(1.0, (images_seen - warmup) / (images - warmup))
    return 0.5 * (1 + math.cos(math.pi * u))
