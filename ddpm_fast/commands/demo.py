"""`ddpm-fast demo`: trains on real digits, samples, measures."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from .errors import CommandError

EXAMPLES = """examples:
  ddpm-fast demo                            about 3 minutes
  ddpm-fast demo --out here --device cuda   the same on an NVIDIA GPU
  ddpm-fast demo --seconds 20               a shorter training; its quality is shown, not judged
"""


def add_arguments(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "demo",
        description="Trains a class-conditional U-Net on scikit-learn's digits and writes samples.png, "
        "reverse.gif, model.safetensors and report.json. Exit code 0: done; 1: a quality bar was "
        "missed at the default training; 2: it could not start.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn; default: 0")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--seconds", type=float, help="training time; default: 95, or up to 115 on a slow machine")
    parser.add_argument("--train-steps", type=int, metavar="N", help="train exactly N steps, however long they take")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """0: done; 1: a quality bar was missed at the default training."""
    from ..demo import DemoError, Recipe, Settings
    from ..demo import run as run_demo

    recipe = Recipe(steps=arguments.train_steps)
    if arguments.seconds is not None:
        seconds = arguments.seconds
        recipe = dataclasses.replace(recipe, seconds=seconds, max_seconds=seconds)
    settings = Settings(
        out=arguments.out,
        seed=arguments.seed,
        device=arguments.device,
        recipe=recipe,
        progress=not arguments.quiet,
    )
    try:
        missed = run_demo(settings)["missed"]
    except DemoError as error:
        raise CommandError(str(error)) from error
    if not missed:
        return 0
    if recipe.steps is not None or recipe.seconds < Recipe().seconds:
        print(f"missed: {', '.join(missed)} (not judged: the training was not the default one)")
        return 0
    print(f"ddpm-fast demo: quality missed: {', '.join(missed)}", file=sys.stderr)
    return 1
