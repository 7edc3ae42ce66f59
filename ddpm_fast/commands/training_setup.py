"""What a training run needs before it has a `Trainer`: a device, a folder, data, and which classes are learned."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ..training.data import Data, open_data
from ..training.processes import World
from .config import AUTO, Config
from .config import Data as DataOptions
from .errors import CommandError
from .networks import WITH_NULL_LABEL, WITHOUT_LABELS


def world(name: str) -> World:
    """This process among the others. CommandError for a device that is not there."""
    if name == AUTO:
        return World.from_environment()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(
            f"--device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; use --device "
            "cpu, or install a CUDA build of PyTorch and a driver (`ddpm-fast info` says what is missing)"
        )
    return World.from_environment(device)


def opened(chosen: DataOptions, split: str) -> Data:
    return open_data(
        str(chosen.source),
        path=chosen.data_path,
        image_size=chosen.image_size,
        channels=chosen.channels,
        fit=chosen.fit,
        split=split,
        labels=chosen.labels is not False,
    )


def check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CommandError(f"--out {out} cannot be written to: {error.strerror}") from error


def with_labels(config: Config, data: Data) -> tuple[Config, int | None]:
    """The configuration with `labels` and `label_dropout` as they will be, and the number of classes."""
    kind, labels, dropout = config.model.kind, config.data.labels, config.training.label_dropout
    default = type(config.training)().label_dropout
    if labels == AUTO:
        labels = data.labels is not None and kind in WITH_NULL_LABEL
    elif labels:
        if data.labels is None:
            raise CommandError(f"--labels: {data.name} has no labels; a folder has where its images are in subfolders")
        if kind in WITHOUT_LABELS:
            raise CommandError(f"--labels: --model {kind} knows no classes; choose another one, or --labels false")
    if not (labels and kind in WITH_NULL_LABEL):
        if dropout not in (default, 0.0):
            why = f"--model {kind} has no label that means none" if labels else "no labels are learned"
            raise CommandError(f"--label-dropout {dropout:g} has no effect: {why}")
        dropout = 0.0
    changed = config.replaced({"data": {"labels": bool(labels)}, "training": {"label_dropout": dropout}})
    guidance = config.sampling.sample_guidance
    if guidance != 1 and dropout == 0:
        raise CommandError(
            f"--sample-guidance {guidance:g} needs a class-conditional model that is also trained without labels "
            "(--label-dropout)"
        )
    return changed, data.num_classes if labels else None
