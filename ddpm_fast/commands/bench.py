"""`ddpm-fast bench`: benchmarks/run.py of the checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from .errors import CommandError


def add_arguments(subparsers: Any) -> None:
    """Everything after `bench` is the script's own, --help included: with another prefix no word is an option here."""
    parser = subparsers.add_parser("bench", add_help=False, prefix_chars="\0")
    parser.add_argument("options", nargs="*")


def run(arguments: argparse.Namespace) -> int:
    """Runs the script of the checkout that this package is in, or of the working folder; its exit code."""
    for place in (Path(__file__).resolve().parents[2], Path.cwd()):
        script = place / "benchmarks" / "run.py"
        if script.is_file():
            return subprocess.call([sys.executable, str(script), *arguments.options])
    raise CommandError(
        "the benchmark is part of the repository, not of the installed package, and there is no benchmarks/run.py "
        "here; clone the repository and run the command in it"
    )
