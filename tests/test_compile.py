"""torch.compile(fullgraph=True) goes through every op without a break and without a recompile over t or row."""

from __future__ import annotations

import pytest
import torch
from support import IMAGE, rand
from test_ddpm_step import T_OF_ROW
from test_ddpm_step import TABLE as STEPS
from test_q_sample import RNG, TABLE, T, timesteps
from torch._dynamo.testing import CompileCounter

from ddpm_fast import ops

pytestmark = pytest.mark.no_poison


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend):
    return torch.compile(function, backend=backend, fullgraph=True)


def test_training_ops_compile_once_over_t():
    def loss(x0, t, scale, temb):
        x_t, v = ops.q_sample(x0, t, TABLE, rng=RNG, target="v", offset_noise=0.1)
        h = ops.add_bias_temb(x_t * scale, None, temb, act="silu")
        return ops.noise_mse(h, target="v", x0=x0, t=t, table=TABLE, rng=RNG, offset_noise=0.1) + 0 * v.sum()

    x0, temb = rand(IMAGE), rand((2, 3), seed=2)
    counter = CompileCounter()
    fast = compiled(loss, counter)
    for shift in range(T):
        t = (timesteps(2) + shift) % T
        scale = torch.tensor(0.7, requires_grad=True)
        expected = torch.autograd.grad(loss(x0, t, scale, temb), scale)[0]
        got = torch.autograd.grad(fast(x0, t, scale, temb), scale)[0]
        assert torch.equal(got, expected)
    assert counter.frame_count == 1


def test_group_norm_silu_compiles_forward_and_backward():
    def loss(h, weight, beta, bias, temb, scale):
        y = ops.group_norm_silu(h, 3, weight, beta, bias=bias, temb=temb, scale=scale)
        return (y * y).sum()

    affine = [rand(IMAGE[1:2], seed=seed) for seed in (1, 2, 3)]
    arguments = [rand(IMAGE, kind="channels_last"), *affine, rand(IMAGE[:2], seed=4), rand(IMAGE[:2], seed=5)]
    leaves = [value.requires_grad_() for value in arguments]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(compiled(loss, "aot_eager")(*leaves), leaves)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_rms_norm_silu_compiles_forward_and_backward():
    def loss(h, weight, scale, shift, residual):
        y = ops.rms_norm_silu(h, weight, scale=scale, shift=shift, residual=residual)
        return (y * y).sum()

    h, residual = (rand(IMAGE, seed=seed, kind="channels_last") for seed in (0, 4))
    arguments = [h, rand(IMAGE[1:2], seed=1), rand(IMAGE[:2], seed=2), rand(IMAGE[:2], seed=3), residual]
    leaves = [value.requires_grad_() for value in arguments]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(compiled(loss, "aot_eager")(*leaves), leaves)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_reverse_step_compiles_once_over_rows():
    def step(x, m, row):
        ops.ddpm_step(x, m, STEPS, T_OF_ROW, row, RNG)
        return x * 1

    counter = CompileCounter()
    fast = compiled(step, counter)
    x, expected = rand(IMAGE), rand(IMAGE)
    row = torch.zeros(1, dtype=torch.int64)
    for _ in range(4):
        m = expected * 0.1
        expected = step(expected, m, row).clone()
        x = fast(x, m, row).clone()
        assert torch.equal(x, expected)
        row = row + 1
    assert counter.frame_count == 1


def test_noise_compiles():
    def draw(rng):
        return ops.normal(2, (3, 4), rng=rng, stream=5) + 0, ops.random_bits(2, (4,), rng=rng) + 0

    for got, expected in zip(compiled(draw, "aot_eager")(RNG), draw(RNG), strict=True):
        assert torch.equal(got, expected)


def test_whole_training_step_through_inductor():
    """The default compiler, forward and backward, in channels_last."""

    def loss(x0, t, weight):
        x_t = ops.q_sample(x0, t, TABLE, rng=RNG)
        h = torch.nn.functional.conv2d(x_t, weight, padding=1)
        return ops.noise_mse(ops.add_bias_temb(h, None, h.mean((2, 3)), act="silu"), rng=RNG)

    x0 = rand(IMAGE, kind="channels_last")
    weight = rand((3, 3, 3, 3), seed=4).requires_grad_()
    expected = torch.autograd.grad(loss(x0, timesteps(2), weight), weight)[0]
    got = torch.autograd.grad(compiled(loss, "inductor")(x0, timesteps(2), weight), weight)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
