"""batch_norm_silu by the CUDA kernels, run on the CPU, against the C++ half; see check_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
from check_kernels import FLOATS, Buffer, C, Data, both, code, every_layout


def both_batch_norms(data: Data, dtype: str, parts: int, silu: bool, missing: str = "", of_batch: bool = True) -> None:
    """Forward and backward. Statistics and sums are taken in another order on either side, so no bits are compared."""
    of_channels, count = data.n * data.channels, data.n * data.inner
    other = "float32" if missing else dtype
    described = []
    for name in ("weight", "bias"):
        array = data.array(other, data.channels)
        described += [0 if name == missing else array, code(other)]
    close = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}[dtype]
    h = data.array(dtype)
    mean, var = (data.output(count=data.channels, tolerance=1e-5) for _ in range(2))
    if not of_batch:
        mean, var = data.array(count=data.channels), data.fixed(np.full(data.channels, 0.7), np.float32)
    # Parts without a place leave in it what was there, which must not be added.
    left = np.full(of_channels * 3 * parts + 2 * data.channels, 1e6, np.float32)
    workspace = Buffer(left.size, "float32", left, tolerance=1e30)
    rest = [of_batch, 1e-2, silu, parts, workspace]
    temb = 0 if missing == "temb" else data.array(dtype, of_channels)
    image = [*data.shape, h, code(dtype), *described]
    y = data.output(dtype, tolerance=close)
    both("batch_norm_silu", *image, mean, var, *rest, temb, code(dtype), y, case=(parts, silu, missing))
    statistics = [data.fixed(x.results[0], np.float32) for x in (mean, var)]
    sums = [data.output(count=data.channels, tolerance=2e-5 * (1 + count**0.5)) for _ in range(2)]
    g_temb = data.output(count=of_channels, tolerance=2e-5 * (1 + data.inner**0.5))
    both(
        "batch_norm_silu_backward",
        *(*image, *statistics, *rest, data.array(dtype), code(dtype)),
        *(
            0 if missing == "g_h" else data.output(dtype, tolerance=2 * close),
            0 if missing == "temb" else g_temb,
            *sums,
        ),
        case=(parts, silu, missing),
    )


@every_layout
def test_batch_norm_silu(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    if data.size == 0:
        return  # answered before the extension is called
    k = FLOATS.index(dtype) + last
    missing = ("", "weight", "bias", "temb", "g_h")[(k + shift + data.n) % 5]
    both_batch_norms(data, dtype, min(1 + k % 3, data.inner), k % 2 == 0, missing, of_batch=k % 3 != 1)


@pytest.mark.parametrize(
    ("n", "channels", "inner", "last", "parts"),
    [
        (1, 32, 256, True, 8),
        (2, 12, 1040, False, 2),  # a warp for each channel, and a last part that is shorter
        (2, 6, 90, True, 7),
        (2, 5, 9, False, 9),  # a part for each place
        (2, 8, 24, False, 9),  # more parts than packs: some have no place
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_norm_silu_in_parts(n: int, channels: int, inner: int, last: bool, parts: int, dtype: str) -> None:
    both_batch_norms(Data((n, channels, inner), last, 0), dtype, parts, True)


def test_batch_norm_silu_of_two_runs_of_channels() -> None:
    """The second one is of a pack."""
    both_batch_norms(Data((2, 260, 3), True, 0), "bfloat16", 1, True)


def test_more_blocks_than_a_launch_may_have() -> None:
    """The samples then take several launches."""
    both_batch_norms(Data((258, 1, 3), False, 0), "float32", 1, False)


@pytest.mark.parametrize("last", [False, True])
def test_a_mean_that_is_far_from_zero_loses_no_digits(last: bool) -> None:
    data = Data((3, 8, 48), last, 0)
    h = np.random.default_rng(0).standard_normal(data.size).astype(np.float32) + np.float32(1e4)
    axes = (0, 1) if last else (0, 2)
    expected = h.astype(np.float64).reshape((3, 48, 8) if last else (3, 8, 48))
    y, workspace, found = np.empty_like(h), np.empty(8 * (3 * 3 * 2 + 2), np.float32), np.empty((2, 8), np.float32)
    C.batch_norm_silu(
        *(0, 0, *data.shape, h.ctypes.data, 0, 0, 0, 0, 0, found[0].ctypes.data, found[1].ctypes.data),
        *(True, 0.0, False, 2, workspace.ctypes.data, 0, 0, y.ctypes.data),
    )
    np.testing.assert_array_equal(found[0], expected.mean(axes).astype(np.float32))
    np.testing.assert_allclose(found[1], expected.var(axes), rtol=1e-6)
