"""What a diffusers scheduler's config makes `Sampler` do. Needs no diffusers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

METHODS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmsolver++"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SPACINGS = ("leading", "trailing", "linspace")
# The log variants are the same numbers, formed through their logarithms.
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
# Of the multistep solver's options, what each must be.
SOLVER = {
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2),
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf, None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
}


def choices_of(config: Mapping[str, Any], source: object = "config", **overrides: Any) -> dict[str, Any]:
    """The config's choices as keyword arguments of `Sampler`, with `overrides` in place of its own.

    overrides: arguments of `Sampler`. `method` reads the config as the scheduler of that method would, as diffusers'
    `from_config` does with another scheduler's config; what contradicts an override is left out: clip and thresholding,
    and a spacing where the timesteps themselves are given. Missing entries have diffusers' defaults.
    Raises ValueError naming the scheduler or the entry that is not covered.
    """
    named = config.get("_class_name")
    if named not in METHODS:
        raise ValueError(f"{source} is the config of a {named}, which is not covered; covered are {', '.join(METHODS)}")
    method = overrides.get("method") or METHODS[named]
    chosen: dict[str, Any] = {
        "method": method,
        **_bound(config, method, overrides),
        **_spacing(config, source, method),
    }
    if "prediction" not in overrides:
        chosen["prediction"] = _known(config, source, "prediction_type", "epsilon", PREDICTIONS)
    if "variance" not in overrides:
        chosen |= _variance(config, source, method)
    if method == "ddim":
        chosen |= {"eta": 0.0, "rederive_eps": False}
        if not config.get("set_alpha_to_one", True):
            chosen["set_alpha_to_one"] = False
    elif method == "dpmsolver++":
        _check_solver(config, source)
        if config.get("solver_order", 2) == 1:
            chosen["solver_order"] = 1
    steps = overrides.get("steps")
    if "spacing" in overrides or not (steps is None or isinstance(steps, numbers.Integral)):
        chosen.pop("spacing")
        chosen.pop("steps_offset", None)
    return {**chosen, **overrides}


def _known(config: Mapping[str, Any], source: object, name: str, default: str, known: Mapping[str, str]) -> str:
    value = config.get(name, default)
    if value not in known:
        raise ValueError(f"{source}: {name} {value!r} is not covered; covered are {', '.join(known)}")
    return known[value]


def _variance(config: Mapping[str, Any], source: object, method: str) -> dict[str, Any]:
    """The variance, where it matters: in ddpm, and where its being learned means that the network returns it too."""
    named = config.get("variance_type", "fixed_small")
    if method != "ddpm":
        return {"variance": named} if named in ("learned", "learned_range") else {}
    if named == "learned":
        raise ValueError(
            f'{source}: variance_type "learned" means that the network gives the variance itself, which is not '
            'covered; for a network that gives its logarithm pass variance="learned"'
        )
    return {"variance": _known(config, source, "variance_type", "fixed_small", VARIANCES)}


def _bound(config: Mapping[str, Any], method: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """How x0 is bounded. Thresholding wins over clipping; the multistep solver does not clip."""
    if overrides.get("thresholding") or overrides.get("clip"):
        return {}
    if config.get("thresholding", False) and "thresholding" not in overrides:
        pair = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return {"thresholding": pair}
    clip = config.get("clip_sample", True) and method != "dpmsolver++"
    return {"clip": float(config.get("clip_sample_range", 1.0)) if clip else False}


def _spacing(config: Mapping[str, Any], source: object, method: str) -> dict[str, Any]:
    """The spacing; that solver's own lists leave out the last timestep."""
    solver = method == "dpmsolver++"
    spacing = config.get("timestep_spacing", "linspace" if solver else "leading")
    if spacing not in SPACINGS:
        raise ValueError(f"{source}: timestep_spacing {spacing!r} is not covered; covered are {', '.join(SPACINGS)}")
    offset = config.get("steps_offset", 0)
    chosen = {"spacing": f"{spacing}_open" if solver and spacing != "trailing" else spacing}
    return {**chosen, "steps_offset": offset} if spacing == "leading" and offset else chosen


def _check_solver(config: Mapping[str, Any], source: object) -> None:
    for name, known in SOLVER.items():
        if name in config and config[name] not in known:
            covered = " or ".join(repr(value) for value in known if value is not None)
            raise ValueError(f"{source}: {name} {config[name]!r} is not covered by dpmsolver++, only {covered}")
