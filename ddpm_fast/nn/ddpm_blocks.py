"""What `DDPMUNet` is made of: time embeddings, the residual block, attention, and the stages of the way down and up.

Module names, and the order in which they are made and registered, are those of diffusers' `UNet2DModel`: equal keys,
and equal weights from equal torch seeds. Throughout, `temb` is act(time embedding), (N, time_dim): the activation is
taken once for all blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

ACT: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention's linear layers were called in diffusers' first releases, and in the checkpoints of that time."""


class Sinusoids(nn.Module):
    """t -> fp32 (N, dim): [sin(t f_i), cos(t f_i)], f_i = 10000^(-i / (h - shift)), i = 0..h-1, h = dim // 2.

    flip: cosines first. An odd dim ends with a zero. No parameters and no buffers: casting a module must not round the
    frequencies.
    """

    def __init__(self, dim: int, flip: bool, shift: float) -> None:
        super().__init__()
        self.dim, self.flip, self.shift = dim, flip, shift

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) * -math.log(10000)
        angles = t[:, None].float() * torch.exp(exponents / (half - self.shift))
        waves = [torch.cos(angles), torch.sin(angles)] if self.flip else [torch.sin(angles), torch.cos(angles)]
        return F.pad(torch.cat(waves, dim=1), (0, self.dim % 2))


class FourierFeatures(nn.Module):
    """t -> (N, 2 dim): [sin a_i, cos a_i], a_i = 2 pi w_i log t, with fixed random w_i ~ N(0, scale^2) (NCSN++)."""

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) * scale, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = torch.log(t)[:, None] * self.weight * 2 * math.pi
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class TimeMLP(nn.Module):
    """linear_2(SiLU(linear_1(e))): (N, in_dim) -> (N, time_dim)."""

    def __init__(self, in_dim: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, e: Tensor) -> Tensor:
        y: Tensor = self.linear_2(F.silu(self.linear_1(e)))
        return y


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of one network have in common; `scale` is the mid block's own, 1 elsewhere."""

    time_dim: int
    groups: int
    eps: float
    act: str
    dropout: float
    time_scale_shift: str
    scale: float = 1.0


def norm_act(
    norm: nn.GroupNorm,
    h: Tensor,
    act: str,
    bias: Tensor | None = None,
    temb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """act(GroupNorm(h + bias[c] + temb[n, c]) (1 + scale[n, c]) + shift[n, c]), each but h optional.

    On a GPU one op. On a CPU that was measured to change nothing (0.96 to 1.03 times the speed of a forward pass), for
    between torch's operators its idle threads spin on the cores that ours would wake on.
    """
    if h.is_cuda and act == "silu":
        return ops.group_norm_silu(
            h, norm.num_groups, norm.weight, norm.bias, bias=bias, temb=temb, scale=scale, shift=shift, eps=norm.eps
        )
    if bias is not None or temb is not None:
        h = ops.add_bias_temb(h, bias, temb)
    h = norm(h)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return ACT[act](h)


class ResnetBlock(nn.Module):
    """h = conv1(act(norm1(x))); h = conv2(dropout(act(norm2(h + W temb)))); y = (shortcut(x) + h) / scale.

    scale is output_scale_factor. With time_scale_shift="scale_shift", (a, b) = W temb and it is
    act(norm2(h) (1 + a) + b). `resample` "down" halves (mean of 2x2), "up" doubles (nearest) what enters conv1 and the
    shortcut.
    x (N, in_channels, H, W), temb (N, time_dim) -> (N, out_channels, H', W').
    """

    def __init__(self, in_channels: int, out_channels: int, style: Style, resample: str | None = None) -> None:
        super().__init__()
        self.time_scale_shift, self.output_scale_factor = style.time_scale_shift, style.scale
        self.act, self.resample = style.act, resample
        self.norm1 = nn.GroupNorm(style.groups, in_channels, style.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        both = 2 if style.time_scale_shift == "scale_shift" else 1
        self.time_emb_proj = nn.Linear(style.time_dim, both * out_channels)
        self.norm2 = nn.GroupNorm(style.groups, out_channels, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = norm_act(self.norm1, x, self.act)
        if self.resample is not None:
            x, h = self._resampled(x), self._resampled(h)
        # conv1's bias waits for the time embedding: one pass for both
        h = F.conv2d(h, self.conv1.weight, None, padding=1)
        temb = self.time_emb_proj(temb)
        if self.time_scale_shift == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            h = norm_act(self.norm2, h, self.act, self.conv1.bias, scale=scale, shift=shift)
        else:
            h = norm_act(self.norm2, h, self.act, self.conv1.bias, temb)
        h = self.conv2(self.dropout(h))
        y: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor

    def _resampled(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.resample == "down" else doubled(x)


class Attention(nn.Module):
    """y = (x + to_out(softmax(q k^T / sqrt(d)) v)) / rescale_output_factor; q, k, v of GroupNorm(x), a token per pixel.

    x (N, channels, H, W) -> the same shape. groups None: no GroupNorm. Loads the layer names of old checkpoints too.
    """

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.rescale_output_factor = channels // head_dim, scale
        inner = self.heads * head_dim
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        tokens = h.flatten(2).transpose(1, 2)
        heads = (n, height * width, self.heads, -1)
        q, k, v = (linear(tokens).view(heads).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for part in self.to_out:
            h = part(h)
        y = x + h.transpose(1, 2).reshape(n, c, height, width)
        return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for old, new in OLD_ATTENTION.items():
            for kind in ("weight", "bias"):
                if f"{prefix}{old}.{kind}" in state_dict:
                    state_dict[f"{prefix}{new}.{kind}"] = state_dict.pop(f"{prefix}{old}.{kind}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def doubled(x: Tensor) -> Tensor:
    """Each pixel four times, (N, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2. padding 0: one row and column of zeros, at the bottom and right only (as TF)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)
        return y


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        y: Tensor = self.conv(doubled(x))
        return y


class Stage(nn.Module):
    """Residual blocks in a row, each followed by attention where head_dim says so."""

    attentions: nn.ModuleList | None
    resnets: nn.ModuleList

    def build(self, widths: Sequence[tuple[int, int]], style: Style, head_dim: int | None) -> None:
        """widths: (in, out) channels of each residual block. head_dim None: no attention."""
        resnets, attentions = [], []
        for before, after in widths:
            resnets.append(ResnetBlock(before, after, style))
            if head_dim is not None:
                attentions.append(Attention(after, head_dim, style.groups, style.eps))
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.resnets = nn.ModuleList(resnets)

    def one(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        """The i-th residual block and its attention."""
        x = self.resnets[i](x, temb)
        return x if self.attentions is None else self.attentions[i](x)


class DownBlock(Stage):
    """x -> (x halved by the last part where `downsample` names one, every intermediate result for the way up)."""

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        style: Style,
        head_dim: int | None,
        downsample: str | None,
        padding: int,
    ) -> None:
        super().__init__()
        self.build(widths, style, head_dim)
        out = widths[-1][1]
        self.downsamplers: nn.ModuleList | None = None
        if downsample is not None:
            resnet = downsample == "resnet"
            down = ResnetBlock(out, out, style, "down") if resnet else Downsample(out, padding)
            self.downsamplers = nn.ModuleList([down])

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.one(i, x, temb)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x, temb)
            skips.append(x)
        return x, skips


class UpBlock(Stage):
    """Each residual block sees [x, the latest of `skips`], which is taken off; then x doubled where asked."""

    def __init__(
        self, widths: Sequence[tuple[int, int]], style: Style, head_dim: int | None, upsample: str | None
    ) -> None:
        super().__init__()
        self.build(widths, style, head_dim)
        out = widths[-1][1]
        self.upsamplers: nn.ModuleList | None = None
        if upsample is not None:
            up = ResnetBlock(out, out, style, "up") if upsample == "resnet" else Upsample(out)
            self.upsamplers = nn.ModuleList([up])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.one(i, torch.cat([x, skips.pop()], dim=1), temb)
        return x if self.upsamplers is None else self.upsamplers[0](x, temb)


class MidBlock(nn.Module):
    """resnets[0], then attentions[0] where there is one, then resnets[1]."""

    def __init__(self, channels: int, style: Style, head_dim: int | None, attention_groups: int | None) -> None:
        super().__init__()
        first = ResnetBlock(channels, channels, style)
        attentions = []
        if head_dim is not None:
            attentions.append(Attention(channels, head_dim, attention_groups, style.eps, style.scale))
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList([first, ResnetBlock(channels, channels, style)])

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        for attention in self.attentions:
            x = attention(x)
        y: Tensor = self.resnets[1](x, temb)
        return y
