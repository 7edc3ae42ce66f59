"""Noise schedules: betas and everything that follows from them, in float64.

q(x_t | x0) = N(sqrt(alphas_cumprod[t]) x0, (1 - alphas_cumprod[t]) I), alphas_cumprod[t] = prod_{s<=t} (1 - betas[s]).
Timesteps run t = 0..T-1; t = 0 is one noising step, and "before 0" is the data.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .tables import betas as formulas
from .tables.betas import Float64
from .tables.steps import StepTable, build_step_table
from .tables.timesteps import Steps, timesteps_for


class Schedule:
    """An immutable noise schedule of T timesteps. Build one with a class method: `Schedule.linear(1000)`.

    All tables are read-only float64 NumPy arrays of length T. Two schedules are equal when their betas are.

    betas: in (0, 1]; 1 only at the last timestep (zero terminal SNR).
    alphas = 1 - betas; alphas_cumprod = cumulative product of alphas; alphas_cumprod_prev = the same, one t earlier.
    one_minus_alphas_cumprod: the variance of x_t given x0, summed up so that it keeps its digits near t = 0.
    sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: the factors of x0 and of eps in x_t.
    snr = alphas_cumprod / one_minus_alphas_cumprod.
    """

    __slots__ = (
        "_label",
        "_tables",
        "alphas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "one_minus_alphas_cumprod",
        "snr",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
    )

    betas: Float64
    alphas: Float64
    alphas_cumprod: Float64
    alphas_cumprod_prev: Float64
    one_minus_alphas_cumprod: Float64
    sqrt_alphas_cumprod: Float64
    sqrt_one_minus_alphas_cumprod: Float64
    snr: Float64
    _label: str
    _tables: dict[torch.device, torch.Tensor]

    def __init__(self, betas: npt.ArrayLike | torch.Tensor, *, label: str | None = None) -> None:
        """As `Schedule.from_betas`; `label` is what repr shows."""
        checked = formulas.checked_betas(betas)
        alphas = 1.0 - checked
        cumprod = np.cumprod(alphas)
        previous = np.concatenate([[1.0], cumprod[:-1]])
        if (previous == 0.0).any():
            t = int(np.argmax(cumprod == 0.0))
            raise ValueError(f"betas leave no signal at t = {t} already (alphas_cumprod underflows); use smaller betas")
        # (1 - ab_t) = (1 - ab_{t-1}) + ab_{t-1} beta_t: a sum of positive terms, where 1 - ab_t would cancel.
        noise = np.cumsum(previous * checked)
        if cumprod[-1] == 0.0:
            noise[-1] = 1.0  # where the signal is gone the noise is all there is, rounding aside
        tables = {
            "betas": checked,
            "alphas": alphas,
            "alphas_cumprod": cumprod,
            "alphas_cumprod_prev": previous,
            "one_minus_alphas_cumprod": noise,
            "sqrt_alphas_cumprod": np.sqrt(cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(noise),
            "snr": cumprod / noise,
        }
        for name, values in tables.items():
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        span = f"{len(checked)} betas, {checked[0]:.6g} to {checked[-1]:.6g}"
        object.__setattr__(self, "_label", label or f"Schedule.from_betas({span})")
        object.__setattr__(self, "_tables", {})

    # -- named schedules ------------------------------------------------------------------------------------------

    @classmethod
    def linear(
        cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, scale_betas: bool = False
    ) -> Schedule:
        """Betas equally spaced from beta_start to beta_end (Ho et al. 2020).

        scale_betas multiplies both ends by 1000 / T, as lucidrains' and OpenAI's code do, so that a schedule with
        another T destroys about as much signal; diffusers does not.
        """
        betas = formulas.linear(T, beta_start, beta_end, scale_betas)
        return cls._named("linear", betas, T, beta_start=beta_start, beta_end=beta_end, scale_betas=scale_betas)

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Square roots of beta equally spaced (diffusers "scaled_linear", "quad" in the DDPM code)."""
        betas = formulas.scaled_linear(T, beta_start, beta_end)
        return cls._named("scaled_linear", betas, T, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """alphas_cumprod at time u = cos^2((u + s)/(1 + s) pi/2), u in [0, 1] (Nichol and Dhariwal 2021, eq. 17)."""
        return cls._named("cosine", formulas.cosine(T, s, max_beta), T, s=s, max_beta=max_beta)

    @classmethod
    def sigmoid_alphas_cumprod(
        cls, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
    ) -> Schedule:
        """A falling sigmoid over alphas_cumprod (Jabri et al. 2022, arXiv 2212.11972; lucidrains "sigmoid").

        alphas_cumprod at time u = (g(end) - g(start + u (end - start))) / (g(end) - g(start)), g(y) = sigmoid(y / tau).
        """
        betas = formulas.sigmoid_alphas_cumprod(T, start, end, tau, max_beta)
        return cls._named("sigmoid_alphas_cumprod", betas, T, start=start, end=end, tau=tau, max_beta=max_beta)

    @classmethod
    def sigmoid_betas(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """A rising sigmoid over the betas, from -6 to 6 (GeoDiff; diffusers "sigmoid"): another schedule altogether."""
        betas = formulas.sigmoid_betas(T, beta_start, beta_end)
        return cls._named("sigmoid_betas", betas, T, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def exponential(cls, T: int = 1000, rate: float = 12.0, max_beta: float = 0.999) -> Schedule:
        """alphas_cumprod at time u = exp(-rate u), so every beta is the same (diffusers' "exp" transform)."""
        return cls._named("exponential", formulas.exponential(T, rate, max_beta), T, rate=rate, max_beta=max_beta)

    @classmethod
    def laplace(cls, T: int = 1000, max_beta: float = 0.999) -> Schedule:
        """Noise levels dense around log-SNR 0 (diffusers "laplace").

        alphas_cumprod at time u = sqrt(r / (1 + r)), log r = -sign(1/2 - u) log(1 - 2 |1/2 - u| + 1e-6) / 2.
        """
        return cls._named("laplace", formulas.laplace(T, max_beta), T, max_beta=max_beta)

    @classmethod
    def from_betas(cls, betas: npt.ArrayLike | torch.Tensor) -> Schedule:
        """A schedule of your own: any 1-D array, list or tensor of betas in (0, 1], 1 only in the last place."""
        return cls(betas)

    @classmethod
    def named(cls, name: str, T: int = 1000, **options: Any) -> Schedule:
        """The schedule of that name, one of `Schedule.names()`, with its options: `named("cosine", 100, s=0.01)`."""
        if name not in NAMES:
            hint = "; there are two sigmoids, over alphas_cumprod (lucidrains) and over betas (diffusers)"
            raise ValueError(
                f"schedule must be one of {', '.join(NAMES)}, got {name!r}{hint if name == 'sigmoid' else ''}"
            )
        maker: Callable[..., Schedule] = getattr(cls, name)
        return maker(T, **options)

    @classmethod
    def like(cls, peer: str, T: int = 1000, name: str | None = None, **options: Any) -> Schedule:
        """The schedule that a peer makes of T timesteps: `like("lucidrains", 1000)`, `like("openai", 100, "cosine")`.

        peer: "tutorial", "diffusers", "lucidrains" or "openai". name: None for the peer's own default, else one of its
            names ("squaredcos_cap_v2" and "sigmoid" mean what they mean there) or of ours. options: as in `named`.
        It differs from `named` in what a name means, and in whether linear betas are multiplied by 1000 / T.
        """
        from .presets import preset  # the table of the peers' choices makes schedules itself

        return preset(peer).make_schedule(T, name, **options)

    @staticmethod
    def names() -> tuple[str, ...]:
        """What `Schedule.named` knows."""
        return NAMES

    @classmethod
    def _named(cls, name: str, betas: Float64, T: int, **options: Any) -> Schedule:
        shown = "".join(f", {key}={value!r}" for key, value in options.items())
        return cls(betas, label=f"Schedule.{name}(T={T}{shown})")

    def rescale_zero_terminal_snr(self) -> Schedule:
        """A new schedule whose last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891, Algorithm 1).

        sqrt(alphas_cumprod) is shifted so that its last value is 0 and scaled so that its first is unchanged. The
        result cannot be sampled with eps prediction; use v or x0. Needs T >= 2.
        """
        betas = formulas.zero_terminal_snr(self.betas, self.sqrt_alphas_cumprod)
        return Schedule(betas, label=f"{self._label}.rescale_zero_terminal_snr()")

    # -- what it gives --------------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep holds no signal at all."""
        return bool(self.alphas_cumprod[-1] == 0.0)

    def noising_table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [T, 2] on `device`: the factors of x0 and of eps in x_t, for `q_sample` and `noise_mse`.

        One tensor per device is made and then shared: do not write to it.
        """
        key = torch.device(device)
        if key not in self._tables:
            both = np.stack([self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], axis=1)
            with torch.inference_mode(False):  # a shared table must stay usable in training
                self._tables[key] = torch.tensor(both, dtype=torch.float32, device=key)
        return self._tables[key]

    def timesteps(
        self, steps: Steps = None, spacing: str | None = None, *, steps_offset: int = 0
    ) -> npt.NDArray[np.int64]:
        """The timesteps of a reverse process, highest first; see `step_table` for the arguments."""
        return timesteps_for(self.num_timesteps, steps, spacing, steps_offset)

    def step_table(
        self,
        steps: Steps = None,
        *,
        spacing: str | None = None,
        steps_offset: int = 0,
        method: str = "ddpm",
        prediction: str = "eps",
        variance: str = "fixed_large",
        eta: float = 0.0,
        clip: float | bool | None = None,
        thresholding: bool = False,
        rederive_eps: bool = True,
        set_alpha_to_one: bool = True,
        solver_order: int = 2,
    ) -> StepTable:
        """The float32 [steps, 8] table of coefficients that `ddpm_fast.ops.ddpm_step` reads, one row per reverse step.

        steps: None (all T), how many, a strictly descending list of timesteps, or section counts "10,10,20", "ddim50".
        spacing: "trailing" (default), "leading", "linspace", "trailing_floor", "linspace_open" (the default of method
            "dpmsolver++" for a number of steps), "leading_open", "explicit", or "sections", which reads an int or a
            list in `steps` as section counts.
        steps_offset: added to the timesteps of spacing "leading" and "leading_open".
        method: "ddpm"; "ddim"; or "dpmsolver++" (2M, midpoint), whose first and last row are of first order.
        eta (ddim): 0 deterministic, 1 as noisy as ddpm with fixed_small.
        set_alpha_to_one (ddim): the last row arrives at the data, or, if False, at alphas_cumprod[0].
        solver_order (dpmsolver++): 2, or 1, which is ddim.
        prediction: what the network gives, "eps", "x0" or "v".
        variance (ddpm): "fixed_small" beta (1-P)/(1-A) or "fixed_large" beta, where beta = 1 - A/P spans the stride;
            "learned" (the network gives the log variance) or "learned_range" (it gives v, see `logvar_range`).
        clip: bound on |x0|; True is 1, None or False is none. thresholding: x0 is bounded per sample at run time.
        rederive_eps (ddim with clip or thresholding): eps is derived anew from the bounded x0, or left as predicted.
        No noise is added in a row that arrives at the data. Raises ValueError or TypeError naming the argument.
        """
        if spacing is None and method == "dpmsolver++" and isinstance(steps, numbers.Integral):
            spacing = "linspace_open"
        return build_step_table(
            self,
            self.timesteps(steps, spacing, steps_offset=steps_offset),
            method=method,
            prediction=prediction,
            variance=variance,
            eta=eta,
            clip=clip,
            thresholding=thresholding,
            rederive_eps=rederive_eps,
            set_alpha_to_one=set_alpha_to_one,
            solver_order=solver_order,
        )

    # -- value semantics ------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Schedule is immutable; cannot set {name}, make a new one with from_betas")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Schedule is immutable; cannot delete {name}")

    def __reduce__(self) -> tuple[Callable[..., Schedule], tuple[Float64, str]]:
        return _restore, (self.betas, self._label)

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return self._label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and np.array_equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash(self.betas.tobytes())


NAMES = (
    "linear",
    "scaled_linear",
    "cosine",
    "sigmoid_alphas_cumprod",
    "sigmoid_betas",
    "exponential",
    "laplace",
)


def _restore(betas: Float64, label: str) -> Schedule:
    return Schedule(betas, label=label)
