"""Checkpoints of a training run: RUN/checkpoints/checkpoint-{images_seen}.safetensors, and what is built from one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MLP, DDPMUNet, RMSNormUNet, UNet
from ..schedule import Schedule
from .checkpoint_file import (
    Checkpoint,
    NewerFormat,
    check,
    file_name,
    latest,
    newest_first,
    prune,
    read,
    read_header,
    remove_temporaries,
    whole,
    write,
)
from .tensor_file import BrokenFile

__all__ = [
    "BrokenFile",
    "Checkpoint",
    "Loaded",
    "NewerFormat",
    "check",
    "check_fits",
    "file_name",
    "find",
    "latest",
    "load_network",
    "network_config",
    "newest_first",
    "prune",
    "read",
    "read_header",
    "remove_temporaries",
    "whole",
    "write",
]

FOLDER = "checkpoints"  # in a run's folder
KINDS: dict[str, type[nn.Module]] = {"UNet": UNet, "DDPMUNet": DDPMUNet, "RMSNormUNet": RMSNormUNet, "MLP": MLP}
_SHOWN = 3  # keys named in a message before "and 17 more"


@dataclass(frozen=True)
class Loaded:
    """A network out of a checkpoint, in eval mode, and what is needed to sample from it.

    ema: whether its weights are the averaged ones. shape: of one sample, (C, H, W) or (D,).
    """

    network: nn.Module
    schedule: Schedule
    prediction: str
    shape: tuple[int, ...]
    config: dict[str, Any]
    state: dict[str, Any]
    path: Path
    checksum: str
    ema: bool


def find(place: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by a file, by a run's folder or by a folder of checkpoints: the newest whole one.

    Raises FileNotFoundError saying what was looked for.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no {path}: a checkpoint (.safetensors) or a run's folder was expected there")
    for folder in (path / FOLDER, path):
        found = latest(folder)
        if found is not None:
            return found
    raise FileNotFoundError(f"no checkpoint in {path / FOLDER} or {path}: looked for whole .safetensors files")


def network_config(model: nn.Module) -> dict[str, Any]:
    """{"kind", "options"} of a network: ours by class name and `config`, others by module and class name alone."""
    for kind, known in KINDS.items():
        if type(model) is known:
            return {"kind": kind, "options": dict(model.config)}  # type: ignore[arg-type]
    return {"kind": f"{type(model).__module__}.{type(model).__qualname__}", "options": None}


def load_network(
    place: str | os.PathLike[str],
    *,
    ema: bool = True,
    device: torch.device | str = "cpu",
    model: nn.Module | None = None,
) -> Loaded:
    """The network in a checkpoint with its weights, in eval mode.

    Args:
        place: a checkpoint, or a run's folder (the newest whole checkpoint).
        ema: the averaged weights, where the run keeps them; else the trained ones (`Loaded.ema` says which).
        device: where the network goes.
        model: a network of that architecture to load into; needed where it is of a class that is not ddpm_fast's.

    Raises FileNotFoundError; ValueError for a broken file, a network that cannot be built, or a model that does not
    fit. `model` is changed only when everything is right.
    """
    path = find(place)
    header = read_header(path)
    part = "ema." if ema and any(key.startswith("ema.") for key in header.keys) else "model."
    found = read(path, wanted=lambda name: name.startswith((part, "schedule.")))
    network = _build(path, header.config) if model is None else getattr(model, "_orig_mod", model)  # torch.compile's
    weights = found.part(part[:-1])
    check_fits(weights, network.state_dict(), path)
    network.load_state_dict(weights)
    try:
        schedule = Schedule(found.tensors["schedule.betas"], label=found.config["schedule"]["label"])
        prediction, shape = str(found.config["training"]["prediction"]), tuple(found.config["data"]["shape"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say {error}, which sampling needs") from None
    return Loaded(
        network.to(device).eval(),
        schedule,
        prediction,
        shape,
        found.config,
        found.state,
        path,
        found.checksum,
        part == "ema.",
    )


def _build(path: Path, config: dict[str, Any]) -> nn.Module:
    network = config.get("network") or {}
    kind, options = network.get("kind"), network.get("options")
    if kind not in KINDS or not isinstance(options, dict):
        raise ValueError(
            f"{path} holds a network of the class {kind}, which ddpm_fast cannot build by itself; pass model=, one of "
            f"that class (known are {', '.join(KINDS)})"
        )
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # first weights are drawn; the user's generator stays
        return KINDS[kind](**options)


def check_fits(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: object) -> None:
    """ValueError naming the first keys, shapes and dtypes in which a state dict is not the expected one."""
    wrong = [f"{key} is missing" for key in expected if key not in weights]
    wrong += [f"{key} is not in the model" for key in weights if key not in expected]
    for key, have in expected.items():
        value = weights.get(key, have)
        if value.shape != have.shape:
            wrong.append(f"{key} has shape {tuple(value.shape)}, the model's has {tuple(have.shape)}")
        elif value.dtype != have.dtype:
            wrong.append(f"{key} is {value.dtype}, the model's is {have.dtype}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{source} is of another model: {'; '.join(wrong[:_SHOWN])}{more}")
