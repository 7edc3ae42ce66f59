"""Checkpoint files: one safetensors file each, and a folder of them, sorted by what is in them.

Tensors: `model.<key>`, `ema.<key>`, `optimizer.<i>.<name>`, `schedule.betas` (float64 [T]). Metadata: `format`,
`version`, `checksum` and, as JSON, `state` (how far the run is) and `config` (what it is). Equal contents give equal
files, byte for byte.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tensor_file
from .tensor_file import BrokenFile

FORMAT = "ddpm_fast.checkpoint"
VERSION = 1


class NewerFormat(ValueError):
    """A whole file, of a later format than this release reads."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's content. keys: of all its tensors; tensors: those that were read; checksum: SHA-256, in hexadecimal."""

    path: Path
    keys: tuple[str, ...]
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    config: dict[str, Any]
    checksum: str

    @property
    def images_seen(self) -> int:
        """Images drawn since training began."""
        return int(self.state["images_seen"])

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name.<key>`, by key: `part("model")` is a state dict."""
        start = name + "."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


def file_name(images_seen: int) -> str:
    """What the file is called that is written after so many images."""
    return f"checkpoint-{images_seen:012d}.safetensors"


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Writes a checkpoint under a temporary name, lets it reach the disk, and renames it to `path`.

    state, config: what JSON holds; `state["images_seen"]` is needed. Raises OSError naming the file where it cannot be
    written (disk full, not allowed): what was there before stays, and no temporary. TypeError for values that neither
    JSON nor the format can hold.
    """
    tensor_file.write_tensors(Path(path), tensors, _metadata(state, config))


def check(tensors: Mapping[str, Tensor], state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """TypeError for what `write` could not hold."""
    _metadata(state, config)
    for name, tensor in tensors.items():
        tensor_file.check(name, tensor)


def _metadata(state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    if type(state.get("images_seen")) is not int:
        raise TypeError(f'state must have "images_seen", an int, got {state.get("images_seen")!r}')
    return {"format": FORMAT, "version": str(VERSION), "state": json.dumps(state), "config": json.dumps(config)}


def read(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Checkpoint:
    """All of a checkpoint, or the tensors with `wanted` names; its checksum, over all of it, is compared in any case.

    Raises FileNotFoundError; ValueError for a file that is cut off, altered, of another format or of a newer version.
    """
    path = Path(path)
    with open(path, "rb") as file:
        header = tensor_file.read_header(path, file)
        found = _checkpoint(path, header)
        tensors = tensor_file.read_tensors(path, header, file, wanted)
    found.tensors.update({name: tensor.to(device) for name, tensor in tensors.items()})
    return found


def read_header(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint without its tensors. Errors as for `read`, but only the size of the rest is looked at."""
    path = Path(path)
    with open(path, "rb") as file:
        return _checkpoint(path, tensor_file.read_header(path, file))


def _checkpoint(path: Path, header: tensor_file.Header) -> Checkpoint:
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise BrokenFile(f"{path} is a safetensors file, but no checkpoint of ddpm_fast")
    version = metadata.get("version", "")
    if version.isdecimal() and int(version) > VERSION:
        raise NewerFormat(
            f"{path} was made by a newer ddpm_fast (format {version}); this one reads {VERSION}; upgrade ddpm_fast"
        )
    try:
        state, config = json.loads(metadata["state"]), json.loads(metadata["config"])
        whole = type(state["images_seen"]) is int and isinstance(config, dict) and version == str(VERSION)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise BrokenFile(f"{path} is damaged: it does not say what it is")
    return Checkpoint(path, tuple(header.entries), {}, state, config, metadata.get("checksum", ""))


def newest_first(folder: str | os.PathLike[str], *, quiet: bool = False) -> list[Checkpoint]:
    """Headers of the checkpoints in a folder, by images seen, whatever their names. Unless `quiet`, warns of the files
    that are none.

    Raises NewerFormat: to pass over such a file would throw away what it holds.
    """
    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            found.append(read_header(path))
        except BrokenFile as error:
            if not quiet:
                warnings.warn(f"{error}; it is passed over", stacklevel=3)
        except FileNotFoundError:
            pass  # a run that goes on has taken it away meanwhile
    return sorted(found, key=lambda checkpoint: checkpoint.images_seen, reverse=True)


def whole(folder: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Checkpoint]:
    """The checkpoints of a folder whose checksum holds, by images seen, newest first, each read when it is asked for.
    Broken ones are passed over with a warning.
    """
    for checkpoint in newest_first(folder):
        try:
            yield read(checkpoint.path, wanted=wanted)
        except BrokenFile as error:
            warnings.warn(f"{error}; it is passed over", stacklevel=3)
        except FileNotFoundError:
            pass


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint with the most images seen; None where there is none. Reads it once, a second per 1.5 GB."""
    for checkpoint in whole(folder, lambda name: False):
        return checkpoint.path
    return None


def prune(folder: str | os.PathLike[str], keep: int, *, good: Path | None = None) -> None:
    """Deletes the checkpoints with the fewest images seen until `keep` are left, but never the newest whole one.

    good: one that is known to be whole (just written); None: the newest ones are read until one is. What is no
    checkpoint is left alone.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    found = newest_first(folder, quiet=True)
    if len(found) <= keep:
        return
    if good is None:
        good = latest(folder)
    for checkpoint in found[keep:]:
        if good is not None and not os.path.samefile(checkpoint.path, good):
            checkpoint.path.unlink(missing_ok=True)


def remove_temporaries(folder: str | os.PathLike[str]) -> int:
    """Deletes what killed runs were writing; how many files there were."""
    left = list(Path(folder).glob(f"*.safetensors.*{tensor_file.TEMPORARY}"))
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)
