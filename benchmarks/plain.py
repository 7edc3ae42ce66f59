"""The tutorial U-Net in plain PyTorch, which the baselines run, and test networks with statistics like trained ones.

Nothing of ddpm_fast's ops runs in a baseline; only the weights are shared.
"""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ddpm_fast
from ddpm_fast import UNet

Network = TypeVar("Network", bound=nn.Module)


def cast(network: Network, dtype: torch.dtype) -> Network:
    """The network itself in another dtype; half precision is channels_last, which convolutions want then."""
    network.to(dtype)
    return network if dtype == torch.float32 else network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class PlainUNet(nn.Module):
    """The layers of a `ddpm_fast.UNet` with a forward pass of torch functions only.

    x (N, C, H, W) in the dtype of the weights, t (N,), labels (N,) int64 or None -> (N, C, H, W). The frequencies of
    the time embedding are computed once, which favours the baseline: the tutorial computes them in every call.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.net = copy.deepcopy(unet)
        half = unet.time_dim // 2
        # No buffer: a cast of the module must not round it.
        self.frequencies = torch.exp(torch.arange(half, device=unet.device) * (-math.log(10000) / (half - 1)))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.at(x, self.sinusoids(t), labels)

    def sinusoids(self, t: Tensor) -> Tensor:
        """[sin(t f_i), cos(t f_i)], (N, time_dim) in the precision of the frequencies."""
        angles = t[:, None] * self.frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)

    def at(self, x: Tensor, t_emb: Tensor, labels: Tensor | None = None) -> Tensor:
        """The forward pass from the sinusoids on."""
        net: Any = self.net
        if net.num_classes is not None:
            labels = x.new_full(x.shape[:1], net.num_classes, dtype=torch.int64) if labels is None else labels
            t_emb = t_emb + net.label_embedding(labels).to(t_emb.dtype)
        t_emb = t_emb.to(x.dtype)
        skips = []
        for i in range(1, net.depth + 1):
            skips.append(_block(getattr(net, f"down{i}"), x, t_emb))
            x = F.max_pool2d(skips[-1], 2)
        x = _block(net.bottleneck, x, t_emb)
        for i in range(net.depth, 0, -1):
            x = torch.cat([getattr(net, f"up{i}")(x), skips.pop()], dim=1)
            x = _block(getattr(net, f"conv_up{i}"), x, t_emb)
        y: Tensor = net.output(x)
        return y

    def folded(self) -> PlainUNet:
        """Itself, with every BatchNorm folded into the convolution before it (eval mode, float32 or better)."""
        for block in self.net.modules():
            if isinstance(block, ddpm_fast.nn.ConvBlock):
                block.conv1, block.norm1 = fuse_conv_bn_eval(block.conv1, block.norm1), nn.Identity()
                block.conv2, block.norm2 = fuse_conv_bn_eval(block.conv2, block.norm2), nn.Identity()
        return self


def _block(block: Any, x: Tensor, t_emb: Tensor) -> Tensor:
    h = F.silu(block.norm1(block.conv1(x)))
    h = h + block.time_mlp(t_emb)[:, :, None, None]
    return F.silu(block.norm2(block.conv2(h)))


def pictures(n: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Smooth random pictures in [-1, 1], (n, C, H, W) float32: something for a denoiser to find."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, shape[0], 4, 4, generator=generator)
    return torch.tanh(F.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False))


def _pass_through(unet: UNet) -> None:
    """Adds the identity to convolutions that keep their channels, and from the skip half to those after a
    concatenation: as in a trained network, what comes in can be found at the end."""
    for name, block in unet.named_children():
        if isinstance(block, ddpm_fast.nn.ConvBlock):
            channels = torch.arange(block.conv2.out_channels)
            block.conv2.weight *= 0.3
            block.conv2.weight[channels, channels, 1, 1] += 1
            if name.startswith("conv_up"):
                block.conv1.weight *= 0.3
                block.conv1.weight[channels, len(channels) + channels, 1, 1] += 1


@torch.no_grad()
def benchmark_network(shape: tuple[int, int, int], seed: int = 0, **sizes: Any) -> UNet:
    """An untrained U-Net, float32 in eval mode, that behaves like a trained one where it matters for a benchmark.

    BatchNorm has gathered the statistics of noisy pictures and has scales and shifts of its own, so folding it is not
    trivial. The last convolution is fitted by least squares to the noise in them and finds about half of it, so that
    reverse steps with x0 clipped stay pictures, and drift means something. sizes: width, depth, num_classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(shape[0], **sizes)
        for part in unet.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.7, 1.3)
                part.bias.normal_(0, 0.2)
                part.momentum = 1.0  # the statistics of the one batch below
        _pass_through(unet)
        n = 64
        alphas_cumprod = torch.tensor(ddpm_fast.Schedule.linear(1000).alphas_cumprod).float()
        t = torch.arange(n) * 1000 // n
        signal = alphas_cumprod[t, None, None, None]
        eps = torch.randn(n, *shape)
        x_t = signal.sqrt() * pictures(n, shape, seed) + (1 - signal).sqrt() * eps
        labels = None if unet.num_classes is None else torch.arange(n) % (unet.num_classes + 1)

        features: list[Tensor] = []
        hook = unet.output.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        unet.train()(x_t, t, labels)
        unet.eval()(x_t, t, labels)
        hook.remove()
        rows = features[-1].movedim(1, -1).flatten(0, 2).double()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        target = eps.movedim(1, -1).flatten(0, 2).double()
        gram = rows.T @ rows
        fit = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)), rows.T @ target)
        unet.output.weight.copy_(fit[:-1].T[:, :, None, None])
        unet.output.bias.copy_(fit[-1])
    return unet
