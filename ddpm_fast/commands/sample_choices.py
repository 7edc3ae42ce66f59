"""The options of `ddpm-fast sample` that depend on the machine or on the network."""

from __future__ import annotations

import argparse
import os

import torch

from ..sampling.model import attribute
from ..sampling.shards import Place
from .errors import CommandError
from .sample_pictures import Labels
from .sample_source import Source


def device_of(name: str, place: Place) -> torch.device:
    """auto: this process's GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CommandError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise CommandError(f"--device {name}: no CUDA device here, or a build of torch without CUDA; use --device cpu")
    count = torch.cuda.device_count()
    index = place.local_rank % count if device.index is None else device.index
    if index >= count:
        raise CommandError(f"--device {name}: there are {count} CUDA devices here, cuda:0 to cuda:{count - 1}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def share_the_cores(place: Place, device: torch.device) -> None:
    """Several processes on one CPU: each takes its part of it, unless OMP_NUM_THREADS says how many (torchrun: 1)."""
    if device.type == "cpu" and place.local_size > 1 and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))


def classes_of(arguments: argparse.Namespace, source: Source) -> Labels:
    """The classes drawn in turn, None for an unconditional network; CommandError for what the network does not know."""
    text = arguments.labels if arguments.label is None else arguments.label
    flag = "--labels" if arguments.label is None else "--label"
    classes = source.classes
    guided = arguments.guidance != 1
    if classes is None:
        if text is not None:
            raise CommandError(f"{flag} needs a class-conditional network; this one is unconditional")
        if guided:
            raise CommandError(f"--guidance {arguments.guidance:g} needs a class-conditional network; this one is not")
        return None
    null = attribute(source.sampler.model, "null_label")
    if guided and source.checkpoint is not None:
        dropout = source.checkpoint.config["training"].get("label_dropout")
        if dropout == 0:
            raise CommandError(
                f"--guidance {arguments.guidance:g} needs a network that was trained without labels, too, for some of "
                "the time; this one was trained with label_dropout 0 (0.1 is usual)"
            )
    if text is None:
        return tuple(range(classes))
    result = []
    for word in text.split(","):
        if word.strip() == "none":
            if null is None:
                raise CommandError(f'{flag}: this network has no label that means "none"')
            result.append(int(null))
            continue
        try:
            label = int(word)
        except ValueError:
            raise CommandError(f"{flag} must be classes such as 0,1,2, got {text!r}") from None
        if not 0 <= label < classes:
            raise CommandError(f"{flag} must lie in 0..{classes - 1}, got {label}")
        result.append(label)
    if flag == "--label" and len(result) != 1:
        raise CommandError(f"--label takes one class, got {text!r}; --labels takes several")
    return tuple(result)
