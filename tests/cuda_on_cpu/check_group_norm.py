"""group_norm_silu by the CUDA kernels, run on the CPU, against the C++ half; see check_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
from check_kernels import FLOATS, Buffer, C, Data, both, code, every_layout


def both_group_norms(
    data: Data, groups: int, dtype: str, parts: int, silu: bool, missing: str = "", per_sample: bool = False
) -> None:
    """Forward and backward. Statistics and sums are taken in another order on either side, so no bits are compared."""
    of_channels, of_groups, size = data.n * data.channels, data.n * groups, data.channels // groups * data.inner
    other = "float32" if missing else dtype
    affine = of_channels if per_sample else data.channels
    arrays = {
        "bias": data.array(other, data.channels),
        "temb": data.array(dtype, of_channels),
        "weight": data.array(other, affine),
        "beta": data.array(dtype, affine),
    }
    described = []
    for name, array in arrays.items():
        described += [0 if name == missing else array, code(array.dtype)]
        described += [per_sample] if name in ("weight", "beta") else []
    close = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}[dtype]
    mean, rstd = (data.output(count=of_groups, tolerance=1e-5) for _ in range(2))
    workspace = Buffer(parts * max(2 * of_groups, 3 * of_channels + 2 * of_groups), "float32", tolerance=1e30)
    both(
        "group_norm_silu",
        *(*data.shape, groups, data.array(dtype), code(dtype), *described, silu, mean, rstd, parts),
        *(workspace if parts > 1 else 0, 1e-5, data.output(dtype, tolerance=close)),
        case=(groups, parts, silu, missing),
    )
    statistics = [data.fixed(result, np.float32) for result in (mean.results[0], rstd.results[0])]
    sums = [data.output(count=of_channels, tolerance=2e-5 * (1 + size**0.5)) for _ in range(3)]
    both(
        "group_norm_silu_backward",
        *(*data.shape, groups, data.array(dtype), code(dtype), *described, silu, *statistics, parts),
        *(workspace if parts > 1 else 0, data.array(dtype), code(dtype)),
        0 if missing == "bias" else data.output(dtype, tolerance=close),
        *((0, *sums[1:]) if missing == "temb" else sums),
        case=(groups, parts, silu, missing),
    )


@every_layout
def test_group_norm_silu(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    if data.size == 0:
        return  # answered before the extension is called
    k = FLOATS.index(dtype) + last
    for groups in (1, 2, data.channels):
        if data.channels % groups == 0 and data.channels // groups * data.inner > 1:
            k += 1
            both_group_norms(data, groups, dtype, min(1 + k % 3, data.inner), silu=k % 4 != 0)
    missing = ("bias", "temb", "weight", "beta")[k % 4]
    both_group_norms(data, 1, dtype, 1, True, missing, per_sample=missing in ("bias", "weight"))


@pytest.mark.parametrize(
    ("channels", "groups", "inner", "last", "parts"),
    [
        (32, 8, 1024, True, 1),
        (32, 8, 1024, False, 5),
        (36, 12, 60, True, 4),
        (30, 6, 60, True, 1),  # no whole packs of four in a group
        (64, 2, 60, False, 1),  # a warp for each channel
        (320, 1, 60, True, 3),  # more packs than fit side by side
        (320, 1, 64, False, 3),  # more channels than the table holds
        (70, 2, 1, False, 1),
        (1032, 1, 1, False, 1),  # one place, but too wide for the kernel of channels_last
    ],
)
def test_group_norm_silu_of_many_channels(channels: int, groups: int, inner: int, last: bool, parts: int) -> None:
    both_group_norms(Data((1, channels, inner), last, 0), groups, "float32", parts, True)


def test_a_group_too_wide_for_channels_last_is_refused() -> None:
    data = Data((1, 1032, 2), True, 0)
    h, y, statistics = data.array(), data.output(), [data.output(count=1) for _ in range(2)]
    missing = [0, 0] * 2 + [0, 0, False] * 2
    with pytest.raises(RuntimeError, match="at most 1024 channels"):
        C.group_norm_silu(
            *(0, 0, *data.shape, 1, h.place(), 0, *missing, True, *(x.place() for x in statistics), 1, 0, 1e-5),
            y.place(),
        )
