"""Training: the Trainer, its data, steps, the average of the weights, checkpoint files."""

from .best import BestEpoch
from .data import Data, TensorData, as_data, open_data
from .ema import EMA
from .images import ImageFolder, loader
from .loop import Loop
from .trainer import StepReport, Trainer

__all__ = [
    "EMA",
    "BestEpoch",
    "Data",
    "ImageFolder",
    "Loop",
    "StepReport",
    "TensorData",
    "Trainer",
    "as_data",
    "loader",
    "open_data",
]
