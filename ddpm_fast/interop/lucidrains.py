"""Drop-in classes for lucidrains' denoising_diffusion_pytorch 2.3, which need not be installed.

    from ddpm_fast.interop.lucidrains import GaussianDiffusion, Trainer, Unet

The same names, signatures, defaults, state-dict keys and files, computed by ddpm_fast; right where the package is not.
"""

from __future__ import annotations

from ..nn import RMSNormUNet as Unet
from ._lucidrains_diffusion import GaussianDiffusion
from ._lucidrains_learned import LearnedGaussianDiffusion, WeightedObjectiveGaussianDiffusion
from ._lucidrains_load import load_diffusion
from ._lucidrains_trainer import Trainer
from ._lucidrains_unet import from_lucidrains, load_unet

__all__ = [
    "GaussianDiffusion",
    "LearnedGaussianDiffusion",
    "Trainer",
    "Unet",
    "WeightedObjectiveGaussianDiffusion",
    "from_lucidrains",
    "load_diffusion",
    "load_unet",
]
