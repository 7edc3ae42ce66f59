"""The baseline of the demo and of examples/tutorial.py: the tutorial's network and loop in plain eager PyTorch.

Nothing of ddpm_fast runs here; only the weights and the schedule's numbers are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(block: Any, x: Tensor, t_emb: Tensor) -> Tensor:
    h = F.silu(block.norm1(block.conv1(x)))
    h = h + block.time_mlp(t_emb)[:, :, None, None]
    return F.silu(block.norm2(block.conv2(h)))


def plain_unet(unet: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """The forward pass of a `ddpm_fast.UNet`, on its own layers, in plain torch.

    x (N, C, H, W), t (N,), labels (N,) if the network is class-conditional -> (N, C, H, W).
    """
    net: Any = unet
    half = net.time_dim // 2
    rate = math.log(10000) / (half - 1)
    angles = t[:, None].float() * torch.exp(torch.arange(half, device=t.device) * -rate)
    t_emb = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    if labels is not None:
        t_emb = t_emb + net.label_embedding(labels)
    levels = range(1, net.depth + 1)
    skips = []
    for i in levels:
        skips.append(_block(getattr(net, f"down{i}"), x, t_emb))
        x = F.max_pool2d(skips[-1], 2)
    x = _block(net.bottleneck, x, t_emb)
    for i in reversed(levels):
        x = torch.cat([getattr(net, f"up{i}")(x), skips.pop()], dim=1)
        x = _block(getattr(net, f"conv_up{i}"), x, t_emb)
    out: Tensor = net.output(x)
    return out


@torch.no_grad()
def textbook_loop(
    model: Callable[[Tensor, Tensor], Tensor],
    betas: npt.NDArray[np.float64],
    x_t: Tensor,
    noises: Iterable[Tensor],
) -> Tensor:
    """x <- (x - beta_t / sqrt(1 - ab_t) eps(x, t)) / sqrt(alpha_t) + sqrt(beta_t) z, t = T-1..0.

    Ho et al. 2020, algorithm 2, with sigma_t^2 = beta_t and nothing clipped.

    Args:
        model: (x, t) -> eps, x (N, C, H, W), t int64 (N,).
        betas: float64 [T].
        x_t: (N, C, H, W), where the loop starts.
        noises: z of the steps t = T-1..1, each like x_t; the last step adds none.
    """
    x, draws = x_t, iter(noises)
    beta = torch.tensor(betas, dtype=torch.float32, device=x.device)
    alpha = torch.tensor(1 - betas, dtype=torch.float32, device=x.device)
    alpha_bar = torch.tensor(np.cumprod(1 - betas), dtype=torch.float32, device=x.device)
    for i in reversed(range(len(betas))):
        t = torch.full((x.shape[0],), i, device=x.device, dtype=torch.long)
        eps = model(x, t)
        noise = next(draws) if i > 0 else torch.zeros_like(x)
        mean = (1 / torch.sqrt(alpha[i])) * (x - (beta[i] / torch.sqrt(1 - alpha_bar[i])) * eps)
        x = mean + torch.sqrt(beta[i]) * noise
    return x
