"""Sampling as lucidrains' GaussianDiffusion offers it, run by `ddpm_fast.Sampler`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import inference, ops
from ..noise import STREAM_TRAIN_NOISE
from ..sampler import Sampler
from ..sampling.generator import Generators, drawing
from ..sampling.inputs import seed_of, whole
from ..sampling.model import dtype_of
from ..sampling.progress import Progress
from ..tables.steps import COLUMNS
from ._lucidrains_loops import by_hand
from ._lucidrains_process import Process
from ._lucidrains_schedule import OBJECTIVES, ddim_times

KEPT_SAMPLERS = 4
# What a step is made of: a subclass with one of its own is sampled through it, call by call.
PARTS = (
    "p_sample",
    "p_mean_variance",
    "model_predictions",
    "q_posterior",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
)

Choices = dict[str, Any]


class Sampling(Process):
    """`sample` and its kin. Images come out as `unnormalize` makes them: [0, 1], not clamped, or the model's range.

    seed, first_sample: as in `Sampler.sample`: image i is a function of (seed, first_sample + i). None draws a seed
        from torch's generator, so that torch.manual_seed governs it.
    generator: a torch.Generator (or one per image) that draws all noise, in the order of the package: with
        `torch.default_generator` after torch.manual_seed the images are the package's.
    """

    channels: int
    image_size: tuple[int, int]
    sampling_timesteps: int
    is_ddim_sampling: bool
    ddim_sampling_eta: float
    _samplers: OrderedDict[tuple[Any, ...], Sampler]

    def __getstate__(self) -> dict[str, Any]:
        # Samplers hold buffers, graphs and plans of this very model.
        return {**super().__getstate__(), "_samplers": OrderedDict()}

    # -- the sampler --------------------------------------------------------------------------------------------------

    def sampler(self, **overrides: Any) -> Sampler:
        """The `ddpm_fast.Sampler` that `sample` uses, for its streams, seeds, resuming and outputs.

        overrides: any argument of `Sampler`, such as dtype=torch.bfloat16, steps=50, method="dpmsolver++",
            deterministic=True, fused=False. fused is True by default: a network without a fused plan runs as it is.
        The same arguments give the same sampler, until the model or the schedule is another. Its samples are in [0, 1],
        not clamped, unless output= says otherwise; with auto_normalize=False output="model" is the model's range.
        """
        return self._sampler(self.is_ddim_sampling, **overrides)

    def _sampler(self, ddim: bool, **overrides: Any) -> Sampler:
        model, choices = self._sampled()
        choices = {
            "like": "lucidrains",
            "shape": (self.channels, *self.image_size),
            "self_condition": self.self_condition,
            "fused": (overrides.get("dtype") or dtype_of(model)) in inference.DTYPES,
            **choices,
        }
        if ddim:
            choices["steps"] = ddim_times(self.num_timesteps, self.sampling_timesteps)
            if overrides.get("method") in (None, "ddim"):
                choices |= {"method": "ddim", "eta": float(self.ddim_sampling_eta)}
        choices |= overrides
        schedule = self.schedule
        key = model, schedule, repr(sorted(choices.items()))
        if key not in self._samplers:
            self._samplers[key] = Sampler(model, schedule, **choices)
        self._samplers.move_to_end(key)
        while len(self._samplers) > KEPT_SAMPLERS:
            self._samplers.popitem(last=False)
        return self._samplers[key]

    def _sampled(self) -> tuple[Any, Choices]:
        """The network that the sampler calls, and the choices that go with it."""
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        # The package passes the condition by position: a network of one's own may call it anything.
        by_position = self.self_condition and not inference.knows(self.model)
        return self._told if by_position else self.model, {"prediction": OBJECTIVES[self.objective]}

    def _told(self, x: Tensor, t: Tensor, x_self_cond: Tensor) -> Tensor:
        return self._call(x, t, x_self_cond)

    # -- images -------------------------------------------------------------------------------------------------------

    def sample(
        self,
        batch_size: int = 16,
        return_all_timesteps: bool = False,
        *,
        seed: int | None = None,
        first_sample: int = 0,
        generator: Generators | None = None,
    ) -> Tensor:
        """float32 (B, C, H, W), or (B, steps + 1, C, H, W) from x_T on; DDIM if sampling_timesteps < timesteps."""
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        shape = (batch_size, self.channels, *self.image_size)
        # Only what was given: a subclass may have a loop with the package's arguments alone.
        ours = {"seed": seed, "first_sample": first_sample or None, "generator": generator}
        given: Choices = {name: value for name, value in ours.items() if value is not None}
        return loop(shape, return_all_timesteps=return_all_timesteps, **given)

    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | None = None,
        first_sample: int = 0,
        generator: Generators | None = None,
    ) -> Tensor:
        """DDPM over all T steps, as in `sample`. shape: (B, C, H, W)."""
        return self._run(False, shape, return_all_timesteps, seed, first_sample, generator)

    def ddim_sample(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | None = None,
        first_sample: int = 0,
        generator: Generators | None = None,
    ) -> Tensor:
        """DDIM over sampling_timesteps steps with ddim_sampling_eta, as in `sample`. shape: (B, C, H, W)."""
        return self._run(True, shape, return_all_timesteps, seed, first_sample, generator)

    def interpolate(
        self,
        x1: Tensor,
        x2: Tensor,
        t: int | None = None,
        lam: float = 0.5,
        *,
        seed: int | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Images between x1 and x2 (DDPM, section 4.3): both noised to t, mixed as (1 - lam) and lam, denoised from t.

        x1, x2: (B, C, H, W) as `forward` takes them; the result is as `sample` gives it. t: 0..T-1, default T - 1.
        """
        t = self.num_timesteps - 1 if t is None else whole("t", t, 0, self.num_timesteps - 1)
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        self._check_altered(seed, 0, generator)
        n, *sizes = x1.shape
        noise: Callable[[int, int], Tensor] | None = None
        if generator is None:
            seed = seed_of(seed)
            z = ops.normal(2 * n, sizes, seed=seed, stream=STREAM_TRAIN_NOISE, device=x1.device)
            z1, z2 = z.chunk(2) if n else (z, z)
        else:
            draw = drawing(generator, n, tuple(sizes), torch.float32, x1.device)
            z1, z2, noise, seed = draw(), draw(), lambda row, t: draw(), 0
        with torch.no_grad():
            times = torch.full((n,), t, device=x1.device)
            one, two = (self.q_sample(self.normalize(x), times, z) for x, z in ((x1, z1), (x2, z2)))
            x = (1 - lam) * one + lam * two
        if self._altered():
            return self.unnormalize(by_hand(self, x, list(range(t, -1, -1)))[-1])
        start = self.num_timesteps - 1 - t
        told = torch.zeros_like(x) if self.self_condition and start else None
        arguments: dict[str, Any] = {
            "x": x,
            "start": start,
            "x0_prev": told,
            "seed": seed,
            "noise": noise,
            "output": "model",
        }
        return self.unnormalize(self._sampler(False).sample(n, sizes, **arguments))

    def _run(
        self,
        ddim: bool,
        shape: Sequence[int],
        every: bool,
        seed: int | None,
        first_sample: int,
        generator: Generators | None,
    ) -> Tensor:
        n, *sizes = shape
        if self._check_altered(seed, first_sample, generator):
            times = ddim_times(self.num_timesteps, self.sampling_timesteps) if ddim else None
            images = by_hand(self, torch.randn(tuple(shape), device=self.device), times, ddim)
            return self.unnormalize(torch.stack(images, dim=1) if every else images[-1])
        sampler = self._sampler(ddim)
        arguments: dict[str, Any] = {"seed": seed, "first_sample": first_sample}
        draw = None
        if generator is not None:
            if seed is not None or first_sample:
                raise ValueError("generator draws all noise: it excludes seed and first_sample; pass it alone")
            draw = drawing(generator, n, tuple(sizes), torch.float32, self.device)
            noise = draw  # bound here: the function below must not see draw as optional
            # A seed, though none is used: the sampler would draw one, from what may be this very generator.
            arguments = {"x": draw(), "noise": lambda row, t: noise(), "seed": 0}
        elif every:
            seed = seed_of(seed)
            x = ops.normal(n, sizes, seed=seed, first_sample=first_sample, device=self.device)
            arguments = {"x": x, "seed": seed, "first_sample": first_sample}
        if every:
            images = [arguments["x"]]
            with Progress(len(sampler), None, lambda: None) as bar:
                for step in sampler.stream(n, sizes, **arguments):
                    images.append(step.x)
                    bar.advance()
            result = torch.stack(images, dim=1)
        else:
            result = sampler.sample(n, sizes, output="model", **arguments)
        if draw is not None:
            self._draw_the_unused(sampler, draw)
        return self.unnormalize(result)

    @staticmethod
    def _draw_the_unused(sampler: Sampler, draw: Callable[[], Tensor]) -> None:
        """The package draws noise in every step but the last, used or not; then the next images are its own too."""
        used = sampler.choices.steps.coefficients[:-1, COLUMNS.index("s")] != 0.0
        for _ in range(int((~used).sum())):
            draw()

    # -- subclasses ---------------------------------------------------------------------------------------------------

    def _altered(self, parts: Sequence[str] = PARTS) -> bool:
        """Whether one of these, by default what a step is made of, is not ours: only calling it does what it does."""
        return any(getattr(self, part).__module__.split(".")[0] != "ddpm_fast" for part in parts)

    def _check_altered(self, seed: int | None, first_sample: int, generator: Generators | None) -> bool:
        altered = self._altered()
        if altered and (seed is not None or first_sample or generator is not None):
            raise ValueError(
                f"{type(self).__name__} has steps of its own, whose noise is torch's: leave out seed, first_sample and "
                "generator, and call torch.manual_seed before"
            )
        return altered
