"""A diffusers scheduler's config as a `Schedule`. Needs no diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..schedule import Schedule

# diffusers' names and ours; "exp" is an alpha transform that no scheduler of the DDPM family offers by name
NAMED: dict[str, Callable[..., Schedule]] = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "sigmoid": Schedule.sigmoid_betas,
}
OF_T: dict[str, Callable[..., Schedule]] = {"squaredcos_cap_v2": Schedule.cosine, "laplace": Schedule.laplace}


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The float64 schedule that a scheduler config means: its betas, zero-terminal-SNR rescale included.

    Missing entries have diffusers' defaults. Raises NotImplementedError, as diffusers does, for an unknown
    `beta_schedule`, and ValueError for values that make no schedule.
    """
    T = config.get("num_train_timesteps", 1000)
    name = config.get("beta_schedule", "linear")
    trained = config.get("trained_betas")
    if trained is not None:
        schedule = Schedule.from_betas(trained)
    elif name in NAMED:
        schedule = NAMED[name](T, config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
    elif name in OF_T:
        schedule = OF_T[name](T)
    else:
        known = ", ".join([*NAMED, *OF_T])
        raise NotImplementedError(f"beta_schedule must be one of {known} (or pass trained_betas), got {name!r}")
    return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr", False) else schedule
