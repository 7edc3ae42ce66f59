"""Whether a module is still what its class made it: a plan runs what the class's forward says, and nothing else."""

from __future__ import annotations

from torch import nn

from .fold import UnreadableError

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Attributes that decide what a part computes, besides the values of its tensors and a norm's eps.
FORM = (
    *("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode"),
    *("time_dim", "dim", "flip", "shift", "num_groups", "heads", "rescale_output_factor"),
    *("time_scale_shift", "output_scale_factor", "act", "resample"),
    *("theta", "scale", "approximate", "downscale_factor", "scale_factor", "mode", "channels", "self_condition"),
)


def check_untouched(model: nn.Module) -> None:
    """UnreadableError where hooks or another forward would be passed over in silence."""
    for name, part in model.named_modules():
        where = name or "the model"
        if any(getattr(part, hooks) for hooks in HOOKS):
            raise UnreadableError(f"{where} has forward hooks, which a plan would not call")
        if "forward" in vars(part):
            raise UnreadableError(f"the forward of {where} was replaced")


def check_unaltered(model: nn.Module, fresh: nn.Module, parts: tuple[type, ...]) -> None:
    """UnreadableError unless the model has the parts of `fresh`, built of the same arguments, and computes with them.

    parts: all classes that may occur.
    """
    kind = type(model).__name__
    for name, part in model.named_modules():
        if type(part) not in parts:
            raise UnreadableError(f"{name or 'the model'} is a {type(part).__name__}, which is no part of a {kind}")
    check_untouched(model)
    for name, expected in fresh.named_modules():
        try:
            own = model.get_submodule(name)
        except AttributeError:
            raise UnreadableError(f"{name} is missing") from None
        if type(own) is not type(expected) or _form(own) != _form(expected):
            raise UnreadableError(f"{name or 'the model'} is {own}, where such a {kind} has {expected}")


def _form(part: nn.Module) -> tuple[object, ...]:
    own = {**part._parameters, **part._buffers}
    shapes = [(name, None if tensor is None else tensor.shape) for name, tensor in own.items()]
    return (*(getattr(part, name, None) for name in FORM), sorted(shapes, key=lambda item: item[0]))
