"""Every implementation of every kind of layer against float64, on its own, with guard values around what it writes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from inference_layers import (
    COLUMNS,
    CPU,
    EVERY_ISA,
    FIRST_COLUMN,
    GUARD,
    TOLERANCES,
    frame,
    guarded,
    intact,
    listed,
    random,
    temb,
)
from inference_models import one_thread, relative_error

from ddpm_fast.inference import library, native
from ddpm_fast.inference.candidate import Packs, Place
from ddpm_fast.inference.network import Buffer, Conv, Layer, Output, Slice, Up

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

CONVS = [
    # n, h, w, in, out, silu, temb, pooled, labels
    (1, 2, 2, 16, 16, True, True, False, False),
    (3, 2, 2, 48, 32, True, False, False, False),
    (5, 2, 2, 32, 64, False, True, True, True),
    (2, 4, 4, 32, 48, True, True, False, True),
    (3, 4, 6, 48, 16, True, False, True, False),
    (2, 3, 5, 16, 32, True, True, False, False),
    (1, 1, 1, 16, 16, True, True, False, False),
    (40, 1, 1, 48, 64, False, True, False, True),
    (1, 7, 1, 16, 16, True, False, False, False),
    (2, 16, 16, 16, 16, True, True, True, False),
    (1, 8, 12, 64, 32, False, False, True, False),
    (2, 6, 4, 33, 7, True, True, True, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "h", "w", "c", "out", "silu", "timed", "pooled", "labels"), CONVS)
def test_convolution(n, h, w, c, out, silu, timed, pooled, labels, dtype) -> None:
    weight, bias = random((out, c, 3, 3), dtype, 0, (9 * c) ** -0.5), random((out,), dtype, 1)
    part = Slice(Buffer("any", c, 0), 0, c)
    layer = Conv("conv", weight, bias, part, part, silu, FIRST_COLUMN if timed else None, part if pooled else None)
    run = frame(n, 3, h, w, labels)
    source_buffer, source = guarded(n, h, w, c, dtype)
    source.copy_(random((n, h, w, c), dtype, 2))
    expected = F.conv2d(source.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=1)
    if silu:
        expected = F.silu(expected)
    if timed:
        expected = expected + temb(run, out)
    candidates = listed(layer, n, h, w, dtype)
    assert candidates
    for candidate in candidates:
        target_buffer, target = guarded(n, h, w, out, dtype)
        small_buffer, small = guarded(n, h // 2, w // 2, out, dtype)
        place = Place(n, h, w, dtype, CPU, source, target, small if pooled else None, COLUMNS, Packs())
        candidate.prepare(layer, place)(run)
        got = target.permute(0, 3, 1, 2)
        assert relative_error(got, expected) < TOLERANCES[dtype], candidate.name
        assert intact(target_buffer, out), candidate.name
        assert intact(small_buffer, out), candidate.name
        assert intact(source_buffer, c), candidate.name
        if pooled:
            assert torch.equal(small.permute(0, 3, 1, 2), F.max_pool2d(got, 2)), candidate.name
        else:
            assert (small == GUARD).all(), candidate.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "h", "w", "c", "out"), [(1, 4, 4, 3, 16), (2, 5, 7, 1, 48), (3, 8, 6, 4, 32)])
def test_first_convolution_reads_the_image(n, h, w, c, out, dtype) -> None:
    weight, bias = random((out, c, 3, 3), dtype, 0, (9 * c) ** -0.5), random((out,), dtype, 1)
    layer = Conv("conv", weight, bias, None, Slice(Buffer("any", out, 0), 0, out), temb=FIRST_COLUMN)
    run = frame(n, c, h, w, labels=False)
    kept = run.x.clone()
    expected = F.silu(F.conv2d(run.x.double(), weight.double(), bias.double(), padding=1)) + temb(run, out)
    for candidate in listed(layer, n, h, w, dtype):
        buffer, target = guarded(n, h, w, out, dtype)
        candidate.prepare(layer, Place(n, h, w, dtype, CPU, None, target, None, COLUMNS, Packs()))(run)
        assert relative_error(target.permute(0, 3, 1, 2), expected) < TOLERANCES[dtype], candidate.name
        assert intact(buffer, out), candidate.name
        assert torch.equal(run.x, kept), candidate.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "out"), [(1, 1, 1, 32, 16), (2, 2, 2, 32, 16), (3, 3, 5, 96, 48), (1, 8, 4, 34, 17)]
)
def test_transposed_convolution(n, h, w, c, out, dtype) -> None:
    weight, bias = random((c, out, 2, 2), dtype, 0, c**-0.5), random((out,), dtype, 1)
    part = Slice(Buffer("any", c, 0), 0, c)
    layer = Up("up", weight, bias, part, part)
    run = frame(n, 3, h, w, labels=False)
    _, source = guarded(n, h, w, c, dtype)
    source.copy_(random((n, h, w, c), dtype, 2))
    expected = F.conv_transpose2d(source.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), stride=2)
    for candidate in listed(layer, n, h, w, dtype):
        buffer, target = guarded(n, 2 * h, 2 * w, out, dtype)
        candidate.prepare(layer, Place(n, h, w, dtype, CPU, source, target, None, COLUMNS, Packs()))(run)
        assert relative_error(target.permute(0, 3, 1, 2), expected) < TOLERANCES[dtype], candidate.name
        assert intact(buffer, out), candidate.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "h", "w", "c", "out"), [(1, 4, 4, 16, 1), (3, 5, 6, 48, 3), (2, 8, 8, 33, 4)])
def test_output_is_float32_whatever_is_stored(n, h, w, c, out, dtype) -> None:
    weight, bias = random((out, c, 1, 1), torch.float32, 0, c**-0.5), random((out,), torch.float32, 1)
    layer = Output("output", weight, bias, Slice(Buffer("any", c, 0), 0, c))
    _, source = guarded(n, h, w, c, dtype)
    source.copy_(random((n, h, w, c), dtype, 2))
    expected = F.conv2d(source.permute(0, 3, 1, 2).double(), weight.double(), bias.double())
    for candidate in listed(layer, n, h, w, dtype):
        run = frame(n, out, h, w, labels=False)
        candidate.prepare(layer, Place(n, h, w, dtype, CPU, source, None, None, COLUMNS, Packs()))(run)
        # float32 from the stored activations on: only the matrix units' own inputs may be rounded again
        bound = 1e-6 if dtype != torch.bfloat16 else 3e-3
        assert relative_error(run.out, expected) < bound, candidate.name


def test_the_dense_matrix_of_a_2x2_image_is_its_convolution() -> None:
    weight, x = random((5, 4, 3, 3), torch.float32, 0), random((3, 4, 2, 2), torch.float32, 1)
    rows = x.permute(0, 2, 3, 1).reshape(3, 16)
    got = (rows @ library.dense_window(weight)).view(3, 2, 2, 5).permute(0, 3, 1, 2)
    assert relative_error(got, F.conv2d(x.double(), weight.double(), padding=1)) < 1e-6


def test_packed_weights_follow_their_layer_in_place() -> None:
    """Whatever is derived from weights: written anew at the same address, so a bound call computes with new weights."""
    c = 32
    part = Slice(Buffer("any", c, 0), 0, c)
    for h, kind in itertools.product((2, 4), ("conv", "up", "output")):
        shape = {"conv": (c, c, 3, 3), "up": (c, c, 2, 2), "output": (3, c, 1, 1)}[kind]
        for dtype in (torch.float32, torch.bfloat16):
            weight, bias = random(shape, dtype, 0, 0.1), random((c if kind != "output" else 3,), dtype, 1)
            layer: Layer = (
                Conv("layer", weight, bias, part, part)
                if kind == "conv"
                else Up("layer", weight, bias, part, part)
                if kind == "up"
                else Output("layer", weight, bias, part)
            )
            for candidate in listed(layer, 2, h, h, dtype):
                run, packs = frame(2, 3, h, h, labels=False), Packs()
                source = random((2, h, h, c), dtype, 2).to(dtype)
                side = 2 * h if kind == "up" else h
                target = torch.zeros(2, side, side, c, dtype=dtype)
                place = Place(2, h, h, dtype, CPU, source, None if kind == "output" else target, None, COLUMNS, packs)
                bound = candidate.prepare(layer, place)
                bound(run)
                before = (run.out if kind == "output" else target).clone()
                layer.weight.mul_(-2)
                layer.bias.mul_(0.5)
                packs.refresh()
                bound(run)
                after = (run.out if kind == "output" else target).clone()
                fresh = candidate.prepare(layer, Place(**vars(place) | {"packs": Packs()}))
                fresh(run)
                expected = run.out if kind == "output" else target
                assert not torch.equal(before, after), candidate.name
                assert torch.equal(after, expected), candidate.name
                layer.weight.mul_(-0.5)
                layer.bias.mul_(2)


@pytest.mark.skipif(not native.available(), reason="the extension has no inference layers here")
class TestNative:
    def test_channels_that_are_no_multiple_of_16_are_the_librarys(self) -> None:
        part = Slice(Buffer("any", 33, 0), 0, 33)
        layer = Conv("conv", torch.zeros(33, 33, 3, 3), torch.zeros(33), part, part)
        assert native.candidates(layer, 1, 4, 4, torch.float32, CPU) == []

    def test_no_instruction_set_computes_float16(self) -> None:
        part = Slice(Buffer("any", 16, 0), 0, 16)
        layer = Conv("conv", torch.zeros(16, 16, 3, 3), torch.zeros(16), part, part)
        assert native.candidates(layer, 1, 4, 4, torch.float16, CPU) == []

    @pytest.mark.parametrize("isa", EVERY_ISA)
    def test_an_image_has_the_same_bits_at_any_batch_size_and_thread_count(self, isa: str) -> None:
        dtype = torch.bfloat16 if isa in native.isas(torch.bfloat16) else torch.float32
        part = Slice(Buffer("any", 32, 0), 0, 32)
        layer = Conv("conv", random((48, 32, 3, 3), dtype, 0, 0.1), random((48,), dtype, 1), part, part)
        for h, kind in itertools.product((1, 2, 4, 6), native.KINDS):
            if native.ONLY_AT.get(kind, (h, h)) != (h, h):
                continue
            x = random((7, h, h, 32), dtype, 2).to(dtype)
            results = []
            for n, threads in ((1, 1), (3, 2), (7, 1), (7, 2), (7, 5)):
                target = torch.zeros(n, h, h, 48, dtype=dtype)
                place = Place(n, h, h, dtype, CPU, x[:n].contiguous(), target, None, COLUMNS, Packs())
                torch.set_num_threads(threads)
                native.Native(kind, isa).prepare(layer, place)(frame(n, 3, h, h, labels=False))
                results.append(target)
            for result in results[:-1]:
                assert torch.equal(result, results[-1][: len(result)]), kind
