"""What the Trainer refuses, and what it warns about."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.images import MODES, ImageFolder, channels_of

_NEEDED = ("channels", "image_size", "is_ddim_sampling", "sample")
_SHOWN = 3  # keys named in a message


def check_model(diffusion: object) -> tuple[int, int]:
    """The model's image size (H, W). TypeError for what is no diffusion model, ValueError for a size that it cannot
    halve as often as it does."""
    lacking = [name for name in _NEEDED if not hasattr(diffusion, name)]
    if not isinstance(diffusion, nn.Module) or lacking:
        what = f"lacks {', '.join(lacking)}" if lacking else "is no torch.nn.Module"
        raise TypeError(
            f"diffusion_model must be a GaussianDiffusion or like it, got {type(diffusion).__name__}, which {what}"
        )
    size: Any = diffusion.image_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = getattr(getattr(diffusion, "model", None), "downsample_factor", 1)
    if height % factor or width % factor:
        raise ValueError(f"image_size {height}x{width} must be divisible by {factor}, the network's downsample_factor")
    if diffusion.channels not in MODES:
        raise ValueError(f"images have 1, 3 or 4 channels, and the model's are {diffusion.channels}")
    return height, width


def check_numbers(trainer: Any) -> None:
    """Counts and `max_grad_norm` must be positive (1e5 is made 100000), `num_samples` a square; a small effective
    batch is a warning.
    """
    for name in ("batch_size", "gradient_accumulate_every", "train_num_steps", "save_and_sample_every", "num_samples"):
        value = getattr(trainer, name)
        if not isinstance(value, (int, float)) or value != value // 1 or value < 1:
            argument = "train_batch_size" if name == "batch_size" else name
            raise ValueError(f"{argument} must be a positive integer, got {value!r}")
        setattr(trainer, name, int(value))
    limit = trainer.max_grad_norm  # a negative one would turn the gradient around
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        raise ValueError(f"max_grad_norm must be a positive number, math.inf for no limit, got {limit!r}")
    num_samples = trainer.num_samples
    root = math.isqrt(num_samples)
    if root * root != num_samples:
        raise ValueError(f"num_samples must be a square, got {num_samples}; near are {root**2} and {(root + 1) ** 2}")
    batch = trainer.batch_size * trainer.gradient_accumulate_every
    if batch < 16:
        warnings.warn(f"train_batch_size x gradient_accumulate_every is {batch}; 16 and more train well", stacklevel=3)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"Trainer runs in one process, and WORLD_SIZE is {os.environ['WORLD_SIZE']}: start it by python alone, "
            "without accelerate launch or torchrun"
        )


def check_count(images: ImageFolder, batch: int) -> None:
    """At least a batch; below a hundred a warning."""
    if len(images) < batch:
        raise ValueError(f"{images.folder} holds {len(images)} images, fewer than train_batch_size={batch}")
    if len(images) < 100:
        warnings.warn(f"{images.folder} holds only {len(images)} images; 10,000 are a good number", stacklevel=3)


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Where results are written: a folder, or nothing yet."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"results_folder must be a folder, and {path} is a file")
    return path


def device_of(model: nn.Module, asked: str | torch.device | None) -> torch.device:
    """Where to train: as asked, else where the model is, unless that is a CPU while there is a GPU."""
    if asked is not None:
        return torch.device(asked)
    where = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if where.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return where


def mode_of(asked: str | None, channels: int) -> str:
    """The mode of Pillow that gives `channels` channels."""
    mode = MODES[channels] if asked is None else asked
    if channels_of(mode) != channels:
        raise ValueError(f"convert_image_to={mode!r} gives {channels_of(mode)} channels, and the model has {channels}")
    return mode


def check_step(step: object, source: str) -> int:
    """How many steps a checkpoint has behind it, a whole number or a tensor of one."""
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, (int, float)) or step != step // 1 or step < 0:
        raise ValueError(f"{source} must be a number of steps, got {step!r}")
    return int(step)


def check_fits(state: object, module: nn.Module, source: str) -> None:
    """ValueError unless `state` has the module's keys with as many elements each; the module is left as it is."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source} must hold tensors by name, got {type(state).__name__}")
    expected = module.state_dict()
    wrong = [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is unexpected" for key in state if key not in expected]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape and not state[key].numel() == value.numel() == 1
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{source} is of another model: {'; '.join(wrong[:_SHOWN])}{more}")
