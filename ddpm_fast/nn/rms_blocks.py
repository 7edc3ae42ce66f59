"""What `RMSNormUNet` is made of: time embeddings, the norm, the residual block, both attentions, down and up.

Module names, and the order in which they are made and registered, are those of lucidrains' `Unet`: equal keys, and
equal weights from equal torch seeds. Throughout, `temb` is SiLU(time embedding), (N, time_dim): the activation is taken
once for all blocks. Both attentions return their result plus x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

EPS = 1e-12  # what torch.nn.functional.normalize divides by at the least
MEMORY_TOKENS = 4


class Sinusoids(nn.Module):
    """t -> (N, dim): [sin(t f_i), cos(t f_i)], f_i = theta^(-i / (h - 1)), i = 0..h-1, h = dim / 2.

    float32, in float64 where t is; the frequencies are float32 always. No parameters and no buffers: casting a module
    must not round them.
    """

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(self.theta) / (half - 1))
        angles = t[:, None] * torch.exp(exponents)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class FourierFeatures(nn.Module):
    """t -> (N, dim + 1): [t, sin a_i, cos a_i], a_i = 2 pi w_i t, w_i ~ N(0, 1), learned or fixed.

    Computed in float32 at least, and casts of a module to half precision leave the weights in it: rounded to bfloat16,
    they would turn the last of a thousand timesteps by whole periods.
    """

    def __init__(self, dim: int, learned: bool) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(dim // 2), requires_grad=learned)

    def forward(self, t: Tensor) -> Tensor:
        t = t[:, None].to(torch.promote_types(torch.float32, t.dtype))
        angles = t * self.weights.to(torch.promote_types(torch.float32, self.weights.dtype)) * 2 * math.pi
        return torch.cat([t.to(angles.dtype), torch.sin(angles), torch.cos(angles)], dim=1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FourierFeatures:
        exact = self.weights.detach()
        super()._apply(fn, recurse)
        weights = self.weights
        if weights.dtype.itemsize < 4:
            exact = exact.to(weights.device, torch.float32)
            gradient, weights.grad = weights.grad, None  # of the other dtype, it would be in the way
            weights.data = exact
            weights.grad = None if gradient is None else gradient.float()
        return self


class RMSNorm(nn.Module):
    """y = act(h / |h| sqrt(C) g (1 + scale) + shift) + residual, |h| the Euclidean norm over the C channels of a pixel.

    h (N, C, H, W), scale, shift (N, C), residual like h; all but h optional. See `ops.rms_norm_silu`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(
        self,
        h: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        act: Literal["silu"] | None = None,
    ) -> Tensor:
        return ops.rms_norm_silu(h, self.g.flatten(), scale=scale, shift=shift, residual=residual, eps=EPS, act=act)


class Block(nn.Module):
    """SiLU(norm(conv(x)) (1 + scale) + shift), then dropout or + residual: the first or second half of a block."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = RMSNorm(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        y: Tensor = self.norm(self.proj(x), scale, shift, residual, act="silu")
        return self.dropout(y) if residual is None else y


class ResnetBlock(nn.Module):
    """(scale, shift) = W temb; y = block2(block1(x, scale, shift)) + res_conv(x).

    x (N, in_channels, H, W), temb (N, time_dim) -> (N, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * out_channels))
        self.block1 = Block(in_channels, out_channels, dropout)
        self.block2 = Block(out_channels, out_channels)
        self.res_conv = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.mlp[1](temb).chunk(2, dim=1)  # temb has been through mlp[0] already
        y: Tensor = self.block2(self.block1(x, scale, shift), residual=self.res_conv(x))
        return y


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3 heads dim, H, W) -> q, k, v, each (N, heads, dim, H W)."""
    n, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(n, 3, heads, channels // (3 * heads), height * width).unbind(1)
    return q, k, v


class LinearAttention(nn.Module):
    """y = x + norm_out(W_out (softmax_tokens(k) v^T)^T softmax_dim(q) / sqrt(d)); q, k, v of W_qkv norm(x).

    Learned memory tokens are in front of k and v. Cost grows with the pixels, not with their square.
    x (N, channels, H, W) -> the same shape.
    """

    def __init__(self, channels: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, MEMORY_TOKENS))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, channels, 1), RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = _heads(self.to_qkv(self.norm(x)), self.heads)
        memory_k, memory_v = self.mem_kv[:, None].expand(-1, n, -1, -1, -1)
        k, v = torch.cat([memory_k, k], dim=-1), torch.cat([memory_v, v], dim=-1)
        context = k.softmax(dim=-1) @ v.transpose(-1, -2) * self.scale  # (N, heads, d of k, d of v)
        h = context.transpose(-1, -2) @ q.softmax(dim=-2)
        project, norm = self.to_out
        y: Tensor = norm(project(h.reshape(n, self.to_qkv.out_channels // 3, height, width)), residual=x)
        return y


class Attention(nn.Module):
    """y = x + W_out (softmax(q^T k / sqrt(d)) v^T)^T; q, k, v of W_qkv norm(x), learned memory tokens before k and v.

    x (N, channels, H, W) -> the same shape. PyTorch chooses the kernel for the device and dtype.
    """

    def __init__(self, channels: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, MEMORY_TOKENS, dim_head))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = (part.transpose(-1, -2) for part in _heads(self.to_qkv(self.norm(x)), self.heads))
        memory_k, memory_v = self.mem_kv[:, None].expand(-1, n, -1, -1, -1)
        k, v = torch.cat([memory_k, k], dim=-2), torch.cat([memory_v, v], dim=-2)
        # The fast kernels want a token's values side by side.
        h = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        y: Tensor = self.to_out(h.transpose(-1, -2).reshape(n, self.to_qkv.out_channels // 3, height, width)) + x
        return y


class Down(nn.Sequential):
    """The four pixels of each 2x2 as channels, then a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.PixelUnshuffle(2), nn.Conv2d(4 * in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        if not n:  # PyTorch's PixelUnshuffle leaves an empty batch in its old shape
            y: Tensor = self[1](x.reshape(0, 4 * channels, height // 2, width // 2))
            return y
        y = super().forward(x)
        return y


class Up(nn.Sequential):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
