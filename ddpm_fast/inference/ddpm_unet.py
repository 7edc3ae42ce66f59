"""`ddpm_fast.nn.DDPMUNet` as a `Network`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import DDPMUNet
from ..nn.ddpm_blocks import Attention as AttentionBlock
from ..nn.ddpm_blocks import DownBlock, Downsample, MidBlock, ResnetBlock, Sinusoids, TimeMLP, UpBlock, Upsample
from .fold import UnreadableError, plain
from .network import Attention, Buffer, Conv, Down, Layer, Linear, Network, Norm, Output, Slice, TimeTable, Up, whole
from .unaltered import check_unaltered

PARTS = (
    *(DDPMUNet, DownBlock, MidBlock, UpBlock, ResnetBlock, AttentionBlock, Downsample, Upsample, TimeMLP, Sinusoids),
    *(nn.ModuleList, nn.Conv2d, nn.GroupNorm, nn.Linear, nn.Dropout, nn.Embedding),
)

# What a plan does not compute, and the one value of each option with which it does.
COVERED = {
    "time_embedding_type": "positional",
    "center_input_sample": False,
    "class_embed_type": None,
    "mid_block_scale_factor": 1,
}


def check_ddpm_unet(model: DDPMUNet) -> None:
    """UnreadableError for options that no plan covers, and for a network that is no longer what its class made it."""
    config = model.config
    for name, value in COVERED.items():
        if config[name] != value:
            raise UnreadableError(f"no fused plan covers {name}={config[name]!r}, only {value!r}")
    if model.act != "silu":
        raise UnreadableError(f"no fused plan covers act_fn={model.act!r}, only 'silu'")
    with torch.device("meta"):
        fresh = DDPMUNet(**config)
    check_unaltered(model, fresh, PARTS)


def ddpm_unet(model: DDPMUNet) -> Network:
    """Reads a module that `check_ddpm_unet` has nothing against; it is not changed."""
    return _Reading(model).network()


class _Reading:
    """The layers so far, and where things lie.

    Every residual block of the way up has a buffer for [what comes from below | what was kept on the way down]; both
    halves are written where they belong. What is not kept shares a buffer with everything of its shape and use, for
    none of it is needed for longer than a block.
    """

    def __init__(self, model: DDPMUNet) -> None:
        self.model = model
        self.layers: list[Layer] = []
        self.linears: list[nn.Linear] = []
        self.columns = 0

    def network(self) -> Network:
        model, kept = self.model, self._kept()
        downs, ups = _stages(model)
        joined = [place.buffer for place in reversed(kept)]
        lower = [Slice(place.buffer, 0, place.first) for place in reversed(kept)]
        at = iter(kept)
        x = next(at)
        self._conv("conv_in", model.conv_in, None, x)
        for i, stage in enumerate(downs):
            for j in range(len(stage.resnets)):
                x = self._one(f"down_blocks.{i}", stage, j, x, next(at))
            if stage.downsamplers is not None:
                x = self._down(f"down_blocks.{i}.downsamplers.0", stage.downsamplers[0], x, next(at))
        if model.mid_block is None:
            self._copy("mid_block", x, lower[0])
        else:
            self._mid(model.mid_block, x, lower[0])
        k, own = 0, _own
        for i, stage in enumerate(ups):
            for j in range(len(stage.resnets)):
                below, k = joined[k], k + 1
                source = Slice(below, 0, below.channels)
                ends = j + 1 == len(stage.resnets) and (stage.upsamplers is not None or k == len(joined))
                target = own("hidden", stage.resnets[j].conv2.out_channels, below.level) if ends else lower[k]
                x = self._one(f"up_blocks.{i}", stage, j, source, target)
            if stage.upsamplers is not None:
                self._up(f"up_blocks.{i}.upsamplers.0", stage.upsamplers[0], x, lower[k])
        normed = own("normed", x.channels, x.buffer.level)
        self._norm("conv_norm_out", model.conv_norm_out, x, normed)
        self.layers.append(Output("conv_out", *_weights(model.conv_out), normed))
        return Network(tuple(self.layers), model.in_channels, 1 << (len(model.down_blocks) - 1), self._time())

    # -- places ---------------------------------------------------------------------------------------------------

    def _kept(self) -> list[Slice]:
        """Where each thing that the way down keeps goes, in the order in which it is made."""
        downs, ups = _stages(self.model)
        made, level = [(self.model.conv_in.out_channels, 0)], 0
        for stage in downs:
            made += [(resnet.conv2.out_channels, level) for resnet in stage.resnets]
            if stage.downsamplers is not None:
                level += 1
                down = stage.downsamplers[0]
                last = down.conv2 if isinstance(down, ResnetBlock) else down.conv
                made.append((last.out_channels, level))
        takers = [resnet.norm1.num_channels for stage in ups for resnet in stage.resnets]
        result = []
        for k, ((channels, level), total) in enumerate(zip(made, reversed(takers), strict=True)):
            result.append(Slice(Buffer(f"joined{k}", total, level), total - channels, channels))
        return result

    # -- parts ----------------------------------------------------------------------------------------------------

    def _one(self, name: str, stage: Any, j: int, x: Slice, target: Slice) -> Slice:
        """A residual block and its attention."""
        if stage.attentions is None:
            return self._resnet(f"{name}.resnets.{j}", stage.resnets[j], x, target)
        before = self._resnet(f"{name}.resnets.{j}", stage.resnets[j], x, _like(target, "before"))
        return self._attention(f"{name}.attentions.{j}", stage.attentions[j], before, target)

    def _mid(self, mid: MidBlock, x: Slice, target: Slice) -> Slice:
        first, second = mid.resnets
        x = self._resnet("mid_block.resnets.0", first, x, _like(target, "before"))
        for attention in mid.attentions:
            x = self._attention("mid_block.attentions.0", attention, x, _like(target, "hidden"))
        return self._resnet("mid_block.resnets.1", second, x, target)

    def _down(self, name: str, part: nn.Module, x: Slice, target: Slice) -> Slice:
        if isinstance(part, ResnetBlock):
            return self._resnet(name, part, x, target)
        assert isinstance(part, Downsample)
        self._conv(f"{name}.conv", part.conv, x, target, resample="down", padding=part.padding)
        return target

    def _up(self, name: str, part: nn.Module, x: Slice, target: Slice) -> Slice:
        if isinstance(part, ResnetBlock):
            return self._resnet(name, part, x, target)
        assert isinstance(part, Upsample)
        self._conv(f"{name}.conv", part.conv, x, target, resample="up")
        return target

    def _resnet(self, name: str, block: nn.Module, x: Slice, target: Slice) -> Slice:
        assert isinstance(block, ResnetBlock)
        first, inner, second, residual = _like(x, "normed"), _like(target, "inner"), _like(target, "normed"), x
        modulated, column = block.time_scale_shift == "scale_shift", self._time_columns(block.time_emb_proj)
        self._norm(f"{name}.norm1", block.norm1, x, first)
        if block.resample == "down":
            first = self._halved(f"{name}.norm1.halved", first, _own("halved normed", x.channels, target.buffer.level))
            residual = self._halved(f"{name}.halved", x, _own("halved", x.channels, target.buffer.level))
        elif block.resample == "up":
            residual = _own("doubled", x.channels, target.buffer.level)
            self.layers.append(Up(f"{name}.doubled", *self._taps(x.channels, 1.0), x, residual))
        temb, resample = None if modulated else column, "up" if block.resample == "up" else "none"
        self._conv(f"{name}.conv1", block.conv1, first, inner, temb=temb, resample=resample)
        self._norm(f"{name}.norm2", block.norm2, inner, second, modulation=column if modulated else None)
        if block.conv_shortcut is not None:
            residual = _like(target, "shortcut")
            weight, bias = _weights(block.conv_shortcut)
            self.layers.append(Linear(f"{name}.conv_shortcut", weight.flatten(1), bias, x, residual))
        self._conv(f"{name}.conv2", block.conv2, second, target, residual=residual)
        return target

    def _attention(self, name: str, block: nn.Module, x: Slice, target: Slice) -> Slice:
        """q, k and v in one product."""
        assert isinstance(block, AttentionBlock)
        inner, level, normed = block.to_q.out_features, x.buffer.level, x
        if block.group_norm is not None:
            normed = _like(x, "normed")
            self._norm(f"{name}.group_norm", block.group_norm, x, normed, silu=False)
        qkv, attended = _own("qkv", 3 * inner, level), _own("attended", inner, level)
        weight, bias = _side_by_side([block.to_q, block.to_k, block.to_v])
        self.layers.append(Linear(f"{name}.to_qkv", weight, bias, normed, qkv))
        scale = (inner // block.heads) ** -0.5
        self.layers.append(Attention(f"{name}.attention", qkv, attended, block.heads, scale))
        self.layers.append(Linear(f"{name}.to_out", *_weights(block.to_out[0]), attended, target, residual=x))
        return target

    def _norm(
        self, name: str, norm: nn.GroupNorm, x: Slice, y: Slice, silu: bool = True, modulation: int | None = None
    ) -> None:
        weight, bias = _weights(norm)
        self.layers.append(Norm(name, weight, bias, x, y, norm.num_groups, norm.eps, silu, modulation))

    def _conv(self, name: str, conv: nn.Conv2d, x: Slice | None, y: Slice, **options: object) -> None:
        weight, bias = _weights(conv)
        self.layers.append(Conv(name, weight, bias, x, y, silu=False, **options))  # type: ignore[arg-type]

    def _halved(self, name: str, x: Slice, y: Slice) -> Slice:
        """The mean of every 2x2 pixels, as a convolution: every product and the sums of zeros are exact."""
        self.layers.append(Down(name, *self._taps(x.channels, 0.25), x, y))
        return y

    def _taps(self, channels: int, value: float) -> tuple[Tensor, Tensor]:
        """Weight and bias of a 2x2 kernel that takes every channel by itself, each of the four taps `value`."""
        one = torch.eye(channels, device=self.model.device) * value
        return one[:, :, None, None].repeat(1, 1, 2, 2), torch.zeros(channels, device=self.model.device)

    def _copy(self, name: str, x: Slice, y: Slice) -> None:
        """Without a mid block the same thing is kept and comes from below."""
        one = torch.eye(x.channels, device=self.model.device)
        self.layers.append(Linear(name, one, torch.zeros(x.channels, device=self.model.device), x, y))

    # -- time -----------------------------------------------------------------------------------------------------

    def _time_columns(self, linear: nn.Linear) -> int:
        """The first column of this block's projection."""
        first = self.columns
        self.linears.append(linear)
        self.columns += linear.out_features
        return first

    def _time(self) -> TimeTable:
        model, mlp = self.model, self.model.time_embedding
        weight, bias = _side_by_side(self.linears)
        labels = None if model.class_embedding is None else plain(model.class_embedding.weight)  # type: ignore[arg-type]
        both = (*_weights(mlp.linear_1), *_weights(mlp.linear_2))
        return TimeTable(weight, bias, model.time_proj, labels, None, both)


def _stages(model: DDPMUNet) -> tuple[list[Any], list[Any]]:
    """The `DownBlock`s and the `UpBlock`s. (Type checkers know a ModuleList's contents as Modules only.)"""
    return [*model.down_blocks], [*model.up_blocks]


def _own(use: str, channels: int, level: int) -> Slice:
    """All of the buffer for this use and shape."""
    return whole(f"{use} {channels} at {level}", channels, level)


def _like(part: Slice, use: str) -> Slice:
    """The buffer for this use in the shape of a slice."""
    return _own(use, part.channels, part.buffer.level)


def _side_by_side(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    pairs = [_weights(linear) for linear in linears]
    return torch.cat([weight for weight, _ in pairs]), torch.cat([bias for _, bias in pairs])


def _weights(part: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias in float32, copied; zeros for a bias that is not there."""
    weight, bias = part.weight, part.bias
    assert isinstance(weight, Tensor)
    if bias is None:
        return plain(weight), torch.zeros(weight.shape[0], device=weight.device)
    assert isinstance(bias, Tensor)
    return plain(weight), plain(bias)
