"""Small `UNet2DModel` configs that between them use every option `DDPMUNet` covers, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
}

ATTENTION_FIRST = {
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paper_sinusoids": {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "fourier": {"time_embedding_type": "fourier"},
    "learned_times": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "time_dim": {"time_embedding_dim": 24},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_mid_norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "mid_norm_groups": {"attn_norm_num_groups": 8},
    "mid_scale": {"mid_block_scale_factor": 1.5},
    "mid_without_attention": {"add_attention": False},
    "no_mid": {"mid_block_type": None},
    "classes": {"num_class_embeds": 5},
    "class_times": {"class_embed_type": "timestep"},
    "class_vectors": {"class_embed_type": "identity"},
    "class_fourier": {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
    "asymmetric": {"downsample_padding": 0},
    "resnet_down": {**ATTENTION_FIRST, "downsample_type": "resnet"},
    "resnet_up": {"upsample_type": "resnet"},
    "resnet_both": {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "resnet_everywhere": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    },
    "resnet_beside_attention": {
        "block_out_channels": (8, 12, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "one_head": {"attention_head_dim": None},
    "head_remainder": {"attention_head_dim": 5},  # 16 channels: 3 heads of 5
    "attention_first": ATTENTION_FIRST,
    "three_layers": {"layers_per_block": 3},
    "three_levels": {
        "block_out_channels": (8, 12, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "one_level": {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
    "odd_channels": {"block_out_channels": (9, 15), "norm_num_groups": 3, "in_channels": 1, "out_channels": 3},
    "mish": {"act_fn": "mish"},
    "gelu": {"act_fn": "gelu"},
    "relu": {"act_fn": "relu"},
    "swish": {"act_fn": "swish"},
    "centered": {"center_input_sample": True},
    "sides": {"sample_size": (8, 16)},
    "no_size": {"sample_size": None},
    "first_names": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
    "dropout": {"dropout": 0.3},
}


def config_of(name: str) -> dict[str, Any]:
    """The small config with that option."""
    return {**SMALL, **OPTIONS[name]}


def inputs_of(config: dict[str, Any], n: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, t, labels) for a network of that config, fp32; t >= 1, for the Fourier features of t = 0 are not finite."""
    g = torch.Generator().manual_seed(seed)
    side = config["sample_size"] or 8
    sides = (side, side) if isinstance(side, int) else tuple(side)
    x = torch.randn(n, config["in_channels"], *sides, generator=g)
    t = torch.randint(1, 1000, (n,), generator=g)
    kind, labels = config.get("class_embed_type"), None
    if kind == "timestep":
        labels = torch.randint(1, 1000, (n,), generator=g)
    elif kind == "identity":
        labels = torch.randn(n, config.get("time_embedding_dim") or 4 * config["block_out_channels"][0], generator=g)
    elif config.get("num_class_embeds"):
        labels = torch.randint(0, config["num_class_embeds"], (n,), generator=g)
    return x, t, labels
