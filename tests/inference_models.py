"""Small U-Nets with statistics worth folding, and errors against float64, for the tests of fused plans."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast.inference import planner
from ddpm_fast.inference.known import read
from ddpm_fast.inference.network import Conv, Layer, Linear, Up


def make_unet(seed: int = 0, **arguments: Any) -> ddpm_fast.UNet:
    """A UNet in eval mode whose BatchNorms have seen something, and whose every layer shows in the output.

    With PyTorch's initial weights the signal fades on its way down: an error at the bottom would go unseen.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ddpm_fast.UNet(**{"time_dim": 32, "width": 16, "depth": 2} | arguments)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, std=0.2)
                nn.init.uniform_(part.running_var, 0.5, 2.0)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.2)
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
            if isinstance(part, nn.ConvTranspose2d):
                nn.init.normal_(part.weight, std=part.in_channels**-0.5)
    return net.eval()


def inputs(n: int, shape: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), torch.randint(0, 1000, (n,), generator=generator)


@torch.no_grad()
def exact(net: ddpm_fast.UNet, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """What the model computes in float64."""
    return copy.deepcopy(net).double()(x.double(), t, labels)


@torch.no_grad()
def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def products_of(model: nn.Module, side: int) -> list[tuple[Conv | Up | Linear, int, int, int]]:
    """(layer, side of its source, channels, columns) of a network on side x side images, no two of one sort."""
    found: dict[tuple[object, ...], tuple[Conv | Up | Linear, int, int, int]] = {}

    def numbers(layer: Layer) -> tuple[object, ...]:
        there = (getattr(layer, part, None) is not None for part in ("temb", "pooled", "residual"))
        return (type(layer), getattr(layer, "resample", None), *there)

    for layer in read(model).layers:
        if isinstance(layer, (Conv, Up, Linear)):
            up = isinstance(layer, Up)
            own = side if layer.source is None else side >> layer.source.buffer.level
            columns, channels = layer.weight.shape[int(up)], layer.weight.shape[1 - int(up)]
            found.setdefault((*numbers(layer), own, channels, columns), (layer, own, channels, columns))
    return list(found.values())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small spend their time waiting for each other's threads, on a busy machine seconds of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured_anew() -> Iterator[None]:
    """No measurement of another test is used, and none is left behind."""
    planner.forget_measurements()
    yield
    planner.forget_measurements()
