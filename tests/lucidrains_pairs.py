"""A GaussianDiffusion of lucidrains' own package beside ours, over one small network, and their random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.interop import lucidrains as ours

SIDE = 8
CHANNELS = 3


def make_unet(package: Any, seed: int = 0, **options: Any) -> Any:
    """The package's own Unet, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2, "channels": CHANNELS, **options}
        return package.Unet(8, **options).eval()


def pair(package: Any, name: str = "GaussianDiffusion", **options: Any) -> tuple[Any, Any]:
    """(theirs, ours) over one and the same network. of_unet: options of the network."""
    net = make_unet(package, **options.pop("of_unet", {}))
    options = {"image_size": SIDE, "timesteps": 100, **options}
    theirs = class_of(package, name)(net, **options)
    return theirs, getattr(ours, name)(net, **options)


def class_of(package: Any, name: str) -> Any:
    """A class of the package, some of which only their own files know."""
    if hasattr(package, name):
        return getattr(package, name)
    import importlib

    files = {
        "LearnedGaussianDiffusion": "learned_gaussian_diffusion",
        "WeightedObjectiveGaussianDiffusion": "weighted_objective_gaussian_diffusion",
    }
    return getattr(importlib.import_module(f"denoising_diffusion_pytorch.{files[name]}"), name)


def seeded(function: Callable[[], Any], seed: int = 0) -> Any:
    """What it gives after torch's and Python's generators were seeded."""
    torch.manual_seed(seed)
    random.seed(seed)
    return function()


def images(n: int = 4, seed: int = 0, side: int = SIDE) -> Tensor:
    """float32 (n, 3, side, side) in [0, 1]."""
    return torch.rand(n, CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))


def normals(n: int = 4, seed: int = 1) -> Tensor:
    """float32 (n, 3, 8, 8), standard normal."""
    return torch.randn(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def gradients(diffusion: Any, loss: Tensor) -> list[Tensor]:
    """Of the loss by every weight."""
    return list(torch.autograd.grad(loss, [p for p in diffusion.model.parameters() if p.requires_grad]))


@contextlib.contextmanager
def plain_models() -> Iterator[None]:
    """One thread: networks this small spend their time waiting for each other's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
