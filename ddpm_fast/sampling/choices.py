"""From `Sampler`'s arguments, most of them None, to what will be done."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from ..presets import preset
from ..schedule import Schedule
from ..tables.steps import LEARNED, StepTable, check_choice
from ..tables.timesteps import Steps
from .inputs import thresholding_of

TIME_SCALES = ("index", "rescaled")


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Every choice made: explicit argument, else the preset's, else the default. See `Sampler` for the meaning."""

    method: str
    prediction: str
    variance: str
    eta: float
    clip: float | bool
    thresholding: tuple[float, float] | None
    rederive_eps: bool
    set_alpha_to_one: bool
    solver_order: int
    time_scale: str
    output: str
    steps: StepTable

    @property
    def twice_the_channels(self) -> bool:
        """Whether the network returns a variance too, as as many channels again."""
        return self.variance in LEARNED

    def __str__(self) -> str:
        shown: dict[str, Any] = {"steps": len(self.steps), "method": self.method, "prediction": self.prediction}
        if self.method == "ddpm" or self.twice_the_channels:
            shown["variance"] = self.variance
        if self.method != "ddpm":
            shown |= {"eta": self.eta} if self.method == "ddim" else {"solver_order": self.solver_order}
        if not self.set_alpha_to_one:
            shown["set_alpha_to_one"] = False
        shown |= {"thresholding": self.thresholding} if self.thresholding else {"clip": self.clip}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items())


def choose(
    schedule: Schedule,
    *,
    like: str | None,
    steps: Steps,
    spacing: str | None,
    steps_offset: int,
    method: str | None,
    eta: float | None,
    prediction: str | None,
    variance: str | None,
    clip: float | bool | None,
    thresholding: bool | float | tuple[float, float] | None,
    rederive_eps: bool | None,
    set_alpha_to_one: bool,
    solver_order: int,
    time_scale: str | None,
) -> Choices:
    """Resolve every None; ValueError or TypeError for choices that are unknown or contradict each other."""
    peer = preset(like)
    if spacing is None and (steps is None or isinstance(steps, numbers.Integral)):
        spacing = peer.solver_spacing if method == "dpmsolver++" and steps is not None else peer.spacing
    timesteps = schedule.timesteps(steps, spacing, steps_offset=steps_offset)
    if method is None:
        method = peer.respaced_method if len(timesteps) < schedule.num_timesteps else peer.method
    if eta and method == "ddpm":
        raise ValueError(f'eta={eta} belongs to method="ddim"; method="ddpm" has variance= instead')
    peers_clip = peer.solver_clip if method == "dpmsolver++" and peer.solver_clip is not None else peer.clip
    dynamic = thresholding_of(thresholding)
    if dynamic and clip:
        raise ValueError(f"clip={clip} and thresholding={thresholding} exclude each other; pass one of them")
    time_scale = peer.time_scale if time_scale is None else time_scale
    check_choice("time_scale", time_scale, TIME_SCALES)
    chosen: dict[str, Any] = {
        "method": method,
        "prediction": peer.prediction if prediction is None else prediction,
        "variance": peer.variance if variance is None else variance,
        "eta": peer.eta if eta is None else eta,
        "clip": False if dynamic else peers_clip if clip is None else clip,
        "rederive_eps": peer.rederive_eps if rederive_eps is None else rederive_eps,
        "set_alpha_to_one": set_alpha_to_one,
        "solver_order": solver_order,
    }
    table = schedule.step_table(timesteps.tolist(), thresholding=dynamic is not None, **chosen)
    return Choices(thresholding=dynamic, time_scale=time_scale, output=peer.output, steps=table, **chosen)
