"""Training: steps, the average of the weights, pictures from a folder, checkpoint files."""

from .ema import EMA
from .images import ImageFolder, loader
from .loop import Loop

__all__ = ["EMA", "ImageFolder", "Loop", "loader"]
