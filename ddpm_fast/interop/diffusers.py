"""Drop-in classes for diffusers: the same names, signatures, configs and files, computed by ddpm_fast.

    from ddpm_fast.interop.diffusers import DDPMScheduler
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

The schedulers are subclasses of diffusers' own; see `DDPMScheduler` and `DDIMScheduler` for what they compute better.
"""

from __future__ import annotations

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ddpm_fast.interop.diffusers needs diffusers ({error}); install it with pip install 'ddpm_fast[diffusers]'"
    ) from error

from ._schedulers import DDIMScheduler, DDPMScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler"]
