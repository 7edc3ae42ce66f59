"""What `DDPMUNet` is told to be, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
MID_BLOCKS = (None, "UNetMidBlock2D")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "mish": "mish", "gelu": "gelu", "relu": "relu"}
OWN = ("num_attention_heads", "time_proj_dim")
"""What diffusers' class does not take, and is left out of a config that does not use it."""

OLD_PREFIX = "UNetRes"  # diffusers' first releases wrote UNetResDownBlock2D for DownBlock2D


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `DDPMUNet`, lists as tuples; ValueError or TypeError naming the one that cannot be served."""
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        config[name] = _blocks(name, config[name], known)
    levels = len(config["down_block_types"])
    widths = _tuple("block_out_channels", config["block_out_channels"])
    if not levels == len(config["up_block_types"]) == len(widths):
        raise ValueError(
            "down_block_types, up_block_types and block_out_channels must have one entry per level, "
            f"got {levels}, {len(config['up_block_types'])} and {len(widths)}"
        )
    for level, width in enumerate(widths):
        _count(f"block_out_channels[{level}]", width)
    for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        _count(name, config[name])
    optional = ("attn_norm_num_groups", "attention_head_dim", "time_embedding_dim", "num_class_embeds", "time_proj_dim")
    for name in optional:
        if config[name] is not None:
            _count(name, config[name])
    _groups("norm_num_groups", config["norm_num_groups"], widths)
    if config["attn_norm_num_groups"] is not None:
        _groups("attn_norm_num_groups", config["attn_norm_num_groups"], widths[-1:])
    config["num_attention_heads"] = _heads(config)
    _attention(config, widths)
    _one_of("mid_block_type", config["mid_block_type"], MID_BLOCKS)
    _one_of("downsample_padding", config["downsample_padding"], (0, 1))
    _one_of("downsample_type", config["downsample_type"], ("conv", "resnet"))
    _one_of("upsample_type", config["upsample_type"], ("conv", "resnet"))
    _one_of("resnet_time_scale_shift", config["resnet_time_scale_shift"], ("default", "scale_shift"))
    _one_of("act_fn", str(config["act_fn"]).lower(), tuple(ACTIVATIONS))
    _one_of("class_embed_type", config["class_embed_type"], (None, "timestep", "identity"))
    _time(config, config["time_proj_dim"] or widths[0])
    for name in ("norm_eps", "mid_block_scale_factor"):
        if not config[name] > 0:
            raise ValueError(f"{name} must be positive, got {config[name]!r}")
    config["sample_size"] = _sample_size(config["sample_size"])
    return {name: value for name, value in config.items() if name not in OWN or value is not None}


def _time(config: dict[str, Any], width: int) -> None:
    kind = config["time_embedding_type"]
    _one_of("time_embedding_type", kind, ("positional", "fourier", "learned"))
    if kind == "learned":
        if config["num_train_timesteps"] is None:
            raise ValueError('time_embedding_type="learned" needs num_train_timesteps, the rows of its table, got None')
        _count("num_train_timesteps", config["num_train_timesteps"])
    if kind == "positional" and width > 1 and width // 2 == config["freq_shift"]:
        name = "time_proj_dim" if config["time_proj_dim"] else "block_out_channels[0]"
        raise ValueError(f"freq_shift must not be half of {name} ({width // 2}), which is divided by their difference")


def _blocks(name: str, value: Any, known: Sequence[str]) -> tuple[str, ...]:
    """Block names without the prefix that the first releases gave them."""
    result = tuple(block.removeprefix(OLD_PREFIX) if isinstance(block, str) else block for block in _tuple(name, value))
    for level, block in enumerate(result):
        if block not in known:
            raise ValueError(f"{name}[{level}] is {block!r}, which is not covered; covered are {', '.join(known)}")
    return result


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or not value:
        raise TypeError(f"{name} must be a list or tuple with one entry per level, got {value!r}")
    return value


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _groups(name: str, groups: int, widths: Sequence[int]) -> None:
    for width in widths:
        if width % groups:
            raise ValueError(f"{name} must divide every number of channels that is normalised, got {groups} of {width}")


def _heads(config: dict[str, Any]) -> tuple[int, int] | None:
    """num_attention_heads as (on the way down and in the middle, on the way up), or None."""
    heads = config["num_attention_heads"]
    if heads is None:
        return None
    pair = heads if isinstance(heads, tuple) else (heads, heads)
    if len(pair) != 2:
        raise ValueError(f"num_attention_heads must be an int or two, for the ways down and up, got {heads!r}")
    for value in pair:
        _count("num_attention_heads", value)
    if config["attention_head_dim"] is not None:
        raise ValueError(
            f"num_attention_heads={heads} and attention_head_dim={config['attention_head_dim']} exclude each other; "
            "pass one of them"
        )
    return pair


def _attention(config: dict[str, Any], widths: Sequence[int]) -> None:
    """Whether the heads fit the channels of every attention."""
    dim, heads = config["attention_head_dim"], config["num_attention_heads"]
    down = [width for block, width in zip(config["down_block_types"], widths, strict=True) if block.startswith("Attn")]
    up = [w for block, w in zip(config["up_block_types"], reversed(widths), strict=True) if block.startswith("Attn")]
    if config["add_attention"] and config["mid_block_type"] is not None:
        down.append(widths[-1])
    if dim is not None and down + up and dim > min(down + up):
        raise ValueError(
            f"attention_head_dim must be at most {min(down + up)}, the channels of the narrowest attention, got {dim}"
        )
    for count, attended in zip(heads or (), (down, up), strict=False):
        for width in attended:
            if width % count:
                raise ValueError(
                    f"num_attention_heads must divide the channels of every attention, got {count} of {width}"
                )


def _sample_size(value: Any) -> int | tuple[int, int] | None:
    """None, a side, or (height, width)."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    sides = value if isinstance(value, tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"sample_size must be None, an image side or (height, width), got {value!r}")
    return sides[0], sides[1]
