"""batch_norm_silu of the Triton backend in many small programs, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from support import rand

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from ddpm_fast.backends import reference
from ddpm_fast.backends import triton as backend
from ddpm_fast.backends.layout import Layout
from ddpm_fast.backends.triton import _batch_norm, launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: there is a GPU")

CASES = [
    pytest.param((1, 2, 150), False, (2, 2), id="parts_of_several_tiles"),
    pytest.param((1, 5, 3, 40), True, (8, 1), id="channels_last"),
    pytest.param((1, 9, 3, 3), False, (1, 3), id="several_blocks_of_channels"),
    pytest.param((3, 70), False, (1, 2), id="vectors"),
]


@pytest.fixture
def small_programs(monkeypatch):
    """Tiles of 64 elements, parts of at most 128."""
    monkeypatch.setattr(_batch_norm, "INTERPRETED_ELEMENTS", 64)
    monkeypatch.setattr(_batch_norm, "PART_ELEMENTS", 128)


@pytest.mark.parametrize(("shape", "last", "division"), CASES)
def test_in_many_programs(small_programs, shape, last, division):
    def image(seed):
        x = rand(shape, seed=seed)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x

    h, g = image(0) + 30, image(1)
    blocks = _batch_norm.Blocks(Layout.of(h), 1e-5)
    assert (blocks.parts, blocks.grid[0] // (shape[0] * blocks.parts)) == division
    temb, weight, bias = rand(shape[:2], seed=2), rand(shape[1:2], seed=3), rand(shape[1:2], seed=4)
    forward = (h, temb, weight, bias, None, None, 1e-5, "silu")
    got, expected = backend.batch_norm_silu(*forward), reference.batch_norm_silu(*forward)
    for mine, true in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    assert got[0].stride() == h.stride()
    backward = (g, h, weight, bias, *expected[1:], True, 1e-5, "silu", True, True)
    both = [op.batch_norm_silu_backward(*backward) for op in (backend, reference)]
    for mine, true in zip(*both, strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-5, atol=2e-5)


def test_a_large_batch_has_fewer_parts():
    sizes = ((1, 64, 2**20), (512, 64, 2**20), (2**14, 64, 2**20))
    parts = [_batch_norm.Blocks(Layout.of(torch.empty(size, device="meta")), 1e-5).parts for size in sizes]
    assert parts == [8, 8, 1]
