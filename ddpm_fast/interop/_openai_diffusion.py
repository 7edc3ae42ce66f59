"""OpenAI's `SpacedDiffusion`, its loops run by `Sampler`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import inference
from ..nn import DDPMUNet
from ..sampler import Sampler
from ..sampling.model import device_of, dtype_of
from ._openai_losses import Training
from ._openai_process import Fn, Kwargs, ModelMeanType, ModelVarType

Output = dict[str, Tensor]
Item = TypeVar("Item")

VARIANCES = {
    ModelVarType.FIXED_SMALL: "fixed_small",
    ModelVarType.FIXED_LARGE: "fixed_large",
    ModelVarType.LEARNED: "learned",
    ModelVarType.LEARNED_RANGE: "learned_range",
}


@dataclasses.dataclass(frozen=True)
class _Ask:
    """What a loop is asked for; eta None is DDPM."""

    model: Fn
    shape: Sequence[int]
    noise: Tensor | None
    clip_denoised: bool
    denoised_fn: Fn | None
    cond_fn: Fn | None
    model_kwargs: Kwargs
    device: torch.device | str | None
    progress: bool
    generator: torch.Generator | None
    eta: float | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.model_kwargs or {})

    @property
    def by_formula(self) -> bool:
        return self.denoised_fn is not None or self.cond_fn is not None


class SpacedDiffusion(Training):
    """OpenAI's diffusion class: constructor, tables, sampling loops and losses; see `Process` for its arguments.

    The loops are `Sampler`'s: no table leaves the device, the update is one fused pass, and a `UNetModel` or `DDPMUNet`
    runs as a fused plan where one covers it and `fused` is left True. Noise is ours, seeded from torch's generator; the
    further argument generator= draws it as OpenAI's code does, and so gives the same samples from the same state.
    With denoised_fn or cond_fn each step is done by formula, and its noise is always torch's.
    """

    fused = True
    _last: tuple[tuple[Any, ...], Sampler] | None = None

    def p_sample_loop(
        self,
        model: Fn,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        cond_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of that shape, (N, C, H, W), in the model's range.

        model: called model(x, t, **model_kwargs), as {"y": labels}. noise: x_T. device: default the model's.
        clip_denoised: the estimate of x0 is clipped to [-1, 1]; denoised_fn is applied to it before.
        cond_fn: (x, t, **model_kwargs) -> the gradient that guides (`condition_mean`).
        """
        given = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, generator)
        return self._final(_Ask(*given))

    def p_sample_loop_progressive(
        self,
        model: Fn,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        cond_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Output]:
        """The same step by step: {"sample", "pred_xstart"} after each, copies that are the caller's."""
        given = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, generator)
        return self._steps(_Ask(*given))

    def ddim_sample_loop(
        self,
        model: Fn,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        cond_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples by DDIM. cond_fn guides as in `condition_score`."""
        given = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, generator)
        return self._final(_Ask(*given, eta))

    def ddim_sample_loop_progressive(
        self,
        model: Fn,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        cond_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[Output]:
        """The same step by step."""
        given = (model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, generator)
        return self._steps(_Ask(*given, eta))

    def sampler(
        self, model: Fn, *, clip_denoised: bool = True, eta: float | None = None, device: Any = None
    ) -> Sampler:
        """The `Sampler` of this process: of DDPM steps, or with eta of DDIM steps. The last one made is kept."""
        network = isinstance(model, DDPMUNet)
        fused = self.fused and network and dtype_of(model) in inference.DTYPES
        key = (model, clip_denoised, eta, None if device is None else torch.device(device), fused)
        if self._last is not None and self._last[0][0] is model and self._last[0][1:] == key[1:]:
            return self._last[1]
        made = Sampler(
            model,
            self.schedule,
            like="openai",
            steps=self.timestep_map[::-1],
            method="ddpm" if eta is None else "ddim",
            eta=eta,
            prediction="eps" if self.model_mean_type is ModelMeanType.EPSILON else "x0",
            variance=VARIANCES[self.model_var_type],
            clip=1.0 if clip_denoised else False,
            time_scale="rescaled" if self.rescale_timesteps else "index",
            fused=fused,
            device=device,
            cuda_graph=None if network else False,  # a caller's own Python may decide things from step to step
        )
        self._last = (key, made) if network else None
        return made

    # -- how it is done ---------------------------------------------------------------------------------------------

    def _final(self, ask: _Ask) -> Tensor:
        n, *sizes = _sizes(ask.shape)
        if ask.by_formula:
            *_, last = self._by_formula(ask)
            return last["sample"]
        sampler, labels = self._asked(ask)
        options: dict[str, Any] = {"labels": labels, "x": ask.noise, "generator": ask.generator}
        images: Tensor = sampler.sample(n, sizes, output="model", progress=ask.progress, **options)
        return images

    def _steps(self, ask: _Ask) -> Iterator[Output]:
        n, *sizes = _sizes(ask.shape)
        if ask.by_formula:
            yield from self._by_formula(ask)
            return
        sampler, labels = self._asked(ask)
        steps = sampler.stream(n, sizes, labels=labels, x=ask.noise, generator=ask.generator)
        for step in _counted(steps, len(sampler), ask.progress):
            yield {"sample": step.x, "pred_xstart": step.x0}

    def _asked(self, ask: _Ask) -> tuple[Sampler, Any]:
        """The sampler, and the labels where it knows what they are; other keywords go to the model as they are."""
        model = ask.model
        device = device_of(model) if ask.device is None else ask.device
        if isinstance(model, DDPMUNet) and ask.kwargs.keys() <= {"y"}:
            return self.sampler(model, clip_denoised=ask.clip_denoised, eta=ask.eta, device=device), ask.kwargs.get("y")

        def told(x: Tensor, t: Tensor) -> Any:
            return model(x, t, **ask.kwargs)

        return self.sampler(told, clip_denoised=ask.clip_denoised, eta=ask.eta, device=device), None

    def _by_formula(self, ask: _Ask) -> Iterator[Output]:
        """Step by step, with functions of the caller's in between."""
        device = device_of(ask.model) if ask.device is None else ask.device
        x = torch.randn(*ask.shape, device=device, generator=ask.generator) if ask.noise is None else ask.noise
        for i in _counted(reversed(range(self.num_timesteps)), self.num_timesteps, ask.progress):
            t = torch.full((ask.shape[0],), i, device=x.device)
            given = (ask.model, x, t, ask.clip_denoised, ask.denoised_fn, ask.cond_fn, ask.model_kwargs)
            with torch.no_grad():
                if ask.eta is None:
                    out = self.p_sample(*given, generator=ask.generator)
                else:
                    out = self.ddim_sample(*given, ask.eta, generator=ask.generator)
            yield out
            x = out["sample"]

    def __getstate__(self) -> dict[str, Any]:
        # A sampler holds the model, plans of this machine and graphs of this device.
        return {**super().__getstate__(), "_last": None}


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or len(shape) < 2:
        raise TypeError(f"shape must be that of a batch, such as (16, 3, 64, 64), got {shape!r}")
    return tuple(shape)


def _counted(steps: Iterable[Item], total: int, progress: bool) -> Iterable[Item]:
    """With a bar where one is asked for."""
    if not progress:
        return steps
    from tqdm.auto import tqdm

    bar: Iterable[Item] = tqdm(steps, total=total)
    return bar
