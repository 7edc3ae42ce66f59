"""`ddpm-fast train`: trains a model, from a configuration or from where it was stopped."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from . import given
from .config import Config
from .errors import CommandError

EXAMPLES = """examples:
  ddpm-fast train --data fashion-mnist --out runs/fashion --images 500000
  ddpm-fast train --out runs/fashion                             goes on where that was stopped
  ddpm-fast train --out runs/fashion --images 1000000            goes on for longer than planned
  ddpm-fast train --out runs/fashion --minutes 10                ... and stops after ten minutes of training
  ddpm-fast train --data pictures --image-size 64 --flip --out runs/mine --model-options width=32 depth=3
  ddpm-fast train --config run.toml --out runs/again --lr 1e-4   flags win over the file
  torchrun --nproc-per-node 2 $(which ddpm-fast) train --data digits --out runs/digits
                                                                 in two processes, with the same result

What is chosen is printed, and kept in RUN/config.toml, which --config takes. Checkpoints, log.csv, loss.png and grids
of samples are there too. Exit code 0: done; 1: the loss is no longer finite; 2: bad input or unusable state; 130, 143,
129: stopped by Ctrl-C, SIGTERM, a lost terminal, after saving.
"""
CONFIG = "config.toml"


def add_arguments(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "train",
        description="Trains a diffusion model. Its state depends on the seed and the number of images seen and on "
        "nothing else: stopped anywhere and continued, it ends with the same weights.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="TOML", help="a file with any of the settings below")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so much time of this call, and save")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    given.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit code; see EXAMPLES."""
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise CommandError(f"--minutes must be more than 0, got {arguments.minutes:g}")
    config = configuration(arguments)
    _check_extras(config)
    from .training_run import TrainingRun  # torch, and what comes with it

    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    return TrainingRun(config, seconds=seconds, quiet=arguments.quiet).run()


def configuration(arguments: argparse.Namespace) -> Config:
    """What flags, the file and the run's folder say together; whatever contradicts is a CommandError."""
    asked = given.from_flags(arguments)
    if arguments.config is not None:
        asked = given.merged(given.from_file(arguments.config), asked)
    out = asked.get("output", {}).get("out")
    if not out:
        raise CommandError("--out is missing: the folder of the run, new or with a run to go on with")
    saved, config = Path(out) / CONFIG, Config()
    if saved.exists():
        config = config.replaced(given.from_file(saved))
        if any((Path(out) / "checkpoints").glob("*.safetensors")):  # before the first one nothing is lost by a change
            given.check_unchanged(asked, config, saved)
            asked = given.without_auto(asked)
    config = config.replaced(asked)
    given.check_conflicts(asked, config)
    if config.data.source is None:
        raise CommandError(f"--data is missing, and {out} holds no run to go on with; --data fashion-mnist, or a path")
    return config


def _check_extras(config: Config) -> None:
    """CommandError for a package that is not there, with what to leave out to do without it."""
    needed = {}
    if config.output.plot:
        needed["matplotlib"] = "loss.png needs matplotlib (--no-plot does without)"
    if config.sampling.sample_every is not None:
        needed["PIL"] = "grids of samples need Pillow (--sample-every none does without)"
    for module, text in needed.items():
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"{text}; pip install ddpm_fast[train]")
    if config.output.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise CommandError("--tensorboard needs tensorboard; pip install ddpm_fast[tensorboard]")
