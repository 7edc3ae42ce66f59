"""`ddpm_fast.nn.RMSNormUNet`, lucidrains' U-Net, as a `Network`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import RMSNormUNet, rms_blocks
from . import network as layers
from .fold import plain
from .network import Buffer, Conv, Layer, Linear, Network, Slice, TimeTable, whole
from .unaltered import check_unaltered

PARTS = (
    *(RMSNormUNet, rms_blocks.Block, rms_blocks.ResnetBlock, rms_blocks.RMSNorm),
    *(rms_blocks.LinearAttention, rms_blocks.Attention, rms_blocks.Down, rms_blocks.Up),
    *(rms_blocks.Sinusoids, rms_blocks.FourierFeatures),
    *(nn.ModuleList, nn.Sequential, nn.Conv2d, nn.Linear, nn.Dropout, nn.SiLU, nn.GELU, nn.Identity),
    *(nn.PixelUnshuffle, nn.Upsample),
)


def check_rms_unet(model: RMSNormUNet) -> None:
    """UnreadableError for a network that is no longer what its class made it."""
    with torch.device("meta"):
        fresh = RMSNormUNet(**model.config)
    check_unaltered(model, fresh, PARTS)


def rms_unet(model: RMSNormUNet) -> Network:
    """Reads a module that `check_rms_unet` has nothing against; it is not changed."""
    return _Reading(model).network()


class _Reading:
    """The layers so far, and where things lie.

    A stage keeps what its first block and its attention make. On the way up each of its two blocks has a buffer for
    [what comes from below | what was kept], the last block of all one for [that | the stem's output]; both halves are
    written where they belong. All else shares a buffer with everything of its shape and use, for none of it is needed
    for longer than a block.
    """

    def __init__(self, model: RMSNormUNet) -> None:
        self.model = model
        self.layers: list[Layer] = []
        self.linears: list[nn.Linear] = []
        self.columns = 0
        config = model.config
        self.widths = [config["init_dim"], *(config["dim"] * mult for mult in config["dim_mults"])]
        pairs = list(zip(self.widths, self.widths[1:], strict=False))
        self.joined = [[Buffer(f"joined{i}.{k}", a + b, i) for k in range(2)] for i, (a, b) in enumerate(pairs)]
        self.end = Buffer("joined", 2 * self.widths[0], 0)

    def network(self) -> Network:
        model = self.model
        stem = _upper(self.end, self.widths[0])
        self._conv("init_conv", model.init_conv, None, stem, padding=3)
        self._middle(self._down(stem))
        self._up()
        result = _own("hidden", self.widths[0], 0)
        self._resnet("final_res_block", model.final_res_block, _all(self.end), result)
        self.layers.append(layers.Output("final_conv", *_weights(model.final_conv), result))
        channels, divisor = model.init_conv.in_channels, model.downsample_factor
        return Network(tuple(self.layers), channels, divisor, self._time(), model.self_condition)

    # -- the way through ------------------------------------------------------------------------------------------

    def _down(self, x: Slice) -> Slice:
        """x: what the stem made. Returns what the last stage makes."""
        stages = _stages(self.model.downs)
        for i, (block1, block2, attention, change) in enumerate(stages):
            a, b = self.widths[i : i + 2]
            first, second = self.joined[i]
            x = self._resnet(f"downs.{i}.0", block1, x, _upper(second, a))
            x = self._resnet(f"downs.{i}.1", block2, x, _own("before", a, i))
            x = self._attention(f"downs.{i}.2", attention, x, _upper(first, a))
            if i + 1 == len(stages):
                target = _own("hidden", b, i)
                self._conv(f"downs.{i}.3", change, x, target)
            else:
                target = _own("hidden", b, i + 1)
                weight, bias = _weights(change[1])  # PixelUnshuffle counts channels as [channel, row, column]
                self.layers.append(layers.Down(f"downs.{i}.3", weight.view(b, a, 2, 2), bias, x, target))
            x = target
        return x

    def _middle(self, x: Slice) -> None:
        model, channels = self.model, self.widths[-1]
        x = self._resnet("mid_block1", model.mid_block1, x, _like(x, "before"))
        x = self._attention("mid_attn", model.mid_attn, x, _like(x, "hidden"))
        self._resnet("mid_block2", model.mid_block2, x, _lower(self.joined[-1][0], channels))

    def _up(self) -> None:
        """From the lower half of the last stage's first buffer to that of `end`."""
        for k, (block1, block2, attention, change) in enumerate(_stages(self.model.ups)):
            i = len(self.joined) - 1 - k
            a, b = self.widths[i : i + 2]
            first, second = self.joined[i]
            x = self._resnet(f"ups.{k}.0", block1, _all(first), _lower(second, b))
            x = self._resnet(f"ups.{k}.1", block2, _all(second), _own("before", b, i))
            x = self._attention(f"ups.{k}.2", attention, x, _own("hidden", b, i))
            if i:
                self._conv(f"ups.{k}.3", change[1], x, _lower(self.joined[i - 1][0], a), resample="up")
            else:
                self._conv(f"ups.{k}.3", change, x, _lower(self.end, a))

    # -- parts ----------------------------------------------------------------------------------------------------

    def _resnet(self, name: str, block: Any, x: Slice, target: Slice) -> Slice:
        """The second norm also adds what went in."""
        inner, normed, residual = _like(target, "inner"), _like(target, "normed"), x
        self._conv(f"{name}.block1.proj", block.block1.proj, x, inner)
        self._norm(f"{name}.block1.norm", block.block1.norm, inner, normed, modulation=self._time_columns(block.mlp[1]))
        if isinstance(block.res_conv, nn.Conv2d):
            residual = _like(target, "shortcut")
            self._linear(f"{name}.res_conv", block.res_conv, x, residual)
        self._conv(f"{name}.block2.proj", block.block2.proj, normed, inner)
        self._norm(f"{name}.block2.norm", block.block2.norm, inner, target, residual=residual)
        return target

    def _attention(self, name: str, block: Any, x: Slice, target: Slice) -> Slice:
        heads, level = block.heads, x.buffer.level
        channels = block.to_qkv.out_channels // 3
        normed, qkv, attended = _like(x, "normed"), _own("qkv", 3 * channels, level), _own("attended", channels, level)
        self._norm(f"{name}.norm", block.norm, x, normed, silu=False)
        self._linear(f"{name}.to_qkv", block.to_qkv, normed, qkv)
        linear = isinstance(block, rms_blocks.LinearAttention)
        kind = layers.LinearAttention if linear else layers.Attention
        scale = (channels // heads) ** -0.5
        self.layers.append(kind(f"{name}.attention", qkv, attended, heads, scale, plain(block.mem_kv)))
        if linear:
            project, norm = block.to_out
            projected = _like(x, "projected")
            self._linear(f"{name}.to_out.0", project, attended, projected)
            self._norm(f"{name}.to_out.1", norm, projected, target, silu=False, residual=x)
        else:
            self._linear(f"{name}.to_out", block.to_out, attended, target, residual=x)
        return target

    def _norm(self, name: str, norm: Any, x: Slice, y: Slice, **options: Any) -> None:
        weight = plain(norm.g.detach().flatten().double() * norm.g.numel() ** 0.5)
        self.layers.append(layers.RMSNorm(name, weight, x, y, rms_blocks.EPS, **options))

    def _conv(self, name: str, conv: nn.Conv2d, x: Slice | None, y: Slice, **options: Any) -> None:
        self.layers.append(Conv(name, *_weights(conv), x, y, silu=False, **options))

    def _linear(self, name: str, conv: nn.Conv2d, x: Slice, y: Slice, residual: Slice | None = None) -> None:
        weight, bias = _weights(conv)
        self.layers.append(Linear(name, weight.flatten(1), bias, x, y, residual))

    # -- time -----------------------------------------------------------------------------------------------------

    def _time_columns(self, linear: nn.Linear) -> int:
        """The first column of this block's projection."""
        first = self.columns
        self.linears.append(linear)
        self.columns += linear.out_features
        return first

    def _time(self) -> TimeTable:
        features, first, _, second = self.model.time_mlp
        weight = torch.cat([plain(linear.weight) for linear in self.linears])
        bias = torch.cat([plain(linear.bias) for linear in self.linears])
        mlp = (*_weights(first), *_weights(second))
        own = copy.deepcopy(features).float().requires_grad_(False)
        frequencies = tuple(parameter.detach() for parameter in own.parameters())  # the same memory
        return TimeTable(weight, bias, own, mlp=mlp, mlp_act="gelu", feature_weights=frequencies)


def _stages(stages: nn.ModuleList) -> list[Any]:
    """Their four parts each. (Type checkers know a ModuleList's contents as Modules only.)"""
    return [*stages]


def _own(use: str, channels: int, level: int) -> Slice:
    """All of the buffer for this use and shape."""
    return whole(f"{use} {channels} at {level}", channels, level)


def _like(part: Slice, use: str) -> Slice:
    """The buffer for this use in the shape of a slice."""
    return _own(use, part.channels, part.buffer.level)


def _all(buffer: Buffer) -> Slice:
    return Slice(buffer, 0, buffer.channels)


def _lower(buffer: Buffer, channels: int) -> Slice:
    return Slice(buffer, 0, channels)


def _upper(buffer: Buffer, channels: int) -> Slice:
    return Slice(buffer, buffer.channels - channels, channels)


def _weights(part: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias in float32, copied; zeros for a bias that is not there."""
    weight = plain(part.weight)
    return weight, weight.new_zeros(len(weight)) if part.bias is None else plain(part.bias)
