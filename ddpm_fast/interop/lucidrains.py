"""Drop-in classes for lucidrains' denoising_diffusion_pytorch 2.3: the same names, signatures and files.

    from ddpm_fast.interop.lucidrains import GaussianDiffusion

The package itself is not needed.
"""

from __future__ import annotations

from ._lucidrains_diffusion import GaussianDiffusion
from ._lucidrains_learned import LearnedGaussianDiffusion, WeightedObjectiveGaussianDiffusion

__all__ = ["GaussianDiffusion", "LearnedGaussianDiffusion", "WeightedObjectiveGaussianDiffusion"]
