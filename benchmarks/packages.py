"""Packages that the benchmark can do without, and what a candidate says that cannot run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


class Missing(Exception):
    """A candidate cannot run here; the message says why and what to install."""


def package(name: str) -> Any:
    """The package, or Missing with the line that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed; pip install {name} ({error})") from error


def lucidrains() -> Any:
    """denoising_diffusion_pytorch, or Missing. Where torchvision is missing a stand-in is there for the import."""
    name = "denoising_diffusion_pytorch"
    if name in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return package(name)
    import torchvision_stand_in

    torchvision_stand_in.install()
    try:
        return package(name)
    finally:
        torchvision_stand_in.remove()
