"""lucidrains' denoising_diffusion_pytorch as it comes, as a candidate of its own network.

L32   GaussianDiffusion.sample, float32
L16   the same under autocast to bfloat16: cast itself, its Unet does not run
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from candidate import Candidate, Problem
from packages import Missing, lucidrains, package
from plain import LucidrainsUNet
from torch import Tensor


class Lucidrains(Candidate):
    """Its sampling loop from x_T to images: x0 clipped, the smaller variance, which cost what ours would.

    Of its progress bar only what shows it is turned off.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.id = {torch.float32: "L32", torch.bfloat16: "L16"}[dtype]
        cast = "" if dtype == torch.float32 else ", autocast to bfloat16"
        self.what = f"lucidrains GaussianDiffusion.sample, float32{cast}"
        self.flags = ""

    def prepare(self, problem: Problem) -> None:
        self.problem = problem
        home = lucidrains()
        network = problem.plain()
        if not isinstance(network, LucidrainsUNet):
            raise Missing("runs lucidrains' own Unet only")
        self.diffusion: Any = home.GaussianDiffusion(
            network.net,
            image_size=problem.case.shape[1:],
            timesteps=problem.T,
            objective="pred_noise",
            beta_schedule="linear",
        ).to(problem.device)
        self.module = package("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
        version = package("denoising_diffusion_pytorch.version").__version__
        self.flags = (
            f"denoising_diffusion_pytorch {version}, GaussianDiffusion(objective=pred_noise, beta_schedule=linear)"
            f".sample, its own Unet, NCHW, float32 state{'' if self.dtype == torch.float32 else f', {self.cast()}'}"
        )

    def cast(self) -> str:
        """Autocast in words."""
        return f"torch.autocast({self.problem.device.type}, {self.dtype})"

    def guard(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.problem.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def predict(self, t: int, x: Tensor | None = None) -> Tensor:
        x = self.problem.x if x is None else x
        with torch.inference_mode(), self.guard():
            m: Tensor = self.diffusion.model_predictions(x, torch.full(x.shape[:1], t, device=x.device)).pred_noise
        return m.float()

    def run(self, steps: int) -> None:
        self.diffusion.num_timesteps = steps  # its loop begins there: these are the last of all
        quiet = functools.partial(self.module.tqdm, disable=True)
        with mock.patch.object(self.module, "tqdm", quiet), self.guard():
            self.diffusion.sample(batch_size=self.problem.case.n)
