"""The network and the schedule that a configuration asks for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..nn import DDPMUNet, RMSNormUNet, UNet
from ..schedule import Schedule
from . import config
from .errors import CommandError

KINDS: dict[str, type[nn.Module]] = {"unet": UNet, "ddpm": DDPMUNet, "rms": RMSNormUNet}
WITHOUT_LABELS = ("rms",)
"""Networks that know no classes."""
WITH_NULL_LABEL = ("unet",)
"""Networks with a label that means "none", which label dropout needs; auto makes these class-conditional."""

_FROM_DATA = {
    "unet": ("in_channels", "num_classes", "device"),
    "ddpm": ("in_channels", "out_channels", "sample_size", "num_class_embeds"),
    "rms": ("channels", "out_dim", "learned_variance"),
}
_MOST_HALVINGS = {"unet": 4, "rms": 3}  # the default network's


def build_network(
    model: config.Model, shape: tuple[int, ...], classes: int | None, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The network for images of a shape (C, H, W), its weights drawn from the seed, and its options in full.

    A network whose number of halvings is not given has as many as the images allow, up to the class's default.
    CommandError for options that do not exist, or that images of this shape cannot be given to.
    """
    kind, cls = model.kind, KINDS[model.kind]
    if len(shape) != 3:
        raise CommandError(f"--model {kind} is for images (C, H, W), and the data has shape {shape}")
    known = [name for name in inspect.signature(cls).parameters if name not in _FROM_DATA[kind]]
    for name in model.options:
        if name in _FROM_DATA[kind]:
            raise CommandError(f"--model-options {name} is not for choosing: the data and what is trained decide it")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise CommandError(f"--model-options {name}: no such option of --model {kind}; {hint}")
    channels, (height, width) = shape[0], shape[1:]
    options = {**_fitting(kind, height, width, model.options), **model.options}
    given: dict[str, dict[str, Any]] = {
        "unet": {"in_channels": channels, "num_classes": classes},
        "ddpm": {
            "in_channels": channels,
            "out_channels": channels,
            "sample_size": (height, width),
            "num_class_embeds": classes,
        },
        "rms": {"channels": channels},
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = cls(**options, **given[kind])
    except (TypeError, ValueError) as error:
        raise CommandError(f"--model-options: {error}") from error
    _check_size(network, height, width)
    return network, options


def _fitting(kind: str, height: int, width: int, options: dict[str, Any]) -> dict[str, Any]:
    """What the class has no default for, or one that images of this size need not fit."""
    if kind == "ddpm":
        return {}
    halvings = _MOST_HALVINGS[kind]
    while halvings and (height % (1 << halvings) or width % (1 << halvings)):
        halvings -= 1
    if kind == "unet":
        return {} if "depth" in options else {"depth": max(1, halvings)}
    return {"dim": 64, "dim_mults": tuple(1 << i for i in range(halvings + 1))}


def _check_size(network: nn.Module, height: int, width: int) -> None:
    """CommandError for images that the network cannot halve so often."""
    if isinstance(network, UNet):
        factor = 1 << network.depth
    elif isinstance(network, RMSNormUNet):
        factor = network.downsample_factor
    else:
        assert isinstance(network, DDPMUNet)
        factor = 1 << (len(network.config["block_out_channels"]) - 1)
    if height % factor or width % factor:
        near = max(factor, -(-max(height, width) // factor) * factor)
        raise CommandError(
            f"this network halves images {factor.bit_length() - 1} times, and {height}x{width} is no multiple of "
            f"{factor}; choose --image-size {near}, or fewer levels"
        )


def build_schedule(chosen: config.Schedule) -> Schedule:
    """The noising. CommandError for a name or options that there are not."""
    makers: dict[str, Callable[..., Schedule]] = {name: getattr(Schedule, name) for name in Schedule.names()}
    if chosen.name in makers:
        known = [name for name in inspect.signature(makers[chosen.name]).parameters if name != "T"]
        for name in chosen.options:
            if name not in known:
                raise CommandError(f"--schedule-options {name}: {chosen.name} has {', '.join(known) or 'none'}")
    try:
        schedule = Schedule.named(chosen.name, chosen.timesteps, **chosen.options)
        return schedule.rescale_zero_terminal_snr() if chosen.zero_terminal_snr else schedule
    except (TypeError, ValueError) as error:
        raise CommandError(f"--schedule: {error}") from error
