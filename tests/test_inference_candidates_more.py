"""The layers that GroupNorm U-Nets add: every implementation against float64, guard values around what it writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inference_layers import COLUMNS, CPU, FIRST_COLUMN, TOLERANCES, frame, guarded, intact, listed, random, temb
from inference_models import one_thread, relative_error
from torch import Tensor

from ddpm_fast.inference.candidate import Frame, Packs, Place
from ddpm_fast.inference.network import Attention, Buffer, Conv, Layer, Linear, Norm, Output, Slice

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def part(channels: int) -> Slice:
    return Slice(Buffer("any", channels, 0), 0, channels)


def nchw(view: Tensor) -> Tensor:
    return view.permute(0, 3, 1, 2).double()


def check(
    layer: Layer, source: Tensor, expected: Tensor, run: Frame, residual: Tensor | None = None, wanted: str = ""
) -> None:
    """All candidates of a layer; `wanted`: what one of them must be called."""
    dtype, (n, h, w, _) = source.dtype, source.shape
    candidates = listed(layer, n, h, w, dtype)
    assert any(wanted in candidate.name for candidate in candidates)
    kept = source.clone()
    out, height, width = expected.shape[1:]
    for candidate in candidates:
        buffer, target = guarded(n, height, width, out, dtype)
        place = Place(n, h, w, dtype, CPU, source, target, None, COLUMNS, Packs(), residual)
        candidate.prepare(layer, place)(run)
        assert relative_error(nchw(target), expected) < TOLERANCES[dtype], candidate.name
        assert intact(buffer, out), candidate.name
        assert torch.equal(source, kept), candidate.name


def source_of(n: int, h: int, w: int, c: int, dtype: torch.dtype, seed: int = 2) -> Tensor:
    _, view = guarded(n, h, w, c, dtype)
    return view.copy_(random((n, h, w, c), dtype, seed))


@every_dtype
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "out"),
    [(2, 8, 8, 32, 48), (1, 5, 7, 16, 16), (3, 2, 2, 32, 16), (20, 1, 1, 16, 32), (2, 4, 6, 20, 12)],
)
def test_residual_is_added_last(n, h, w, c, out, dtype) -> None:
    weight, bias = random((out, c, 3, 3), dtype, 0, (9 * c) ** -0.5), random((out,), dtype, 1)
    layer = Conv("conv", weight, bias, part(c), part(out), False, FIRST_COLUMN, residual=part(out))
    source, residual, run = source_of(n, h, w, c, dtype), source_of(n, h, w, out, dtype, 7), frame(n, 3, h, w, True)
    expected = F.conv2d(nchw(source), weight.double(), bias.double(), padding=1) + temb(run, out) + nchw(residual)
    check(layer, source, expected, run, residual)


@every_dtype
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "out"), [(2, 8, 8, 32, 48), (1, 6, 10, 16, 16), (3, 2, 2, 48, 64), (1, 7, 5, 16, 32)]
)
def test_stride_two(n, h, w, c, out, padding, dtype) -> None:
    weight, bias = random((out, c, 3, 3), dtype, 0, (9 * c) ** -0.5), random((out,), dtype, 1)
    layer = Conv("conv", weight, bias, part(c), part(out), False, resample="down", padding=padding)
    source = source_of(n, h, w, c, dtype)
    padded = nchw(source) if padding else F.pad(nchw(source), (0, 1, 0, 1))
    expected = F.conv2d(padded, weight.double(), bias.double(), stride=2, padding=padding)
    check(layer, source, expected, frame(n, 3, h, w, False), wanted="" if dtype == torch.float16 else "strided")


@every_dtype
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "out"), [(2, 4, 4, 32, 48), (1, 3, 5, 16, 16), (3, 1, 1, 48, 64), (2, 16, 16, 16, 16)]
)
def test_doubled(n, h, w, c, out, dtype) -> None:
    weight, bias = random((out, c, 3, 3), dtype, 0, (9 * c) ** -0.5), random((out,), dtype, 1)
    layer = Conv("conv", weight, bias, part(c), part(out), False, resample="up")
    source = source_of(n, h, w, c, dtype)
    larger = F.interpolate(nchw(source), scale_factor=2, mode="nearest")
    expected = F.conv2d(larger, weight.double(), bias.double(), padding=1)
    check(layer, source, expected, frame(n, 3, h, w, False), wanted="" if dtype == torch.float16 else "doubled")


@every_dtype
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("n", "h", "w", "c", "out"), [(2, 4, 4, 32, 96), (1, 3, 5, 16, 16), (3, 9, 11, 48, 32)])
def test_linear(n, h, w, c, out, residual, dtype) -> None:
    weight, bias = random((out, c), dtype, 0, c**-0.5), random((out,), dtype, 1)
    layer = Linear("linear", weight, bias, part(c), part(out), part(out) if residual else None)
    source, added = source_of(n, h, w, c, dtype), source_of(n, h, w, out, dtype, 7) if residual else None
    expected = F.conv2d(nchw(source), weight.double()[:, :, None, None], bias.double())
    if added is not None:
        expected = expected + nchw(added)
    wanted = "" if dtype == torch.float16 else "linear"
    check(layer, source, expected, frame(n, 3, h, w, False), added, wanted=wanted)


@every_dtype
@pytest.mark.parametrize("residual", [False, True])
def test_linear_into_a_whole_buffer(residual, dtype) -> None:
    """Then the library's product needs no copy to its place."""
    n, h, w, c, out = 2, 3, 5, 16, 48
    layer = Linear("linear", random((out, c), dtype, 0, c**-0.5), random((out,), dtype, 1), part(c), part(out))
    source, target = source_of(n, h, w, c, dtype), torch.empty(n, h, w, out, dtype=dtype)
    added = source_of(n, h, w, out, dtype, 7) if residual else None
    expected = F.conv2d(nchw(source), layer.weight.double()[:, :, None, None], layer.bias.double())
    expected = expected if added is None else expected + nchw(added)
    for candidate in listed(layer, n, h, w, dtype):
        target.fill_(float("nan"))
        place = Place(n, h, w, dtype, CPU, source, target, None, COLUMNS, Packs(), added)
        candidate.prepare(layer, place)(frame(n, 3, h, w, False))
        assert relative_error(nchw(target), expected) < TOLERANCES[dtype], candidate.name


@every_dtype
@pytest.mark.parametrize(("n", "h", "w", "c", "out"), [(1, 4, 4, 16, 1), (3, 5, 6, 48, 3), (2, 32, 12, 32, 4)])
def test_output_3x3_is_float32_whatever_is_stored(n, h, w, c, out, dtype) -> None:
    weight, bias = random((out, c, 3, 3), torch.float32, 0, (9 * c) ** -0.5), random((out,), torch.float32, 1)
    layer = Output("output", weight, bias, part(c))
    source, run = source_of(n, h, w, c, dtype), frame(n, out, h, w, False)
    expected = F.conv2d(nchw(source), weight.double(), bias.double(), padding=1)
    for candidate in listed(layer, n, h, w, dtype):
        run.out.fill_(float("nan"))
        candidate.prepare(layer, Place(n, h, w, dtype, CPU, source, None, None, COLUMNS, Packs()))(run)
        assert relative_error(run.out, expected) < 2e-6, candidate.name


@every_dtype
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "groups"), [(2, 4, 4, 32, 8), (1, 3, 5, 48, 4), (3, 2, 2, 32, 32), (2, 8, 8, 32, 1)]
)
def test_norm(n, h, w, c, groups, silu, modulated, dtype) -> None:
    weight, bias = random((c,), torch.float32, 0), random((c,), torch.float32, 1)
    layer = Norm("norm", weight, bias, part(c), part(c), groups, 1e-6, silu, FIRST_COLUMN if modulated else None)
    source, run = source_of(n, h, w, c, dtype), frame(n, 3, h, w, modulated)
    expected = F.group_norm(nchw(source), groups, weight.double(), bias.double(), 1e-6)
    if modulated:
        scale, shift = temb(run, 2 * c).chunk(2, dim=1)
        expected = expected * (1 + scale) + shift
    check(layer, source, F.silu(expected) if silu else expected, run)


@every_dtype
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "heads"), [(2, 4, 4, 32, 1), (1, 3, 5, 48, 3), (3, 1, 1, 32, 4), (2, 16, 16, 64, 1)]
)
def test_attention(n, h, w, c, heads, dtype) -> None:
    layer = Attention("attention", part(3 * c), part(c), heads, (c // heads) ** -0.5)
    source = source_of(n, h, w, 3 * c, dtype)
    q, k, v = nchw(source).reshape(n, 3, heads, c // heads, h * w).transpose(3, 4).unbind(1)
    expected = torch.softmax(q @ k.transpose(2, 3) * layer.scale, -1) @ v
    check(layer, source, expected.transpose(2, 3).reshape(n, c, h, w), frame(n, 3, h, w, False))
