"""What `ddpm-fast sample` draws from: a run, a checkpoint or a diffusers folder, as a `Sampler`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sampler import Sampler
from ..sampling.model import attribute, sample_shape
from ..training.checkpoints import Loaded, load_network
from .errors import CommandError

PIPELINE = "model_index.json"
USUAL_STEPS = {"ddim": 50, "dpmsolver++": 20}  # what these methods are made for; ddpm takes all T
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Source:
    """A sampler, the shape of one sample, and what the manifest says of both.

    checkpoint: None for weights that are none of ours. classes: how many there are, None for an unconditional network.
    """

    sampler: Sampler
    shape: tuple[int, ...]
    described: str
    identity: dict[str, Any]
    checkpoint: Loaded | None
    classes: int | None

    @property
    def pictures(self) -> bool:
        """Whether a sample is a picture, grey or in colour."""
        return len(self.shape) == 3 and self.shape[0] in (1, 3)


def open_source(arguments: argparse.Namespace, device: torch.device) -> Source:
    """Loads what `arguments.source` names. FileNotFoundError, ValueError or CommandError for what cannot be served."""
    path = Path(arguments.source)
    if _is_pipeline(path):
        return _of_pipeline(path, arguments, device)
    loaded = load_network(path, ema=not arguments.no_ema, device=device)
    weights = "ema" if loaded.ema else "model"  # a run may keep no average
    options = _options(arguments, loaded.prediction)
    pictures = len(loaded.shape) == 3 and loaded.shape[0] in (1, 3)
    if options["clip"] is None and arguments.like is None:
        options["clip"] = 1.0 if pictures else False
    condition = loaded.config["training"].get("self_condition")
    sampler = Sampler(loaded.network, loaded.schedule, shape=loaded.shape, self_condition=condition, **options)
    _cast(sampler, options["dtype"])
    seen = int(loaded.state["images_seen"])
    identity = {"images_seen": seen, "checksum": loaded.checksum, "weights": weights}
    kind = "averaged weights" if weights == "ema" else "weights as trained, not averaged"
    described = f"{loaded.path}: {type(loaded.network).__name__} after {seen:,} images, {kind}"
    return _source(sampler, loaded.shape, described, identity, loaded)


def _of_pipeline(path: Path, arguments: argparse.Namespace, device: torch.device) -> Source:
    if arguments.no_ema:
        raise CommandError(f"--no-ema is for checkpoints of ddpm_fast; the pipeline in {path} has one set of weights")
    options = {name: value for name, value in _options(arguments, None).items() if value is not None}
    fused = options.pop("fused") or None
    sampler = Sampler.from_pretrained(path, device=device, fused=False if arguments.no_fused else fused, **options)
    assert isinstance(sampler.model, nn.Module)
    identity = {"checksum": checksum(sampler.model), "weights": "pipeline"}
    described = f"{path}: {type(sampler.model).__name__} of a diffusers pipeline"
    return _source(sampler, sample_shape(sampler.model, None), described, identity, None)


def _source(
    sampler: Sampler, shape: tuple[int, ...], described: str, identity: dict[str, Any], loaded: Loaded | None
) -> Source:
    classes = attribute(sampler.model, "num_classes")
    return Source(sampler, shape, described, identity, loaded, classes if isinstance(classes, int) else None)


def _is_pipeline(path: Path) -> bool:
    """A saved diffusers pipeline, or its network and scheduler side by side."""
    return any((path / part).is_file() for part in (PIPELINE, "unet/config.json", "config.json"))


def _options(arguments: argparse.Namespace, prediction: str | None) -> dict[str, Any]:
    """The arguments of `Sampler`, None where the command line is silent."""
    steps = arguments.steps
    if steps is None and arguments.method in USUAL_STEPS:
        steps = USUAL_STEPS[arguments.method]
    return {
        "steps": steps,
        "spacing": arguments.spacing,
        "method": arguments.method,
        "eta": arguments.eta,
        "prediction": prediction,
        "variance": arguments.variance,
        "clip": arguments.clip,
        "like": arguments.like,
        "dtype": DTYPES[arguments.dtype],
        "deterministic": arguments.deterministic,
        "fused": not arguments.no_fused,
    }


def _cast(sampler: Sampler, dtype: torch.dtype) -> None:
    """A network that runs as it is computes in its parameters' dtype; a fused plan keeps copies of its own."""
    if not sampler.fused and isinstance(sampler.model, nn.Module):
        sampler.model.to(dtype)


def described_choices(sampler: Sampler) -> dict[str, Any]:
    """Everything that decides a sample besides weights, seed, labels and guidance, as JSON can hold it."""
    chosen = {
        field.name: getattr(sampler.choices, field.name)
        for field in dataclasses.fields(sampler.choices)
        if field.name not in ("steps", "output")
    }
    timesteps = ",".join(map(str, sampler.timesteps))
    chosen |= {
        "steps": len(sampler),
        "timesteps": hashlib.sha256(timesteps.encode()).hexdigest()[:16],
        "schedule": hashlib.sha256(sampler.schedule.betas.tobytes()).hexdigest()[:16],
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "fused": sampler.fused,
        "deterministic": sampler.deterministic,
    }
    if sampler.deterministic:
        chosen |= {"chunk": sampler.chunk, "device": sampler.device.type if sampler.device else None}
    return chosen


def checksum(network: nn.Module) -> str:
    """Of the names, shapes, dtypes and bytes of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        whole: Tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(whole.shape)} {whole.dtype};".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else b"")
    return digest.hexdigest()[:16]
