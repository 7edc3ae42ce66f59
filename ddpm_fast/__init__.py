"""ddpm_fast: fused kernels for denoising diffusion models - exact, fast, drop-in, installable anywhere.

`ddpm_fast.Sampler(model, ddpm_fast.Schedule.linear(1000)).sample(16, (3, 32, 32), seed=0)` draws sixteen images.
"""

from ddpm_fast import inference, ops
from ddpm_fast.backends import use_backend
from ddpm_fast.nn import DDPMUNet, UNet
from ddpm_fast.ops import normal
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.training import Trainer

__version__ = "0.1.0"

__all__ = [
    "DDPMUNet",
    "Sampler",
    "Schedule",
    "Trainer",
    "UNet",
    "__version__",
    "inference",
    "normal",
    "ops",
    "use_backend",
]
