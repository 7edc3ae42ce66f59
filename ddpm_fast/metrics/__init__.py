"""How far apart two sets of samples are, and how well a model explains data; all sums in float64.

Of samples themselves: `energy_distance`, `energy_ratio`, `nearest_distance`. Of features of them: `frechet_distance`
with `FeatureStatistics`, `kid`, `precision_recall`. Of a model: `bits_per_dim`.
`inception` and `classifier` make features; `trained_classifier(data).predict(images)` tells whether a conditional
model's samples are what was asked for; `ddpm_fast.metrics.hooks.Evaluate` measures while a `Trainer` runs.
"""

from .bits import Bits, bits_per_dim
from .energy import energy_distance, energy_ratio, nearest_distance
from .features import Extractor, classifier, inception
from .frechet import FeatureStatistics, frechet_distance
from .kid import Kid, kernel_distance, kid
from .precision_recall import PrecisionRecall, precision_recall
from .small_classifier import Classifier, trained_classifier

__all__ = [
    "Bits",
    "Classifier",
    "Extractor",
    "FeatureStatistics",
    "Kid",
    "PrecisionRecall",
    "bits_per_dim",
    "classifier",
    "energy_distance",
    "energy_ratio",
    "frechet_distance",
    "inception",
    "kernel_distance",
    "kid",
    "nearest_distance",
    "precision_recall",
    "trained_classifier",
]
