"""Drop-in classes for lucidrains' denoising_diffusion_pytorch 2.3, which need not be installed.

    from ddpm_fast.interop.lucidrains import Unet

The same names, signatures, defaults, state-dict keys and files, computed by ddpm_fast.
"""

from __future__ import annotations

from ..nn import RMSNormUNet as Unet
from ._lucidrains_unet import from_lucidrains, load_unet

__all__ = ["Unet", "from_lucidrains", "load_unet"]
