"""diffusers' `UNet2DModel` as a `DDPMUNet` and back: objects, folders, state dicts. Only `to_diffusers` needs it.

Keys and values are the same on both sides, so every way back and forth is exact to the bit.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..nn import DDPMUNet
from ..nn.ddpm_blocks import OLD_ATTENTION
from ..nn.ddpm_config import OWN
from ._weights import State, check_state, read_json, read_weights, write_weights

Module = TypeVar("Module", bound=nn.Module)

CLASS = "UNet2DModel"

DEFAULTS: dict[str, Any] = {
    **{name: arg.default for name, arg in inspect.signature(DDPMUNet).parameters.items() if name not in OWN},
    "sample_size": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "downsample_padding": 1,
    "attention_head_dim": 8,
    "norm_eps": 1e-5,
}
"""What a config means where it is silent: `UNet2DModel`'s defaults, which are not `DDPMUNet`'s."""

_OLD = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(OLD_ATTENTION)})(?=\.)")
_NEW = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(map(re.escape, OLD_ATTENTION.values()))})(?=\.)")
_BACK = {new: old for old, new in OLD_ATTENTION.items()}


def new_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with today's attention names: query, key, value, proj_attn become to_q, to_k, to_v, to_out.0."""
    renamed: dict[str, Any] = {}
    for key, value in state.items():
        name = _OLD.sub(lambda m: m[1] + OLD_ATTENTION[m[2]], key) if isinstance(key, str) else key
        if name in renamed:
            raise ValueError(f"the state dict holds {name} twice, under its old and its new name")
        renamed[name] = value
    return renamed


def old_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the attention names of diffusers' first releases; the inverse of `new_keys`."""
    return {_NEW.sub(lambda m: m[1] + _BACK[m[2]], key): value for key, value in state.items()}


def unet_arguments(config: Mapping[str, Any], source: object = "config") -> dict[str, Any]:
    """A `UNet2DModel` config as keyword arguments of `DDPMUNet`; entries with a leading underscore are notes.

    ValueError for a config of another class or with a key that neither class has.
    """
    named = config.get("_class_name", CLASS)
    if named not in (CLASS, DDPMUNet.__name__):
        raise ValueError(f"{source} is the config of a {named}, which is not covered; covered is {CLASS}")
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in given:
        if name not in DEFAULTS:
            raise ValueError(f"{source} has the key {name!r}, which is not covered; {CLASS} has {', '.join(DEFAULTS)}")
    return {**DEFAULTS, **given}


def _their_config(net: DDPMUNet) -> dict[str, Any]:
    """The network's arguments without notes; ValueError where one is not diffusers'."""
    for name in OWN:
        if name in net.config:
            raise ValueError(
                f"diffusers' {CLASS} has no {name}, which is {net.config[name]!r} here, and so no such network; "
                "keep it as a state dict, or with ddpm_fast.interop.openai.to_openai as an OpenAI checkpoint"
            )
    return {name: value for name, value in net.config.items() if not name.startswith("_")}


def from_diffusers(unet: nn.Module) -> DDPMUNet:
    """A `DDPMUNet` with copies of the weights of a diffusers `UNet2DModel`: dtype, device, mode and all.

    Raises TypeError for another class, ValueError for blocks that are not covered and for a network that was altered.
    """
    if not isinstance(unet, nn.Module) or CLASS not in (base.__name__ for base in type(unet).__mro__):
        raise TypeError(f"unet must be a diffusers {CLASS}, got {type(unet).__name__}")
    config: Any = unet.config
    net = build_unet(unet_arguments(config), unet.state_dict(), f"the {CLASS}")
    same_flags(unet, net)
    return net


def to_diffusers(net: DDPMUNet) -> Any:
    """A diffusers `UNet2DModel` with copies of the weights: dtype, device, mode and all.

    Raises ImportError without diffusers, ValueError where it has no words for an option of this network.
    """
    if not isinstance(net, DDPMUNet):
        raise TypeError(f"net must be a DDPMUNet, got {type(net).__name__}")
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(f"to_diffusers needs diffusers ({error}): pip install ddpm_fast[diffusers]") from None
    known = inspect.signature(UNet2DModel.__init__).parameters
    config = _their_config(net)
    for name, value in config.items():
        if name not in known and value != DEFAULTS[name]:
            raise ValueError(f"this diffusers knows no {name}, which is {value!r} here; install a newer one")
    with torch.device("meta"):
        unet: Any = UNet2DModel(**{name: value for name, value in config.items() if name in known})
    fill(unet, net.state_dict(), "the DDPMUNet")
    same_flags(net, unet)
    return unet


def load_unet(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> DDPMUNet:
    """The network in a folder with config.json and weights, as diffusers' `save_pretrained` writes; in eval mode.

    Weights are diffusion_pytorch_model.safetensors or .bin (read as weights only, never as a program), whole or in
    shards with an index; variant="fp16" reads diffusion_pytorch_model.fp16.safetensors. Old attention names are mapped.

    Raises FileNotFoundError or ValueError naming the file, key or block that is missing, unexpected, wrong-shaped, cut
    off or not covered, before anything is loaded.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    source = path / "config.json"
    arguments = unet_arguments(read_json(source), source)
    try:
        expected = _bare(arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None
    state, file = read_weights(path, variant)
    return fill(expected, new_keys(state), file, dtype=dtype, device=device).eval()


def save_unet(
    net: DDPMUNet, folder: str | os.PathLike[str], *, variant: str | None = None, safe_serialization: bool = True
) -> None:
    """Writes config.json and weights that `load_unet` and diffusers' `UNet2DModel.from_pretrained` read.

    safe_serialization=False writes .bin with torch.save. The folder is made where it is missing. ValueError for options
    that diffusers has not.
    """
    if not isinstance(net, DDPMUNet):
        raise TypeError(f"net must be a DDPMUNet, got {type(net).__name__}")
    config = _their_config(net)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_weights(net.state_dict(), path, variant=variant, safe=safe_serialization)
    text = json.dumps({"_class_name": CLASS, **config}, indent=2, sort_keys=True)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def build_unet(arguments: Mapping[str, Any], state: Mapping[str, Tensor], source: object) -> DDPMUNet:
    """A DDPMUNet of these arguments with copies of these tensors, each in its own dtype and on its own device."""
    return fill(_bare(arguments), new_keys(state), source)


def _bare(arguments: Mapping[str, Any]) -> DDPMUNet:
    """The network without weights."""
    with torch.device("meta"):
        return DDPMUNet(**arguments)


def fill(
    net: Module,
    state: Mapping[str, Tensor],
    source: object,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Module:
    """Every parameter of a bare network replaced by a copy of its tensor, once all of them are known to fit.

    dtype, device None: the tensor's own.
    """
    checked: State = check_state(state, net.state_dict(), source)
    with torch.inference_mode(False), torch.no_grad():
        own = {key: value.detach().to(device=device, dtype=dtype, copy=True) for key, value in checked.items()}
        net.load_state_dict(own, strict=True, assign=True)
    return net


def same_flags(source: nn.Module, target: nn.Module) -> None:
    """Training mode and requires_grad as in `source`."""
    target.train(source.training)
    wanted = {key: parameter.requires_grad for key, parameter in source.named_parameters()}
    for key, parameter in target.named_parameters():
        parameter.requires_grad_(wanted[key])
