"""The ops on which compiled_code.py compares compiled kernels with the reference: what to call, and how close it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.noise import make_rng

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IMAGES = (3, 3, 10, 12)  # no multiple of a program's block
FEATURES = (3, 32, 6, 10)
MANY = (171, 3, 32, 32)  # so many that programs are large: see launch.MANY
STREAM = 2**31
RNG = make_rng(2**63 + 12345, 2**32 + 7)
NOISING = torch.rand(10, 2, generator=torch.Generator().manual_seed(9))
# a, b, c1, c2, c3, c4, s, clip: see DESIGN's step table
STEPS = torch.tensor([[1.25, 0.75, 0.4, 1.01, -0.02, 0.1, 0.3, 0.9], [1.0, 0.1, 0.0, 1.1, -0.5, 0.0, 0.2, math.inf]])
T_OF_ROW = torch.tensor([900, 600], dtype=torch.int32)
# Sums in another order than the reference's, which adds in float64; half-width results are rounded once on either side.
CLOSE = {F32: (1e-5, 4e-5), BF16: (2**-7, 1e-3), F16: (2**-10, 1e-4)}


@dataclass(frozen=True)
class OpCase:
    """call(backend) -> the outputs, from fresh inputs. exact: equal bits, else as CLOSE."""

    name: str
    call: Callable[[Any], list[Tensor]]
    exact: bool

    def difference(self, got: list[Tensor], expected: list[Tensor]) -> str | None:
        """What is wrong, in one line, or None."""
        for place, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
                return (
                    f"output {place} is {mine.dtype} {tuple(mine.shape)}, expected {theirs.dtype} {tuple(theirs.shape)}"
                )
            wrong = (mine != theirs) & ~(mine.isnan() & theirs.isnan())
            if not self.exact and mine.is_floating_point():
                relative, absolute = CLOSE[mine.dtype]
                near = (mine.double() - theirs.double()).abs() <= absolute + relative * theirs.double().abs()
                wrong &= ~near
            if bool(wrong.any()):
                at = tuple(int(i) for i in wrong.nonzero()[0])
                return (
                    f"output {place}: {int(wrong.sum())} of {mine.numel()} elements differ; "
                    f"at {at} {mine[at].item()!r}, expected {theirs[at].item()!r}"
                )
        return None


def rand(shape: tuple[int, ...], dtype: torch.dtype = F32, seed: int = 0, last: bool = False) -> Tensor:
    """Normal numbers (bytes for uint8), in channels_last where asked."""
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        x = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    else:
        x = torch.randn(shape, generator=draw).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _times(n: int) -> Tensor:
    return torch.arange(n) * 7 % 10


def _normal(ops: Any, dtype: torch.dtype, last: bool, shape: tuple[int, ...] = IMAGES) -> list[Tensor]:
    out = torch.full_like(rand(shape, dtype, last=last), math.nan)
    ops.normal(out, RNG, 3)
    return [out]


def _random_bits(ops: Any) -> list[Tensor]:
    out = torch.zeros(IMAGES, dtype=torch.int64)
    ops.random_bits(out, RNG, STREAM)
    return [out]


def _q_sample(ops: Any, dtype: torch.dtype, last: bool, target: str, image: torch.dtype | None = None) -> list[Tensor]:
    x0 = rand(IMAGES, image or dtype, last=last)
    return list(ops.q_sample(x0, _times(3), NOISING, None, RNG, STREAM, 0.1 * last, target, dtype))


def _q_sample_backward(ops: Any, dtype: torch.dtype, last: bool) -> list[Tensor]:
    g, g_v = (rand(IMAGES, dtype, seed, last) for seed in (1, 2))
    return list(ops.q_sample_backward(g, g_v, _times(3), NOISING, "v", dtype, True, True))


def _step(
    ops: Any, dtype: torch.dtype, last: bool, every: bool = False, row: int = 0, shape: tuple[int, ...] = IMAGES
) -> list[Tensor]:
    x, m = rand(shape, last=last), rand(shape, dtype, 1, last)
    bad_row = torch.tensor([-1], dtype=torch.int32)
    outputs: list[Tensor] = [x, bad_row]
    more: list[Tensor | None] = [None] * 9
    if every:
        n, history = shape[0], rand(shape, F32, 5)
        copy_out = torch.zeros(shape, dtype=torch.uint8)
        scale = torch.linspace(0.5, 1.5, n)
        more = [None, rand(shape, dtype, 2), torch.tensor([2.5]), history, rand(shape, dtype, 3).clamp(-1, 1)]
        more += [torch.tensor([[-4.0, -2.5], [-6.0, -3.0]]), scale, history, copy_out]
        outputs += [history, copy_out]
    ops.ddpm_step(x, m, STEPS, T_OF_ROW, torch.tensor([row]), RNG, *more, bad_row)
    return outputs


def _add(ops: Any, dtype: torch.dtype, last: bool, act: str, shape: tuple[int, ...] = FEATURES) -> list[Tensor]:
    h = rand(shape, dtype, last=last)
    return [ops.add_bias_temb(h, rand(shape[1:2], seed=1), rand(shape[:2], dtype, 2), act)]


def _add_backward(ops: Any, dtype: torch.dtype, last: bool, act: str) -> list[Tensor]:
    g, h = (rand(FEATURES, dtype, seed, last) for seed in (1, 2))
    return list(ops.add_bias_temb_backward(g, h, rand(FEATURES[1:2], seed=3), act, True, True, True))


def _mse(ops: Any, dtype: torch.dtype, last: bool, target: str, loss: str, backward: bool) -> list[Tensor]:
    pred, x0 = (rand(IMAGES, dtype, seed, last) for seed in (1, 2))
    rest = (pred, x0, _times(3), NOISING, None, RNG, STREAM, 0.1 * last, target, loss, 0.7)
    return [ops.noise_mse_backward(rand((3,), seed=4), *rest)] if backward else [ops.noise_mse(*rest)]


def _norm(ops: Any, dtype: torch.dtype, last: bool, backward: bool, shape: tuple[int, ...] = FEATURES) -> list[Tensor]:
    channels, sample = shape[1:2], shape[:2]
    h, g = (rand(shape, dtype, seed, last) for seed in (1, 2))
    given = (h, rand(channels, seed=3), rand(sample, dtype, 4), rand(channels, seed=5), rand(channels, seed=6))
    if not backward:
        return list(ops.group_norm_silu(*given, 8, 1e-5, "silu"))
    statistics = rand((shape[0], 8), seed=7), 1 + rand((shape[0], 8), seed=8).abs()
    return list(ops.group_norm_silu_backward(g, *given, *statistics, 8, "silu", True, True, True, True))


def _batch_norm(
    ops: Any, dtype: torch.dtype, last: bool, backward: bool, shape: tuple[int, ...] = FEATURES
) -> list[Tensor]:
    channels = shape[1:2]
    h, g = (rand(shape, dtype, seed, last) for seed in (1, 2))
    affine = rand(channels, seed=3), rand(channels, seed=4)
    if not backward:
        return list(ops.batch_norm_silu(h, rand(shape[:2], dtype, 5), *affine, None, None, 1e-5, "silu"))
    statistics = rand(channels, seed=6), 0.5 + rand(channels, seed=7).abs()
    return list(ops.batch_norm_silu_backward(g, h, *affine, *statistics, True, 1e-5, "silu", True, True))


def _rms_norm(
    ops: Any, dtype: torch.dtype, last: bool, backward: bool, shape: tuple[int, ...] = FEATURES
) -> list[Tensor]:
    channels = shape[1:2]
    h, g = (rand(shape, dtype, seed, last) for seed in (1, 2))
    affine = rand(channels, seed=3), rand(channels, seed=4)
    if backward:
        return list(ops.rms_norm_silu_backward(g, h, *affine, 1e-12, "silu", True, True, True))
    return [ops.rms_norm_silu(h, *affine, rand(shape, dtype, 5, last), 1e-12, "silu")]


def cases(dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16)) -> Iterator[OpCase]:
    """Every op, forward and backward, in these types and both memory formats; then what comes once."""

    def case(name: str, function: Any, *arguments: Any, exact: bool = True, **more: Any) -> OpCase:
        def call(ops: Any) -> list[Tensor]:
            found: list[Tensor] = function(ops, *arguments, **more)
            return found

        return OpCase(name, call, exact)

    for dtype in dtypes:
        for last in (False, True):
            both = (dtype, last)
            of = f"{str(dtype).removeprefix('torch.')}{' channels_last' * last}"
            yield case(f"normal {of}", _normal, *both)
            yield case(f"q_sample {of}", _q_sample, *both, "eps")
            yield case(f"q_sample_backward {of}", _q_sample_backward, *both)
            yield case(f"ddpm_step {of}", _step, *both)
            yield case(f"add_bias_temb {of}", _add, *both, "silu")
            yield case(f"noise_mse_backward {of}", _mse, *both, "eps", "mse", True)
            near = functools.partial(case, exact=False)
            yield near(f"noise_mse {of}", _mse, *both, "v", "huber", False)
            yield near(f"add_bias_temb_backward {of}", _add_backward, *both, "silu")
            for backward in (False, True):
                back = "_backward" * backward
                yield near(f"group_norm_silu{back} {of}", _norm, *both, backward)
                yield near(f"batch_norm_silu{back} {of}", _batch_norm, *both, backward)
                yield near(f"rms_norm_silu{back} {of}", _rms_norm, *both, backward)
    yield case("ddpm_step with every option", _step, BF16, False, True)
    yield case("ddpm_step with every option channels_last", _step, BF16, True, True, 1)
    yield case("ddpm_step of a row outside of the table", _step, F32, False, False, 2)
    yield case("ddpm_step of one number", _step, F32, False, shape=(1, 1, 1, 1))
    yield case("random_bits", _random_bits)
    yield case("normal of many images", _normal, F32, False, MANY)
    yield case("q_sample of bytes", _q_sample, BF16, False, "v", torch.uint8)
    yield case("add_bias_temb of vectors", _add, F32, False, "none", (5, 32))
    for name, function in (("group", _norm), ("batch", _batch_norm), ("rms", _rms_norm)):
        for backward in (False, True):
            back = "_backward" * backward
            for what, shape in (("one image", (1, 32, 5, 5)), ("many places", (2, 32, 48, 48))):
                label = f"{name}_norm_silu{back} of {what}"
                yield case(label, function, BF16, False, backward, shape, exact=False)
