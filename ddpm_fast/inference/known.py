"""Which models a plan can be read from: a check and a reader per class, to be extended here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn import DDPMUNet, UNet
from .ddpm_unet import check_ddpm_unet, ddpm_unet
from .fold import UnreadableError
from .network import Network
from .unet import check_unet, unet

Check = Callable[[Any], None]
Reader = Callable[[Any], Network]
KNOWN: dict[type, tuple[Check, Reader]] = {UNet: (check_unet, unet), DDPMUNet: (check_ddpm_unet, ddpm_unet)}


def reader_of(model: object) -> Reader:
    """What reads this model. UnreadableError, a TypeError, for a class that is not known or an object that was altered.

    The class itself is asked for: a subclass may have another forward.
    """
    if type(model) not in KNOWN:
        names = ", ".join(f"{known.__module__}.{known.__qualname__}" for known in KNOWN)
        raise UnreadableError(
            f"no fused plan is known for {type(model).__name__}; known are exactly: {names}. "
            "Run the model as it is, or torch.compile(model)"
        )
    check, reader = KNOWN[type(model)]
    check(model)
    return reader


def read(model: nn.Module) -> Network:
    """The model's Network, with copies of its weights. UnreadableError for what cannot be read."""
    reader = reader_of(model)
    with torch.inference_mode(False), torch.no_grad():
        return reader(model)


def unknown_reason(model: object) -> str | None:
    """Why no plan can be read from the model; None when one can."""
    try:
        reader_of(model)
    except UnreadableError as error:
        return str(error)
    return None
