"""`ddpm_fast.nn.UNet` as a `Network`."""

from __future__ import annotations

import torch
from torch import nn

from ..nn import ConvBlock, TimeEmbedding, UNet
from .fold import UnreadableError, conv_bn, plain
from .network import Buffer, Conv, Layer, Network, Output, Slice, TimeTable, Up

PARTS = (
    *(UNet, ConvBlock, TimeEmbedding),
    *(nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d, nn.ConvTranspose2d, nn.Embedding),
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


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
    between = [_all(f"between{level}", c, level) for level, c in enumerate(widths)]

    source: Slice | None = None
    for level, c in enumerate(widths[:-1]):
        skip = Slice(joined[level], c, c)
        pooled = _all(f"pooled{level + 1}", c, level + 1)
        name = f"down{level + 1}"
        block(name, model.get_submodule(name), source, between[level], skip, pooled)
        source = pooled
    below = _all(f"result{model.depth}", widths[-1], model.depth)
    block("bottleneck", model.bottleneck, source, between[-1], below, None)
    for level in reversed(range(model.depth)):
        c = widths[level]
        name = f"up{level + 1}"
        up = model.get_submodule(name)
        assert isinstance(up, nn.ConvTranspose2d)
        assert up.bias is not None
        layers.append(Up(name, plain(up.weight), plain(up.bias), below, Slice(joined[level], 0, c)))
        below = _all(f"result{level}", c, level)
        name = f"conv_up{level + 1}"
        whole = Slice(joined[level], 0, 2 * c)
        block(name, model.get_submodule(name), whole, between[level], below, None)
    assert model.output.bias is not None
    layers.append(Output("output", plain(model.output.weight), plain(model.output.bias), below))
    return Network(tuple(layers), model.in_channels, 1 << model.depth, _time(model, linears))


def _all(name: str, channels: int, level: int) -> Slice:
    return Slice(Buffer(name, channels, level), 0, channels)


def _time(model: UNet, linears: list[nn.Linear]) -> TimeTable:
    weight = torch.cat([plain(linear.weight) for linear in linears])
    bias = torch.cat([plain(linear.bias) for linear in linears])
    if model.num_classes is None:
        return TimeTable(weight, bias, model.time_embedding)
    # W (features + e) + b = (W features + b) + W e
    labels = plain(model.label_embedding.weight.detach().double() @ weight.double().T)
    return TimeTable(weight, bias, model.time_embedding, labels, model.null_label)


FORM = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "time_dim")


def _form(part: nn.Module) -> tuple[object, ...]:
    """What decides what a part computes, besides the values of its tensors and a BatchNorm's eps."""
    own = {**part._parameters, **part._buffers}
    shapes = [(name, None if tensor is None else tensor.shape) for name, tensor in own.items()]
    return (*(getattr(part, name, None) for name in FORM), sorted(shapes, key=lambda item: item[0]))


def check_unet(model: UNet) -> None:
    """UnreadableError where a UNet is no longer what its class made it.

    A plan runs what `UNet.forward` says: hooks, other parts or another forward would be passed over in silence.
    """
    for name, part in model.named_modules():
        where = name or "the model"
        if type(part) not in PARTS:
            raise UnreadableError(f"{where} is a {type(part).__name__}, which is no part of a UNet")
        if any(getattr(part, hooks) for hooks in HOOKS):
            raise UnreadableError(f"{where} has forward hooks, which a plan would not call")
        if "forward" in vars(part):
            raise UnreadableError(f"the forward of {where} was replaced")
        if isinstance(part, nn.BatchNorm2d) and (part.running_mean is None or part.running_var is None):
            raise UnreadableError(f"{where} has no running statistics: it normalises by the batch and cannot be folded")
    fresh = UNet(**model.config, device=torch.device("meta"))  # type: ignore[arg-type]
    for name, expected in fresh.named_modules():
        try:
            own = model.get_submodule(name)
        except AttributeError:
            raise UnreadableError(f"{name} is missing") from None
        if type(own) is not type(expected) or _form(own) != _form(expected):
            raise UnreadableError(f"{name} is {own}, where a UNet of {model.config} has {expected}")
