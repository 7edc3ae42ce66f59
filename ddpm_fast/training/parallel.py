"""One network in several processes: each has a copy, and the copies' gradients are averaged as backward makes them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .data import Data
from .processes import World
from .settings import Settings


def parallel(model: nn.Module, world: World, *, compile: bool, sync_batchnorm: bool) -> Callable[..., Any]:
    """What is called in `model`'s stead in training: itself, compiled if asked, and in several processes under
    DistributedDataParallel. The slices of a batch are equal, so that the mean of the copies' gradients is the gradient
    of the batch's mean loss.

    Buffers are not exchanged: BatchNorm's running statistics are each process's own, and those of process 0 are saved,
    unless sync_batchnorm makes them one, see `sync_batchnorm.convert`.
    """
    if sync_batchnorm and world.size > 1:
        from .sync_batchnorm import convert  # imports torch's compiler, which takes a second or two

        # Under torch.compile two processes were seen, rarely, to wait for each other in such a layer for good.
        if compile and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
            raise ValueError(
                "compile=True does not go with sync_batchnorm=True in several processes; leave one of them out"
            )
        convert(model, world)
    network: Any = torch.compile(model) if compile else model
    if world.size == 1:
        return network  # type: ignore[no-any-return]
    wrapper: Any = nn.parallel.DistributedDataParallel
    new_name = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # torch 2.13
    with world.contact():
        network = wrapper(
            network,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{"forward_sync_buffers" if new_name else "broadcast_buffers": False},
        )
    return network  # type: ignore[no-any-return]


def averaging(network: Callable[..., Any], last: bool) -> contextlib.AbstractContextManager[Any]:
    """The context of a micro-batch's forward and backward pass: the gradients are averaged after the step's last."""
    if last or not isinstance(network, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()


def check_used(model: nn.Module) -> None:
    """After a backward pass: ValueError naming parameters that had no part in it. The processes would wait for their
    gradients in vain.
    """
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if idle:
        names = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
        raise ValueError(
            f"with several processes every parameter must have a part in the loss, and these have none: {names}; "
            "freeze them (requires_grad_(False)) or take them out of the model"
        )


def check_agreed(world: World, settings: Settings, data: Data) -> None:
    """ValueError, in all processes, unless all were given the same settings and data; it names what differs."""
    if world.size == 1:
        return
    ours = {**settings.deciding(), "images": settings.images, "accumulate": settings.accumulate}
    ours["data"] = f"{len(data)} images, {data.fingerprint()}"
    theirs = world.from_main(ours)
    wrong = [
        f"{name} is {value!r}, in process 0 {theirs[name]!r}" for name, value in ours.items() if value != theirs[name]
    ]
    if world.any(bool(wrong)):
        found = "; ".join(wrong) if wrong else "another one says which"
        raise ValueError(f"all processes must be given the same settings and data; in process {world.rank}: {found}")
