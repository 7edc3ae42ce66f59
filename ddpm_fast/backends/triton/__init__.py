"""The Triton backend: one function per op of ``ddpm_fast/ops/_schema.py``, for GPUs, and for CPUs in the interpreter.

Importing this package never fails: where Triton is missing or too old there are no ops, and ``unavailable_reason`` says
so.
"""

from __future__ import annotations

import torch

_import_error: str | None = None
try:
    from .add_bias_temb import add_bias_temb, add_bias_temb_backward
    from .batch_norm_silu import batch_norm_silu
    from .batch_norm_silu_backward import batch_norm_silu_backward
    from .ddpm_step import ddpm_step
    from .group_norm_silu import group_norm_silu
    from .group_norm_silu_backward import group_norm_silu_backward
    from .launch import INTERPRETED
    from .noise_mse import noise_mse, noise_mse_backward
    from .normal import normal, random_bits
    from .q_sample import q_sample, q_sample_backward
    from .rms_norm_silu import rms_norm_silu
    from .rms_norm_silu_backward import rms_norm_silu_backward
except (ImportError, AttributeError) as error:  # AttributeError: a Triton without something that the kernels use
    _import_error = str(error)

__all__ = [
    "add_bias_temb",
    "add_bias_temb_backward",
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "ddpm_step",
    "group_norm_silu",
    "group_norm_silu_backward",
    "noise_mse",
    "noise_mse_backward",
    "normal",
    "q_sample",
    "q_sample_backward",
    "random_bits",
    "rms_norm_silu",
    "rms_norm_silu_backward",
    "unavailable_reason",
]


def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton cannot serve tensors on ``device``, with the remedy; None when it can."""
    if _import_error is not None:
        return (
            f"Triton cannot be used ({_import_error}); pip install 'ddpm_fast[triton]' "
            "(Linux only; tested with Triton 3.6 to 3.9)"
        )
    if device.type not in ("cpu", "cuda"):
        return f"no Triton kernels for {device.type}; they run on cuda"
    if INTERPRETED:
        return None
    if device.type == "cpu":
        return "Triton runs on CPU tensors in its interpreter only; set TRITON_INTERPRET=1 before Python starts"
    if not torch.cuda.is_available():
        return "no usable GPU; install the GPU's driver and a torch built for it"
    return None
