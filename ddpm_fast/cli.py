"""The command `ddpm-fast`: demo, bench and info."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXAMPLES = """examples:
  ddpm-fast demo                            train on real digits, sample and measure; about 3 minutes
  ddpm-fast demo --out here --device cuda   the same on an NVIDIA GPU
  ddpm-fast demo --seconds 20               a shorter training; its quality is shown, not judged
  ddpm-fast bench --quick                   sampling steps and ops against every baseline; about 3 minutes
  ddpm-fast info                            what was built and what works on this machine
"""


class _Parser(argparse.ArgumentParser):
    """Errors as one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="ddpm-fast",
        description="Fast training and sampling of denoising diffusion models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="{demo,bench,info}", required=True)
    demo = commands.add_parser(
        "demo",
        help="train on real handwritten digits, sample a labelled grid, measure quality and speed",
        description="Trains a class-conditional U-Net on scikit-learn's digits and writes samples.png, "
        "reverse.gif, model.safetensors and report.json. Exit code 0: done; 1: a quality bar was "
        "missed at the default training; 2: it could not start.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    demo.add_argument("--seed", type=int, default=0, help="of everything drawn; default: 0")
    demo.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    demo.add_argument("--seconds", type=float, help="training time; default: 95, or up to 115 on a slow machine")
    demo.add_argument("--train-steps", type=int, metavar="N", help="train exactly N steps, however long they take")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    commands.add_parser(
        "bench",
        add_help=False,  # its options are those of the script
        help="measure ops and sampling steps against eager PyTorch, torch.compile, OpenVINO and diffusers",
    )
    commands.add_parser("info", help="version, what the extension was built with, which backend serves which op")
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import DemoError, Recipe, Settings, run

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
        report = run(settings)
    except DemoError as error:
        print(f"ddpm-fast demo: error: {error}", file=sys.stderr)
        return 2
    missed = report["missed"]
    if not missed:
        return 0
    if recipe.steps is not None or recipe.seconds < Recipe().seconds:
        print(f"missed: {', '.join(missed)} (not judged: the training was not the default one)")
        return 0
    print(f"ddpm-fast demo: quality missed: {', '.join(missed)}", file=sys.stderr)
    return 1


def _info() -> int:
    from .__main__ import main as info

    return int(info() or 0)


def _bench(options: Sequence[str]) -> int:
    """Runs benchmarks/run.py with these options: of the checkout that this package is in, or of the working folder."""
    places = [Path(__file__).resolve().parent.parent, Path.cwd()]
    for place in places:
        script = place / "benchmarks" / "run.py"
        if script.is_file():
            return subprocess.call([sys.executable, str(script), *options])
    print(
        "ddpm-fast bench: error: the benchmark is part of the repository, not of the installed package, and there is "
        "no benchmarks/run.py here; clone the repository and run the command in it",
        file=sys.stderr,
    )
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "bench":  # argparse would keep options before the first positional one to itself
        return _bench(argv[1:])
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse ends the process itself; a caller wants the code
        return stop.code if isinstance(stop.code, int) else 2
    return _info() if arguments.command == "info" else _demo(arguments)


if __name__ == "__main__":
    sys.exit(main())
