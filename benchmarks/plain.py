"""What the baselines run: the same weights as ours in networks that have nothing of ddpm_fast's ops in them.

PlainUNet  the tutorial's U-Net, in torch functions
PeerUNet   the paper's U-Net: diffusers' own UNet2DModel
LucidrainsUNet  lucidrains' U-Net: the package's own Unet
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from packages import lucidrains, package
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ddpm_fast
from ddpm_fast import UNet
from ddpm_fast.nn import DDPMUNet, RMSNormUNet

Network = TypeVar("Network", bound=nn.Module)


def cast(network: Network, dtype: torch.dtype) -> Network:
    """The network itself in another dtype; half precision is channels_last, which convolutions want then."""
    network.to(dtype)
    return network if dtype == torch.float32 else network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Plain(nn.Module):
    """x (N, C, H, W) in the dtype of the weights, t (N,), labels (N,) int64 or None -> (N, C, H, W).

    net: the module that has the weights. what: in words. folds: what `folded` does, in words, "" for nothing.
    """

    net: nn.Module
    what: str
    folds: str = ""

    @abstractmethod
    def sinusoids(self, t: Tensor) -> Tensor:
        """The sinusoids of t, (N, features) in the precision of their frequencies, float32."""

    @abstractmethod
    def at(self, x: Tensor, t_emb: Tensor, labels: Tensor | None = None) -> Tensor:
        """The forward pass from the sinusoids on."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.at(x, self.sinusoids(t), labels)

    def folded(self) -> Plain:
        """Itself, with every BatchNorm folded into the convolution before it (eval mode, float32 or better)."""
        return self


class PlainUNet(Plain):
    """The layers of a `ddpm_fast.UNet` with a forward pass of torch functions only.

    The frequencies of the time embedding are computed once, which favours the baseline: the tutorial computes them in
    every call.
    """

    what = "the plain network"
    folds = "BatchNorm folded"

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.net = copy.deepcopy(unet)
        half = unet.time_dim // 2
        # No buffer: a cast of the module must not round it.
        self.frequencies = torch.exp(torch.arange(half, device=unet.device) * (-math.log(10000) / (half - 1)))

    def sinusoids(self, t: Tensor) -> Tensor:
        """[sin(t f_i), cos(t f_i)], (N, time_dim)."""
        angles = t[:, None] * self.frequencies.to(t.device)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)

    def at(self, x: Tensor, t_emb: Tensor, labels: Tensor | None = None) -> Tensor:
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
        for block in self.net.modules():
            if isinstance(block, ddpm_fast.nn.ConvBlock):
                block.conv1, block.norm1 = fuse_conv_bn_eval(block.conv1, block.norm1), nn.Identity()
                block.conv2, block.norm2 = fuse_conv_bn_eval(block.conv2, block.norm2), nn.Identity()
        return self


def _block(block: Any, x: Tensor, t_emb: Tensor) -> Tensor:
    h = F.silu(block.norm1(block.conv1(x)))
    h = h + block.time_mlp(t_emb)[:, :, None, None]
    return F.silu(block.norm2(block.conv2(h)))


class PeerUNet(Plain):
    """diffusers' UNet2DModel with the config and the weights of a `ddpm_fast.nn.DDPMUNet`, whose keys are the same."""

    what = "diffusers' own UNet2DModel"

    def __init__(self, unet: DDPMUNet) -> None:
        super().__init__()
        with torch.device(unet.device):
            self.net = package("diffusers").UNet2DModel(**unet.config)
        self.net.load_state_dict(unet.state_dict(), strict=True)

    def sinusoids(self, t: Tensor) -> Tensor:
        net: Any = self.net
        waves: Tensor = net.time_proj(t)
        return waves

    def at(self, x: Tensor, t_emb: Tensor, labels: Tensor | None = None) -> Tensor:
        net: Any = self.net
        own, net.time_proj = net.time_proj, _Given(t_emb)
        try:
            return self(x, t_emb[:, 0], labels)
        finally:
            net.time_proj = own

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.net(x, t, class_labels=labels, return_dict=False)[0]
        return y


class LucidrainsUNet(Plain):
    """The package's own Unet with the config and the weights of a `ddpm_fast.nn.RMSNormUNet`, whose keys are the same.

    Its sinusoids are float32 and are cast to the dtype of the layer behind them; without that only float32 runs.
    """

    what = "lucidrains' own Unet"

    def __init__(self, unet: RMSNormUNet) -> None:
        super().__init__()
        with torch.device(unet.device):
            self.net = lucidrains().Unet(**unet.config)
        self.net.load_state_dict(unet.state_dict(), strict=True)
        mlp: Any = self.net.time_mlp
        mlp[0] = _Cast(mlp[0], mlp[1])

    def sinusoids(self, t: Tensor) -> Tensor:
        net: Any = self.net
        waves: Tensor = net.time_mlp[0].features(t)
        return waves

    def at(self, x: Tensor, t_emb: Tensor, labels: Tensor | None = None) -> Tensor:
        told: Any = self.net.get_submodule("time_mlp.0")
        own, told.features = told.features, _Given(t_emb)
        try:
            return self(x, t_emb[:, 0])
        finally:
            told.features = own

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.net(x, t)
        return y


class _Cast(nn.Module):
    """features(t) in the dtype that a linear layer has, whatever it may be cast to."""

    def __init__(self, features: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.features, self.like = features, [linear]  # in a list: it has its place among the modules

    def forward(self, t: Tensor) -> Tensor:
        waves: Tensor = self.features(t)
        return waves.to(self.like[0].weight.dtype)


class _Given(nn.Module):
    """Sinusoids that have been computed elsewhere."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, t: Tensor) -> Tensor:
        return self.value
