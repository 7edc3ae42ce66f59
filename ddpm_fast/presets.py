"""like="...": what each peer's own sampler does, one row per peer.

An argument of `Sampler` that is None is taken from the preset named by `like=`, or from DEFAULT; an explicit one wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Preset:
    """One peer's choices; see `Schedule.step_table` and `Sampler` for what each one does.

    method: for all T steps. respaced_method: for fewer.
    prediction: what its networks are trained to give by default.
    variance, clip, eta, rederive_eps, spacing: as in `Schedule.step_table`.
    solver_clip, solver_spacing: clip (None: as clip) and spacing of a number of steps for method "dpmsolver++".
    time_scale: what the network is told as t: "index" (int64 t) or "rescaled" (float32 t * 1000 / T).
    output: the range its sampler returns, as in `Sampler.sample`.
    schedule, scale_betas: its default schedule, and whether its linear betas are multiplied by 1000 / T.
    schedules: its names of schedules that are not ours, or mean another one here, and the names that those have here.
    """

    method: str = "ddpm"
    respaced_method: str = "ddpm"
    prediction: str = "eps"
    variance: str = "fixed_large"
    clip: float | bool = False
    eta: float = 0.0
    rederive_eps: bool = True
    spacing: str = "trailing"
    solver_clip: float | bool | None = None
    solver_spacing: str = "linspace_open"
    time_scale: str = "index"
    output: str = "model"
    schedule: str = "linear"
    scale_betas: bool = False
    schedules: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def make_schedule(self, T: int = 1000, name: str | None = None, **options: Any) -> Schedule:
        """The peer's schedule of T timesteps: its default one, or another by name, with its scaling of linear betas.

        name: the peer's, or one of `Schedule.names()`. ValueError for any other.
        """
        chosen = self.schedules.get(name, name) if name else self.schedule
        if chosen not in Schedule.names():
            known = ", ".join(dict.fromkeys([*self.schedules, *Schedule.names()]))
            raise ValueError(f"schedule must be one of {known}, got {name!r}")
        if chosen == "linear":
            options.setdefault("scale_betas", self.scale_betas)
        return Schedule.named(chosen, T, **options)


DEFAULT = Preset()

PRESETS = MappingProxyType(
    {
        # The textbook loop (Ho et al. 2020, Algorithm 2), shown as images in [0, 1].
        "tutorial": Preset(output="unit"),
        # DDPMPipeline with DDPMScheduler() as it comes; for method="ddim" DDIMScheduler(), for "dpmsolver++"
        # DPMSolverMultistepScheduler(), which knows no clip.
        "diffusers": Preset(
            variance="fixed_small",
            clip=1.0,
            solver_clip=False,
            spacing="leading",
            rederive_eps=False,
            output="unit",
            schedules=MappingProxyType({"squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid_betas"}),
        ),
        # GaussianDiffusion(); it turns to DDIM when asked for fewer steps, and does not clamp what it returns.
        "lucidrains": Preset(
            respaced_method="ddim",
            prediction="v",
            variance="fixed_small",
            clip=1.0,
            spacing="trailing_floor",
            output="unit_unclamped",
            schedule="sigmoid_alphas_cumprod",
            scale_betas=True,
            schedules=MappingProxyType({"sigmoid": "sigmoid_alphas_cumprod"}),
        ),
        # improved-diffusion's defaults (rescale_timesteps is on there; guided-diffusion leaves it off).
        "openai": Preset(clip=1.0, spacing="sections", time_scale="rescaled", scale_betas=True),
    }
)


def preset(like: str | None) -> Preset:
    """The preset of that name, DEFAULT for None; ValueError listing the known ones otherwise."""
    if like is None:
        return DEFAULT
    if like not in PRESETS:
        raise ValueError(f"like must be one of {', '.join(PRESETS)}, got {like!r}")
    return PRESETS[like]
