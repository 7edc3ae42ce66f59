"""The layers of lucidrains' U-Net: every implementation against float64, guard values around what it writes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from inference_layers import COLUMNS, CPU, FIRST_COLUMN, TOLERANCES, frame, guarded, intact, listed, random, temb
from inference_models import one_thread, relative_error
from torch import Tensor

from ddpm_fast.inference.candidate import Frame, Packs, Place
from ddpm_fast.inference.check import CHECKED_IMAGES, exact
from ddpm_fast.inference.network import Attention, Buffer, Conv, Down, Layer, LinearAttention, RMSNorm, Slice
from ddpm_fast.inference.plan import signature

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def part(channels: int) -> Slice:
    return Slice(Buffer("any", channels, 0), 0, channels)


def nchw(view: Tensor) -> Tensor:
    return view.permute(0, 3, 1, 2).double()


def slice_of(n: int, h: int, w: int, c: int, dtype: torch.dtype, seed: int = 2) -> Tensor:
    return guarded(n, h, w, c, dtype)[1].copy_(random((n, h, w, c), dtype, seed))


def check(
    layer: Layer,
    source: Tensor | None,
    expected: Tensor,
    run: Frame,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> None:
    """All candidates of a layer, and what a plan itself compares them with."""
    n, out, height, width = expected.shape
    h, w = (height, width) if source is None else source.shape[1:3]
    candidates = listed(layer, n, h, w, dtype)
    assert candidates
    for candidate in candidates:
        buffer, target = guarded(n, height, width, out, dtype)
        place = Place(n, h, w, dtype, CPU, source, target, None, COLUMNS, Packs(), residual)
        candidate.prepare(layer, place)(run)
        assert relative_error(nchw(target), expected) < TOLERANCES[dtype], candidate.name
        assert intact(buffer, out), candidate.name
        assert n <= CHECKED_IMAGES
        assert relative_error(exact(layer, place, run, torch.arange(n)), expected) < 1e-6


@every_dtype
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "out"), [(2, 8, 8, 32, 48), (1, 6, 10, 16, 16), (3, 2, 2, 48, 64), (2, 4, 6, 20, 12)]
)
def test_two_by_two_down(n, h, w, c, out, dtype) -> None:
    weight, bias = random((out, c, 2, 2), dtype, 0, (4 * c) ** -0.5), random((out,), dtype, 1)
    source = slice_of(n, h, w, c, dtype)
    expected = F.conv2d(nchw(source), weight.double(), bias.double(), stride=2)
    check(Down("down", weight, bias, part(c), part(out)), source, expected, frame(n, 3, h, w, False), dtype)


@every_dtype
@pytest.mark.parametrize(("n", "h", "w", "c", "out"), [(1, 4, 4, 3, 16), (2, 5, 9, 1, 48), (3, 8, 6, 6, 32)])
def test_seven_by_seven_stem_reads_the_image(n, h, w, c, out, dtype) -> None:
    weight, bias = random((out, c, 7, 7), dtype, 0, (49 * c) ** -0.5), random((out,), dtype, 1)
    layer = Conv("init_conv", weight, bias, None, part(out), silu=False, padding=3)
    run = dataclasses.replace(frame(n, c, h, w, False))
    run.x = run.x.to(dtype).float()  # exact in the dtype, like all inputs here
    expected = F.conv2d(run.x.double(), weight.double(), bias.double(), padding=3)
    check(layer, None, expected, run, dtype)


@every_dtype
@pytest.mark.parametrize(("modulated", "labels"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("silu", "residual"), [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize(("n", "h", "w", "c"), [(2, 4, 4, 32), (1, 3, 5, 48), (3, 1, 1, 16), (2, 3, 2, 20)])
def test_rms_norm(n, h, w, c, silu, residual, modulated, labels, dtype) -> None:
    weight, column = random((c,), torch.float32, 0), FIRST_COLUMN if modulated else None
    layer = RMSNorm("norm", weight, part(c), part(c), 1e-12, silu, column, part(c) if residual else None)
    source, added = slice_of(n, h, w, c, dtype), slice_of(n, h, w, c, dtype, 7) if residual else None
    run = frame(n, 3, h, w, labels)
    expected = F.normalize(nchw(source), dim=1) * weight.double()[:, None, None]
    if modulated:
        scale, shift = temb(run, 2 * c).chunk(2, dim=1)
        expected = expected * (1 + scale) + shift
    expected = F.silu(expected) if silu else expected
    check(layer, source, expected if added is None else expected + nchw(added), run, dtype, added)


@every_dtype
def test_a_pixel_of_zeros_is_normalised_to_zeros(dtype) -> None:
    source, run = slice_of(1, 2, 2, 16, dtype), frame(1, 3, 2, 2, False)
    source[0, 1, 1] = 0
    layer = RMSNorm("norm", torch.full((16,), 4.0), part(16), part(16), 1e-12, silu=False)
    expected = 4 * F.normalize(nchw(source), dim=1)
    assert (expected[0, :, 1, 1] == 0).all()
    check(layer, source, expected, run, dtype)


@every_dtype
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "heads", "tokens"),
    [(2, 4, 4, 32, 1, 4), (1, 3, 5, 48, 3, 1), (3, 1, 1, 64, 2, 4), (2, 16, 16, 128, 4, 4)],
)
class TestTokens:
    def test_attention_with_memory(self, n, h, w, c, heads, tokens, dtype) -> None:
        memory = random((2, heads, tokens, c // heads), dtype, 5)
        layer = Attention("attention", part(3 * c), part(c), heads, (c // heads) ** -0.5, memory)
        source = slice_of(n, h, w, 3 * c, dtype)
        q, k, v = nchw(source).reshape(n, 3, heads, c // heads, h * w).transpose(3, 4).unbind(1)
        keys, values = (side.double().expand(n, -1, -1, -1) for side in memory)
        k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        expected = (torch.softmax(q @ k.mT * layer.scale, -1) @ v).mT.reshape(n, c, h, w)
        check(layer, source, expected, frame(n, 3, h, w, False), dtype)

    def test_linear_attention(self, n, h, w, c, heads, tokens, dtype) -> None:
        """Written as the paper has it, channels before tokens."""
        memory = random((2, heads, c // heads, tokens), dtype, 5)
        layer = LinearAttention("attention", part(3 * c), part(c), heads, (c // heads) ** -0.5, memory)
        source = slice_of(n, h, w, 3 * c, dtype)
        q, k, v = nchw(source).reshape(n, 3, heads, c // heads, h * w).unbind(1)
        keys, values = (side.double().expand(n, -1, -1, -1) for side in memory)
        k, v = torch.cat([keys, k], dim=3).softmax(3), torch.cat([values, v], dim=3)
        context = torch.einsum("nhdj,nhej->nhde", k, v)
        expected = torch.einsum("nhde,nhdp->nhep", context, q.softmax(2) * layer.scale).reshape(n, c, h, w)
        check(layer, source, expected, frame(n, 3, h, w, False), dtype)


def test_layers_that_differ_in_what_they_do_are_not_timed_as_one() -> None:
    c, source = 32, slice_of(2, 4, 4, 32, torch.float32)
    place = Place(2, 4, 4, torch.float32, CPU, source, source, None, COLUMNS, Packs())
    weight = torch.ones(c)
    norms = [
        RMSNorm("norm", weight, part(c), part(c), 1e-12, silu, column, residual)
        for silu in (False, True)
        for column in (None, 0)
        for residual in (None, part(c))
    ]
    memories = (None, torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 8, 16))
    attentions = [Attention("attention", part(3 * c), part(c), 2, 1.0, memory) for memory in memories]
    linear = [LinearAttention("attention", part(3 * c), part(c), heads, 1.0, memories[1]) for heads in (2, 4)]
    marks = [signature(layer, place) for layer in (*norms, *attentions, *linear)]
    assert len(set(marks)) == len(marks)
