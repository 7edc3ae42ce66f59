"""The networks of the benchmark: untrained, but with statistics like trained ones where it matters for a benchmark.

    tutorial         `ddpm_fast.UNet`, baselines run it as a `PlainUNet`
    ddpm-cifar10-32  `ddpm_fast.nn.DDPMUNet`, the paper's; baselines run diffusers' UNet2DModel
    lucidrains       `ddpm_fast.nn.RMSNormUNet` of dim 64; baselines run the Unet of denoising_diffusion_pytorch

Deterministic: (shape, seed, options) decide every weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from plain import LucidrainsUNet, PeerUNet, Plain, PlainUNet
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import UNet
from ddpm_fast.nn import DDPMUNet, RMSNormUNet, rms_blocks

Shape = tuple[int, int, int]
Network = UNet | DDPMUNet | RMSNormUNet


def pictures(n: int, shape: Shape, seed: int = 0) -> Tensor:
    """Smooth random pictures in [-1, 1], (n, C, H, W) float32: something for a denoiser to find."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, shape[0], 4, 4, generator=generator)
    return torch.tanh(F.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False))


def _noisy(n: int, shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, eps) of n pictures, t spread over 0..999."""
    alphas_cumprod = torch.tensor(ddpm_fast.Schedule.linear(1000).alphas_cumprod).float()
    t = torch.arange(n) * 1000 // n
    signal = alphas_cumprod[t, None, None, None]
    eps = torch.randn(n, *shape)
    return signal.sqrt() * pictures(n, shape, seed) + (1 - signal).sqrt() * eps, t, eps


def _fit(unet: nn.Module, last: nn.Conv2d, images: tuple[Tensor, Tensor, Tensor], labels: Tensor | None) -> None:
    """Sets the last convolution, by least squares, to find the noise in these images: it finds about half of it, so
    that reverse steps with x0 clipped stay pictures, and drift means something."""
    x_t, t, eps = images
    features: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    unet.eval()(x_t, t, labels)
    hook.remove()
    gram, found = torch.zeros(()), torch.zeros(())
    for feature, target in zip(features[0], eps, strict=True):
        rows = F.unfold(feature[None].double(), last.kernel_size, padding=last.padding)[0]
        rows = torch.cat([rows, torch.ones_like(rows[:1])])
        gram, found = gram + rows @ rows.T, found + rows @ target.flatten(1).double().T
    fit = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)), found)
    last.weight.copy_(fit[:-1].T.reshape(last.weight.shape))
    assert last.bias is not None
    last.bias.copy_(fit[-1])


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
def tutorial_network(shape: Shape, seed: int = 0, **sizes: Any) -> UNet:
    """float32, in eval mode, on the CPU. sizes: width, depth, num_classes.

    BatchNorm has gathered the statistics of noisy pictures and has scales and shifts of its own, so folding it is not
    trivial.
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
        images = x_t, t, _ = _noisy(n, shape, seed)
        labels = None if unet.num_classes is None else torch.arange(n) % (unet.num_classes + 1)
        unet.train()(x_t, t, labels)
        _fit(unet, unet.output, images, labels)
    return unet


@torch.no_grad()
def paper_network(shape: Shape, seed: int = 0, **config: Any) -> DDPMUNet:
    """float32, in eval mode, on the CPU. config: keywords of DDPMUNet; its defaults are google/ddpm-cifar10-32.

    Every norm has scales and shifts of its own, and attention looks at some pixels more than at others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = DDPMUNet(sample_size=shape[1:], in_channels=shape[0], out_channels=shape[0], **config)
        for name, part in unet.named_modules():
            if isinstance(part, nn.GroupNorm):
                part.weight.uniform_(0.7, 1.3)
                part.bias.normal_(0, 0.2)
            elif isinstance(part, nn.Linear) and name.endswith(("to_q", "to_k")):
                part.weight *= 2
        n = 32
        labels = None if unet.num_classes is None else torch.arange(n) % unet.num_classes
        _fit(unet, unet.conv_out, _noisy(n, shape, seed), labels)
    return unet


@torch.no_grad()
def lucidrains_network(shape: Shape, seed: int = 0, **options: Any) -> RMSNormUNet:
    """float32, in eval mode, on the CPU. options: keywords of RMSNormUNet; dim is 64 unless given.

    Every norm has gains of its own, and attention looks at some pixels more than at others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = RMSNormUNet(**{"dim": 64, "channels": shape[0], **options})
        for name, part in unet.named_modules():
            if isinstance(part, rms_blocks.RMSNorm):
                part.g.uniform_(0.7, 1.3)
            elif isinstance(part, nn.Conv2d) and name.endswith("to_qkv"):
                q_k = part.weight[: 2 * len(part.weight) // 3]
                q_k *= 2
        # What comes from below must not vanish beside the skips, nor full attention beside what it is added to.
        for stage in unet.ups:
            stage[3].get_parameter("1.weight" if isinstance(stage[3], rms_blocks.Up) else "weight").mul_(3)
        for part in unet.modules():
            if isinstance(part, rms_blocks.Attention):
                part.to_out.weight *= 5
        # As in a trained network, what comes in can be found at the end: through the stem and the skip from it.
        image, stem = torch.arange(unet.channels), torch.arange(unet.config["init_dim"])
        unet.init_conv.weight[image, image, 3, 3] += 1
        shortcut = unet.final_res_block.res_conv.weight
        shortcut *= 0.3
        shortcut[stem, len(stem) + stem, 0, 0] += 1
        _fit(unet, unet.final_conv, _noisy(32, shape, seed), None)
    return unet


@dataclasses.dataclass(frozen=True)
class Kind:
    """make: (shape, **options) -> our network. plain: the same weights as the baselines run them."""

    make: Callable[..., Network]
    plain: Callable[[Any], Plain]


NETWORKS = {
    "tutorial": Kind(tutorial_network, PlainUNet),
    "ddpm-cifar10-32": Kind(paper_network, PeerUNet),
    "lucidrains": Kind(lucidrains_network, LucidrainsUNet),
}
