"""The fused ops of DDPM training and sampling.

They see N samples of E elements: images (N, C, H, W), vectors (N, D), anything (N, ...), contiguous, channels_last or
sliced. Arithmetic is float32 whatever the dtype stored (float64 inputs: float64, on the reference backend). Noise comes
from ``rng``, the int64[2] tensor (seed, first_sample) of ``ddpm_fast.noise.make_rng``, or from an explicit tensor.
What each op computes, step by step, is in ``ddpm_fast/backends/reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ddpm_fast.noise import STREAM_TRAIN_NOISE, make_rng
from ddpm_fast.ops import _checks as check
from ddpm_fast.ops import _schema as _schema  # declares the ops
from ddpm_fast.ops._add_bias_temb import add_bias_temb
from ddpm_fast.ops._batch_norm import batch_norm_silu
from ddpm_fast.ops._group_norm import group_norm_silu
from ddpm_fast.ops._rms_norm import rms_norm_silu

__all__ = [
    "add_bias_temb",
    "batch_norm_silu",
    "ddpm_step",
    "group_norm_silu",
    "noise_mse",
    "normal",
    "q_sample",
    "random_bits",
    "rms_norm_silu",
]

# Bound once: looking an op up costs a tenth of a small call.
_normal = torch.ops.ddpm_fast.normal.default
_random_bits = torch.ops.ddpm_fast.random_bits.default
_q_sample = torch.ops.ddpm_fast.q_sample.default
_ddpm_step = torch.ops.ddpm_fast.ddpm_step.default
_noise_mse = torch.ops.ddpm_fast.noise_mse.default
_BYTES_TOO = (*check.FLOATS, torch.uint8)


# ---- noise ---------------------------------------------------------------------------------------------------------


def _filled_arguments(
    n: int, shape: Sequence[int], seed: int | None, first_sample: int, rng: Tensor | None, stream: int,
    dtype: torch.dtype, device: torch.device | str | None, out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an integer >= 0, got {n!r}")
    size = (n, *shape)
    if any(not isinstance(length, int) or length < 0 for length in size):
        raise ValueError(f"shape must be integers >= 0, got {tuple(shape)}")
    check.stream(stream)
    if (seed is None) == (rng is None):
        raise ValueError("pass exactly one of seed and rng" + (", got both" if rng is not None else ", got neither"))
    if out is None:
        where = device if device is not None else rng.device if rng is not None else "cpu"
        out = torch.empty(size, dtype=dtype, device=where)
    else:
        check.tensor("out", out, (dtype,))
        check.shape("out", out, size)
        check.no_overlap("out", out, {"rng": rng})
    if rng is None:
        assert seed is not None
        rng = make_rng(seed, first_sample, out.device)
    elif first_sample != 0:
        raise ValueError("first_sample belongs to seed; with rng it is rng[1]")
    check.shape("rng", check.tensor("rng", rng, (torch.int64,)), (2,))
    if rng.device != out.device:
        raise ValueError(f"rng must be on {out.device} like the result, got {rng.device}")
    return out, rng.contiguous()


def normal(
    n: int,
    shape: Sequence[int],
    *,
    seed: int | None = None,
    first_sample: int = 0,
    rng: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise, the same for an image whatever batch, device or backend draws it.

    out[i, e] = normal(seed, first_sample + i, stream, e), e counting in contiguous order inside a sample, rounded from
    float32 to ``dtype``. See ``ddpm_fast.noise`` for the generator.

    Args:
        n: samples, >= 0.
        shape: of one sample, for example (3, 32, 32).
        seed, first_sample: 64-bit key and global index of the first sample; or
        rng: both as an int64[2] tensor on the device (see ``make_rng``), so that a captured graph can be given others.
        stream: what the noise is for, in [0, 2**32); 0 is x_T (constants in ``ddpm_fast.noise``).
        dtype: float32, bfloat16, float16 or float64 (then float32 values).
        out: a tensor (n, *shape) to fill, in any memory format.

    Returns:
        Tensor (n, *shape).
    """
    if out is not None:
        dtype = check.tensor("out", out).dtype
    if dtype not in check.FLOATS:
        raise TypeError(f"dtype must be {check.names(check.FLOATS)}, got {dtype}")
    out, rng = _filled_arguments(n, shape, seed, first_sample, rng, stream, dtype, device, out)
    _normal(out, rng, stream)
    return out


def random_bits(
    n: int,
    shape: Sequence[int],
    *,
    seed: int | None = None,
    first_sample: int = 0,
    rng: Tensor | None = None,
    stream: int = 0,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Uniform random integers in [0, 2**32), int64 (n, *shape), keyed like ``normal``.

    An integer below T is ``(r * T) >> 32``; a coin of probability p is ``r < p * 2**32``.
    """
    out, rng = _filled_arguments(n, shape, seed, first_sample, rng, stream, torch.int64, device, out)
    _random_bits(out, rng, stream)
    return out


def _noise_source(
    images: check.Images, noise: Tensor | None, rng: Tensor | None, stream: int, offset_noise: float
) -> tuple[Tensor | None, Tensor | None]:
    """noise and rng, checked: at least one of them, and rng where offset noise is drawn."""
    wanted = torch.float64 if images.tensor.dtype == torch.float64 else torch.float32
    noise, rng = images.like("noise", noise, (wanted,)), images.rng(rng)
    check.stream(stream)
    if not 0 <= offset_noise < float("inf"):
        raise ValueError(f"offset_noise must be a finite number >= 0, got {offset_noise}")
    if noise is None and rng is None:
        raise ValueError("noise or rng is needed: pass a noise tensor, or rng=make_rng(seed, first_sample, device)")
    if offset_noise > 0 and rng is None:
        raise ValueError("offset_noise is drawn from rng: pass rng=make_rng(seed, first_sample, device)")
    return noise, rng


# ---- q_sample ------------------------------------------------------------------------------------------------------


@overload
def q_sample(
    x0: Tensor, t: Tensor, table: Tensor, *, noise: Tensor | None = ..., rng: Tensor | None = ..., stream: int = ...,
    target: None = ..., offset_noise: float = ..., dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def q_sample(
    x0: Tensor, t: Tensor, table: Tensor, *, noise: Tensor | None = ..., rng: Tensor | None = ..., stream: int = ...,
    target: Literal["eps", "x0", "v"], offset_noise: float = ..., dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    *,
    noise: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = STREAM_TRAIN_NOISE,
    target: Literal["eps", "x0", "v"] | None = None,
    offset_noise: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The forward process: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps (DDPM eq. 4), one pass.

    Args:
        x0: (N, ...) images, or uint8 images, read as x / 127.5 - 1.
        t: int64 or int32 (N,), 0 <= t < T. Outside (on a GPU, where it is not checked) the sample becomes NaN.
        table: ``schedule.noising_table(device)``: float32 (T, 2).
        noise: eps, float32 (float64 for float64 x0) in the shape of x0; or
        rng: draw eps = normal(seed, first_sample + i, stream, e) inside the kernel, without storing it.
        target: also return the training target: eps, x0 or v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0.
        offset_noise: adds this much of one normal per sample and channel to eps (needs rng).
        dtype: of the results; default that of x0, float32 for uint8.

    Returns:
        x_t, or (x_t, target), in the shape and memory format of x0. Differentiable in x0 and noise.
    """
    images = check.Images("x0", x0, _BYTES_TOO)
    table = images.table(table, 2, "Schedule.noising_table")
    t = images.timesteps(t, table)
    noise, rng = _noise_source(images, noise, rng, stream, offset_noise)
    wanted = check.choice("target", target, (None, "eps", "x0", "v")) or "none"
    out_dtype = dtype or (torch.float32 if x0.dtype == torch.uint8 else x0.dtype)
    if out_dtype not in check.FLOATS:
        raise TypeError(f"dtype must be {check.names(check.FLOATS)}, got {out_dtype}")
    if (out_dtype == torch.float64) != (x0.dtype == torch.float64):
        raise TypeError(f"float64 is for float64 x0 only: x0 is {x0.dtype}, dtype is {out_dtype}")
    x_t, y = _q_sample(x0, t, table, noise, rng, stream, float(offset_noise), wanted, out_dtype)
    return x_t if wanted == "none" else (x_t, y)


# ---- ddpm_step -----------------------------------------------------------------------------------------------------


def ddpm_step(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    t_of_row: Tensor,
    row: Tensor,
    rng: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    m_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    x0_prev: Tensor | None = None,
    logvar: Tensor | None = None,
    logvar_range: Tensor | None = None,
    threshold: Tensor | None = None,
    x0_out: Tensor | None = None,
    copy_out: Tensor | None = None,
    bad_row: Tensor | None = None,
) -> Tensor:
    """One reverse step, in place, in one pass: guidance, x0, clip, mean and noise.

    With (a, b, c1, c2, c3, c4, s, clip) = table[row] and m' = m_uncond + guidance (m - m_uncond):

        x0 = clip(a x - b m', -clip, clip)         or, with threshold: clip(a x - b m', -th[n], th[n]) / th[n]
        x  = c1 x0 + c2 x + c3 m' [+ c4 x0_prev] [+ s z],  z = normal(seed, first_sample + i, 1 + t_of_row[row], e)

    Not differentiable: m is used without its history. Everything that changes from step to step is read on the device.

    Args:
        x: float32 (N, ...), overwritten.
        m: the network's output, any float dtype, the shape of x.
        table, t_of_row: a ``StepTable``: float32 (steps, 8) and int32 (steps,). row: int64 (1,).
            A row outside the table gives NaN.
        rng: int64[2]; noise: float32 like x, instead of rng; neither: no noise. Where s = 0 noise is not read.
        m_uncond, guidance: the unconditional output and the float32 (1,) scale, together.
        x0_prev: float32 like x, for multistep solvers; may be x0_out itself, which then holds the history in place.
        logvar: like x; the noise is then scaled by exp(logvar / 2) instead of s.
        logvar_range: ``StepTable.logvar_range``, float32 (steps, 2): the smallest and the largest log variance of each
            row. logvar is then v in [-1, 1] and the log variance f max + (1 - f) min, f = (v + 1) / 2.
        threshold: float32 (N,) dynamic threshold, instead of the table's clip.
        x0_out: float32 like x, receives x0.
        copy_out: like x in any float dtype or uint8 ((x + 1) * 127.5, rounded half to even, saturated), any memory
            format: receives the new x.
        bad_row: int32 (1,); if negative, set to the row that first wrote a non-finite value.

    Returns:
        x.
    """
    images = check.Images("x", x, (torch.float32, torch.float64))
    floats = check.FLOATS if x.dtype == torch.float64 else check.STORED
    state = (x.dtype,)
    if x.requires_grad:
        raise ValueError("x is overwritten and must not require grad; pass x.detach()")
    images.with_device("m", m, images.shape, floats)
    table = images.table(table, 8, "Schedule.step_table")
    t_of_row = images.with_device("t_of_row", t_of_row, table.shape[:1], (torch.int32,)).contiguous()
    row = images.with_device("row", row, (1,), check.INDICES)
    row = row if row.dtype == torch.int64 else row.to(torch.int64)
    rng, noise = images.rng(rng), images.like("noise", noise, state)
    m_uncond, logvar = images.like("m_uncond", m_uncond, floats), images.like("logvar", logvar, floats)
    x0_prev, x0_out = images.like("x0_prev", x0_prev, state), images.like("x0_out", x0_out, state)
    copy_out = images.like("copy_out", copy_out, (*floats, torch.uint8))
    if (m_uncond is None) != (guidance is None):
        raise ValueError("m_uncond and guidance belong together: pass both or neither")
    if guidance is not None:
        images.with_device("guidance", guidance, (1,), (torch.float32, x.dtype))
    if logvar_range is not None:
        if logvar is None:
            raise ValueError("logvar_range needs logvar: the network's v in [-1, 1], which chooses between its columns")
        shape = (table.shape[0], 2)
        logvar_range = images.with_device("logvar_range", logvar_range, shape, (torch.float32,)).contiguous()
    if threshold is not None:
        images.with_device("threshold", threshold, images.shape[:1], (torch.float32, x.dtype))
    if bad_row is not None:
        images.with_device("bad_row", bad_row, (1,), (torch.int32,))
    reads = {"m": m, "m_uncond": m_uncond, "logvar": logvar, "noise": noise, "table": table}
    reads["logvar_range"] = logvar_range
    history = None if x0_prev is None or check.same_place(x0_prev, x0_out) else x0_prev
    check.no_overlap("x", x, {**reads, "x0_prev": x0_prev, "x0_out": x0_out, "copy_out": copy_out})
    check.no_overlap("x0_out", x0_out, {**reads, "x0_prev": history, "copy_out": copy_out})
    check.no_overlap("copy_out", copy_out, {**reads, "x0_prev": x0_prev})
    # Not differentiable: histories end here.
    m = m.detach() if m.requires_grad else m
    m_uncond = m_uncond.detach() if m_uncond is not None and m_uncond.requires_grad else m_uncond
    logvar = logvar.detach() if logvar is not None and logvar.requires_grad else logvar
    _ddpm_step(
        x, m, table, t_of_row, row, rng, noise, m_uncond, guidance, x0_prev, logvar, logvar_range, threshold, x0_out,
        copy_out, bad_row,
    )  # fmt: skip
    return x


# ---- noise_mse -----------------------------------------------------------------------------------------------------


def noise_mse(
    pred: Tensor,
    *,
    target: Literal["eps", "x0", "v"] = "eps",
    x0: Tensor | None = None,
    t: Tensor | None = None,
    table: Tensor | None = None,
    noise: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = STREAM_TRAIN_NOISE,
    offset_noise: float = 0.0,
    loss: Literal["mse", "l1", "huber"] = "mse",
    huber_delta: float = 1.0,
    weight: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The training loss against eps, x0 or v, the noise of the target drawn again instead of stored.

    With the same rng, stream and offset_noise as ``q_sample``, the target is the unrounded one of that call.
    "mean" is sum_n weight[n] mean_e loss(pred - target) / N (DDPM eq. 14 for weight 1); "none" the N means, unweighted.

    Args:
        pred: (N, ...), the network's output. The only differentiable argument besides weight.
        target: what the network predicts. "x0" and "v" need x0 (float or uint8); "v" also t and table.
        loss: "mse", "l1" or "huber" (with huber_delta > 0, as torch.nn.functional.huber_loss).
        weight: float (N,), for example min-SNR weights; only with reduction "mean".
        noise, rng, stream, offset_noise: as in ``q_sample``.

    Returns:
        float32 scalar or (N,) (float64 for float64 pred).
    """
    images = check.Images("pred", pred)
    check.choice("target", target, ("eps", "x0", "v"))
    check.choice("loss", loss, ("mse", "l1", "huber"))
    check.choice("reduction", reduction, ("mean", "none"))
    if not 0 < huber_delta < float("inf"):
        raise ValueError(f"huber_delta must be a finite number > 0, got {huber_delta}")
    # What a target does not need is neither checked nor read.
    if target == "eps":
        x0 = None
    elif x0 is None or (target == "v" and (t is None or table is None)):
        raise ValueError(f"target {target!r} needs x0" + (", t and table" if target == "v" else ""))
    x0 = images.like("x0", x0, _BYTES_TOO)
    if target == "v":
        table = images.table(table, 2, "Schedule.noising_table")
        t = images.timesteps(t, table)
    else:
        t = table = None
    if target == "x0":
        noise, rng, offset_noise = None, None, 0.0
    else:
        noise, rng = _noise_source(images, noise, rng, stream, offset_noise)
    for name, value in (("x0", x0), ("noise", noise)):
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} is a constant of the loss and must not require grad; pass {name}.detach()")
    if weight is not None:
        images.with_device("weight", weight, images.shape[:1])
        if reduction == "none":
            raise ValueError("weight goes with reduction='mean'; multiply the result of 'none' yourself")
    each: Tensor = _noise_mse(
        pred, x0, t, table, noise, rng, stream, float(offset_noise), target, loss, float(huber_delta)
    )
    if reduction == "none":
        return each
    return (each if weight is None else weight * each).mean()
