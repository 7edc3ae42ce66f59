"""`ddpm-fast info`: what works on this machine."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(subparsers: Any) -> None:
    """Registers the command."""
    subparsers.add_parser("info", description="Version, what the extension was built with, which backend serves what.")


def run(arguments: argparse.Namespace) -> int:
    """0 when the extension is there."""
    from ..__main__ import main

    return int(main() or 0)
