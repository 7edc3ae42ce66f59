"""Networks of lucidrains' denoising_diffusion_pytorch 2.x as `RMSNormUNet`s: objects, checkpoint files, state dicts.

Keys and values are the same on both sides: what is loaded is exact to the bit, and `net.state_dict()` loads there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import RMSNormUNet
from ..nn import rms_blocks as parts
from ._unets import fill, same_flags
from ._weights import State, read_file

HOME = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
"""The module of the package's `Unet`; classes of that name in other modules are other networks."""

BUFFERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    "loss_weight",
)
"""What a GaussianDiffusion's state dict holds beside `model.<the network's keys>`."""

_OTHERS = {
    "down_blocks.": "a diffusers network: ddpm_fast.interop.load_unet(folder)",
    "input_blocks.": "an OpenAI network: ddpm_fast.interop.openai",
    "down1.": "the tutorial's U-Net: ddpm_fast.UNet",
    "null_classes_emb": "the Unet of classifier_free_guidance.py, which is not covered",
    "classes_emb.": "the Unet of classifier_free_guidance.py, which is not covered",
    "input_block.": "a KarrasUnet, which is not covered",
    "downs.0.2.fn.": "a Unet1D or a Unet of an older version, which are not covered",
}
"""How keys of other classes begin, and whose they are."""

_THEIRS: dict[type, str] = {
    parts.Sinusoids: "SinusoidalPosEmb",
    parts.FourierFeatures: "RandomOrLearnedSinusoidalPosEmb",
    parts.Down: "Sequential",
    parts.Up: "Sequential",
    nn.PixelUnshuffle: "Rearrange",
}
"""What the package calls our parts where it has another name for them."""

_EXTRA = ("SiLU", "Attend", "Dropout")
"""Parts without weights that it has and we have not."""

_FORM = (
    *("stride", "padding", "dilation", "groups", "padding_mode", "scale_factor", "mode", "approximate"),
    *("p", "dim", "theta", "heads", "scale"),
)


def from_lucidrains(unet: nn.Module) -> RMSNormUNet:
    """A `RMSNormUNet` with copies of the weights of the package's own `Unet`: dtype, device, mode and all.

    Raises TypeError for another class, ValueError for a network that was altered.
    """
    theirs: list[Any] = [base for base in type(unet).__mro__ if (base.__module__, base.__name__) == (HOME, "Unet")]
    if not theirs:
        raise TypeError(
            f"unet must be a Unet of {HOME}, got {type(unet).__module__}.{type(unet).__qualname__}; for a copy of "
            "its code pass load_unet its state dict"
        )
    if "forward" in vars(unet) or type(unet).forward is not theirs[0].forward:
        raise ValueError("the Unet was altered: it has another forward")
    source, state = "the Unet", unet.state_dict()
    given: dict[str, Any] = {name: getattr(unet, name) for name in ("channels", "self_condition", "out_dim")}
    if "time_mlp.0.weights" in state:
        given["random_fourier_features"] = not _setting(unet, "time_mlp.0", "weights").requires_grad
    else:
        given["sinusoidal_pos_emb_theta"] = _setting(unet, "time_mlp.0", "theta")
    given["dropout"] = _setting(unet, "mid_block1.block1.dropout", "p")
    given["flash_attn"] = _setting(unet, "mid_attn.attend", "flash")
    net = _build(unet_arguments(state, source, **given), state, source)
    _check_parts(unet, net)
    same_flags(unet, net)
    return net


def load_unet(source: str | os.PathLike[str] | Mapping[str, Any], *, ema: bool = True, **arguments: Any) -> RMSNormUNet:
    """The network in a checkpoint of the package, in eval mode.

    Args:
        source: a file, .pt (read as weights only, never as a program) or .safetensors, or what such a file holds: what
            Trainer saves (`model-N.pt`), the state dict of a GaussianDiffusion or that of a Unet.
        ema: of a Trainer's file the averaged weights, those its samples are drawn with; False: those being trained.
        arguments: of `RMSNormUNet`. Its shape follows from the weights; sinusoidal_pos_emb_theta, dropout and
            random_fourier_features (instead of learned_sinusoidal_cond) leave no trace in them and are the defaults
            unless given. As many channels out as in means no self_condition unless given.

    Raises FileNotFoundError or ValueError naming the file and the key, shape or argument that is not as it should be,
    before anything is loaded. A checkpoint of another class is a ValueError that says whose it looks like.
    """
    if isinstance(source, Mapping):
        found, name = dict(source), "the state dict"
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}" + _beside(path))
        found, name = read_file(path), str(path)
    return unet_of(found, name, ema=ema, **arguments)


def unet_of(found: Mapping[str, Any], name: str, *, ema: bool = True, **arguments: Any) -> RMSNormUNet:
    """`load_unet` of what a file holds, which messages call `name`."""
    state = unet_state(found, name, ema=ema)
    return _build(unet_arguments(state, name, **arguments), state, name).eval()


def unet_state(found: Mapping[str, Any], source: object = "the state dict", *, ema: bool = True) -> State:
    """The network's own tensors out of a Trainer's checkpoint, a GaussianDiffusion's state dict or a bare one.

    ValueError where it is none of these.
    """
    state: Mapping[str, Any] = found
    if "model" in found and isinstance(found["model"], Mapping):  # what Trainer.save writes
        state = found["model"]
        if ema:
            averaged = found.get("ema")
            if not isinstance(averaged, Mapping):
                raise ValueError(f"{source} holds no averaged weights under 'ema'; pass ema=False for the others")
            state = _under("ema_model.", averaged)
            if not state:
                raise ValueError(f"{source} holds an average without ema_model.*; pass ema=False")
    state = unwrapped(state)
    if any(str(key).startswith("model.") for key in state):
        extra = [key for key in state if not str(key).startswith("model.") and key not in BUFFERS]
        if extra:
            raise ValueError(f"{source} holds {extra[0]!r} beside the network, which no GaussianDiffusion has")
        state = _under("model.", state)
    for start, whose in _OTHERS.items():
        if any(str(key).startswith(start) for key in state):
            raise ValueError(f"{source} holds no lucidrains Unet but {whose}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} must hold tensors by name, got {type(value).__name__} under {key!r}")
    return dict(state)


def unet_arguments(state: Mapping[str, Tensor], source: object = "the state dict", **given: Any) -> dict[str, Any]:
    """Arguments of `RMSNormUNet` that follow from the shapes of a network's state dict; `given` ones win.

    ValueError where a tensor that decides is missing or has no such shape. That all others fit is for
    `check_state` to see.
    """

    def shape(key: str, *pattern: int | None) -> tuple[int, ...]:
        """The tensor's shape, checked against numbers and Nones (any)."""
        if key not in state:
            raise ValueError(f"{source} holds no lucidrains Unet: {key} is missing")
        got = tuple(state[key].shape)
        if len(got) != len(pattern) or any(p not in (None, size) for p, size in zip(pattern, got, strict=True)):
            wanted = ", ".join("any" if p is None else str(p) for p in pattern)
            raise ValueError(f"{source} holds no lucidrains Unet: {key} has shape {got}, expected ({wanted})")
        return got

    init_dim, seen, _, _ = shape("init_conv.weight", None, None, 7, 7)
    time_dim = shape("time_mlp.3.weight", None, None)[0]
    out_dim = shape("final_conv.weight", None, None, 1, 1)[0]
    stages = 1 + max((int(match[1]) for key in state if (match := re.match(r"downs\.(\d+)\.", key))), default=-1)
    dim, full, heads, dim_head, mults = max(time_dim // 4, 1), [], [], [], []
    for stage in range(stages):
        # full attention has no norm behind it, and memory with the tokens before the channels
        full.append(f"downs.{stage}.2.to_out.weight" in state)
        memory = shape(f"downs.{stage}.2.mem_kv", 2, None, None, None)
        heads.append(memory[1])
        dim_head.append(memory[3 if full[-1] else 2])
        width = shape(f"downs.{stage}.3.{'' if stage == stages - 1 else '1.'}weight", None, None, None, None)[0]
        if width % dim or time_dim % 4:
            raise ValueError(
                f"{source} holds no lucidrains Unet: stage {stage} has {width} channels, which is no multiple of "
                f"{time_dim} / 4, what time_mlp.3.weight makes of dim"
            )
        mults.append(width // dim)
    self_condition = given.get("self_condition", seen == 2 * out_dim and given.get("channels") != seen)
    channels = seen // 2 if self_condition else seen
    inferred: dict[str, Any] = {
        "dim": dim,
        "init_dim": init_dim,
        "out_dim": out_dim,
        "dim_mults": tuple(mults),
        "channels": channels,
        "self_condition": self_condition,
        "learned_variance": out_dim == 2 * given.get("channels", channels),
        "attn_heads": tuple(heads),
        "attn_dim_head": tuple(dim_head),
        "full_attn": tuple(full),
    }
    if "time_mlp.0.weights" in state:
        inferred["learned_sinusoidal_cond"] = not given.get("random_fourier_features", False)
        inferred["learned_sinusoidal_dim"] = 2 * shape("time_mlp.0.weights", None)[0]
    return {**inferred, **given}


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The keys without what torch.compile and the parallel wrappers put in front of a module's own."""
    wrapper = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")
    return {wrapper.sub("", key) if isinstance(key, str) else key: value for key, value in state.items()}


def _under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose keys start so, without it."""
    return {str(key)[len(prefix) :]: value for key, value in state.items() if str(key).startswith(prefix)}


def _build(arguments: Mapping[str, Any], state: Mapping[str, Tensor], source: object) -> RMSNormUNet:
    """The network of these arguments with copies of these tensors, each in its own dtype and on its own device."""
    try:
        with torch.device("meta"):
            net = RMSNormUNet(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None
    return fill(net, state, source)


def _beside(path: Path) -> str:
    """What a message may add when a checkpoint is not found."""
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for file in folder.glob("*.pt")) if folder.is_dir() else []
    return f"; in {folder} there are {', '.join(names)}" if names else ""


def _part(unet: nn.Module, name: str) -> Any:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the Unet was altered: {name} is missing") from None


def _setting(unet: nn.Module, name: str, attribute: str) -> Any:
    part = _part(unet, name)
    if not hasattr(part, attribute):
        raise ValueError(f"the Unet was altered: {name} is a {type(part).__name__}, which has no {attribute}")
    return getattr(part, attribute)


def _check_parts(unet: nn.Module, net: RMSNormUNet) -> None:
    """ValueError where a part of the package's network computes something else than ours does in its place."""
    ours = dict(net.named_modules())
    for name, part in unet.named_modules():
        own, kind = ours.get(name), type(part).__name__
        expected = _EXTRA if own is None else (_THEIRS.get(type(own), type(own).__name__),)
        if name and kind not in expected:
            raise ValueError(f"the Unet was altered: {name} is a {kind}, expected {' or '.join(expected)}")
        for form in _FORM:
            if hasattr(own, form) and getattr(part, form, None) != getattr(own, form):
                got, wanted = getattr(part, form, None), getattr(own, form)
                raise ValueError(f"the Unet was altered: {name}.{form} is {got!r}, expected {wanted!r}")
    for name in ours:
        _part(unet, name)
