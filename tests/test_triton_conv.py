"""The Triton convolutions against float64, with guard values around everything that is written.

Without a GPU they run in the interpreter, and test_triton_aot_conv.py compiles them. What only a GPU can show, wrong
code for a right kernel, is tested where there is one, and by the trial of every plan.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from inference_models import products_of

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from ddpm_fast.backends.triton import launch
from ddpm_fast.backends.triton.conv_call import Conv, Tile, first_terms, images_of, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not launch.INTERPRETED else "cpu")
GUARD = 55.0
# Norm of the error over the norm of the result: weights and sources are exact in the dtype here, so half an ulp of
# rounding at the end and, in float32, that of the sums.
# On a GPU the products of float32 are made of three of half its digits.
BOUND = {torch.float32: 5e-7 if launch.INTERPRETED else 3e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}


class Case:
    """A layer of random numbers, its buffers filled with guards, and what it should give."""

    def __init__(
        self,
        kind,
        size,
        channels,
        columns,
        dtype,
        *,
        pooled=False,
        residual=False,
        silu=True,
        temb=True,
        labels=False,
        dense=False,
    ):
        n, h, w = size
        draw = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE)  # noqa: E731
        below = lambda high: torch.randint(0, high, (n,), generator=draw).to(DEVICE)  # noqa: E731
        scale = 2 if kind in ("up", "doubled") else 1
        self.kind, self.n, self.columns, self.pool, self.silu = kind, n, columns, pooled, silu
        shapes = {"up": (channels, columns, 2, 2), "linear": (columns, channels)}
        self.weight = randn(*shapes.get(kind, (columns, channels, 3, 3))) / (9 * channels) ** 0.5
        if kind == "doubled":  # few enough digits that the sums of four taps are exact in every dtype
            self.weight = (randn(columns, channels, 3, 3) * 4).round() / 64
        self.bias = randn(columns)
        # Guards stand beside every pixel, and before and behind all images as many rows as a tile has.
        around = -(-128 // (h * w))
        self.buffer = torch.full(
            (n + 2 * around, scale * h, scale * w, columns + 32), GUARD, dtype=dtype, device=DEVICE
        )
        self.target = self.buffer[around : n + around, ..., 16 : 16 + columns]
        self.pooled_buffer = self.buffer.new_full((n + 2 * around, h // 2, w // 2, columns + 16), GUARD)
        self.pooled = self.pooled_buffer[around : n + around, ..., 16:] if pooled else None
        # What lies beside the residual must not get in.
        beside = torch.full((n, scale * h, scale * w, columns + 48), float("nan"), dtype=dtype, device=DEVICE)
        self.residual = beside[..., 16 : 16 + columns].copy_(randn(n, scale * h, scale * w, columns))
        self.residual = self.residual if residual else None
        self.x = self.source = None
        self.channels = channels
        if kind == "first":
            self.x = randn(n, channels, h, w)
            self.seen = self.x
        else:
            beside = 0 if dense else 16
            self.source = randn(n, h, w, channels + beside).to(dtype)[..., beside:]
            self.seen = self.source.permute(0, 3, 1, 2)
            self.weight = self.weight.to(dtype).float()
        self.first_column = 16 if temb else None
        self.table, self.rows = randn(7, columns + 32), below(7)
        self.label_table, self.label_rows = None, None
        if labels:
            self.label_table, self.label_rows = randn(3, columns + 32), below(3)

    def bind(self, tile):
        packed = pack(self.kind, self.weight, self.buffer.dtype)
        return Conv(
            self.kind,
            self.source,
            packed,
            self.bias,
            self.target,
            tile,
            pooled=self.pooled,
            residual=self.residual,
            silu=self.silu,
            first_column=self.first_column,
            channels=self.channels,
        )

    def run(self, tile):
        conv = self.bind(tile)
        conv(self.x, self.table, self.rows, self.label_table, self.label_rows)
        return self.target.clone()

    def exact(self):
        x, weight, bias = self.seen.double(), self.weight.double(), self.bias.double()
        if self.kind == "up":
            y = F.conv_transpose2d(x, weight, bias, stride=2)
        elif self.kind == "linear":
            y = F.conv2d(x, weight[:, :, None, None], bias)
        else:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.kind == "doubled" else x
            y = F.conv2d(x, weight, bias, padding=1)
        if self.silu:
            y = F.silu(y)
        if self.first_column is not None:
            temb = self.table[self.rows]
            if self.label_table is not None:
                temb = temb + self.label_table[self.label_rows]
            y = y + temb[:, 16 : 16 + self.columns, None, None].double()
        y = y.permute(0, 2, 3, 1)
        return y if self.residual is None else y + self.residual.double()

    def check(self):
        expected = self.exact()
        error = (self.target.double() - expected).norm() / expected.norm()
        assert error < BOUND[self.buffer.dtype]
        if self.pooled is not None:
            assert torch.equal(self.pooled.permute(0, 3, 1, 2), F.max_pool2d(self.target.permute(0, 3, 1, 2), 2))
            self.pooled.fill_(GUARD)
        self.target.fill_(GUARD)
        assert (self.buffer == GUARD).all()
        assert (self.pooled_buffer == GUARD).all()


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {"silu": False, "temb": False}
ADDED = {"silu": False, "residual": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "size", "channels", "columns", "tile", "options"),
    [
        pytest.param("conv", (3, 6, 10), 48, 96, Tile(64, 128, 16), {"labels": True}, id="odd_tiles"),
        pytest.param("conv", (1, 4, 4), 96, 48, Tile(16, 64, 32), {"temb": False}, id="no_embedding"),
        pytest.param("conv", (3, 4, 4), 16, 64, Tile(16, 32, 16), {"silu": False}, id="one_image_a_tile"),
        pytest.param("conv", (3, 6, 10), 16, 48, Tile(64, 32, 16), {"pooled": True}, id="pooled"),
        pytest.param("conv", (5, 6, 4), 16, 64, Tile(128, 64, 16), {"labels": True}, id="six_images_a_tile"),
        pytest.param("conv", (9, 4, 4), 16, 64, Tile(128, 64, 16), {"pooled": True}, id="eight_pooled_images_a_tile"),
        pytest.param("conv", (18, 4, 4), 16, 128, Tile(64, 128, 16), {}, id="four_images_a_tile"),
        pytest.param("conv", (3, 2, 2), 64, 16, Tile(16, 32, 64, splits=2), {"labels": True}, id="split_2"),
        pytest.param("conv", (1, 6, 6), 64, 64, Tile(32, 64, 64, splits=4), {"pooled": True}, id="split_4_pooled"),
        pytest.param("first", (3, 6, 10), 3, 64, Tile(128, 64, 32), {}, id="image"),
        pytest.param("first", (1, 4, 4), 1, 48, Tile(16, 64, 16), {"pooled": True}, id="image_of_one_channel"),
        pytest.param("up", (3, 3, 5), 64, 48, Tile(32, 64, 64), {"silu": False, "temb": False}, id="up"),
        pytest.param(
            "up", (1, 2, 2), 96, 16, Tile(16, 32, 32, splits=2), {"silu": False, "temb": False}, id="up_split"
        ),
        pytest.param("window", (3, 2, 2), 32, 48, Tile(16, 32, 32), {"labels": True}, id="window"),
        pytest.param("window", (17, 2, 2), 32, 32, Tile(16, 32, 32, splits=4), {}, id="window_split"),
        pytest.param(
            "window", (3, 2, 2), 32, 48, Tile(16, 32, 32, splits=2), {"dense": True}, id="window_of_a_whole_buffer"
        ),
        pytest.param("point", (3, 1, 1), 48, 96, Tile(16, 64, 16), {}, id="point"),
        pytest.param("conv", (3, 6, 10), 16, 96, Tile(64, 128, 16), {**ADDED, "labels": True}, id="residual"),
        pytest.param("conv", (18, 4, 4), 16, 64, Tile(128, 64, 16), {"residual": True}, id="eight_images_residual"),
        pytest.param("conv", (3, 4, 4), 64, 32, Tile(16, 32, 32, splits=3), ADDED, id="split_residual"),
        pytest.param("linear", (3, 6, 10), 48, 96, Tile(64, 64, 16), PLAIN, id="linear"),
        pytest.param("linear", (1, 2, 2), 128, 48, Tile(16, 32, 64, splits=2), ADDED, id="linear_split_residual"),
        pytest.param("doubled", (3, 3, 5), 48, 48, Tile(32, 64, 16), PLAIN, id="doubled"),
        pytest.param("doubled", (2, 1, 1), 32, 16, Tile(16, 32, 32), PLAIN, id="doubled_pixels"),
        pytest.param("doubled", (1, 4, 2), 64, 32, Tile(16, 32, 64, splits=2), {"residual": True}, id="doubled_split"),
        pytest.param("window", (3, 2, 2), 16, 32, Tile(16, 32, 16), {"residual": True}, id="window_residual"),
    ],
)
def test_matches_float64(kind, size, channels, columns, tile, options, dtype):
    case = Case(kind, size, channels, columns, dtype, **options)
    split = case.run(tile)
    case.check()
    if tile.splits > 1:  # the same parts in the same order, and the count of programs is ready for the next launch
        conv = case.bind(dataclasses.replace(tile, joined=True))
        for _ in range(2):
            case.target.fill_(GUARD)
            conv(case.x, case.table, case.rows, case.label_table, case.label_rows)
            assert torch.equal(case.target, split)
        case.check()


def test_a_split_sum_has_the_same_bits_every_time():
    case = Case("conv", (2, 4, 4), 64, 32, torch.float32)
    tile = Tile(16, 32, 16, splits=4)
    assert torch.equal(case.run(tile), case.run(tile))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_joined_sums_have_the_bits_of_separate_ones_whatever_program_comes_last(dtype):
    """Thousands of launches, as a race would show itself in one of many."""
    case = Case("conv", (4, 8, 8), 512, 128, dtype, residual=True)
    separate = Tile(16, 64, 32, splits=16)
    expected = case.run(separate)
    conv = case.bind(dataclasses.replace(separate, joined=True))
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(3000):
        case.target.fill_(GUARD)
        conv(case.x, case.table, case.rows)
        wrong += (case.target != expected).sum()
    assert int(wrong) == 0


def test_more_parts_than_passes_are_as_many_as_there_are():
    case = Case("point", (2, 1, 1), 32, 16, torch.float32)
    case.run(Tile(16, 16, 16, splits=16))
    case.check()


@pytest.mark.parametrize("kind", ["conv", "first", "linear", "up", "doubled"])
def test_wide_addresses_give_the_same_bits(kind):
    size, channels = (2, 4, 6), 3 if kind == "first" else 16
    case = Case(kind, size, channels, 32, torch.float32, pooled=kind == "conv", residual=kind != "conv")
    expected = case.run(Tile(32, 32, 32 if kind == "first" else 16))
    conv = case.bind(Tile(32, 32, 32 if kind == "first" else 16))
    assert conv._constants["WIDE"] is False
    conv._constants["WIDE"] = True
    case.buffer.fill_(GUARD)
    conv(case.x, case.table, case.rows)
    assert torch.equal(case.target, expected)


def test_buffers_beyond_32_bits_are_addressed_in_64():
    def wide(n, beside=0):
        meta = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
        packed, bias = meta(9 * 64, 64), torch.empty(64, device="meta")
        target, residual = meta(n, 32, 32, 128)[..., 64:], meta(n, 32, 32, 64 + beside)[..., beside:]
        conv = Conv("conv", meta(n, 32, 32, 64), packed, bias, target, Tile(128, 64, 64), residual=residual)
        return conv._constants["WIDE"]

    assert not wide(8192)  # 2^30 elements
    assert wide(16384)
    assert wide(8192, beside=192)  # in the residual


MANY_IMAGES = Tile(64, 128, 32)


def test_tiles_know_of_how_many_images_they_are():
    assert images_of("conv", 256, 128, 128) == images_of("up", 64, 64, 128) == 1
    assert images_of("conv", 16, 64, 32) == 0  # small tiles look every row up
    assert images_of("window", 4, 64, 128) == images_of("point", 1, 64, 128) == 0  # every row is another image
    assert images_of("conv", 16, 128, 64) == 16
    assert images_of("conv", 4, 128, 128) == 32
    assert images_of("conv", 60, 128, 128) == 16  # up to 4
    assert images_of("conv", 8, 128, 64) == 16
    assert images_of("conv", 6, 96, 128) == 16
    assert images_of("conv", 6, 98, 128) == 32  # up to 18


@pytest.mark.parametrize("row", [-1, 7, 2**40])
def test_a_row_outside_the_table_makes_nan_of_its_sample_alone(row):
    for side, tile in ((2, Tile(16, 16, 16)), (2, Tile(16, 16, 16, splits=2)), (4, Tile(16, 16, 16)), (2, MANY_IMAGES)):
        case = Case("conv", (3, side, side), 32, 16, torch.float32)
        case.rows[1] = row
        y = case.run(tile)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
        case = Case("conv", (3, side, side), 32, 16, torch.float32, labels=True)
        case.label_rows[2] = row
        y = case.run(tile)
        assert y[2].isnan().all()
        assert y[:2].isfinite().all()


def test_nan_in_the_source_reaches_the_target():
    case = Case("conv", (1, 4, 4), 16, 16, torch.bfloat16)
    case.source[0, 1, 1, 3] = float("nan")
    y = case.run(Tile(16, 16, 16))
    assert y[0, :3, :3].isnan().all()
    assert y[0, 3].isfinite().all()


@pytest.mark.parametrize(
    ("kind", "size", "channels", "columns", "tile", "options", "message"),
    [
        ("conv", (1, 4, 4), 24, 16, Tile(16, 16, 8), {}, "multiples of 16, got 24 in and 16 out"),
        ("conv", (1, 4, 4), 16, 24, Tile(16, 16, 16), {}, "multiples of 16, got 16 in and 24 out"),
        ("conv", (1, 4, 4), 48, 16, Tile(16, 16, 32), {}, "must divide the 48 channels of the source, got 32"),
        ("conv", (1, 4, 4), 16, 16, Tile(16, 16, 16, warps=8), {}, "at most 4 warps .* got 8"),
        ("first", (1, 4, 4), 3, 16, Tile(16, 16, 16), {}, 'of a "first" layer must be 32, got 16'),
        ("first", (1, 4, 4), 3, 16, Tile(16, 16, 32, splits=2), {}, "cannot be split, got 2 parts"),
        ("window", (1, 4, 4), 16, 16, Tile(16, 16, 16), {}, "images of 2x2 pixels, got 4x4"),
        ("point", (1, 2, 2), 16, 16, Tile(16, 16, 16), {}, "images of 1x1 pixels, got 2x2"),
        ("conv", (1, 3, 4), 16, 16, Tile(16, 16, 16), {"pooled": True}, 'can be pooled, got "conv" of 3x4'),
        ("doubled", (1, 4, 4), 16, 16, Tile(16, 16, 16, warps=8), {}, "at most 4 warps .* got 8"),
        ("conv", (1, 4, 4), 16, 16, Tile(16, 16, 16), {"pooled": True, "residual": True}, "pooled or has a residual"),
        ("linear", (1, 4, 4), 16, 16, Tile(16, 16, 16), {"pooled": True}, 'can be pooled, got "linear" of 4x4'),
        ("plane", (1, 4, 4), 16, 16, Tile(16, 16, 16), {}, "kind must be one of conv, .* got 'plane'"),
    ],
)
def test_bad_input(kind, size, channels, columns, tile, options, message):
    case = Case(kind, size, channels, columns, torch.float32, **options)
    with pytest.raises(ValueError, match=message):
        case.run(tile)
    assert (case.buffer == GUARD).all()


def test_too_many_pixels_are_refused():
    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    target = meta(2**21, 32, 32, 16)
    for kind, side in (("conv", 32), ("doubled", 16)):
        source = meta(2**21, side, side, 16)
        with pytest.raises(ValueError, match="use smaller batches"):
            Conv(kind, source, meta(144, 16), torch.empty(16, device="meta"), target, Tile(128, 16, 16))


def test_terms_of_an_image_are_a_power_of_two():
    assert [first_terms(channels) for channels in (1, 2, 3, 4)] == [16, 32, 32, 64]


def test_layers_of_the_paper_s_network_are_of_every_kind():
    from ddpm_fast.inference.gpu_layers import listed
    from ddpm_fast.nn import DDPMUNet

    found = products_of(DDPMUNet().eval(), 32)
    kinds, left = set(), 0
    for layer, side, *_ in found:
        candidates = listed(layer, 4, side, side, torch.bfloat16, 132, 90)
        kinds |= {candidate.kind for candidate in candidates}
        left += not candidates
    assert kinds == {"first", "conv", "linear", "doubled"}
    assert left == sum(getattr(layer, "resample", None) == "down" for layer, *_ in found) == 3


SHARES = 4  # of a network's layers: 100 or more kernels are compiled for all of them, in several processes then


@pytest.mark.gpu
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("name", ["UNet", "DDPMUNet"])
def test_every_tile_of_a_network_computes_the_right_thing_on_this_gpu(name, n, dtype, share):
    """All that a plan may choose there, flattened loops of whatever length included (triton#1254)."""
    from ddpm_fast import nn
    from ddpm_fast.inference.gpu import processors
    from ddpm_fast.inference.gpu_layers import listed

    numbers = processors(torch.device("cuda", torch.cuda.current_device()))
    for layer, side, channels, columns in products_of(getattr(nn, name)().eval(), 32)[share::SHARES]:
        options = {"silu": getattr(layer, "silu", False), "temb": getattr(layer, "temb", None) is not None}
        options |= {part: getattr(layer, part, None) is not None for part in ("pooled", "residual")}
        for candidate in listed(layer, n, side, side, dtype, *numbers):
            case = Case(candidate.kind, (n, side, side), channels, columns, dtype, **options)
            case.run(candidate.tile)
            case.check()
