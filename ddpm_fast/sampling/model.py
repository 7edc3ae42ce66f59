"""Calling somebody else's network: its mode, its device and dtype, its shape, and what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[..., Any]


def module_of(model: Model) -> nn.Module | None:
    """The module behind `model`: itself, or the owner of a bound method such as `net.forward`; None for a function."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextlib.contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Every submodule in eval mode inside, each as it was before on the way out, whatever happens in between.

    The flags are set directly: `.eval()` may be overridden with side effects that setting a flag back would not undo.
    """
    module = module_of(model)
    training = [part for part in module.modules() if part.training] if module is not None else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def device_of(model: Model) -> torch.device | None:
    """The device of the first parameter or buffer, or `model.device` of what is no Module; None where there is none."""
    module = module_of(model)
    if module is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else None


def dtype_of(model: Model) -> torch.dtype:
    """What the network wants to be fed: the dtype of its first floating parameter, float32 where there is none."""
    module = module_of(model)
    if module is not None:
        for parameter in module.parameters():
            if parameter.dtype in FED_DTYPES:
                return parameter.dtype
    return torch.float32


FED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fingerprint(model: Model) -> tuple[int, ...]:
    """Where the weights lie in memory. A captured graph reads them there, so it is stale once this changes."""
    module = module_of(model)
    if module is None:
        return ()
    return tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))


def attribute(model: Model, name: str) -> Any:
    """`model.name`, looked up in a diffusers-style `.config` and a wrapped `.module` too; None where it is missing."""
    module = module_of(model)
    for owner in (getattr(model, "config", None), model, module, getattr(model, "module", None)):
        value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
        if value is not None:
            return value
    return None


def sample_shape(model: Model, shape: int | Sequence[int] | None) -> tuple[int, ...]:
    """One sample's shape: as given, or from an image side and the network's channels, or all from the network."""
    if shape is None:
        known = attribute(model, "sample_shape")
        shape = known if isinstance(known, tuple) else None
    channels = attribute(model, "in_channels") or attribute(model, "channels")
    if shape is None:
        shape = attribute(model, "sample_size")
        if shape is None or not isinstance(channels, int):
            raise ValueError(
                "shape is not known: the model names no sample_shape, nor in_channels and sample_size, and no x was "
                "given; pass the shape of one sample, shape=(C, H, W) for images or shape=(D,) for vectors"
            )
        sides = (shape, shape) if isinstance(shape, int) else tuple(shape)
        return (channels, *sides)
    result: tuple[int, ...]
    if isinstance(shape, int) and not isinstance(shape, bool):
        result = (channels, shape, shape) if isinstance(channels, int) else (shape,)
    else:
        result = tuple(shape) if isinstance(shape, Sequence) else ()
    if not result or not all(isinstance(size, int) and not isinstance(size, bool) for size in result):
        raise TypeError(f"shape must be one sample's sizes, such as (3, 32, 32) or (2,), got {shape!r}")
    if min(result) < 1:
        raise ValueError(f"shape must be made of sizes of at least 1, got {result}")
    return result


def prediction(output: Any, fed: Tensor, parts: int = 1) -> Tensor:
    """The tensor in what a network returned for input `fed`, checked to be like it, with `parts` times the channels.

    Understood: a tensor, an object with `.sample` (diffusers), a mapping with "sample", a tuple that starts with it.
    """
    m = output
    if isinstance(m, (tuple, list)) and m:
        m = m[0]
    if not isinstance(m, Tensor):
        m = m.get("sample") if isinstance(m, Mapping) else getattr(m, "sample", m)
    if not isinstance(m, Tensor):
        raise TypeError(
            "the model must return a tensor, an object with .sample or a tuple that starts with a tensor, "
            f"got {type(output).__name__}"
        )
    expected = (fed.shape[0], parts * fed.shape[1], *fed.shape[2:])
    if m.shape != expected:
        like = ", like its input"
        hint = ""
        if parts == 2:
            like = ", a prediction like its input and a variance"
            if m.shape == fed.shape:
                hint = '; this one predicts no variance: use variance="fixed_large" or "fixed_small"'
        elif m.dim() > 1 and m.shape == (fed.shape[0], 2 * fed.shape[1], *fed.shape[2:]):
            hint = (
                '; twice the channels usually means a learned variance: pass the Sampler variance="learned_range" or '
                '"learned"'
            )
        raise ValueError(f"the model must return shape {expected}{like}, got {tuple(m.shape)}{hint}")
    if m.device != fed.device:
        raise ValueError(f"the model must return a tensor on {fed.device}, like its input, got one on {m.device}")
    if not m.is_floating_point():
        raise TypeError(f"the model must return a floating tensor, got {m.dtype}")
    return m.float() if m.dtype == torch.float64 else m
