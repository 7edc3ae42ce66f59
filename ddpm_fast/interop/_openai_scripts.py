"""What the scripts of improved- and guided-diffusion are made of: flags in, a network and a process out."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from ..schedule import Schedule
from ..tables.betas import Float64
from ..tables.timesteps import timesteps_for
from ._openai_diffusion import SpacedDiffusion
from ._openai_flags import DIFFUSION_FLAGS, MODEL_FLAGS, attention_levels, boolean, check_names, multipliers, typed
from ._openai_process import LossType, ModelMeanType, ModelVarType
from ._openai_unet import UNetModel

P = ParamSpec("P")
T = TypeVar("T")

NUM_CLASSES = 1000

# Flags of one repository only, and those whose default differs: (improved-diffusion's, guided-diffusion's).
GUIDED_ONLY = ("num_head_channels", "channel_mult", "resblock_updown", "use_fp16", "use_new_attention_order")
IMPROVED_ONLY = ("sigma_small",)
DIFFERENT = {"rescale_timesteps": (True, False), "rescale_learned_sigmas": (True, False)}


def model_and_diffusion_defaults(guided: bool = False) -> dict[str, Any]:
    """The flags and defaults of improved-diffusion's scripts, or of guided-diffusion's."""
    left_out = IMPROVED_ONLY if guided else GUIDED_ONLY
    flags = {name: value for name, value in (MODEL_FLAGS | DIFFUSION_FLAGS).items() if name not in left_out}
    return flags | {name: both[guided] for name, both in DIFFERENT.items()}


def reads_text(create: Callable[P, T]) -> Callable[P, T]:
    """Flags may be text, as a command line gives them: "False" must not count as true."""
    signature = inspect.signature(create)

    @functools.wraps(create)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = typed("diffusion_steps" if name == "steps" else name, value)
        return create(*bound.args, **bound.kwargs)

    return call


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """The network and the process of either repository's flags.

    Values may be text, as on a command line. Flags that are left out have their default; rescale_timesteps and
    rescale_learned_sigmas, whose defaults differ between the two, must be given. ValueError for unknown flags and
    values that are not covered.
    """
    check_names(flags)
    for name, (improved, guided) in DIFFERENT.items():
        if name not in flags:
            raise ValueError(
                f"{name} is needed: by default it is {improved} in improved-diffusion, {guided} in guided-diffusion; "
                "start from model_and_diffusion_defaults(guided=...)"
            )
    every = {**MODEL_FLAGS, **DIFFUSION_FLAGS, **flags}
    model = create_model(**{name: every[name] for name in MODEL_FLAGS}, learn_sigma=every["learn_sigma"])
    options = {name: every[name] for name in DIFFUSION_FLAGS if name != "diffusion_steps"}
    return model, create_gaussian_diffusion(steps=every["diffusion_steps"], **options)


@reads_text
def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str | Sequence[float] = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str | Sequence[int] = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """A `UNetModel` for RGB images, of 1000 classes with class_cond, with 6 channels out with learn_sigma.

    channel_mult: "1,2,3" or, where empty, the repositories' own for image_size 32, 64, 128, 256 or 512.
    attention_resolutions: sides of the images where there is attention, "16,8".
    """
    if image_size is None:
        raise ValueError("image_size must be a whole number, got None")
    mult = multipliers(image_size, channel_mult)
    attention = attention_levels(image_size, attention_resolutions, len(mult))
    return UNetModel(
        image_size,
        3,
        num_channels,
        6 if learn_sigma else 3,
        num_res_blocks,
        tuple(2**level for level, attends in enumerate(attention) if attends),
        dropout,
        mult,
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


@reads_text
def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
) -> SpacedDiffusion:
    """The process of the flags. timestep_respacing: section counts "250" or "10,15,20", a stride "ddim50", or all."""
    squared = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else squared,
        rescale_timesteps=rescale_timesteps,
    )


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Float64:
    """float64 betas of "linear", scaled by 1000 / T, or "cosine"."""
    if schedule_name not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule must be linear or cosine, got {schedule_name!r}")
    options = {"scale_betas": True} if schedule_name == "linear" else {}
    return Schedule.named(schedule_name, num_diffusion_timesteps, **options).betas


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps that section counts (list or text) or "ddimN" keep of 0..num_timesteps-1."""
    try:
        kept = timesteps_for(num_timesteps, section_counts, "sections")
    except (ValueError, TypeError) as error:
        raise type(error)(f"timestep_respacing {section_counts!r}: {error}") from None
    return {int(t) for t in kept}


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """Those attributes of parsed arguments."""
    return {key: getattr(args, key) for key in keys}


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """An option --name for every entry, of the type of its default; booleans are written out, True or False."""
    for name, default in default_dict.items():
        kind = _boolean if isinstance(default, bool) else str if default is None else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def _boolean(text: str) -> bool:
    try:
        return boolean(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
