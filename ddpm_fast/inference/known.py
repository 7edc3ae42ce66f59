"""Which models a plan can be read from: a check and a reader per class, to be extended here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn import DDPMUNet, RMSNormUNet, UNet
from .ddpm_unet import check_ddpm_unet, ddpm_unet
from .fold import UnreadableError
from .network import Network
from .rms_unet import check_rms_unet, rms_unet
from .unaltered import check_untouched
from .unet import check_unet, unet

Check = Callable[[Any], None]
Reader = Callable[[Any], Network]
KNOWN: dict[type, tuple[Check, Reader]] = {
    UNet: (check_unet, unet),
    DDPMUNet: (check_ddpm_unet, ddpm_unet),
    RMSNormUNet: (check_rms_unet, rms_unet),
}

# Classes of other packages, by name: what makes one of KNOWN of them, imported when such a model comes along.
CONVERTED = {
    "diffusers.models.unets.unet_2d.UNet2DModel": ("ddpm_fast.interop._unets", "from_diffusers"),
    "ddpm_fast.interop._unet2d.UNet2DModel": ("ddpm_fast.interop._unets", "from_diffusers"),
    "ddpm_fast.interop._openai_unet.UNetModel": ("ddpm_fast.interop._openai_unet", "twin"),
    "denoising_diffusion_pytorch.denoising_diffusion_pytorch.Unet": (
        "ddpm_fast.interop._lucidrains_unet",
        "from_lucidrains",
    ),
}


def reader_of(model: object) -> Reader:
    """What reads this model. UnreadableError, a TypeError, for a class that is not known or an object that was altered.

    The class itself is asked for: a subclass may have another forward.
    """
    name = _name(type(model))
    if name in CONVERTED:
        assert isinstance(model, nn.Module)
        check_untouched(model)
        reader_of(_converted(model))
        return lambda other: read(_converted(other))
    if type(model) not in KNOWN:
        names = ", ".join([*map(_name, KNOWN), *(name for name in CONVERTED if not name.startswith("ddpm_fast"))])
        raise UnreadableError(
            f"no fused plan is known for {type(model).__name__}; known are exactly: {names}. "
            "Run the model as it is, or torch.compile(model)"
        )
    check, reader = KNOWN[type(model)]
    check(model)
    return reader


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _converted(model: nn.Module) -> nn.Module:
    """One of KNOWN with the model's weights."""
    module, function = CONVERTED[_name(type(model))]
    try:
        result: nn.Module = getattr(importlib.import_module(module), function)(model)
    except ValueError as error:  # blocks or layers that it does not know
        raise UnreadableError(f"no fused plan covers this {type(model).__name__}: {error}") from None
    return result


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
