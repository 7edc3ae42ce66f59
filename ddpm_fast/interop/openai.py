"""Drop-in for OpenAI's improved-diffusion and guided-diffusion: checkpoints, flags, `UNetModel`, `SpacedDiffusion`.

    from ddpm_fast.interop.openai import create_model_and_diffusion, load_unet, model_and_diffusion_defaults

`load_unet`, `from_openai` and `to_openai` exchange weights with `ddpm_fast.nn.DDPMUNet`; the rest has the names and
signatures of script_util.py, unet.py, respace.py and gaussian_diffusion.py there. Nothing of OpenAI's is needed.
"""

from __future__ import annotations

from ._openai_diffusion import SpacedDiffusion
from ._openai_process import LossType, ModelMeanType, ModelVarType
from ._openai_scripts import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    get_named_beta_schedule,
    model_and_diffusion_defaults,
    space_timesteps,
)
from ._openai_unet import UNetModel
from ._openai_weights import from_openai, load_unet, to_openai

__all__ = [
    "NUM_CLASSES",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "UNetModel",
    "add_dict_to_argparser",
    "args_to_dict",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "from_openai",
    "get_named_beta_schedule",
    "load_unet",
    "model_and_diffusion_defaults",
    "space_timesteps",
    "to_openai",
]
