"""Random arguments for every op of ddpm_fast/ops/_schema.py, in its schema's order, and what its results must satisfy.

Tensors lie on the CPU, in the memory format asked for; outputs that the caller provides are full of NaN (integers: 99).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.backends import reference

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from support import CLOSE, CLOSE_SUMS, DTYPES, MEMORY, SHAPES, TOLERANCES, in_memory

__all__ = ["CLOSE", "CLOSE_SUMS", "DTYPES", "MEMORY", "RULES", "TOLERANCES", "VARIANTS", "Case", "build", "cases"]

RULES: dict[str, tuple[str, ...]] = {
    "normal": ("same",),
    "random_bits": ("same",),
    "q_sample": ("same", "same"),
    "q_sample_backward": ("same", "same"),
    "add_bias_temb": ("same",),
    "add_bias_temb_backward": ("same", "sums", "sums"),
    "batch_norm_silu": ("close", "sums", "sums"),
    "batch_norm_silu_backward": ("close", "sums", "sums", "sums"),
    "group_norm_silu": ("close", "sums", "sums"),
    "group_norm_silu_backward": ("close", "sums", "sums", "sums"),
    "rms_norm_silu": ("close",),
    "rms_norm_silu_backward": ("close", "sums", "sums"),
    "ddpm_step": ("same", "same", "same", "same"),
    "noise_mse": ("reduction",),
    "noise_mse_backward": ("same",),
}
"""What each result of an op, in order, must be: the reference's bits, or no further from float64 than a tolerance or
than the reference is, whichever is more."""

INF = float("inf")
STEPS = torch.tensor(  # a, b, c1, c2, c3, c4, s, clip: direct form, clipped with noise, multistep, last step
    [
        [1.25, 0.75, 0.0, 1.01, -0.02, 0.0, 0.3, INF],
        [1.1, 0.46, 0.6, 0.38, 0.0, 0.0, 0.21, 1.0],
        [1.05, 0.3, 0.7, 0.2, 0.05, -0.1, 0.125, 0.8],
        [1.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    ]
)
T_OF_ROW = torch.tensor([900, 600, 300, 0], dtype=torch.int32)
LOGVAR_RANGE = torch.tensor([[-4.0, -2.5], [-6.0, -3.0], [-9.2, -4.1], [-9.2, -4.6]])
SIGNAL = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 10, dtype=torch.float64), 0).sqrt()
NOISING = torch.stack([SIGNAL, (1 - SIGNAL**2).sqrt()], 1).float()


class Case(NamedTuple):
    """One call of an op. what: its dtype, memory format, shape and variant, in words."""

    op: str
    what: str
    arguments: tuple[Any, ...]


class Draw:
    """Fresh random tensors of one case: all images in its shape, dtype and memory format."""

    def __init__(self, seed: int, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.dtype, self.kind = shape, dtype, kind
        seed64, first = torch.randint(0, 2**62, (2,), generator=self.generator).tolist()
        self.rng = torch.tensor([seed64 - 2**61, first >> 20])  # seeds above 2**63 are negative here

    def image(self, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator)
        return in_memory(values.to(dtype or self.dtype), self.kind)

    def full(self, dtype: torch.dtype) -> Tensor:
        """An output not written yet."""
        return in_memory(
            torch.full(self.shape, float("nan") if dtype.is_floating_point else 99, dtype=dtype), self.kind
        )

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def integers(self, high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self.generator)

    @property
    def stream(self) -> int:
        return int(self.integers(2**32, 1))


def _noise(d: Draw) -> Tensor:
    return d.image(torch.float32)


def _normal(d: Draw, variant: int) -> tuple[Any, ...]:
    return d.full(d.dtype), d.rng, d.stream


def _random_bits(d: Draw, variant: int) -> tuple[Any, ...]:
    return d.full(torch.int64), d.rng, d.stream


def _q_sample(d: Draw, variant: int) -> tuple[Any, ...]:
    given, offset, target, of_bytes = [
        (False, 0.1, "v", False),
        (True, 0.0, "none", False),
        (True, 0.0, "eps", False),
        (False, 0.0, "x0", True),
        (False, 0.0, "none", False),
    ][variant]
    x0 = d.image()
    if of_bytes:
        x0 = in_memory(torch.randint(0, 256, d.shape, generator=d.generator, dtype=torch.uint8), d.kind)
    t = d.integers(10, d.shape[0])
    source = (_noise(d), None) if given else (None, d.rng)
    return x0, t, NOISING, *source, d.stream, offset, target, d.dtype


def _q_sample_backward(d: Draw, variant: int) -> tuple[Any, ...]:
    target, need_x0, need_noise = [("v", True, True), ("none", True, False), ("eps", False, True), ("x0", True, True)][
        variant
    ]
    g_target = None if target == "none" else d.image()
    return d.image(), g_target, d.integers(10, d.shape[0]), NOISING, target, d.dtype, need_x0, need_noise


def _channels(d: Draw) -> tuple[int, int]:
    return d.shape[0], d.shape[1]


def _add_bias_temb(d: Draw, variant: int) -> tuple[Any, ...]:
    bias, temb, act = [(True, True, "silu"), (True, True, "none"), (True, False, "silu"), (False, True, "silu")][
        variant
    ]
    n, c = _channels(d)
    return d.image(), d.numbers(c) if bias else None, d.numbers(n, c, dtype=d.dtype) if temb else None, act


def _add_bias_temb_backward(d: Draw, variant: int) -> tuple[Any, ...]:
    if variant == 1:  # the identity needs neither h nor bias
        return d.image(), None, None, "none", False, True, True
    return d.image(), d.image(), d.numbers(d.shape[1]), "silu", True, True, variant == 0


def _batch_norm_silu(d: Draw, variant: int) -> tuple[Any, ...]:
    n, c = _channels(d)
    h = d.image() if variant else d.image() + d.numbers(c).reshape(c, *[1] * (len(d.shape) - 2)).to(d.dtype)
    temb = None if variant == 1 else d.numbers(n, c, dtype=d.dtype)
    running = (d.numbers(c), d.numbers(c).abs() + 0.1) if variant == 2 else (None, None)
    return in_memory(h, d.kind), temb, d.numbers(c), d.numbers(c), *running, 1e-5, "none" if variant == 1 else "silu"


def _batch_norm_silu_backward(d: Draw, variant: int) -> tuple[Any, ...]:
    h, temb, weight, bias, *_ = _batch_norm_silu(d, 0)
    _, mean, var = reference.batch_norm_silu(h, temb, weight, bias, None, None, 1e-5, "silu")
    act = "none" if variant == 1 else "silu"
    return d.image(), h, weight, bias, mean, var, variant != 2, 1e-5, act, True, variant == 0


def _groups(c: int) -> int:
    """Of at least two channels each: the gradient of one alone sums to 0."""
    return next((groups for groups in (8, 4, 3, 2) if c % groups == 0 and c > groups), 1)


def _group_norm_silu(d: Draw, variant: int) -> tuple[Any, ...]:
    n, c = _channels(d)
    if variant == 1:
        return d.image(), None, None, None, None, _groups(c), 1e-6, "none"
    affine = (c,) if variant == 0 else (n, c)  # per sample: scale and shift
    parts = d.numbers(c), d.numbers(n, c, dtype=d.dtype), d.numbers(*affine), d.numbers(*affine)
    return d.image(), *parts, _groups(c), 1e-5, "silu"


def _group_norm_silu_backward(d: Draw, variant: int) -> tuple[Any, ...]:
    forward = _group_norm_silu(d, variant)
    _, mean, rstd = reference.group_norm_silu(*forward)
    *tensors, groups, _eps, act = forward
    return d.image(), *tensors, mean, rstd, groups, act, True, variant != 1, variant != 1, variant != 1


def _rms_norm_silu(d: Draw, variant: int) -> tuple[Any, ...]:
    n, c = _channels(d)
    if variant == 1:
        return d.image(), d.numbers(c), None, None, 1e-12, "none"
    affine = (c,) if variant == 0 else (n, c)
    return d.image(), d.numbers(*affine), d.numbers(*affine), d.image(), 1e-12, "silu"


def _rms_norm_silu_backward(d: Draw, variant: int) -> tuple[Any, ...]:
    h, weight, beta, _residual, eps, act = _rms_norm_silu(d, variant)
    return d.image(), h, weight, beta, eps, act, True, True, beta is not None


def _ddpm_step(d: Draw, variant: int) -> tuple[Any, ...]:
    """0: what sampling does; then one option each; the last but one: all of them; the last: outside the table."""
    n = d.shape[0]
    last = VARIANTS["ddpm_step"] - 1
    row = (0, 1, 2, 3)[variant % 4] if variant < last else 4
    every = variant == last - 1
    has = {
        name: every or variant == k
        for k, name in enumerate(("noise", "m_uncond", "x0_prev", "logvar", "logvar_range", "threshold", "bytes"), 1)
    }
    logvar = None
    if has["logvar"] or has["logvar_range"]:
        logvar = d.image()
        logvar = in_memory(logvar.clamp(-1, 1) if has["logvar_range"] else logvar - 2, d.kind)
    return (
        d.image(torch.float32),
        d.image(),
        STEPS,
        T_OF_ROW,
        torch.tensor([row]),
        None if has["noise"] else d.rng,
        _noise(d) if has["noise"] else None,
        d.image() if has["m_uncond"] else None,
        d.numbers(1) if has["m_uncond"] else None,
        d.image(torch.float32) if has["x0_prev"] else None,
        logvar,
        LOGVAR_RANGE if has["logvar_range"] else None,
        d.numbers(n).abs() + 0.2 if has["threshold"] else None,
        d.full(torch.float32) if variant != 1 else None,
        d.full(torch.uint8 if has["bytes"] else d.dtype) if variant != 2 else None,
        torch.tensor([-1], dtype=torch.int32) if variant != 3 else None,
    )


def _noise_mse(d: Draw, variant: int) -> tuple[Any, ...]:
    target, loss, given, offset = [
        ("eps", "mse", False, 0.2),
        ("v", "huber", False, 0.0),
        ("x0", "l1", True, 0.0),
        ("eps", "mse", True, 0.0),
    ][variant]
    x0 = None if target == "eps" else d.image(torch.float32)
    t, table = (d.integers(10, d.shape[0]), NOISING) if target == "v" else (None, None)
    noise, rng = (None, None) if target == "x0" else (_noise(d), None) if given else (None, d.rng)
    return d.image(), x0, t, table, noise, rng, d.stream, offset, target, loss, 0.7


def _noise_mse_backward(d: Draw, variant: int) -> tuple[Any, ...]:
    return d.numbers(d.shape[0]), *_noise_mse(d, variant)


BUILDERS: dict[str, tuple[Callable[[Draw, int], tuple[Any, ...]], int]] = {
    "normal": (_normal, 1),
    "random_bits": (_random_bits, 1),
    "q_sample": (_q_sample, 5),
    "q_sample_backward": (_q_sample_backward, 4),
    "add_bias_temb": (_add_bias_temb, 4),
    "add_bias_temb_backward": (_add_bias_temb_backward, 3),
    "batch_norm_silu": (_batch_norm_silu, 3),
    "batch_norm_silu_backward": (_batch_norm_silu_backward, 3),
    "group_norm_silu": (_group_norm_silu, 3),
    "group_norm_silu_backward": (_group_norm_silu_backward, 3),
    "rms_norm_silu": (_rms_norm_silu, 3),
    "rms_norm_silu_backward": (_rms_norm_silu_backward, 3),
    "ddpm_step": (_ddpm_step, 10),
    "noise_mse": (_noise_mse, 4),
    "noise_mse_backward": (_noise_mse_backward, 4),
}
VARIANTS = {op: variants for op, (_, variants) in BUILDERS.items()}
"""Combinations of an op's options; number 0 has the most of them."""

TYPICAL, ODD = (3, 8, 8, 8), (2, 6, 5, 7)
LARGER = [(4, 64, 32, 32), (300, 3, 32, 32), (1, 3, 200, 201), (64, 128, 4, 4)]
"""Several programs per sample and per batch, launches of many samples, tails."""


def build(op: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str, variant: int, seed: int) -> Case:
    """One case of an op."""
    what = f"{str(dtype).removeprefix('torch.')} {kind} {shape} variant {variant}"
    return Case(op, what, BUILDERS[op][0](Draw(seed, shape, dtype, kind), variant))


def cases(op: str, dtype: torch.dtype, seed: int, small: bool = False) -> Iterator[Case]:
    """All of an op in one dtype, what differs most first. small: a handful."""
    kinds = ("contiguous", "channels_last") if small else MEMORY
    wanted: list[tuple[tuple[int, ...], str, int]] = [(ODD if small else TYPICAL, kind, 0) for kind in kinds]
    wanted += [(TYPICAL, "contiguous", variant) for variant in range(small, VARIANTS[op])]
    if not small:
        wanted += [(LARGER[0], "channels_last", 0), *((ODD, kind, 0) for kind in MEMORY)]
        wanted += [(shape, "contiguous", 0) for shape in LARGER]
        if dtype != torch.float16:  # which differs from bfloat16 in how it is loaded and stored alone
            wanted += [(TYPICAL, "channels_last", variant) for variant in range(1, VARIANTS[op])]
        if dtype == torch.float32:
            wanted += [(shape, "offset", 0) for shape in SHAPES if fits(op, shape)]
    if op == "random_bits" and dtype != torch.float32:  # int64, whatever images are stored in
        wanted = []
    for k, (shape, kind, variant) in enumerate(wanted):
        yield build(op, shape, dtype, kind, variant, seed + k)


def fits(op: str, shape: tuple[int, ...]) -> bool:
    """Whether the op takes the shape, and its result is not the mere rounding of what cancels out: statistics have to
    be those of a few values."""
    inner = torch.Size(shape[2:]).numel()
    values = {
        "batch": lambda: shape[0] * inner,
        "group": lambda: shape[1] // _groups(shape[1]) * inner,
        "rms": lambda: shape[1] * (inner > 0),
        "noise": lambda: 4 * (0 not in shape),
    }
    count = values.get(op.split("_")[0])
    return count is None or (0 not in shape and count() > 3)
