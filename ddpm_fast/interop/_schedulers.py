"""diffusers' DDPMScheduler and DDIMScheduler with their arithmetic done by the fused ops.

Configuration, timesteps, saving, loading and output classes are diffusers' own, inherited; what computes (`step`,
`add_noise`, `get_velocity`) is ours, from float64 tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers import scheduling_ddim as ddim
from diffusers.schedulers import scheduling_ddpm as ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..noise import make_rng
from ..schedule import Schedule
from ..tables.timesteps import Timesteps
from ._scheduler_noise import noised
from ._scheduler_output import maker
from ._scheduler_rows import Rows, Timeline, as_index
from ._scheduler_step import any_step, is_plain, plain_step
from ._schedules import schedule_of
from ._signature import signature_of

Generators = torch.Generator | list[torch.Generator] | None
Pair = tuple[Tensor | None, Tensor | None]
_ddpm_output = maker(ddpm.DDPMSchedulerOutput, "prev_sample", "pred_original_sample")
_ddim_output = maker(ddim.DDIMSchedulerOutput, "prev_sample", "pred_original_sample")


class _Fused:
    """What the two schedulers share; mixed in before diffusers' class.

    compat: compute as diffusers does, bit for bit, by its own functions.
    seed: the noise of image i at timestep t is a function of (seed, first_sample + i, t), i counting in the batch, and
        not of a generator, which must then be None.
    first_sample: with seed, the global index of the batch's first image; set it before a later batch.
    compat and seed are no part of the config: `from_config` and `from_pretrained` take them as keywords.
    """

    ignore_for_config = ["compat", "seed"]  # noqa: RUF012  as diffusers declares it
    timesteps: Tensor
    alphas_cumprod: Tensor
    num_inference_steps: int | None
    config: Any

    # -- construction ---------------------------------------------------------------------------------------------

    def _choose(self, compat: bool, seed: int | None) -> None:
        if not isinstance(compat, bool):
            raise TypeError(f"compat must be True or False, got {compat!r}")
        if seed is not None:
            make_rng(seed)  # says what a seed is
            if compat:
                raise ValueError("compat=True draws diffusers' noise and takes no seed; pass one of them")
        self.compat, self.seed, self.first_sample = compat, seed, 0
        # Pipelines save the name of the module that an object gives: theirs, so that their folder needs no ddpm_fast.
        self.__module__ = "diffusers"
        self._made = self.alphas_cumprod
        self._float64: tuple[Tensor, Schedule] | None = None
        self._rng: tuple[Any, Tensor] | None = None
        self._line: Timeline | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers', and takes compat= and seed=."""
        ours = {name: kwargs.pop(name) for name in cls.ignore_for_config if name in kwargs}
        made = super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]
        scheduler = made[0] if return_unused_kwargs else made
        scheduler._choose(**{"compat": False, "seed": None, **ours})
        return made

    def __getstate__(self) -> dict[str, Any]:
        # Addresses of tensors mean nothing in a copy.
        return {**self.__dict__, "_line": None, "_rng": None}

    # -- what the steps need --------------------------------------------------------------------------------------

    def _schedule(self) -> Schedule:
        """In float64: the config's, or that of `alphas_cumprod` where a caller has put other values there."""
        values = self.alphas_cumprod
        if self._float64 is None or self._float64[0] is not values:
            if values is self._made or torch.equal(values.cpu(), self._made.cpu()):
                schedule = schedule_of(self.config)
            else:
                cumprod = values.double().cpu().numpy()
                schedule = Schedule.from_betas(1.0 - cumprod / np.concatenate([[1.0], cumprod[:-1]]))
            self._float64 = values, schedule
        return self._float64[1]

    def _timeline(self) -> Timeline:
        state = self.__dict__  # past ConfigMixin.__getattr__, which makes every attribute slower
        line: Timeline | None = state["_line"]
        if line is None or not line.serves(state):
            before, line = line, Timeline(state, *self._steps(len(self._schedule())))
            if before is not None and line.same_steps(before):
                line.rows = before.rows  # a pipeline's next call sets the same timesteps again
            self._line = line
        return line

    def _steps(self, T: int) -> tuple[Timesteps, Timesteps]:
        """Timesteps that the steps leave, and those at which they arrive (-1: the data)."""
        raise NotImplementedError

    def _without_ghost(self) -> None:
        """Drops the timestep -1 that rounding adds to some trailing lists, one more than were asked for."""
        steps = self.num_inference_steps
        spaced = self.config.timestep_spacing == "trailing" and not getattr(self, "custom_timesteps", False)
        if not self.compat and spaced and steps is not None and len(self.timesteps) > steps:
            self.timesteps = self.timesteps[:steps].clone()

    def _drawn(self, m: Tensor, generator: Generators, plain: bool = False) -> Pair:
        """The noise of a step, float32 and contiguous if `plain` and else like m, and None; or None and the rng."""
        if self.seed is None:
            if plain and (generator is None or (type(generator) is torch.Generator and generator.device == m.device)):
                return torch.empty_like(m).normal_(generator=generator), None  # what randn does, in less time
            return randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype), None
        if generator is not None:
            raise ValueError(
                "generator must be None, because this scheduler was made with a seed, which keys its noise; "
                "make one without seed= to draw from a generator"
            )
        key = self.seed, self.first_sample, m.device
        if self._rng is None or self._rng[0] != key:
            self._rng = key, make_rng(*key)
        return None, self._rng[1]

    def _advance(
        self,
        rows: Rows,
        row: int,
        m: Tensor,
        x: Tensor,
        generator: Generators,
        noisy: bool,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x0) of one step; noisy: noise is drawn, or `noise` taken."""
        if rows.bad and row in rows.bad:
            kind, why = rows.bad[row]
            raise kind(why)
        if noise is None and is_plain(rows, m, x):
            z, rng = self._drawn(m, generator, plain=True) if noisy else (None, None)
            return plain_step(rows.on(x.device), row, m, x, z, rng)

        def draw(m: Tensor) -> Pair:
            return (noise, None) if noise is not None else self._drawn(m, generator)

        return any_step(rows, row, m, x, draw if noisy else None)

    # -- the forward process --------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, coefficients in float32 whatever the dtype; see diffusers'."""
        if self.compat:
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc,no-any-return]
        return noised(self._schedule(), original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(ab_t) noise - sqrt(1 - ab_t) x0, coefficients in float32 whatever the dtype; see diffusers'."""
        if self.compat:
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc,no-any-return]
        return noised(self._schedule(), sample, noise, timesteps, velocity=True)


class DDPMScheduler(_Fused, ddpm.DDPMScheduler):
    """diffusers' DDPMScheduler with a fused, float64-tabled step; `compat` and `seed` as keywords (see README).

    Differences from diffusers' numbers, all corrections: tables from float64 betas; `add_noise` and `get_velocity` in
    half precision; variance_type "fixed_large_log" (the same as "fixed_large"); no timestep -1 in trailing lists.
    `compat=True` gives diffusers' numbers.
    """

    @signature_of(ddpm.DDPMScheduler, compat=False, seed=None)
    def __init__(self, *args: Any, compat: bool = False, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._choose(compat, seed)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        self._without_ghost()

    def _steps(self, T: int) -> tuple[Timesteps, Timesteps]:
        if self.custom_timesteps or self.num_inference_steps:
            here = np.array(self.timesteps.tolist(), dtype=np.int64)
            return here, np.append(here[1:], -1)
        here = np.arange(T - 1, -1, -1, dtype=np.int64)
        return here, here - 1

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> ddpm.DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step (DDPM eq. 7), as diffusers'; both results are new tensors.

        Raises IndexError for a timestep that is not in the list, ValueError for one whose coefficients are not finite
        and for a generator beside a seed, TypeError where a learned variance is missing.
        """
        if self.compat:
            return super().step(model_output, timestep, sample, generator, return_dict)
        line = self._timeline()
        rows = line.rows.get(None)
        if rows is None:
            rows = line.rows[None] = Rows(
                self._schedule(), self.config, line.here, line.there, method="ddpm", variance_type=self.variance_type
            )
        row = line.find(timestep)
        if row < 0:
            listed = ", ".join(map(str, line.listed[:3])) + (" ..." if len(line.listed) > 3 else "")
            raise IndexError(
                f"timestep {as_index(timestep)} is not one of this scheduler's {len(line.listed)} timesteps "
                f"({listed}); pass one of scheduler.timesteps, or give your own list to set_timesteps(timesteps=...)"
            )
        prev_sample, x0 = self._advance(rows, row, model_output, sample, generator, line.listed[row] > 0)
        if not return_dict:
            return prev_sample, x0
        return _ddpm_output(prev_sample, x0)


class DDIMScheduler(_Fused, ddim.DDIMScheduler):
    """diffusers' DDIMScheduler with a fused, float64-tabled step; `compat` and `seed` as keywords (see README).

    Differences from diffusers' numbers, all corrections: tables from float64 betas; `add_noise` and `get_velocity` in
    half precision; with timestep_spacing "linspace" and "trailing" a step arrives at the next timestep of the list, and
    the last one at the data; no timestep -1 in trailing lists. `compat=True` gives diffusers' numbers.
    """

    @signature_of(ddim.DDIMScheduler, compat=False, seed=None)
    def __init__(self, *args: Any, compat: bool = False, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._choose(compat, seed)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As diffusers'."""
        super().set_timesteps(num_inference_steps, device)
        self._without_ghost()

    def _stride(self) -> int:
        assert self.num_inference_steps is not None
        return int(self.config.num_train_timesteps // self.num_inference_steps)

    def _steps(self, T: int) -> tuple[Timesteps, Timesteps]:
        here = np.array(self.timesteps.tolist(), dtype=np.int64)
        there = here - self._stride() if self.config.timestep_spacing == "leading" else np.append(here[1:], -1)
        return here, self._arriving(there)

    def _arriving(self, there: Timesteps) -> Timesteps:
        """Beyond the last timestep: the data, or with set_alpha_to_one=False timestep 0."""
        return np.where(there >= 0, there, -1 if self.config.set_alpha_to_one else 0)

    def _rows(self, line: Timeline, eta: float, rederive: bool, listed: bool) -> Rows:
        """The rows of the timeline, or, for timesteps that are not listed, of all timesteps with the plain stride."""
        key = eta, rederive, listed
        if key not in line.rows:
            schedule = self._schedule()
            every = np.arange(len(schedule), dtype=np.int64)
            ends = (line.here, line.there) if listed else (every, self._arriving(every - self._stride()))
            line.rows[key] = Rows(schedule, self.config, *ends, method="ddim", eta=eta, rederive_eps=rederive)
        return line.rows[key]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> ddim.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One reverse step (DDIM eq. 12), as diffusers'; both results are new tensors.

        A timestep that is not in the list steps down by num_train_timesteps // num_inference_steps. Raises ValueError
        before `set_timesteps`, for both generator and variance_noise, for eta too large, and IndexError for a timestep
        outside the schedule.
        """
        if self.compat:
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call scheduler.set_timesteps(...) before scheduler.step")
        line = self._timeline()
        row = line.find(timestep)
        # The noise of a negative eta is never drawn, and its square is what counts.
        rows = self._rows(line, abs(float(eta)), bool(use_clipped_model_output), row >= 0)
        if row < 0:
            row = as_index(timestep)
            if not 0 <= row < len(rows.timesteps):
                raise IndexError(f"timestep {row} is outside the schedule, which has 0..{len(rows.timesteps) - 1}")
        noisy = eta > 0
        if noisy and variance_noise is not None and generator is not None:
            raise ValueError("pass generator or variance_noise, not both")
        prev_sample, x0 = self._advance(rows, row, model_output, sample, generator, noisy, variance_noise)
        if not return_dict:
            return prev_sample, x0
        return _ddim_output(prev_sample, x0)
