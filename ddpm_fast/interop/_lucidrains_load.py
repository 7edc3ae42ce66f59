"""`load_diffusion`: a checkpoint of lucidrains' package as a GaussianDiffusion, its schedule and objective checked."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..nn import RMSNormUNet
from ..schedule import Schedule
from ._lucidrains_diffusion import GaussianDiffusion
from ._lucidrains_learned import LearnedGaussianDiffusion, WeightedObjectiveGaussianDiffusion
from ._lucidrains_schedule import SAME, SCHEDULES, objective_of, schedule_of
from ._lucidrains_unet import BUFFERS, load_unet, unet_of, unwrapped
from ._weights import read_file

EXACT = (torch.float32, torch.float64)  # what a schedule can be read from
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
            the one whose loss weights were saved. Buffers in half precision only tell which schedule it is.

    A Unet with twice the channels out makes a LearnedGaussianDiffusion, one with two more a
    WeightedObjectiveGaussianDiffusion. Raises FileNotFoundError or ValueError as `load_unet` does.
    """
    if isinstance(source, Mapping):
        found, name = dict(source), "the state dict"
    else:
        found, name = read_file(Path(source)) if Path(source).is_file() else {}, str(source)
    of_unet = {key: value for key, value in arguments.items() if key in UNET_ARGUMENTS}
    # load_unet says what is wrong with a file that is missing.
    model = unet_of(found, name, ema=ema, **of_unet) if found else load_unet(source, ema=ema, **of_unet)
    buffers = _buffers(found, name, ema)
    rest = {key: value for key, value in arguments.items() if key not in UNET_ARGUMENTS}
    betas = buffers["betas"]
    if rest.setdefault("timesteps", len(betas)) != len(betas):
        raise ValueError(f"{name} has {len(betas)} timesteps, got timesteps={rest['timesteps']}")
    named = _name_of(betas, rest.get("schedule_fn_kwargs") or {}, rest.get("beta_schedule"))
    rounded = betas.dtype not in EXACT
    if rounded and named is None:
        raise ValueError(
            f"{name} holds its schedule in {betas.dtype}, too coarse to go by, and it is no default one; pass the "
            "beta_schedule and schedule_fn_kwargs that it was trained with"
        )
    rest.setdefault("beta_schedule", named or "sigmoid")
    make = _class_of(model.channels, model.out_dim, name)
    if make is GaussianDiffusion:
        used = schedule_of(named, len(betas), rest.get("schedule_fn_kwargs") or {}) if rounded and named else None
        rest["objective"], gamma = _objective(
            buffers["loss_weight"], used or Schedule.from_betas(betas), rest.get("objective"), name
        )
        if rounded and gamma is not None:
            rest |= {"min_snr_loss_weight": True, "min_snr_gamma": gamma}
    diffusion = make(model, image_size=image_size, **rest)
    if rounded:  # the schedule by its name is the better one
        return diffusion.eval()
    diffusion.load_state_dict({**buffers, **{f"model.{key}": value for key, value in model.state_dict().items()}})
    return diffusion.eval()


def _buffers(found: Mapping[str, Any], name: str, ema: bool) -> dict[str, Tensor]:
    """The thirteen buffers beside the network, each of one length; ValueError naming the one that is not so."""
    state: Mapping[str, Any] = found
    if isinstance(found.get("model"), Mapping):
        prefix, state = ("ema_model.", found["ema"]) if ema else ("", found["model"])
        state = {str(key)[len(prefix) :]: value for key, value in state.items() if str(key).startswith(prefix)}
    state = unwrapped(state)
    missing = [key for key in BUFFERS if key not in state]
    if len(missing) == len(BUFFERS):
        raise ValueError(f"{name} holds a network and no GaussianDiffusion; load_unet loads it")
    if missing:
        raise ValueError(f"{name} holds no GaussianDiffusion of version 2: {missing[0]} is missing")
    buffers = {key: state[key] for key in BUFFERS}
    for key, value in buffers.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must hold tensors by name, got {type(value).__name__} under {key!r}")
        if buffers["betas"].dim() != 1 or not len(buffers["betas"]):
            raise ValueError(f"{name}: betas must have shape (T,), got {tuple(buffers['betas'].shape)}")
        if value.dim() != 1 or value.shape != buffers["betas"].shape:
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


def _name_of(betas: Tensor, options: Mapping[str, Any], given: str | None) -> str | None:
    """The schedule, of these arguments or the default ones, that these are the betas of; None: of none that is known.

    given: the only one to be tried.
    """
    found, precision = betas.detach().cpu().double().numpy(), torch.finfo(betas.dtype)
    rtol, atol = SAME, 0.0
    if betas.dtype not in EXACT:
        rtol, atol = precision.eps, precision.tiny * precision.eps
    for name in SCHEDULES if given is None else (given,):
        if name == "linear" and len(found) < 20:
            continue  # its betas would exceed 1
        if np.allclose(found, schedule_of(name, len(found), options).betas, rtol=rtol, atol=atol):
            return name
    return None


def _objective(weight: Tensor, schedule: Schedule, given: str | None, name: str) -> tuple[str, float | None]:
    """The objective whose loss weights were saved, which must be the given one, if one was given; min-SNR's gamma."""
    found = objective_of(weight, schedule.snr)
    if found is None:
        if given is None:
            raise ValueError(f"{name}: loss_weight is that of no objective; say which it is, objective=")
        return given, None
    if given is not None and given != found[0]:
        raise ValueError(f"{name} was trained with objective {found[0]!r}, as its loss_weight says, got {given!r}")
    return found
