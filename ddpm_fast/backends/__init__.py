"""Which implementation serves an op: one registry, one resolver.

``reference`` is the specification in eager PyTorch, ``native`` the compiled extension (C++ threads on CPU, CUDA on
GPU), ``triton`` the Triton kernels. Each is a module with one function per op, loaded when first asked for. Without
a request the first backend of ``ORDER`` that can serve the tensor is taken; a request (``use_backend``, the environment
variable DDPM_FAST_BACKEND) never falls back: it raises, saying why the backend cannot serve and which can.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "native", "triton")
ENVIRONMENT_VARIABLE = "DDPM_FAST_BACKEND"

# On a GPU the compiled kernels come first because they start sooner than Triton's; both are exact.
ORDER = ("native", "triton", "reference")

_requested: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None
_chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r}: use_backend and the environment variable {ENVIRONMENT_VARIABLE} take one of "
            f"{', '.join(BACKENDS)}"
        )
    return name


def requested() -> str | None:
    """The backend that is asked for, by `use_backend` or the environment; None where the choice is automatic."""
    return _requested


def unavailable_reason(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the backend ``name`` cannot serve tensors of ``dtype`` on ``device``, with the remedy; None when it can."""
    module = importlib.import_module(f"ddpm_fast.backends.{_check_name(name)}")
    if dtype == torch.float64 and name != "reference":
        return "float64 is computed by the reference backend only; convert to float32"
    reason: str | None = module.unavailable_reason(device)
    return reason


def resolve(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that implements ``op`` for ``tensor``. The choice is made once per device and dtype."""
    key = (op, _requested, tensor.device, tensor.dtype)
    function = _chosen.get(key)
    if function is None:
        name = _choose(op, _requested, tensor.device, tensor.dtype)
        function = _chosen[key] = getattr(importlib.import_module(f"ddpm_fast.backends.{name}"), op)
    return function


def _choose(op: str, requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    if requested is None:
        return next(name for name in ORDER if unavailable_reason(name, device, dtype) is None)
    reason = unavailable_reason(requested, device, dtype)
    if reason is not None:
        able = [name for name in BACKENDS if unavailable_reason(name, device, dtype) is None]
        raise RuntimeError(
            f"backend {requested!r} was asked for, but cannot run {op} on {device.type} in {dtype}: {reason}. "
            f"Available here: {', '.join(able)}"
        )
    return requested


class use_backend:
    """Ask for one backend for all ops: ``use_backend("triton")``, or ``with use_backend("reference"): ...``.

    ``None`` goes back to the automatic choice. Process-wide; an unknown name raises ValueError at once, one that
    cannot serve a call raises RuntimeError in that call.
    """

    def __init__(self, name: str | None) -> None:
        global _requested
        if name is not None:
            _check_name(name)
        self._before = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _requested
        _requested = self._before
