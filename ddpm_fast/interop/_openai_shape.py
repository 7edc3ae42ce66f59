"""What OpenAI's `UNetModel` is, as `DDPMUNet` arguments; read off a config, or off the shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ._openai_keys import resamples
from ._weights import State

CLASS = "UNetModel"

# What DDPMUNet must be told to be one of theirs.
FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}


class Shape(NamedTuple):
    """What the shapes of the weights say. attention: per level."""

    in_channels: int
    out_channels: int
    num_channels: int
    num_res_blocks: int
    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    scale_shift: bool
    updown: bool
    num_classes: int | None


class Heads(NamedTuple):
    """num_heads, num_heads_upsample and num_head_channels, -1 meaning what it means there."""

    number: int
    upsample: int = -1
    channels: int = -1


def ddpm_arguments(shape: Shape, heads: Heads, *, image_size: int | None, dropout: float = 0.0) -> dict[str, Any]:
    """Keyword arguments of `DDPMUNet`; ValueError for heads that do not divide the channels."""
    widths, first = shape.widths, shape.widths[0]
    plain_down, plain_up = ("ResnetDown", "ResnetUp") if shape.updown else ("Down", "Up")
    down = ["AttnDownBlock2D" if a else f"{plain_down}{'sample' * shape.updown}Block2D" for a in shape.attention]
    up = ["AttnUpBlock2D" if a else f"{plain_up}{'sample' * shape.updown}Block2D" for a in shape.attention]
    change = "resnet" if shape.updown else "conv"
    return {
        **FIXED,
        **_heads(shape, heads),
        "sample_size": image_size,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "time_embedding_dim": 4 * shape.num_channels,
        "time_proj_dim": None if shape.num_channels == first else shape.num_channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(reversed(up)),
        "block_out_channels": widths,
        "layers_per_block": shape.num_res_blocks,
        "downsample_type": change,
        "upsample_type": change,
        "dropout": float(dropout),
        "attn_norm_num_groups": FIXED["norm_num_groups"] if shape.scale_shift else None,
        "resnet_time_scale_shift": "scale_shift" if shape.scale_shift else "default",
        "num_class_embeds": shape.num_classes,
    }


def _heads(shape: Shape, heads: Heads) -> dict[str, Any]:
    """By their size where it is the same everywhere, which diffusers can say too, else by their number."""
    attended = [width for width, attends in zip(shape.widths, shape.attention, strict=True) if attends]
    pair = heads.number, heads.number if heads.upsample == -1 else heads.upsample
    places = [(width, pair[0]) for width in (*attended, shape.widths[-1])] + [(width, pair[1]) for width in attended]
    sizes = set()
    for width, number in places:
        if heads.channels != -1:
            if heads.channels < 1 or width % heads.channels:
                raise ValueError(
                    f"num_head_channels must divide the channels of every attention, got {heads.channels} of {width}"
                )
            sizes.add(heads.channels)
        elif number < 1 or width % number:
            raise ValueError(f"num_heads must divide the channels of every attention, got {number} of {width}")
        else:
            sizes.add(width // number)
    if len(sizes) == 1:
        return {"attention_head_dim": sizes.pop()}
    return {"attention_head_dim": None} if pair == (1, 1) else {"num_attention_heads": pair}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """A `DDPMUNet` config as theirs; ValueError naming what their class cannot be told."""
    last = len(config["block_out_channels"]) - 1
    for name, value in FIXED.items():
        if config[name] != value:
            raise ValueError(f"OpenAI's {CLASS} has no {name}={config[name]!r}, only {value!r}")
    attention = tuple(block.startswith("Attn") for block in config["down_block_types"])
    if attention != tuple(block.startswith("Attn") for block in reversed(config["up_block_types"])):
        raise ValueError(
            f"OpenAI's {CLASS} has attention on the same levels on both ways, not {config['up_block_types']}"
        )
    ways = [("down", level) for level in range(last)] + [("up", level) for level in range(1, last + 1)]
    updown = {resamples(config, way, level) for way, level in ways}
    if len(updown) > 1:
        raise ValueError(f"OpenAI's {CLASS} resamples either by residual blocks or by convolutions on all levels")
    shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups = config["attn_norm_num_groups"] or (0 if shift else FIXED["norm_num_groups"])
    if groups != FIXED["norm_num_groups"]:
        raise ValueError(f"OpenAI's {CLASS} has no attn_norm_num_groups={groups or None}, only 32")
    size = config["attention_head_dim"]
    for level, width in enumerate(config["block_out_channels"]):
        if size and (attention[level] or level == last) and width % size:
            raise ValueError(
                f"OpenAI's {CLASS} has heads that divide the {width} channels of level {level}, not of {size}"
            )
    features = config.get("time_proj_dim") or config["block_out_channels"][0]
    if config["time_embedding_dim"] not in (None, 4 * features):
        raise ValueError(
            f"OpenAI's {CLASS} has a time_embedding_dim of {4 * features}, not {config['time_embedding_dim']}"
        )
    return Shape(
        config["in_channels"],
        config["out_channels"],
        features,
        config["layers_per_block"],
        config["block_out_channels"],
        attention,
        shift,
        updown == {True},
        config["num_class_embeds"],
    )


# -- from weights ----------------------------------------------------------------------------------------------------


def shape_of_weights(state: State, source: object) -> Shape:
    """What the state dict of a `UNetModel` was made with. ValueError for one of another class, saying which."""
    _check_class(state, source)
    stem, end, ends = state["input_blocks.0.0.weight"], state["out.2.weight"], []
    inputs, outputs = (_count(state, name, source) for name in ("input_blocks", "output_blocks"))
    updown = False
    for i in range(outputs):
        for j in (1, 2):
            conv, resnet = f"output_blocks.{i}.{j}.conv.weight" in state, _is_resnet(state, f"output_blocks.{i}.{j}")
            updown |= resnet
            ends += [i] * (conv or resnet)
    levels = len(ends) + 1
    per_level = outputs // levels
    if inputs != outputs or per_level < 2 or ends != [per_level * (k + 1) - 1 for k in range(levels - 1)]:
        raise ValueError(
            f"{source} has {inputs} input_blocks and {outputs} output_blocks with upsampling after {ends or 'none'}, "
            f"which no {CLASS} that resamples by convolutions or residual blocks has; conv_resample=False is none"
        )
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    for name in firsts:
        if not _is_resnet(state, f"{name}.0"):
            raise ValueError(f"{source} does not fit OpenAI's {CLASS}: missing: {name}.0.in_layers.2.weight")
    widths = tuple(state[f"{name}.0.in_layers.2.weight"].shape[0] for name in firsts)
    embedded = state.get(f"{firsts[0]}.0.emb_layers.1.weight")
    labels = state.get("label_emb.weight")
    return Shape(
        in_channels=stem.shape[1],
        out_channels=end.shape[0],
        num_channels=state["time_embed.0.weight"].shape[1],
        num_res_blocks=per_level - 1,
        widths=widths,
        attention=tuple(f"{name}.1.qkv.weight" in state for name in firsts),
        scale_shift=embedded is not None and embedded.shape[0] == 2 * widths[0],
        updown=updown,
        num_classes=None if labels is None else labels.shape[0],
    )


def _check_class(state: State, source: object) -> None:
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} must hold tensors by name, got {type(value).__name__} under {key!r}")
        if not value.dim() and key.endswith((".weight", ".bias")):
            raise ValueError(f"{source} does not fit OpenAI's {CLASS}: {key} is a single number")
    seems = None
    if "conv_in.weight" in state:
        seems = "diffusers' UNet2DModel; see ddpm_fast.interop.load_unet and from_diffusers"
    elif "init_conv.weight" in state:
        seems = "lucidrains' Unet; see ddpm_fast.interop.lucidrains"
    elif any(key.startswith("module.") for key in state):
        seems = "one wrapped in DistributedDataParallel; take the prefix 'module.' off its keys"
    elif "input_blocks.0.0.weight" in state and not any(key.startswith("output_blocks.") for key in state):
        seems = "OpenAI's classifier, EncoderUNetModel, which is not covered"
    elif not {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= state.keys():
        seems = f"something else: its keys are {', '.join(list(state)[:3]) or 'none'}, ..."
    if seems:
        raise ValueError(f"{source} holds no weights of OpenAI's {CLASS} but of {seems}")
    stem, out = state["input_blocks.0.0.weight"], state["out.2.weight"].shape[0]
    if stem.dim() != 4 or state["time_embed.0.weight"].dim() != 2:
        raise ValueError(f"{source} has a first convolution of shape {tuple(stem.shape)}; covered is dims=2 only")
    if stem.shape[1] == 6 and out in (3, 6):
        raise ValueError(f"{source} takes 6 channels and gives {out}, as OpenAI's SuperResModel, which is not covered")


def _count(state: State, name: str, source: object) -> int:
    found = {int(match[1]) for key in state if (match := re.match(rf"{name}\.(\d+)\.", key))}
    for i in range(max(found, default=-1) + 1):
        if i not in found:
            raise ValueError(
                f"{source} has no weights for {name}.{i}; that is so with conv_resample=False, which is not covered"
            )
    return len(found)


def _is_resnet(state: State, name: str) -> bool:
    return f"{name}.in_layers.2.weight" in state
