"""rms_norm_silu by the CUDA kernels, run on the CPU, against the C++ half; see check_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
from check_kernels import FLOATS, Buffer, C, Data, both, code, every_layout


def both_rms_norms(
    data: Data, dtype: str, parts: int, silu: bool, missing: str = "", per_sample: bool = False, eps: float = 1e-12
) -> None:
    """Forward and backward. Norms and sums are taken in another order on either side, so no bits are compared."""
    of_channels = data.n * data.channels
    other = "float32" if missing else dtype
    affine = of_channels if per_sample else data.channels
    described = []
    for name, kind in (("weight", other), ("beta", dtype)):
        array = data.array(kind, affine)
        described += [0 if name == missing else array, code(kind), per_sample]
    close = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}[dtype]
    h = data.array(dtype)
    assert h.values is not None
    if dtype == "float32":
        h.values[np.abs(h.values) < 0.05] *= 1e-14  # some places of few channels are below eps
    common = [*data.shape, h, code(dtype), *described, eps, silu]
    residual = 0 if missing == "residual" else data.array(dtype)
    both("rms_norm_silu", *common, residual, data.output(dtype, tolerance=close), case=(parts, silu, missing))
    # A place of one channel has a gradient of 0, the difference of terms of size 1 / |h|.
    no_g_h = missing == "g_h" or data.channels == 1
    sums = [data.output(count=of_channels, tolerance=2e-5 * (1 + data.inner**0.5)) for _ in range(2)]
    # Parts without a place leave in it what was there, which must not be added.
    left = np.full(2 * parts * of_channels, 1e6, np.float32)
    workspace = Buffer(left.size, "float32", left, tolerance=1e30)
    both(
        "rms_norm_silu_backward",
        *(*common, data.array(dtype), code(dtype), 0 if no_g_h else data.output(dtype, tolerance=close)),
        *([0, 0] if missing == "sums" else sums),
        *(parts, workspace if parts > 1 else 0),
        case=(parts, silu, missing),
    )


@every_layout
def test_rms_norm_silu(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    if data.size == 0:
        return  # answered before the extension is called
    k = FLOATS.index(dtype) + last
    both_rms_norms(data, dtype, min(1 + k % 3, data.inner), silu=k % 2 == 0)
    missing = ("weight", "beta", "residual", "g_h", "sums")[(k + shift + data.n) % 5]
    both_rms_norms(data, dtype, 1, True, missing, per_sample=True)


@pytest.mark.parametrize(
    ("channels", "inner", "last", "parts"),
    [
        (32, 1024, True, 8),
        (32, 1024, False, 32),
        (32, 1024, False, 5),  # several tiles a block, and a last part that is shorter
        (36, 1000, True, 3),
        (6, 4000, True, 2),  # as many places a tile as there may be
        (320, 60, True, 5),
        (320, 60, False, 2),
        (1032, 6, True, 1),  # more packs than fit side by side
        (5000, 3, True, 3),  # more channels than a tile has elements
        (5000, 1, False, 1),
        (70, 33, True, 33),  # a part for each place
        (70, 33, False, 9),  # more parts than tiles: some have no place
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_silu_of_many_numbers(channels: int, inner: int, last: bool, parts: int, dtype: str) -> None:
    both_rms_norms(Data((1, channels, inner), last, 0), dtype, parts, True)


@pytest.mark.parametrize("shape", [(258, 2, 3), (1, 1, 8300)])
def test_more_blocks_than_a_launch_may_have(shape: tuple[int, int, int]) -> None:
    """A batch then takes several launches, and where it is one sample, a block takes several tiles."""
    data = Data(shape, False, 0)
    arguments = [data.array(), 0, 0, 0, False, 0, 0, False, 1e-12, True, 0, data.output(tolerance=2e-5)]
    both("rms_norm_silu", *data.shape, *arguments)


@pytest.mark.parametrize("last", [False, True])
def test_a_place_below_eps_has_a_constant_norm(last: bool) -> None:
    data = Data((2, 24, 12), last, 0)
    both_rms_norms(data, "float32", 1, True, eps=5.0)


def test_an_infinite_gradient_stays_in_its_place() -> None:
    h, g = np.ones(4096, np.float32), np.ones(4096, np.float32)
    g[77] = np.inf
    g_h, sums = np.zeros(4096, np.float32), np.zeros((2, 64), np.float32)
    C.rms_norm_silu_backward(
        *(0, 0, 1, 64, 64, True, h.ctypes.data, 0, 0, 0, False, 0, 0, False, 1e-12, True, g.ctypes.data, 0),
        *(g_h.ctypes.data, sums[0].ctypes.data, sums[1].ctypes.data, 1, 0),
    )
    assert not np.isfinite(g_h.reshape(64, 64)[1]).any()
    assert np.isfinite(np.delete(g_h.reshape(64, 64), 1, 0)).all()
    assert np.isinf(sums[:, 13]).all()
    assert np.isfinite(np.delete(sums, 13, 1)).all()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("misaligned", range(7))
def test_one_misaligned_array_is_enough(misaligned: int, last: bool) -> None:
    """The sanitizer sees a wide access to it."""
    data = Data((2, 8, 16), last, 0)
    h, residual, g = data.array(), data.array(), data.array()
    weight, beta = data.array(count=8), data.array(count=16)
    y, g_h = data.output(tolerance=2e-5), data.output(tolerance=2e-5)
    (h, weight, beta, residual, y, g, g_h)[misaligned].shift = 1
    common = [*data.shape, h, 0, weight, 0, False, beta, 0, True, 1e-12, True]
    both("rms_norm_silu", *common, residual, y)
    both("rms_norm_silu_backward", *common, g, 0, g_h, 0, 0, 1, 0)
