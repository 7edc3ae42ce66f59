"""What the tests of the drop-in schedulers share: pairs of ours and diffusers', and what their numbers are held to."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ddpm_fast.interop import diffusers as ours

PAIRS = {"ddpm": (diffusers.DDPMScheduler, ours.DDPMScheduler), "ddim": (diffusers.DDIMScheduler, ours.DDIMScheduler)}

# diffusers forms 1 - alphas_cumprod and beta = 1 - A/P from float32 tables, which leaves them up to 1.7e-4 and 4.9e-4
# off (relatively, near t = 0); on x of size 1 that moved no result by more than 1.4e-4.
FLOAT32_TABLES = 2e-4

UNIT = 2.0**-24  # half an ulp of 1, in float32


def pair(kind: str, steps: int | None = None, **config: Any) -> tuple[Any, Any]:
    """diffusers' scheduler and ours of the same arguments, with `steps` set."""
    theirs, mine = (cls(**config) for cls in PAIRS[kind])
    if steps is not None:
        theirs.set_timesteps(steps)
        mine.set_timesteps(steps)
    return theirs, mine


def images(n: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """A model output and a sample of size 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, 6, 6)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


def in_float64(theirs: Any, mine: Any) -> Any:
    """diffusers' scheduler with its tables made anew in float64: its own formulas, freed of its rounding."""
    schedule = mine._schedule()
    theirs.betas = torch.from_numpy(schedule.betas.copy())
    theirs.alphas = 1.0 - theirs.betas
    theirs.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(theirs, "final_alpha_cumprod"):
        last = theirs.alphas_cumprod[0] if not theirs.config.set_alpha_to_one else theirs.one
        theirs.final_alpha_cumprod = last
    return theirs


def close(mine: Tensor, theirs: Tensor, bound: float | Tensor = FLOAT32_TABLES) -> None:
    """Within `bound` for values of size 1, and relatively above."""
    assert mine.dtype == theirs.dtype
    assert mine.shape == theirs.shape
    error = (mine.double() - theirs.double()).abs()
    allowed = bound * theirs.double().abs().clamp(min=1.0)
    assert torch.isfinite(mine).all()
    assert (error <= allowed).all(), f"{error.max():.3g} off"
