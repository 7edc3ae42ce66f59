"""The flags of OpenAI's scripts: their defaults, what they come to, and whether they agree with weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._openai_shape import Heads, Shape

# create_model's own tables: 32 is improved-diffusion's, 128 and 512 are guided-diffusion's.
MULTIPLIERS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}

MODEL_FLAGS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
}
DIFFUSION_FLAGS: dict[str, Any] = {
    "learn_sigma": False,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
UNCOVERED = {"conv_resample": True, "dims": 2}
"""Options of their class, and the only value of each that is covered."""


def check_names(flags: Mapping[str, Any]) -> None:
    """ValueError for a flag that neither repository has, or a value that is not covered."""
    for name, value in flags.items():
        if name in UNCOVERED:
            if value != UNCOVERED[name]:
                raise ValueError(f"{name}={value!r} is not covered, only {UNCOVERED[name]!r}")
        elif name not in MODEL_FLAGS and name not in DIFFUSION_FLAGS:
            known = ", ".join((*MODEL_FLAGS, *DIFFUSION_FLAGS))
            raise ValueError(
                f"{name!r} is no flag of improved- or guided-diffusion that is covered; covered are {known}"
            )


def typed(name: str, value: Any) -> Any:
    """A flag's value in the type of its default; text, as a command line has it, is read. ValueError for another.

    Flags that are text themselves are looked at where they are used. None is for image_size alone, where weights tell.
    """
    default = (MODEL_FLAGS | DIFFUSION_FLAGS).get(name, "")
    if isinstance(default, str) or (name == "image_size" and value is None):
        return value
    kind = type(default)
    if isinstance(value, str):
        try:
            return boolean(value) if kind is bool else kind(value)
        except ValueError:
            pass
    elif isinstance(value, (bool, np.bool_)) == (kind is bool):
        whole = isinstance(value, numbers.Integral) or (kind is float and isinstance(value, numbers.Real))
        if kind is bool or whole:
            return kind(value)
    wanted = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def boolean(text: str) -> bool:
    """A truth value in words. ValueError for any other text."""
    for value, words in ((True, ("true", "yes", "t", "y", "1")), (False, ("false", "no", "f", "n", "0"))):
        if text.lower() in words:
            return value
    raise ValueError(f"must be True or False, got {text!r}")


def heads_of(flags: Mapping[str, Any]) -> Heads:
    """The heads, of which weights say nothing."""
    number, channels = flags.get("num_heads", -1), flags.get("num_head_channels", -1)
    if number == channels == -1:
        raise ValueError(
            "num_heads or num_head_channels is needed: the weights do not say how many heads attention has"
        )
    return Heads(number, flags.get("num_heads_upsample", -1), channels)


def check_flags(shape: Shape, flags: Mapping[str, Any], source: object) -> None:
    """ValueError for a flag that says something else than the weights do."""
    found = {
        "num_channels": shape.num_channels,
        "num_res_blocks": shape.num_res_blocks,
        "learn_sigma": shape.out_channels == 2 * shape.in_channels,
        "class_cond": shape.num_classes is not None,
        "use_scale_shift_norm": shape.scale_shift,
    }
    levels, size = len(shape.widths), flags.get("image_size")
    if levels > 1:
        found["resblock_updown"] = shape.updown
    for name, value in found.items():
        if name in flags and flags[name] != value:
            raise ValueError(f"{name} is {flags[name]!r} by the flags, but {source} has {value!r}")
    check_size(size, levels)
    if "channel_mult" in flags:
        widths = widths_of(shape.num_channels, multipliers(size, flags["channel_mult"]))
        if widths != shape.widths:
            raise ValueError(
                f"channel_mult={flags['channel_mult']!r} with image_size={size} makes levels of {widths} channels, "
                f"but {source} has {shape.widths}"
            )
    if "attention_resolutions" in flags:
        if size is None:
            raise ValueError("attention_resolutions are sides of images: pass image_size too")
        if attention_levels(size, flags["attention_resolutions"], levels) != shape.attention:
            sides = ",".join(str(size >> level) for level, attends in enumerate(shape.attention) if attends)
            raise ValueError(
                f"attention_resolutions is {flags['attention_resolutions']!r} by the flags, but {source} has {sides!r}"
            )


def check_size(image_size: int | None, levels: int) -> None:
    """ValueError for a side that cannot be halved on every level but the last."""
    if image_size is not None and (image_size < 1 or image_size % 2 ** (levels - 1)):
        raise ValueError(f"image_size must be a multiple of {2 ** (levels - 1)} ({levels} levels), got {image_size}")


def multipliers(image_size: int | None, channel_mult: str | Sequence[float] | None) -> tuple[float, ...]:
    """Channels of each level in num_channels: as given ("1,2,3" or numbers), or the table's for the image size."""
    if channel_mult:
        given = channel_mult.split(",") if isinstance(channel_mult, str) else channel_mult
        try:
            result = tuple(float(part) for part in given)
        except (TypeError, ValueError):
            result = ()
        if not result or not all(math.isfinite(m) and m > 0 for m in result):
            raise ValueError(f'channel_mult must look like "1,2,3,4", got {channel_mult!r}')
        return result
    if image_size not in MULTIPLIERS:
        raise ValueError(
            f"image_size must be one of {', '.join(map(str, MULTIPLIERS))} without channel_mult, got {image_size!r}"
        )
    return MULTIPLIERS[image_size]


def widths_of(num_channels: int, mult: Sequence[float]) -> tuple[int, ...]:
    """Channels of each level."""
    return tuple(int(m * num_channels) for m in mult)


def attention_levels(image_size: int, resolutions: str | Sequence[int], levels: int) -> tuple[bool, ...]:
    """Whether each level has attention. resolutions: sides of the images there, "16,8"."""
    given = resolutions.split(",") if isinstance(resolutions, str) else resolutions
    try:
        sides = [int(part) for part in given if part != ""]
    except (TypeError, ValueError):
        sides = [0]
    if not all(side > 0 for side in sides):
        raise ValueError(f'attention_resolutions must look like "16,8", got {resolutions!r}')
    factors = {image_size // side for side in sides}
    return tuple(2**level in factors for level in range(levels))
