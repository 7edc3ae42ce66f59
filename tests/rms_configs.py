"""Small configs of lucidrains' `Unet` that between them use every option, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL: dict[str, Any] = {"dim": 16, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "four stages": {"dim_mults": (1, 2, 4, 8)},
    "one stage": {"dim_mults": (2,)},
    "three equal stages": {"dim_mults": (1, 1, 1)},
    "self condition": {"self_condition": True},
    "learned variance": {"learned_variance": True, "channels": 1},
    "both": {"self_condition": True, "learned_variance": True},
    "out dim": {"out_dim": 8, "init_dim": 12},
    "heads per stage": {"attn_heads": (2, 3), "attn_dim_head": (16, 4)},
    "head of four": {"attn_dim_head": 4, "attn_heads": 4},
    "all full": {"full_attn": True},
    "no full": {"full_attn": (False, False)},
    "full first": {"full_attn": (True, False), "flash_attn": True},
    "learned sinusoids": {"learned_sinusoidal_cond": True},
    "random fourier": {"random_fourier_features": True, "learned_sinusoidal_dim": 6, "dim": 15},
    "theta": {"sinusoidal_pos_emb_theta": 100, "dim": 20},
    "dropout": {"dropout": 0.3},
}

SIZES = {"four stages": (16, 8), "three equal stages": (8, 12), "plain": (32, 32)}


def config_of(name: str) -> dict[str, Any]:
    """The small config with that option."""
    return {**SMALL, **OPTIONS[name]}


def inputs_of(name: str, n: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, t, x_self_cond or None) for that config, float32."""
    g = torch.Generator().manual_seed(seed)
    config = config_of(name)
    x = torch.randn(n, config.get("channels", 3), *SIZES.get(name, (8, 8)), generator=g)
    t = torch.randint(0, 1000, (n,), generator=g)
    return x, t, torch.randn(x.shape, generator=g) if config.get("self_condition") else None
