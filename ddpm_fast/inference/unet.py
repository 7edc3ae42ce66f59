"""`ddpm_fast.nn.UNet` as a `Network`."""

from __future__ import annotations

import torch
from torch import nn

from ..nn import ConvBlock, TimeEmbedding, UNet
from .fold import UnreadableError, conv_bn, plain
from .network import Buffer, Conv, Layer, Network, Output, Slice, TimeTable, Up, whole
from .unaltered import check_unaltered

PARTS = (
    *(UNet, ConvBlock, TimeEmbedding),
    *(nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d, nn.ConvTranspose2d, nn.Embedding),
)


def unet(model: UNet) -> Network:
    """Reads a module that `check_unet` has nothing against; it is not changed.

    At level i, of c channels, one buffer of 2c is the concatenation [up_i(x), down_i's output]: both write their half.
    Its intermediate results share a buffer with the way up, for they are never needed at the same time.
    """
    layers: list[Layer] = []
    linears: list[nn.Linear] = []
    columns = 0

    def block(name: str, part: nn.Module, source: Slice | None, half: Slice, out: Slice, pooled: Slice | None) -> None:
        """conv1 -> half, conv2 -> out (and pooled)."""
        nonlocal columns
        assert isinstance(part, ConvBlock)
        weight, bias = conv_bn(part.conv1, part.norm1)
        layers.append(Conv(f"{name}.conv1", weight, bias, source, half, temb=columns))
        weight, bias = conv_bn(part.conv2, part.norm2)
        layers.append(Conv(f"{name}.conv2", weight, bias, half, out, pooled=pooled))
        linears.append(part.time_mlp)
        columns += part.time_mlp.out_features

    widths = [model.width << level for level in range(model.depth + 1)]
    joined = [Buffer(f"joined{level}", 2 * c, level) for level, c in enumerate(widths[:-1])]
    between = [whole(f"between{level}", c, level) for level, c in enumerate(widths)]

    source: Slice | None = None
    for level, c in enumerate(widths[:-1]):
        skip = Slice(joined[level], c, c)
        pooled = whole(f"pooled{level + 1}", c, level + 1)
        name = f"down{level + 1}"
        block(name, model.get_submodule(name), source, between[level], skip, pooled)
        source = pooled
    below = whole(f"result{model.depth}", widths[-1], model.depth)
    block("bottleneck", model.bottleneck, source, between[-1], below, None)
    for level in reversed(range(model.depth)):
        c = widths[level]
        name = f"up{level + 1}"
        up = model.get_submodule(name)
        assert isinstance(up, nn.ConvTranspose2d)
        assert up.bias is not None
        layers.append(Up(name, plain(up.weight), plain(up.bias), below, Slice(joined[level], 0, c)))
        below = whole(f"result{level}", c, level)
        name = f"conv_up{level + 1}"
        both = Slice(joined[level], 0, 2 * c)
        block(name, model.get_submodule(name), both, between[level], below, None)
    assert model.output.bias is not None
    layers.append(Output("output", plain(model.output.weight), plain(model.output.bias), below))
    return Network(tuple(layers), model.in_channels, 1 << model.depth, _time(model, linears))


def _time(model: UNet, linears: list[nn.Linear]) -> TimeTable:
    weight = torch.cat([plain(linear.weight) for linear in linears])
    bias = torch.cat([plain(linear.bias) for linear in linears])
    if model.num_classes is None:
        return TimeTable(weight, bias, model.time_embedding)
    # W (features + e) + b = (W features + b) + W e
    labels = plain(model.label_embedding.weight.detach().double() @ weight.double().T)
    return TimeTable(weight, bias, model.time_embedding, labels, model.null_label)


def check_unet(model: UNet) -> None:
    """UnreadableError where a UNet is no longer what its class made it, or normalises by the batch."""
    for name, part in model.named_modules():
        if isinstance(part, nn.BatchNorm2d) and (part.running_mean is None or part.running_var is None):
            raise UnreadableError(f"{name} has no running statistics: it normalises by the batch and cannot be folded")
    check_unaltered(model, UNet(**model.config, device=torch.device("meta")), PARTS)  # type: ignore[arg-type]
