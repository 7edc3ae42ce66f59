"""Drop-in classes for diffusers: the same names, signatures, configs and files, computed by ddpm_fast.

    from ddpm_fast.interop.diffusers import DDPMScheduler
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

All are subclasses of diffusers' own; see `DDPMScheduler` and `DDIMScheduler` for what they compute better. What is
saved is as diffusers saves it, and needs no ddpm_fast to be loaded; a pipeline loaded again has diffusers' classes.
"""

from __future__ import annotations

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ddpm_fast.interop.diffusers needs diffusers ({error}); install it with pip install 'ddpm_fast[diffusers]'"
    ) from error

from ._schedulers import DDIMScheduler, DDPMScheduler
from ._unet2d import UNet2DModel
from ._unets import from_diffusers, to_diffusers

__all__ = ["DDIMScheduler", "DDPMScheduler", "UNet2DModel", "from_diffusers", "to_diffusers"]
