"""The arguments of a call of `Compiled`, checked before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .network import Network


def check_call(network: Network, x: Tensor, labels: Tensor | None, x_self_cond: Tensor | None = None) -> None:
    """ValueError for what the model itself would refuse, in its words, and for what a plan does not do."""
    time = network.time
    check_shape(network, tuple(x.shape))
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor, got {x.dtype}")
    if x.device != time.weight.device:
        raise ValueError(f"x must be on {time.weight.device}, where the model is, got {x.device}")
    if x.requires_grad:
        raise ValueError("x requires a gradient, which a fused plan does not compute; call the model itself")
    if x_self_cond is not None:
        _check_condition(network, x, x_self_cond)
    if labels is None:
        if time.classes is not None and time.null_label is None:
            raise ValueError(f"labels are needed: the model has {time.classes} classes and no label for none")
        return
    if time.classes is None:
        raise ValueError("labels were given to an unconditional UNet; build it with num_classes=K")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels must have shape ({x.shape[0]},), got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.device.type == "cpu":
        last = time.classes - 1
        in_range("labels", labels, last, "the last class" if time.null_label is None else "no label")


def _check_condition(network: Network, x: Tensor, x_self_cond: Tensor) -> None:
    if not network.self_condition:
        raise ValueError("x_self_cond was given to a model that was built with self_condition=False")
    if x_self_cond.shape != x.shape or not x_self_cond.is_floating_point():
        got = f"{x_self_cond.dtype} {tuple(x_self_cond.shape)}"
        raise ValueError(f"x_self_cond must be a floating tensor of x's shape {tuple(x.shape)}, got {got}")
    if x_self_cond.device != x.device:
        raise ValueError(f"x_self_cond must be on {x.device}, where x is, got {x_self_cond.device}")
    if x_self_cond.requires_grad:
        raise ValueError("x_self_cond requires a gradient, which a fused plan does not compute; call the model itself")


def check_shape(network: Network, shape: tuple[int, ...]) -> None:
    """ValueError unless shape is (N, C, H, W) with the network's channels and sides that its halvings leave whole."""
    channels, m = network.image_channels, network.divisor
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"x must have shape (N, {channels}, H, W), got {shape}")
    h, w = shape[2:]
    if h % m or w % m or not h or not w:
        fit = tuple(max(-(-size // m), 1) * m for size in (h, w))
        raise ValueError(
            f"height and width of x must be multiples of {m}, got ({h}, {w}); pad or resize to the next valid size "
            f"{fit}"
        )


def in_range(name: str, values: Tensor, most: int, meaning: str) -> None:
    """ValueError unless all values are in 0..most; meaning: what `most` stands for."""
    if values.numel():
        low, high = (int(value) for value in torch.aminmax(values))
        if low < 0 or high > most:
            raise ValueError(f"{name} must be in 0..{most} ({most} = {meaning}), got {low}..{high}")
