"""One small network of each kind that a fused plan knows, with statistics and weights with which every layer shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpm_fast.nn import DDPMUNet, RMSNormUNet, UNet, rms_blocks


def unet(**sizes: Any) -> UNet:
    """The tutorial's network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(**{"width": 16, "depth": 2, "time_dim": 32, **sizes}).eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.2)
    return net


def ddpm_unet(**options: Any) -> DDPMUNet:
    """The paper's network, with norms that scale and shift."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DDPMUNet(**{**blocks, **sizes, **options}).eval()
        for part in net.modules():
            if isinstance(part, nn.GroupNorm):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.2)
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
                nn.init.normal_(part.bias, std=0.1)
    return net


def rms_unet(**options: Any) -> RMSNormUNet:
    """lucidrains' network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = RMSNormUNet(**{"dim": 16, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 16, **options}).eval()
        for part in net.modules():
            if isinstance(part, rms_blocks.RMSNorm):
                nn.init.uniform_(part.g, 0.5, 1.5)
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
    return net
