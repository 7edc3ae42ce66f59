"""BatchNorm over processes: the jobs of `processes_child` that test_sync_batchnorm compares with one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.training.processes import World, share


def batchnorm(world: World) -> dict[str, Any]:
    """Every case of BATCHNORMS in every dtype, this rank's part of it."""
    return {
        f"{name}, {dtype}": batchnorm_case(world, name, dtype)
        for name in BATCHNORMS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }


# name: (layer, shape of the whole batch, mean of the values)
BATCHNORMS: dict[str, Any] = {
    "vectors": (lambda: nn.BatchNorm1d(5), (6, 5), 0.5),
    "sequences": (lambda: nn.BatchNorm1d(5), (6, 5, 7), 0.5),
    "images": (lambda: nn.BatchNorm2d(8), (8, 8, 5, 6), 0.5),
    "channels_last": (lambda: nn.BatchNorm2d(8), (8, 8, 5, 6), 0.5),
    "unequal shares": (lambda: nn.BatchNorm2d(8), (7, 8, 5, 6), 0.5),
    "one image each": (lambda: nn.BatchNorm2d(8), (2, 8, 3, 3), 0.5),
    "far from zero": (lambda: nn.BatchNorm2d(8), (8, 8, 16, 16), 30.0),
    "volumes": (lambda: nn.BatchNorm3d(4), (4, 4, 3, 2, 5), 0.5),
    "without weights": (lambda: nn.BatchNorm2d(8, affine=False), (8, 8, 5, 6), 0.5),
    "without running statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), (8, 8, 5, 6), 0.5),
    "running average": (lambda: nn.BatchNorm2d(8, momentum=None), (8, 8, 5, 6), 0.5),
}


def batchnorm_case(world: World, name: str, dtype: torch.dtype, exact: bool = False) -> dict[str, Tensor]:
    """Two batches through a layer, forward and backward: outputs, gradients, buffers.

    Weights are as in mixed precision: float32 under bf16 images. exact: the same numbers, computed in float64.
    """
    make, shape, centre = BATCHNORMS[name]
    generator = torch.Generator().manual_seed(7)
    layer = make().to(torch.float64 if exact else torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if world.size > 1:
        from ddpm_fast.training.sync_batchnorm import convert

        convert(layer, world)
    first, last = share(shape[0], world.rank, world.size)
    got: dict[str, Tensor] = {}
    for step in range(2):
        whole = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        x, dy = (part.to(dtype)[first:last] for part in (centre + whole[0] * (2 + step), whole[1]))
        if exact:
            x, dy = x.double(), dy.double()
        if name == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        y = layer(x)
        y.backward(dy)
        got |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
        assert y.dtype == x.dtype
        assert y.stride() == x.stride()
    got |= {f"d{key}": parameter.grad for key, parameter in layer.named_parameters()}  # of both steps
    return got | dict(layer.named_buffers())


def batchnorm_calls(world: World) -> dict[str, Any]:
    """How often a network of three layers waits for the others in a forward and a backward pass."""
    from ddpm_fast.training import sync_batchnorm
    from ddpm_fast.training.sync_batchnorm import convert

    network = nn.Sequential(nn.Linear(3, 4), *(nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()) for _ in range(3)))
    keys = list(network.state_dict())
    converted = convert(network, world)
    calls, plain = [], World.sum

    def counted(self: World, tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return plain(self, tensor)

    World.sum = counted  # type: ignore[method-assign]
    try:
        y = network(torch.ones(2, 3) * torch.arange(2)[:, None])
        forward = len(calls)
        y.sum().backward()
    finally:
        World.sum = plain  # type: ignore[method-assign]
    same_keys = list(network.state_dict()) == keys
    network.eval()
    alone = network(torch.full((1, 3), float(world.rank))) if world.rank == 0 else None  # nobody to wait for
    sync_batchnorm.revert(network)
    kinds = {type(part) for part in network.modules()} - {nn.Sequential, nn.Linear, nn.SiLU}
    return {
        "converted": converted,
        "keys": same_keys,
        "forward": forward,
        "both": len(calls) - forward,
        "alone": alone is None or bool(alone.isfinite().all()),
        "reverted": kinds == {nn.BatchNorm1d},
    }
