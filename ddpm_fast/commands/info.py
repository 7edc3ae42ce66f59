"""`ddpm-fast info`: what works on this machine; or what a run or a checkpoint holds."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .errors import CommandError, one_line

EXAMPLES = """examples:
  ddpm-fast info                                     version, what was built, which backend serves what
  ddpm-fast info runs/fashion                        how far a run is, and what it is
  ddpm-fast info runs/fashion/checkpoints/checkpoint-000000500000.safetensors
"""
_CONFIG, _LOG = "config.toml", "log.csv"
_WIDTH = 13


def add_arguments(subparsers: Any) -> None:
    """Registers the command."""
    parser = subparsers.add_parser(
        "info",
        description="Without an argument: version, what the extension was built with, which backend serves what. "
        "With a run's folder or a checkpoint: images seen, loss, network, schedule, settings, data, files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("place", nargs="?", type=Path, metavar="RUN|CHECKPOINT", help="default: this machine")


def run(arguments: argparse.Namespace) -> int:
    """0; without an argument 1 where the extension is missing."""
    if arguments.place is None:
        from ..__main__ import main

        return int(main() or 0)
    for name, text in describe(arguments.place):
        print(f"{name:{_WIDTH}} {text}" if name else f"{'':{_WIDTH}} {text}")
    return 0


def describe(place: Path) -> list[tuple[str, str]]:
    """(what, its value) of a run's folder or a checkpoint. CommandError where there is neither."""
    from ..training.checkpoints import FOLDER, newest_first, read_header

    if place.is_file():
        return _of_checkpoint(read_header(place))
    if not place.is_dir():
        raise CommandError(f"no {place}: a run's folder or a checkpoint (.safetensors) was expected there")
    folder = place / FOLDER if (place / FOLDER).is_dir() else place
    found = newest_first(folder)
    if not found:
        if (place / _CONFIG).is_file():
            return [("run", str(place)), ("images seen", "0: no checkpoint was written yet")]
        raise CommandError(f"{place} is no run: there is no checkpoint in it, and no {_CONFIG}")
    lines = _of_checkpoint(found[0])
    lines[0] = ("run", str(place))
    lines[2:2] = _loss(place / _LOG, found[0].images_seen)
    sizes = [_size(checkpoint.path) for checkpoint in found]
    lines = [line for line in lines if line[0] != "file"]
    for i, (checkpoint, size) in enumerate(zip(found, sizes, strict=True)):
        lines.append(("checkpoints" if i == 0 else "", f"{checkpoint.path.name}  {size}"))
    return lines


def _of_checkpoint(checkpoint: Any) -> list[tuple[str, str]]:
    """A value that the file does not have is left out."""
    state, config = checkpoint.state, checkpoint.config
    training, data, network = (config.get(part) or {} for part in ("training", "data", "network"))
    steps = f", {state['step']:,} steps of {state['batch_size']}" if {"step", "batch_size"} <= state.keys() else ""
    lines = [("checkpoint", str(checkpoint.path)), ("images seen", f"{checkpoint.images_seen:,}{steps}")]
    options = network.get("options")
    shown = "" if options is None else ", ".join(f"{name}={value!r}" for name, value in options.items())
    lines.append(("network", f"{network.get('kind')}({shown})"))
    lines.append(("parameters", f"{_parameters(checkpoint.path):,}, with buffers"))
    average = any(key.startswith("ema.") for key in checkpoint.keys)
    lines.append(("average", f"decay {training.get('ema')}" if average else "none"))
    label = (config.get("schedule") or {}).get("label")
    lines.append(("schedule", str(label)))
    lines.append(("training", ", ".join(f"{name} {value}" for name, value in training.items())))
    if data:
        shape, classes = "x".join(map(str, data.get("shape") or ())), data.get("num_classes")
        labels = "" if classes is None else f", {classes} classes"
        lines.append(
            ("data", f"{data.get('name')}: {data.get('images')} of {shape}{labels}, {data.get('fingerprint')}")
        )
    return [*lines, ("file", _size(checkpoint.path))]


def _parameters(path: Path) -> int:
    """Numbers in the tensors of the model."""
    from ..training import tensor_file

    with open(path, "rb") as file:
        header = tensor_file.read_header(path, file)
    return sum(math.prod(entry.shape) for name, entry in header.entries.items() if name.startswith("model."))


def _loss(path: Path, images_seen: int) -> list[tuple[str, str]]:
    """The last row of the log that is not after the checkpoint."""
    from . import log

    if not path.is_file():
        return []
    try:
        rows = [row for row in log.read(path) if row[0] <= images_seen]
    except ValueError as error:
        return [("loss", one_line(error))]
    if not rows:
        return []
    return [("loss", f"{rows[-1][2]:.4g} at a learning rate of {rows[-1][3]:.4g}, {rows[-1][5]:g} images/s")]


def _size(path: Path) -> str:
    size = float(path.stat().st_size)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
