"""`Sampler.from_pretrained`: the folder of a saved diffusers pipeline as a `Sampler`. Needs no diffusers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import inference
from ..schedule import Schedule
from ._choices import choices_of
from ._schedules import schedule_of
from ._unets import CLASS, load_unet
from ._weights import read_json

if TYPE_CHECKING:
    from ..sampler import Sampler

S = TypeVar("S", bound="Sampler")

SCHEDULER = "scheduler_config.json"
# How many steps a run has unless it is said: what the pipeline does by itself, and for the solver what it is made for.
STEPS = {"DDIMPipeline": 50}
SOLVER_STEPS = 20


def sampler_of(
    make: type[S], folder: str | os.PathLike[str], variant: str | None, fused: bool | None, overrides: dict[str, Any]
) -> S:
    """See `Sampler.from_pretrained`."""
    overrides = {name: value for name, value in overrides.items() if value is not None}
    path = _existing(folder)
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    _check_class(index, path)
    network, file = _part(path, "unet", "config.json"), _part(path, "scheduler", SCHEDULER)
    config = read_json(file)
    choices = choices_of(config, file, **overrides)
    _default_steps(choices, index, len(schedule := _schedule(config, file)))
    dtype = overrides.get("dtype")
    if fused is None:
        fused = dtype is None or dtype in inference.DTYPES
    net = load_unet(network.parent, variant=variant, device=overrides.get("device"))
    if dtype is not None and not (fused and inference.unknown_reason(net) is None):
        net = net.to(dtype)  # a fused plan keeps copies of its own and wants to be read from float32
    return make(net, schedule, **{"like": "diffusers", **choices, "fused": fused})


def _existing(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        hint = (
            f"; if it is a name on the Hub, download it first (huggingface-cli download {folder} --local-dir DIR, or "
            "huggingface_hub.snapshot_download) and pass that folder"
        )
    raise FileNotFoundError(f"no folder {path}{hint}")


def _check_class(index: Mapping[str, Any], path: Path) -> None:
    """The pipeline's network must be one that is covered; saved by whom, diffusers or a drop-in, does not matter."""
    entry = index.get("unet", [None, CLASS])
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] != CLASS:
        raise ValueError(
            f"{path / 'model_index.json'} names the unet {entry!r}, which is not covered; covered is {CLASS}"
        )


def _part(path: Path, name: str, file: str) -> Path:
    """A component's config: in its own folder, or, as the first pipelines were saved, in the folder itself."""
    for place in (path / name / file, path / file):
        if place.is_file():
            return place
    raise FileNotFoundError(f"no {name}/{file} and no {file} in {path}, the folder of a saved pipeline")


def _schedule(config: Mapping[str, Any], file: Path) -> Schedule:
    try:
        return schedule_of(config)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _default_steps(choices: dict[str, Any], index: Mapping[str, Any], T: int) -> None:
    if choices.get("steps") is None:
        usual = SOLVER_STEPS if choices["method"] == "dpmsolver++" else STEPS.get(str(index.get("_class_name")), T)
        choices["steps"] = min(usual, T)
