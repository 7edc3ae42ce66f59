"""OpenAI's checkpoints as `DDPMUNet`s and back, exact to the bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import DDPMUNet
from ._openai_flags import check_flags, check_names, heads_of, typed
from ._openai_keys import to_ours, to_theirs
from ._openai_shape import CLASS, ddpm_arguments, shape_of, shape_of_weights
from ._openai_unet import UNetModel
from ._unets import fill
from ._weights import State, check_state, read_file


def from_openai(
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **flags: Any,
) -> DDPMUNet:
    """A `DDPMUNet` in eval mode with copies of the weights of OpenAI's `UNetModel`, improved- or guided-diffusion's.

    state: its state dict; weights in half precision, wholly or in part, are read too.
    flags: those of OpenAI's scripts. Needed: num_heads (and num_heads_upsample) or num_head_channels, and
        use_new_attention_order=True where the network was made so, for weights do not show them. image_size informs
        `Sampler`. All others are read off the weights, and where given must agree with them; flags of the diffusion
        process and use_checkpoint, use_fp16 say nothing here.
    dtype, device: of the network.

    Raises ValueError, one line, for weights of another class, missing or unknown keys, wrong shapes, flags that
    contradict the weights, and what is not covered: dims, conv_resample=False, super-resolution, classifiers.
    """
    return _built(state, "the state dict", dtype, device, flags)


def load_unet(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **flags: Any,
) -> DDPMUNet:
    """`from_openai` of a file: .pt, read as weights only and never as a program, or .safetensors."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    return _built(read_file(file), file, dtype, device, flags)


def to_openai(net: DDPMUNet, *, use_new_attention_order: bool | None = None) -> State:
    """OpenAI's state dict with copies of the weights.

    use_new_attention_order: how q, k and v are to be laid out; None is the network's own, or False. Heads must be said
    again wherever the result is loaded. Raises ValueError for options that their `UNetModel` has not.
    """
    if not isinstance(net, DDPMUNet):
        raise TypeError(f"net must be a DDPMUNet, got {type(net).__name__}")
    shape_of(net.config)
    if use_new_attention_order is None:
        use_new_attention_order = isinstance(net, UNetModel) and net.use_new_attention_order
    own = {key: value.detach() for key, value in DDPMUNet.state_dict(net).items()}
    theirs = to_theirs(own, net.config, use_new_attention_order)
    return {key: value.clone() for key, value in theirs.items()}


def _built(
    state: Mapping[str, Tensor],
    source: object,
    dtype: torch.dtype,
    device: torch.device | str | None,
    flags: Mapping[str, Any],
) -> DDPMUNet:
    check_names(flags)
    flags = {name: typed(name, value) for name, value in flags.items()}
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} must hold a state dict, tensors by name, got {type(state).__name__}")
    shape = shape_of_weights(dict(state), source)
    check_flags(shape, flags, source)
    if shape.out_channels not in (shape.in_channels, 2 * shape.in_channels):
        raise ValueError(
            f"{source} takes {shape.in_channels} channels and gives {shape.out_channels}; a {CLASS} for sampling gives "
            "as many, or with learn_sigma twice as many"
        )
    new_order = flags.get("use_new_attention_order", False)
    sides = {"image_size": flags.get("image_size"), "dropout": flags.get("dropout", 0.0)}
    config = ddpm_arguments(shape, heads_of(flags), **sides)
    with torch.device("meta"):
        net = DDPMUNet(**config)
    checked = check_state(state, to_theirs(net.state_dict(), net.config, new_order), source)
    return fill(net, to_ours(checked, net.config, new_order), source, dtype=dtype, device=device).eval()
