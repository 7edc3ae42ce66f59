"""`load_diffusion`: a checkpoint of lucidrains' package as a GaussianDiffusion, its schedule and objective checked."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..nn import RMSNormUNet
from ..schedule import Schedule
from ._lucidrains_diffusion import GaussianDiffusion
from ._lucidrains_learned import LearnedGaussianDiffusion, WeightedObjectiveGaussianDiffusion
from ._lucidrains_schedule import SAME, objective_of, schedule_of
from ._lucidrains_unet import BUFFERS, load_unet
from ._weights import read_file

UNET_ARGUMENTS = frozenset(inspect.signature(RMSNormUNet).parameters)


def load_diffusion(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    image_size: int | Sequence[int],
    ema: bool = True,
    **arguments: Any,
) -> GaussianDiffusion:
    """The GaussianDiffusion in a checkpoint of the package, with its Unet, in eval mode.

    Args:
        source: a file, .pt (read as weights only) or .safetensors, or what it holds: what Trainer saves (`model-N.pt`)
            or the state dict of a GaussianDiffusion.
        image_size: H = W, or (H, W); it leaves no trace in a checkpoint.
        ema: of a Trainer's file the averaged weights; False: those being trained.
        arguments: of `GaussianDiffusion` (sampling_timesteps, loss_type, ...) and of `Unet`, where the defaults are not
            meant. timesteps, the schedule and the objective follow from the buffers; an objective that is given must be
            the one whose loss weights were saved.

    A Unet with twice the channels out makes a LearnedGaussianDiffusion, one with two more a
    WeightedObjectiveGaussianDiffusion. Raises FileNotFoundError or ValueError as `load_unet` does.
    """
    if isinstance(source, Mapping):
        found, name = dict(source), "the state dict"
    else:
        found, name = read_file(Path(source)) if Path(source).is_file() else {}, str(source)
    of_unet = {key: value for key, value in arguments.items() if key in UNET_ARGUMENTS}
    model = load_unet(found or source, ema=ema, **of_unet)  # says what is wrong with a file that is missing
    buffers = _buffers(found, name, ema)
    rest = {key: value for key, value in arguments.items() if key not in UNET_ARGUMENTS}
    betas = buffers["betas"]
    if rest.setdefault("timesteps", len(betas)) != len(betas):
        raise ValueError(f"{name} has {len(betas)} timesteps, got timesteps={rest['timesteps']}")
    if "beta_schedule" not in rest:
        rest["beta_schedule"] = _name_of(betas)
    make = _class_of(model.channels, model.out_dim, name)
    if make is GaussianDiffusion:
        rest["objective"] = _objective(buffers, rest.get("objective"), name)
    diffusion = make(model, image_size=image_size, **rest)
    diffusion.load_state_dict({**buffers, **{f"model.{key}": value for key, value in model.state_dict().items()}})
    return diffusion.eval()


def _buffers(found: Mapping[str, Any], name: str, ema: bool) -> dict[str, Tensor]:
    """The thirteen buffers beside the network, each of one length; ValueError naming the one that is not so."""
    state: Mapping[str, Any] = found
    if isinstance(found.get("model"), Mapping):
        prefix, state = ("ema_model.", found["ema"]) if ema else ("", found["model"])
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    missing = [key for key in BUFFERS if key not in state]
    if len(missing) == len(BUFFERS):
        raise ValueError(f"{name} holds a network and no GaussianDiffusion; load_unet loads it")
    if missing:
        raise ValueError(f"{name} holds no GaussianDiffusion of version 2: {missing[0]} is missing")
    buffers = {key: state[key] for key in BUFFERS}
    for key, value in buffers.items():
        if value.dim() != 1 or value.shape != buffers["betas"].shape or not len(value):
            raise ValueError(f"{name}: {key} must have shape {tuple(buffers['betas'].shape)}, got {tuple(value.shape)}")
    return buffers


def _class_of(channels: int, out_dim: int, name: str) -> type[GaussianDiffusion]:
    known = {
        channels: GaussianDiffusion,
        2 * channels: LearnedGaussianDiffusion,
        2 * channels + 2: WeightedObjectiveGaussianDiffusion,
    }
    if out_dim not in known:
        raise ValueError(f"{name}: no class is for a Unet of {channels} channels and out_dim {out_dim}")
    return known[out_dim]


def _name_of(betas: Tensor) -> str:
    """The schedule by its default arguments that these are the betas of; any other follows from the betas alone."""
    given = betas.detach().cpu().double().numpy()
    for name in ("linear", "cosine"):
        if (name == "cosine" or len(given) > 20) and np.allclose(
            given, schedule_of(name, len(given), {}).betas, rtol=SAME, atol=0.0
        ):
            return name
    return "sigmoid"


def _objective(buffers: Mapping[str, Tensor], given: str | None, name: str) -> str:
    """The objective whose loss weights were saved, which must be the given one, if one was given."""
    found = objective_of(buffers["loss_weight"], Schedule.from_betas(buffers["betas"]).snr)
    if found is None:
        if given is None:
            raise ValueError(f"{name}: loss_weight is that of no objective; say which it is, objective=")
        return given
    if given is not None and given != found[0]:
        raise ValueError(f"{name} was trained with objective {found[0]!r}, as its loss_weight says, got {given!r}")
    return found[0]
