"""PyTorch's convolution followed by our one pass, against float64 and the passes that it replaces.

Without a GPU the pass runs in the interpreter; test_triton_jit.py compiles it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from ddpm_fast.backends.triton import launch
from ddpm_fast.backends.triton.epilogue import Epilogue
from ddpm_fast.inference import check, gpu_library
from ddpm_fast.inference.candidate import Frame, Packs, Place
from ddpm_fast.inference.network import Buffer, Conv, Linear, Slice

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
GUARD = 55.0
# Sums and results are rounded once each; cuDNN may add up float32 by fast algorithms.
BOUND = {torch.float32: 1e-6 if launch.INTERPRETED else 1e-5, torch.bfloat16: 5e-3, torch.float16: 7e-4}
DTYPES = tuple(BOUND)


class Case:
    """A layer of random numbers at a place, guards beside everything that it writes."""

    def __init__(
        self,
        size,
        channels,
        columns,
        dtype,
        *,
        kernel=3,
        resample="none",
        padding=1,
        silu=True,
        temb=True,
        labels=False,
        pooled=False,
        residual=False,
    ):
        n, h, w = size
        draw = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE)  # noqa: E731
        whole = lambda c: Slice(Buffer("b", c, 0), 0, c)  # noqa: E731
        image = kernel == 7
        weight = (randn(columns, channels, kernel, kernel) / (kernel**2 * channels) ** 0.5).to(dtype).float()
        source = None if image else randn(n, h, w, channels + 16).to(dtype)[..., 16:]
        scale = {"none": 1, "up": 2, "down": 0.5}[resample]
        th, tw = int(h * scale), int(w * scale)
        self.buffer = torch.full((n, th, tw, columns + 32), GUARD, dtype=dtype, device=DEVICE)
        self.pooled_buffer = self.buffer.new_full((n, th // 2, tw // 2, columns + 16), GUARD)
        target = self.buffer[..., 16 : 16 + columns]
        self.layer = Conv(
            "conv",
            weight,
            randn(columns),
            None if image else whole(channels),
            whole(columns),
            silu=silu,
            temb=16 if temb else None,
            pooled=whole(columns) if pooled else None,
            residual=whole(columns) if residual else None,
            resample=resample,
            padding=padding,
        )
        self.place = Place(
            *(n, h, w, dtype, DEVICE, source, target),
            self.pooled_buffer[..., 16:] if pooled else None,
            columns + 32,
            Packs(),
            randn(n, th, tw, columns).to(dtype) if residual else None,
        )
        x = randn(n, channels if image else 3, h, w).to(dtype).float()
        tables = (randn(7, columns + 32), torch.randint(0, 7, (n,), generator=draw).to(DEVICE))
        if labels:
            tables += (randn(3, columns + 32), torch.randint(0, 3, (n,), generator=draw).to(DEVICE))
        self.frame = Frame(x, torch.zeros_like(x), *tables)

    def check(self):
        place = self.place
        (candidate,) = gpu_library.listed(self.layer, place.n, place.h, place.w)
        bound = candidate.prepare(self.layer, place)
        images = torch.arange(place.n, device=DEVICE)
        expected = check.exact(self.layer, place, self.frame, images)
        assert check.error(self.layer, place, self.frame, bound, expected, images) < BOUND[place.dtype]
        if place.pooled is not None:
            nchw = place.target.permute(0, 3, 1, 2)
            assert torch.equal(place.pooled.permute(0, 3, 1, 2), F.max_pool2d(nchw, 2))
            place.pooled.fill_(GUARD)
        place.target.fill_(GUARD)
        assert (self.buffer == GUARD).all()
        assert (self.pooled_buffer == GUARD).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "channels", "columns", "options"),
    [
        pytest.param((3, 6, 10), 16, 96, {"labels": True}, id="odd_tiles"),
        pytest.param((2, 8, 8), 16, 64, {}, id="one_image_a_tile"),
        pytest.param((9, 2, 2), 32, 48, {"silu": False}, id="many_images_a_tile"),
        pytest.param((3, 6, 10), 16, 48, {"pooled": True}, id="pooled"),
        pytest.param((9, 4, 4), 16, 64, {"pooled": True, "temb": False}, id="pooled_images_a_tile"),
        pytest.param((3, 6, 10), 16, 96, {"residual": True, "silu": False, "labels": True}, id="residual"),
        pytest.param((2, 4, 6), 16, 32, {"resample": "up", "silu": False, "temb": False}, id="doubled"),
        pytest.param((2, 4, 6), 16, 32, {"resample": "down", "padding": 0, "silu": False}, id="strided"),
        pytest.param((2, 4, 6), 16, 32, {"resample": "down", "residual": True}, id="strided_and_padded"),
        pytest.param((2, 8, 8), 3, 64, {"kernel": 7, "padding": 3, "silu": False, "temb": False}, id="image_7x7"),
    ],
)
def test_matches_float64(size, channels, columns, options, dtype):
    Case(size, channels, columns, dtype, **options).check()


def test_wide_addresses_give_the_same_bits():
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(2, 4, 6, 32, generator=draw).to(DEVICE)
    target, pooled = torch.zeros_like(y), torch.zeros(2, 2, 3, 32, device=DEVICE)
    end = Epilogue(torch.zeros(32, device=DEVICE), target, pooled=pooled, silu=True)
    assert end._constants["WIDE"] is False
    end(y)
    expected = target.clone(), pooled.clone()
    end._constants["WIDE"] = True
    target.zero_()
    end(y)
    assert torch.equal(target, expected[0])
    assert torch.equal(pooled, expected[1])


def test_buffers_beyond_32_bits_are_addressed_in_64():
    meta = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    assert not Epilogue(meta(64), meta(16384, 32, 32, 64))._constants["WIDE"]
    assert Epilogue(meta(64), meta(16384, 32, 32, 128)[..., 64:])._constants["WIDE"]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4, 4, 24), {}, "multiple of 16, got 24"),
        ((2**21, 32, 32, 16), {}, "use smaller batches"),
        ((1, 3, 4, 16), {"pooled": True}, "got 3x4"),
        ((1, 4, 4, 16), {"pooled": True, "residual": True}, "without a residual"),
    ],
)
def test_bad_input(shape, options, message):
    meta = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match=message):
        Epilogue(torch.empty(shape[3], device="meta"), meta, **dict.fromkeys(options, meta))


def test_only_convolutions_of_enough_columns_are_served():
    part = Slice(Buffer("b", 16, 0), 0, 16)
    few = Conv("conv", torch.empty(24, 16, 3, 3), torch.empty(24), part, part)
    assert gpu_library.listed(few, 1, 4, 4) == []
    assert gpu_library.listed(Linear("linear", torch.empty(16, 16), torch.empty(16), part, part), 1, 4, 4) == []
    many = Conv("conv", torch.empty(16, 16, 3, 3), torch.empty(16), part, part)
    assert gpu_library.listed(many, 2**21, 32, 32) == []
