"""The compiled extension: C++ threads for CPU tensors, CUDA kernels for GPU tensors, one binary for both.

Each function brings its tensors into one layout, allocates the outputs and passes raw addresses to ``ddpm_fast._C``;
the meaning of the arguments is in ``csrc/kernels.h``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast import noise as spec
from ddpm_fast.backends.architectures import unserved_reason, unusable_reason
from ddpm_fast.backends.layout import Layout, Staged
from ddpm_fast.backends.native_batch_norm import batch_norm_silu as batch_norm_silu
from ddpm_fast.backends.native_batch_norm import batch_norm_silu_backward as batch_norm_silu_backward
from ddpm_fast.backends.native_norm import group_norm_silu as group_norm_silu
from ddpm_fast.backends.native_norm import group_norm_silu_backward as group_norm_silu_backward
from ddpm_fast.backends.native_rms_norm import rms_norm_silu as rms_norm_silu
from ddpm_fast.backends.native_rms_norm import rms_norm_silu_backward as rms_norm_silu_backward

_C: Any = None
_import_error: str | None = None
try:
    from ddpm_fast import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _import_error = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
TARGETS = {"none": 0, "eps": 1, "x0": 2, "v": 3}
LOSSES = {"mse": 0, "l1": 1, "huber": 2}

# Partial sums per sample in noise_mse: enough blocks to fill a GPU at batch 1.
WORKSPACE_COLUMNS = 256


def unavailable_reason(device: torch.device) -> str | None:
    """Why the extension cannot serve ``device``; None when it can."""
    if _C is None:
        return (
            f"the compiled extension ddpm_fast._C is missing ({_import_error}); install the package with pip instead "
            "of importing the source folder (for development: pip install -e .)"
        )
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no compiled kernels for {device.type}; they exist for cpu and cuda"
    return _cuda_reason() or _gpu_reason(device)


def _gpu_reason(device: torch.device) -> str | None:
    """Why there is no machine code for this GPU; None where there is."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; install a torch built for CUDA"
    return unserved_reason(str(_C.build_info()["cuda_architectures"]), torch.cuda.get_device_capability(device))


@functools.cache
def _cuda_reason() -> str | None:
    return unusable_reason(_C.build_info())


def _target(x: Tensor) -> tuple[int, int]:
    """(-1, threads) for a CPU tensor, (device index, current stream) for a CUDA tensor."""
    if x.is_cpu:
        return -1, torch.get_num_threads()
    index = x.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _dtype(x: Tensor | None) -> int:
    return 0 if x is None else DTYPES[x.dtype]


def _optional(x: Tensor | None, layout: Layout) -> Tensor | None:
    return None if x is None else layout.dense(x)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _shape(layout: Layout) -> tuple[int, int, int, bool]:
    return layout.n, layout.channels, layout.inner, layout.channels_last


def normal(out: Tensor, rng: Tensor, stream: int) -> None:
    """out[n, e] = normal(seed, first_sample + n, stream, e)"""
    layout = Layout.of(out)
    staged = Staged(out, layout)
    data = staged.data
    _C.normal(*_target(out), *_shape(layout), _address(data), _dtype(data), _address(rng), stream % 2**32)
    staged.commit()


def random_bits(out: Tensor, rng: Tensor, stream: int) -> None:
    """The uint32 under the normals, as int64"""
    data = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    elements = out.shape[1:].numel()
    _C.random_bits(*_target(out), out.shape[0], elements, _address(data), _address(rng), stream % 2**32)
    if data is not out:
        out.copy_(data)


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps, and the target"""
    layout = Layout.of(x0)
    x, eps = layout.dense(x0), _optional(noise, layout)
    x_t = Staged(torch.empty_like(x0, dtype=dtype), layout)
    wanted = Staged(torch.empty_like(x_t.tensor), layout) if target != "none" else None
    _C.q_sample(
        *_target(x0),
        *_shape(layout),
        _address(x),
        _dtype(x),
        _address(t),
        _address(table),
        table.shape[0],
        _address(eps),
        _address(rng),
        stream % 2**32,
        offset_noise,
        spec.STREAM_OFFSET_NOISE,
        TARGETS[target],
        _address(x_t.data),
        _address(wanted.data) if wanted else 0,
        DTYPES[dtype],
    )
    return x_t.commit(), wanted.commit() if wanted else x_t.tensor.new_empty(0)


def q_sample_backward(
    g_x_t: Tensor | None,
    g_target: Tensor | None,
    t: Tensor,
    table: Tensor,
    target: str,
    dtype: torch.dtype,
    need_x0: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x_t and of the target pulled back to x0 and eps"""
    g = g_x_t if g_x_t is not None else g_target
    assert g is not None
    layout = Layout.of(g)
    g1, g2 = _optional(g_x_t, layout), _optional(g_target, layout)
    g_x0 = Staged(torch.empty_like(g, dtype=dtype), layout) if need_x0 else None
    g_noise = Staged(torch.empty_like(g, dtype=torch.float32), layout) if need_noise else None
    _C.q_sample_backward(
        *_target(g),
        *_shape(layout),
        _address(g1),
        _address(g2),
        _dtype(g),
        _address(t),
        _address(table),
        table.shape[0],
        TARGETS[target],
        _address(g_x0.data) if g_x0 else 0,
        DTYPES[dtype],
        _address(g_noise.data) if g_noise else 0,
    )
    return g_x0.commit() if g_x0 else g.new_empty(0), g_noise.commit() if g_noise else g.new_empty(0)


def add_bias_temb(h: Tensor, bias: Tensor | None, temb: Tensor | None, act: str) -> Tensor:
    """y = act(h + bias[c]) + temb[n, c]"""
    layout = Layout.of(h)
    x, bias, temb = layout.dense(h), _flat(bias), _flat(temb)
    y = Staged(torch.empty_like(h), layout)
    _C.add_bias_temb(
        *_target(h), *_shape(layout), _address(x), _dtype(x), _address(bias), _dtype(bias), _address(temb),
        _dtype(temb), act == "silu", _address(y.data),
    )  # fmt: skip
    return y.commit()


def add_bias_temb_backward(
    g: Tensor, h: Tensor | None, bias: Tensor | None, act: str, need_h: bool, need_bias: bool, need_temb: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """g_h = g act'(h + bias); the sums of g_h and of g over all but (n, c)"""
    like = h if h is not None else g
    layout = Layout.of(like)
    g_dense, h_dense, bias = layout.dense(g), _optional(h, layout), _flat(bias)
    g_h = Staged(torch.empty_like(like), layout) if need_h else None
    gh_sum = g.new_empty(g.shape[:2], dtype=torch.float32) if need_bias else g.new_empty(0)
    g_sum = g.new_empty(g.shape[:2], dtype=torch.float32) if need_temb else g.new_empty(0)
    _C.add_bias_temb_backward(
        *_target(g),
        *_shape(layout),
        _address(g_dense),
        _dtype(g_dense),
        _address(h_dense),
        DTYPES[like.dtype],
        _address(bias),
        _dtype(bias),
        act == "silu",
        _address(g_h.data) if g_h else 0,
        _address(gh_sum) if need_bias else 0,
        _address(g_sum) if need_temb else 0,
    )
    return g_h.commit() if g_h else g.new_empty(0), gh_sum, g_sum


def ddpm_step(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    t_of_row: Tensor,
    row: Tensor,
    rng: Tensor | None,
    noise: Tensor | None,
    m_uncond: Tensor | None,
    guidance: Tensor | None,
    x0_prev: Tensor | None,
    logvar: Tensor | None,
    logvar_range: Tensor | None,
    threshold: Tensor | None,
    x0_out: Tensor | None,
    copy_out: Tensor | None,
    bad_row: Tensor | None,
) -> None:
    """One reverse step in place"""
    layout = Layout.of(x)
    state = Staged(x, layout, read=True)
    m, m_uncond, logvar = layout.dense(m), _optional(m_uncond, layout), _optional(logvar, layout)
    noise, x0_prev, threshold = _optional(noise, layout), _optional(x0_prev, layout), _flat(threshold)
    x0 = Staged(x0_out, layout) if x0_out is not None else None
    copy_layout = Layout.of(copy_out) if copy_out is not None else layout
    copy = Staged(copy_out, copy_layout) if copy_out is not None else None
    _C.ddpm_step(
        *_target(x),
        *_shape(layout),
        _address(state.data),
        _address(m),
        _dtype(m),
        _address(m_uncond),
        _dtype(m_uncond),
        _address(guidance),
        _address(table),
        _address(t_of_row),
        table.shape[0],
        _address(row),
        _address(noise),
        _address(rng),
        _address(x0_prev),
        _address(logvar),
        _dtype(logvar),
        _address(logvar_range),
        _address(threshold),
        _address(x0.data) if x0 else 0,
        _address(copy.data) if copy else 0,
        _dtype(copy_out),
        copy_layout.channels_last,
        _address(bad_row),
    )
    for output in (state, x0, copy):
        if output is not None:
            output.commit()


class RowAddresses(NamedTuple):
    """Where a step table lies, for `ddpm_step_row`; its tensors must outlive it."""

    table: int
    t_of_row: int
    rows: int
    row_numbers: int

    @classmethod
    def of(cls, table: Tensor, t_of_row: Tensor, row_numbers: Tensor) -> RowAddresses:
        """table, t_of_row: contiguous, as in ddpm_step; row_numbers: int64 (rows,) 0, 1, 2, ..."""
        return cls(table.data_ptr(), t_of_row.data_ptr(), len(table), row_numbers.data_ptr())


def ddpm_step_row(
    x: Tensor, m: Tensor, at: RowAddresses, row: int, noise: Tensor | None, rng: Tensor | None, x0_out: Tensor
) -> None:
    """ddpm_step without its options and at a fraction of its host time, for callers that step one image at a time.

    x, m, noise and x0_out are contiguous float32 of one shape, not empty, and share no memory. 0 <= row < at.rows.
    """
    n = len(x) if rng is not None and x.dim() else 1  # samples matter to keyed noise alone
    device, stream = _target(x)
    _C.ddpm_step(
        device, stream, n, 1, x.numel() // n, False, x.data_ptr(), m.data_ptr(), 0, 0, 0, 0, at.table, at.t_of_row,
        at.rows, at.row_numbers + 8 * row, 0 if noise is None else noise.data_ptr(), _address(rng), 0, 0, 0, 0,
        0, x0_out.data_ptr(), 0, 0, False, 0,
    )  # fmt: skip


def noise_mse(
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
) -> Tensor:
    """[N]: the mean over each sample of loss(pred - target)"""
    layout = Layout.of(pred)
    arguments, _kept_alive = _noise_mse_arguments(
        layout, pred, x0, t, table, noise, rng, stream, offset_noise, target, loss, huber_delta
    )
    out = pred.new_empty(layout.n, dtype=torch.float32)
    on_gpu = arguments[0] >= 0
    workspace = pred.new_empty(layout.n * WORKSPACE_COLUMNS if on_gpu else 0, dtype=torch.float32)
    _C.noise_mse(*arguments, _address(out), _address(workspace), WORKSPACE_COLUMNS if on_gpu else 0)
    return out


def noise_mse_backward(
    g: Tensor,
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
) -> Tensor:
    """g_pred = g[n] / E loss'(pred - target)"""
    layout = Layout.of(pred)
    arguments, _kept_alive = _noise_mse_arguments(
        layout, pred, x0, t, table, noise, rng, stream, offset_noise, target, loss, huber_delta
    )
    g = g.contiguous()
    g_pred = Staged(torch.empty_like(pred), layout)
    _C.noise_mse_backward(*arguments, _address(g), _address(g_pred.data))
    return g_pred.commit()


def _noise_mse_arguments(
    layout: Layout,
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """What forward and backward pass alike, and the dense copies, which must live until the call."""
    dense = layout.dense(pred)
    x0, noise = _optional(x0, layout), _optional(noise, layout)
    arguments = (
        *_target(pred),
        *_shape(layout),
        _address(dense),
        _dtype(dense),
        _address(x0),
        _dtype(x0),
        _address(t),
        _address(table),
        0 if table is None else table.shape[0],
        _address(noise),
        _address(rng),
        stream % 2**32,
        offset_noise,
        spec.STREAM_OFFSET_NOISE,
        TARGETS[target],
        LOSSES[loss],
        huber_delta,
    )
    return arguments, (dense, x0, noise)
