"""What `RMSNormUNet` is told to be, checked before anything is built."""

from __future__ import annotations

import math
from typing import Any

FLAGS = ("self_condition", "learned_variance", "learned_sinusoidal_cond", "random_fourier_features", "flash_attn")


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `RMSNormUNet` with its defaults filled in: a tuple with one entry per stage for each of
    full_attn, attn_heads and attn_dim_head, init_dim and out_dim as numbers.

    ValueError or TypeError naming the one that cannot be served.
    """
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    for name in ("dim", "channels", "learned_sinusoidal_dim"):
        _count(name, config[name])
    for name in FLAGS:
        if not isinstance(config[name], bool):
            raise TypeError(f"{name} must be True or False, got {config[name]!r}")
    for name in ("sinusoidal_pos_emb_theta", "dropout"):
        if isinstance(config[name], bool) or not isinstance(config[name], (int, float)):
            raise TypeError(f"{name} must be a number, got {config[name]!r}")
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"dropout must be a probability below 1, got {config['dropout']}")
    theta = config["sinusoidal_pos_emb_theta"]
    if not 0 < theta < math.inf:
        raise ValueError(f"sinusoidal_pos_emb_theta must be positive and finite, got {theta}")
    _time(config)
    stages = _stages(config["dim_mults"])
    if config["init_dim"] is None:
        config["init_dim"] = config["dim"]
    if config["out_dim"] is None:
        config["out_dim"] = config["channels"] * (2 if config["learned_variance"] else 1)
    for name in ("init_dim", "out_dim"):
        _count(name, config[name])
    for name in ("attn_heads", "attn_dim_head"):
        config[name] = _per_stage(name, config[name], stages)
        for stage, value in enumerate(config[name]):
            _count(f"{name}[{stage}]", value)
    full = config["full_attn"] or (*(False,) * (stages - 1), True)
    config["full_attn"] = _per_stage("full_attn", full, stages)
    for stage, value in enumerate(config["full_attn"]):
        if not isinstance(value, bool):
            raise TypeError(f"full_attn[{stage}] must be True or False, got {value!r}")
    return config


def _time(config: dict[str, Any]) -> None:
    """Both kinds of features come in pairs of a sine and a cosine."""
    if config["learned_sinusoidal_cond"] or config["random_fourier_features"]:
        if config["learned_sinusoidal_dim"] % 2:
            raise ValueError(f"learned_sinusoidal_dim must be even, got {config['learned_sinusoidal_dim']}")
    elif config["dim"] % 2 or config["dim"] < 4:
        raise ValueError(
            f"dim must be even and at least 4, for it is the number of sines and cosines of the time, got "
            f"{config['dim']}; learned_sinusoidal_cond=True takes any"
        )


def _stages(mults: Any) -> int:
    if not isinstance(mults, tuple) or not mults:
        raise ValueError(f"dim_mults must be a list or tuple with one entry per stage, at least one, got {mults!r}")
    for stage, value in enumerate(mults):
        _count(f"dim_mults[{stage}]", value)
    return len(mults)


def _per_stage(name: str, value: Any, stages: int) -> tuple[Any, ...]:
    """One value for all stages as a tuple, a tuple as it is."""
    values = value if isinstance(value, tuple) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} must be one value or one per stage, {stages} as dim_mults has, got {len(values)}")
    return values


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
