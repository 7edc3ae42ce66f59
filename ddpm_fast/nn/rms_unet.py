"""The U-Net of lucidrains' denoising_diffusion_pytorch 2.3, with its constructor, its call and its state-dict keys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rms_blocks import Attention, Down, FourierFeatures, LinearAttention, ResnetBlock, Sinusoids, Up
from .rms_config import checked


class RMSNormUNet(nn.Module):
    """lucidrains' `Unet`: a 7x7 stem, RMSNorm with scale and shift from the time, linear and full attention.

    Norm, scale-shift, SiLU and what is added to it are one op, forward and backward (`ops.rms_norm_silu`).

    Args:
        dim: the width that dim_mults multiplies; even and at least 4 unless the time features are learned or random.
        init_dim: channels after the stem, default dim. out_dim: default channels, twice that with learned_variance.
        dim_mults: channels per stage are dim times these; every stage but the last halves height and width.
        channels: of the images.
        self_condition: the stem sees [x_self_cond | x].
        learned_sinusoidal_cond, random_fourier_features: learned or fixed random frequencies of the time, half of
            learned_sinusoidal_dim of them, for sinusoids of base sinusoidal_pos_emb_theta.
        dropout: after the first activation of each residual block.
        attn_dim_head, attn_heads: channels per head and heads, for all stages or a tuple with one per stage; the middle
            has the last stage's.
        full_attn: full instead of linear attention, for all or per stage; None (and False): in the last stage only.
        flash_attn: accepted; PyTorch chooses the kernel of full attention by device and dtype, float32 included.

    Raises ValueError or TypeError naming the argument that is not possible.
    """

    def __init__(
        self,
        dim: int,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        self_condition: bool = False,
        learned_variance: bool = False,
        learned_sinusoidal_cond: bool = False,
        random_fourier_features: bool = False,
        learned_sinusoidal_dim: int = 16,
        sinusoidal_pos_emb_theta: float = 10000,
        dropout: float = 0.0,
        attn_dim_head: int | Sequence[int] = 32,
        attn_heads: int | Sequence[int] = 4,
        full_attn: bool | Sequence[bool] | None = None,
        flash_attn: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config = checked(given)
        """Keyword arguments that build this architecture again: `RMSNormUNet(**net.config)`."""
        self.channels, self.self_condition = channels, self_condition
        self.out_dim: int = config["out_dim"]
        self.random_or_learned_sinusoidal_cond = learned_sinusoidal_cond or random_fourier_features
        stem: int = config["init_dim"]
        self.init_conv = nn.Conv2d(2 * channels if self_condition else channels, stem, 7, padding=3)
        features: nn.Module
        if self.random_or_learned_sinusoidal_cond:
            features = FourierFeatures(learned_sinusoidal_dim, learned=not random_fourier_features)
            in_dim = learned_sinusoidal_dim + 1
        else:
            features, in_dim = Sinusoids(dim, sinusoidal_pos_emb_theta), dim
        time_dim = 4 * dim
        self.time_mlp = nn.Sequential(features, nn.Linear(in_dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))
        self._build_stages([stem, *(dim * mult for mult in config["dim_mults"])], time_dim)
        self.final_res_block = ResnetBlock(2 * stem, stem, time_dim, dropout)
        self.final_conv = nn.Conv2d(stem, self.out_dim, 1)

    def _build_stages(self, widths: list[int], time_dim: int) -> None:
        """widths: of the stem and after each stage."""
        config, last = self.config, len(widths) - 2

        def resnet(in_channels: int, out_channels: int) -> ResnetBlock:
            return ResnetBlock(in_channels, out_channels, time_dim, config["dropout"])

        def attention(channels: int, stage: int, full: bool) -> nn.Module:
            kind = Attention if full else LinearAttention
            return kind(channels, config["attn_heads"][stage], config["attn_dim_head"][stage])

        # As each list is assigned, its place among the keys is fixed; the weights are drawn in the order of making.
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for stage, (a, b) in enumerate(itertools.pairwise(widths)):
            blocks = [resnet(a, a), resnet(a, a), attention(a, stage, config["full_attn"][stage])]
            down = nn.Conv2d(a, b, 3, padding=1) if stage == last else Down(a, b)
            self.downs.append(nn.ModuleList([*blocks, down]))
        self.mid_block1 = resnet(widths[-1], widths[-1])
        self.mid_attn = attention(widths[-1], last, full=True)
        self.mid_block2 = resnet(widths[-1], widths[-1])
        for stage in range(last, -1, -1):
            a, b = widths[stage : stage + 2]
            blocks = [resnet(a + b, b), resnet(a + b, b), attention(b, stage, config["full_attn"][stage])]
            up = nn.Conv2d(b, a, 3, padding=1) if stage == 0 else Up(b, a)
            self.ups.append(nn.ModuleList([*blocks, up]))

    # -- what it says about itself --------------------------------------------------------------------------------

    @property
    def downsample_factor(self) -> int:
        """What height and width of images must be multiples of."""
        return 1 << (len(self.downs) - 1)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.init_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are kept in, and images must be given in."""
        return self.init_conv.weight.dtype

    # -- what it does ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, time: Tensor | float, x_self_cond: Tensor | None = None) -> Tensor:
        """Predicts what it was trained for: the noise in x, x0 or v.

        Args:
            x: (N, channels, H, W), the dtype of the parameters, H and W multiples of `downsample_factor`.
            time: (N,), (1,) or 0-dim tensor or a number; its features are computed in float32 at least.
            x_self_cond: like x, an earlier estimate of x0; None means zeros. Only with self_condition.

        Returns:
            (N, out_dim, H, W) in the dtype of x.
        """
        self._check_images(x, x_self_cond)
        features, *mlp = self.time_mlp
        temb = features(self._times(x, time)).to(self.dtype)
        for part in mlp:
            temb = part(temb)
        temb = F.silu(temb)
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        stem = x = self.init_conv(x)
        skips = []
        for stage in self.downs:
            block1, block2, attention, change = cast(nn.ModuleList, stage)
            x = block1(x, temb)
            skips.append(x)
            x = attention(block2(x, temb))
            skips.append(x)
            x = change(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, temb)), temb)
        for stage in self.ups:
            block1, block2, attention, change = cast(nn.ModuleList, stage)
            x = block1(torch.cat([x, skips.pop()], dim=1), temb)
            x = block2(torch.cat([x, skips.pop()], dim=1), temb)
            x = change(attention(x))
        y: Tensor = self.final_conv(self.final_res_block(torch.cat([x, stem], dim=1), temb))
        return y

    @staticmethod
    def _times(x: Tensor, t: Tensor | float) -> Tensor:
        """t as (N,) on the device of x."""
        if not isinstance(t, Tensor):
            t = torch.full((x.shape[0],), t, dtype=torch.int64 if isinstance(t, int) else torch.float32)
        if t.shape not in (x.shape[:1], (1,), ()):
            raise ValueError(
                f"time must have shape ({x.shape[0]},), one per image, or be one number, got {tuple(t.shape)}"
            )
        if t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"time must be an integer or floating tensor, got {t.dtype}")
        return t.to(x.device).reshape(-1).expand(x.shape[0])

    def _check_images(self, x: Tensor, x_self_cond: Tensor | None) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must have shape (N, {self.channels}, H, W), got {tuple(x.shape)}")
        m = self.downsample_factor
        h, w = x.shape[2:]
        if h % m or w % m or not h or not w:
            fit = tuple(max(round(size / m), 1) * m for size in (h, w))
            raise ValueError(
                f"height and width of x must be multiples of {m} ({len(self.downs)} stages), got ({h}, {w}); "
                f"pad or resize to the nearest size that fits, {fit}"
            )
        if x_self_cond is None:
            return
        if not self.self_condition:
            raise ValueError("x_self_cond was given to a network without it; build it with self_condition=True")
        if x_self_cond.shape != x.shape:
            raise ValueError(f"x_self_cond must have shape {tuple(x.shape)}, like x, got {tuple(x_self_cond.shape)}")
