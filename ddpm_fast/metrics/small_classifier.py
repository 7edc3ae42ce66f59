"""Features where there is no Inception: those of a small classifier, trained here on the data itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.data import Data
from ..training.streams import Order

WIDTHS = (16, 32, 64, 128)
DIMENSIONS = WIDTHS[-1]
IMAGES = 100_000  # drawn in training: some 20 s on two cores for 28 x 28
BATCH = 128
_SIDE = 32  # larger images are averaged down to this
_RATE = 4e-3
_LOOKED_AT = 1024
_VERSION = 1  # of all of this; another number makes new files


class Everyone(Protocol):
    """What is asked of the processes that share the work: `ddpm_fast.training.processes.World`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Overwrites every tensor with rank 0's."""
        ...


class Classifier(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU, the mean over the picture, and one linear layer.

    channels: of the images. size: (H, W). outputs: how many classes.
    """

    def __init__(self, channels: int, size: tuple[int, int], outputs: int) -> None:
        super().__init__()
        self.channels = channels
        side, width, layers = min(_SIDE, max(size)), channels, []
        for i, wider in enumerate(WIDTHS):
            stride = 2 if side > 4 and i != 2 else 1
            side = -(-side // stride)
            layers += [nn.Conv2d(width, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            width = wider
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs)

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W), uint8 or in model range, -> float32 (N, 128)."""
        x = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
        if max(x.shape[2:]) > _SIDE:
            scale = _SIDE / max(x.shape[2:])
            height, width = (max(1, round(side * scale)) for side in x.shape[2:])
            x = F.adaptive_avg_pool2d(x, (height, width))
        maps: Tensor = self.body(x.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W), uint8 or in model range, -> logits, float32 (N, outputs)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """(N, C, H, W), uint8 or in model range -> the likeliest class of each, int64 (N,) on the CPU.

        It looks at 1024 images at a time, on its own device. Raises ValueError for images of other channels.
        """
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must have shape (N, {self.channels}, H, W), got {tuple(images.shape)}")
        device = self.head.weight.device
        return torch.cat([self(part.to(device)).argmax(1).cpu() for part in images.split(_LOOKED_AT)])


def trained_classifier(
    data: Data,
    *,
    seed: int = 0,
    images: int | None = None,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    world: Everyone | None = None,
    say: Callable[[str], None] | None = None,
) -> Classifier:
    """A `Classifier` in eval mode that tells the labels of `data` apart, or without labels how an image was turned.

    Without labels the task is which of four ways an image was turned (Gidaris et al. 2018, arXiv 1803.07728), or, of
    images that are not square, mirrored. A function of (data, seed): on a CPU the same bits for the same number of
    threads, which is why the weights are kept in a file, under a name made of the data's fingerprint and the settings.

    Args:
        data: images (C, H, W).
        seed: of the first weights and the order of the images.
        images: how many to train on, None for IMAGES; they are drawn from the data again and again.
        device: where.
        cache: folder of the kept weights; None: $DDPM_FAST_CACHE, or ddpm_fast in $XDG_CACHE_HOME or ~/.cache.
        world: of several processes the first trains and hands the weights to the others; all must call.
        say: told that training begins, or where the weights were found.

    Raises ValueError for data that is no images.
    """
    if len(data.shape) != 3:
        raise ValueError(f"a classifier's features are of images (C, H, W), this data has shape {tuple(data.shape)}")
    images = IMAGES if images is None else images
    labels, classes = data.labels, data.num_classes
    if labels is None or classes is None or classes < 2:
        labels, classes = None, 4
    channels, height, width = data.shape
    say = say or (lambda text: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(channels, (height, width), classes)
    if world is None or world.rank == 0:
        path = _file(cache, f"{_VERSION} {data.fingerprint()} {tuple(data.shape)} {classes} {seed} {images}")
        if _load(network, path):
            say(f"features: a classifier trained on {data.name} before, {path}")
        else:
            what = f"{classes} classes" if labels is not None else "four ways to turn an image, for want of labels"
            say(f"features: training a small classifier on {images:,} images of {data.name} ({what}), once")
            network.to(device)
            accuracy = _train(network, data, labels, seed, images, torch.device(device))
            say(f"features: it was right for {100 * accuracy:.1f} % of its last images; kept in {path}")
            _save(network, path)
    network.to(device)
    if world is not None and world.size > 1:
        world.broadcast_(list(network.state_dict().values()))
    return network.eval().requires_grad_(False)


def _train(
    network: Classifier, data: Data, labels: Tensor | None, seed: int, images: int, device: torch.device
) -> float:
    """Trains in place; the share of the last tenth of the images, before they were learnt from, that it got right."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=1e-3)
    order, right, seen = Order(seed, len(data)), 0, 0
    steps = max(1, images // BATCH)
    for step in range(steps):
        for group in optimizer.param_groups:  # up for a tenth of the way, then down to nothing
            group["lr"] = _RATE * min(10 * (step + 1) / steps, (1 - step / steps) / 0.9)
        index = order.indices(step * BATCH, BATCH)
        x = data.batch(index).to(device)
        if labels is None:
            x, y = _turned(x, step)
        else:
            y = labels[index].to(device)
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if 10 * step >= 9 * steps:
            right, seen = right + int((logits.argmax(1) == y).sum()), seen + len(y)
    return right / max(1, seen)


def _turned(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Each quarter of the batch turned by another angle, or mirrored if not square; and which."""
    square = x.shape[2] == x.shape[3]
    ways, parts, y = ((), (2,), (3,), (2, 3)), [], []
    for k, part in enumerate(x.chunk(4)):
        way = (k + step) % 4  # with the step, so that small data is seen in every way
        parts.append(torch.rot90(part, way, (2, 3)) if square else part.flip(ways[way]))
        y.append(torch.full((len(part),), way, device=x.device))
    return torch.cat(parts), torch.cat(y)


def _file(cache: str | os.PathLike[str] | None, key: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache or os.environ.get("DDPM_FAST_CACHE") or Path(home) / "ddpm_fast")
    return folder / f"classifier-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.npz"


def _load(network: Classifier, path: Path) -> bool:
    """Whether the file was there, whole and of this network, whose weights it then has."""
    try:
        with np.load(path, allow_pickle=False) as file:
            network.load_state_dict({name: torch.tensor(file[name]) for name in file.files})
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, EOFError, RuntimeError, AttributeError, zipfile.BadZipFile):
        warnings.warn(f"{path} holds no weights of the classifier that is wanted; it is trained anew", stacklevel=3)
        return False
    return True


def _save(network: Classifier, path: Path) -> None:
    """Under a temporary name, then renamed. A folder that cannot be written to costs the file, not the figures."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(f"the classifier could not be kept in {path}: {error.strerror or error}", stacklevel=3)
        with contextlib.suppress(OSError):
            temporary.unlink()
