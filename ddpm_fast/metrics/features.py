"""What images are compared by: Inception's features where its weights are, else those of a small classifier."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..training.data import Data
from .small_classifier import Everyone, trained_classifier

KINDS = ("auto", "inception", "classifier", "pixels")
WEIGHTS_VARIABLE = "DDPM_FAST_INCEPTION"
# The same weights under the names that torch-fidelity and pytorch-fid give them in torch's cache.
WEIGHTS_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
_PUBLISHED = "6726825d"  # the first digits of their SHA-256
NOT_COMPARABLE = "not comparable with published FID"


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Images (N, ...), uint8 or in model range, -> features, float32 (N, D) on the CPU.

    name: of the features. note: what their figures must not be taken for; empty where they are what papers report.
    device: where `function` wants its images.
    """

    name: str
    note: str
    function: Callable[[Tensor], Tensor]
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        rows = self.function(images.to(self.device))
        if rows.dim() != 2 or len(rows) != len(images):
            raise ValueError(
                f"features must have shape ({len(images)}, D) for {len(images)} images, got {tuple(rows.shape)}"
            )
        return rows.float().cpu()

    def of(self, batches: Iterable[Tensor]) -> Tensor:
        """Of all batches, (N, D)."""
        return torch.cat([self(batch) for batch in batches])


def find_inception_weights(weights: str | os.PathLike[str] | None = None) -> Path:
    """The weights file: as given, or $DDPM_FAST_INCEPTION, or where torch-fidelity or pytorch-fid keep theirs.

    Raises FileNotFoundError with the places looked at. Nothing is downloaded.
    """
    given = weights or os.environ.get(WEIGHTS_VARIABLE)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(given)] if given else [folder / name for name in WEIGHTS_FILES]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no Inception weights at {' or '.join(map(str, places))}: put torch-fidelity's {WEIGHTS_FILES[0]} there, or "
        f"name the file in {WEIGHTS_VARIABLE}"
    )


def inception(weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The 2048 features of torch-fidelity's InceptionV3, which FID, KID and precision/recall are reported of.

    Images of any size, grey or in colour: a grey one is three equal channels, floats become uint8 pixels, and the
    network's own resizing follows. With other weights than the published ones the extractor's note says so.

    Args:
        weights: see `find_inception_weights`.
        device: where the network runs.

    Raises ImportError without torch-fidelity, FileNotFoundError without the weights, ValueError for a file that is no
    plain dictionary of tensors or of another network.
    """
    path = find_inception_weights(weights)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(f"Inception features need torch-fidelity ({error}): pip install torch-fidelity") from None
    try:
        # torch-fidelity unpickles whatever the file holds; this refuses anything but tensors before it does.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:
        raise ValueError(f"{path} must hold the weights of torch-fidelity's InceptionV3: {_short(error)}") from None
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    note = "" if digest.startswith(_PUBLISHED) else f"{NOT_COMPARABLE}: the weights are not the published ones"
    network = network.to(device)

    def features(images: Tensor) -> Tensor:
        rows: Tensor = network(_rgb(images))[0]
        return rows

    return Extractor("Inception v3, 2048", note, features, torch.device(device))


def classifier(
    data: Data,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    world: Everyone | None = None,
    say: Callable[[str], None] | None = None,
) -> Extractor:
    """The 128 features in front of the last layer of `trained_classifier`, whose arguments these are.

    They tell models of the same data apart; figures of them say nothing beside those of other data or of Inception.
    """
    network = trained_classifier(data, seed=seed, device=device, cache=cache, world=world, say=say)
    name = f"small classifier of {data.name}, 128"
    return Extractor(name, NOT_COMPARABLE, network.features, torch.device(device))


def pixels() -> Extractor:
    """The values themselves, in model range, flattened: for vectors and latents."""

    def features(images: Tensor) -> Tensor:
        return (images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()).flatten(1)

    return Extractor("values, flattened", NOT_COMPARABLE, features)


def choose(
    kind: str,
    data: Data,
    *,
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | None = None,
    world: Everyone | None = None,
    say: Callable[[str], None] | None = None,
) -> Extractor:
    """The features of that kind for samples of `data`; "auto": Inception's where they are to be had, else the
    classifier's, or the values themselves of what is no images.
    """
    if kind not in KINDS:
        raise ValueError(f"features must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "pixels":
        return pixels()
    if kind == "inception":
        return inception(weights, device)
    pictures = len(data.shape) == 3
    if kind == "auto" and pictures and data.shape[0] in (1, 3):
        try:
            return inception(weights, device)
        except (ImportError, FileNotFoundError) as error:
            if weights is not None:
                raise
            if say is not None:
                say(f"features: no Inception here ({_short(error)})")
    if kind == "auto" and not pictures:
        return pixels()
    return classifier(data, seed=seed, device=device, cache=cache, world=world, say=say)


def _rgb(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W)."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"Inception's features are of images (N, 1 or 3, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        images = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.expand(-1, 3, -1, -1)


def _short(error: Exception) -> str:
    """The first line of an error, for one that is to hold it."""
    text = str(error).strip().split("\n")[0]
    return text if len(text) < 300 else text[:297] + "..."
