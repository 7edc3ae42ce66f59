"""Drop-in for OpenAI's improved-diffusion and guided-diffusion: their checkpoints, flags and calls."""

from __future__ import annotations

from ._openai_unet import UNetModel
from ._openai_weights import from_openai, load_unet, to_openai

__all__ = ["UNetModel", "from_openai", "load_unet", "to_openai"]
