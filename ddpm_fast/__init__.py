"""ddpm_fast: fused kernels for denoising diffusion models - exact, fast, drop-in, installable anywhere."""

from ddpm_fast import ops
from ddpm_fast.backends import use_backend
from ddpm_fast.ops import normal

__version__ = "0.1.0"

__all__ = ["__version__", "normal", "ops", "use_backend"]
