"""q_sample: the forward process and its training targets, exact on every backend."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, IMAGE, MEMORY, SHAPES, assert_same, rand, reference, to

import ddpm_fast
from ddpm_fast import noise as spec
from ddpm_fast import ops

T = 10
BETAS = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
SIGNAL = torch.cumprod(1 - BETAS, 0).sqrt()
TABLE = torch.stack([SIGNAL, (1 - SIGNAL**2).sqrt()], 1).float()
RNG = spec.make_rng(21, 4)


def timesteps(n: int) -> torch.Tensor:
    return torch.arange(n) * 7 % T


def check(device, x0, **options):
    """The backend of ``device`` against the reference, all outputs."""
    t = timesteps(x0.shape[0])
    expected = reference(ops.q_sample, x0, t, TABLE, **options)
    got = ops.q_sample(to(device, x0), to(device, t), to(device, TABLE), **to(device, options))
    for mine, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        assert_same(mine, theirs)
        assert mine.stride() == torch.empty_like(x0).stride()
    return got


@pytest.mark.parametrize("target", [None, "eps", "x0", "v"])
@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, kind, target):
    check(device, rand(IMAGE, dtype, kind=kind), noise=rand(IMAGE, seed=1), target=target)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_with_drawn_noise(device, dtype, kind):
    check(device, rand(IMAGE, dtype, kind=kind), rng=RNG, target="v", offset_noise=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_awkward_inputs(device, shape):
    check(device, rand(shape), rng=RNG, target="eps")
    check(device, rand(shape, torch.bfloat16, kind="offset"), noise=rand(shape, seed=1), target="v")


@pytest.mark.parametrize("kind", MEMORY)
def test_bytes_are_images(device, kind):
    x0 = rand((2, 3, 4, 8), torch.uint8, kind=kind)
    got, target = check(device, x0, rng=RNG, target="x0")
    assert got.dtype == torch.float32
    assert_same(target, x0.float() / 127.5 - 1)
    check(device, x0, rng=RNG, dtype=torch.bfloat16)


def test_equals_eager_pytorch_bit_for_bit(device):
    """The textbook line in eager float32, with broadcast coefficients."""
    x0, noise, t = rand(IMAGE), rand(IMAGE, seed=1), timesteps(2)
    signal, sigma = (TABLE[t, k].view(-1, 1, 1, 1) for k in (0, 1))
    got = ops.q_sample(to(device, x0), to(device, t), to(device, TABLE), noise=to(device, noise))
    assert_same(got, signal * x0 + sigma * noise)


def test_drawn_noise_equals_given_noise(device):
    for dtype in DTYPES:
        x0, t = to(device, rand((3, 2, 5, 3), dtype)), to(device, timesteps(3))
        drawn = ops.q_sample(x0, t, to(device, TABLE), rng=to(device, RNG), stream=77, target="v")
        noise = ddpm_fast.normal(3, (2, 5, 3), rng=to(device, RNG), stream=77)
        given = ops.q_sample(x0, t, to(device, TABLE), noise=noise, target="v")
        assert torch.equal(drawn[0], given[0])
        assert torch.equal(drawn[1], given[1])


def test_offset_noise_is_one_normal_per_channel(device):
    x0 = torch.zeros(2, 3, 4, 4)
    zeros = torch.zeros_like(x0)
    _, eps = check(device, x0, noise=zeros, rng=RNG, offset_noise=0.5, target="eps")
    offset = spec.normal(21, 4, 2, spec.STREAM_OFFSET_NOISE, 3)
    assert_same(eps, (0.5 * torch.from_numpy(offset.copy()))[:, :, None, None].expand(2, 3, 4, 4).contiguous())


def test_int32_timesteps(device):
    x0, t = to(device, rand(IMAGE)), to(device, timesteps(2))
    table, noise = to(device, TABLE), to(device, rand(IMAGE, seed=1))
    assert torch.equal(ops.q_sample(x0, t, table, noise=noise), ops.q_sample(x0, t.to(torch.int32), table, noise=noise))


@pytest.mark.parametrize("outside", [-1, T, 2**40])
def test_timestep_outside_the_table_gives_nan_for_that_sample_only(device, outside):
    """What a GPU does, where the values of t are not read: the op itself, beneath the check."""
    t = to(device, torch.tensor([3, outside]))
    x0, noise = to(device, rand(IMAGE)), to(device, rand(IMAGE, seed=1))
    x_t, _ = torch.ops.ddpm_fast.q_sample(x0, t, to(device, TABLE), noise, None, 0, 0.0, "none", torch.float32)
    assert bool(x_t[0].isfinite().all())
    assert bool(x_t[1].isnan().all())


@pytest.mark.parametrize("target", [None, "eps", "x0", "v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_gradients_match_reference(device, kind, dtype, target):
    def gradients(where):
        x0 = to(where, rand(IMAGE, dtype, kind=kind)).requires_grad_()
        noise = to(where, rand(IMAGE, seed=1)).requires_grad_()
        out = ops.q_sample(x0, to(where, timesteps(2)), to(where, TABLE), noise=noise, target=target)
        outs = out if isinstance(out, tuple) else (out,)
        seeds = [to(where, rand(IMAGE, dtype, seed=5 + i)) for i in range(len(outs))]
        return torch.autograd.grad(outs, (x0, noise), seeds)

    for got, expected in zip(gradients(device), reference(gradients, torch.device("cpu")), strict=True):
        assert_same(got, expected)


def test_gradient_of_the_target_alone(device):
    x0 = to(device, rand(IMAGE)).requires_grad_()
    _, v = ops.q_sample(x0, to(device, timesteps(2)), to(device, TABLE), rng=to(device, RNG), target="v")
    (g,) = torch.autograd.grad(v.sum(), x0)
    assert_same(g, -TABLE[timesteps(2), 1].view(2, 1, 1, 1).expand(IMAGE))


@pytest.mark.parametrize("target", [None, "eps", "x0", "v"])
def test_gradcheck_in_float64(target):
    x0 = rand((2, 2, 3)).double().requires_grad_()
    noise = rand((2, 2, 3), seed=1).double().requires_grad_()

    def run(x0, noise):
        return ops.q_sample(x0, timesteps(2), TABLE, noise=noise, target=target)

    assert torch.autograd.gradcheck(run, (x0, noise))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("target", ["none", "v"])
def test_opcheck(device, kind, target):
    x0 = to(device, rand(IMAGE, kind=kind)).requires_grad_()
    t, table, noise = to(device, timesteps(2)), to(device, TABLE), to(device, rand(IMAGE, seed=1)).requires_grad_()
    torch.library.opcheck(
        torch.ops.ddpm_fast.q_sample.default, (x0, t, table, noise, None, 5, 0.0, target, torch.float32)
    )


X0, T2, NOISE = rand(IMAGE), timesteps(2), rand(IMAGE, seed=1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"noise": NOISE[..., 1:]}, ValueError, r"noise must have shape \(2, 3, 6, 6\), got \(2, 3, 6, 5\)"),
        ({"noise": NOISE.half()}, TypeError, "noise must be float32, got float16"),
        ({"noise": None}, ValueError, "noise or rng is needed"),
        ({"noise": [1.0]}, TypeError, "noise must be a torch.Tensor, got list"),
        ({"x0": X0.long()}, TypeError, "x0 must be float32, bfloat16, float16, float64 or uint8, got int64"),
        ({"x0": X0[0, 0, 0]}, ValueError, r"x0 must have shape \(N, C, ...\) or \(N, D\), got \(6,\)"),
        ({"t": T2[:1]}, ValueError, r"t must have shape \(2,\), got \(1,\)"),
        ({"t": T2.float()}, TypeError, "t must be int64 or int32, got float32"),
        ({"t": T2 + T}, ValueError, r"t must be in \[0, 10\), the length of the table, got 17"),
        ({"t": T2 - 1}, ValueError, r"t must be in \[0, 10\), the length of the table, got -1"),
        ({"t": T2.to("meta")}, ValueError, r'cpu like x0, got meta; move it with t.to\("cpu"\)'),
        ({"table": TABLE.double()}, TypeError, "table must be float32, got float64"),
        ({"table": TABLE.T}, ValueError, r"table must have shape \(steps, 2\) \(see Schedule.noising_table\)"),
        ({"target": "noise"}, ValueError, "target must be one of None, 'eps', 'x0', 'v', got 'noise'"),
        ({"offset_noise": -1.0}, ValueError, "offset_noise must be a finite number >= 0"),
        ({"offset_noise": 0.1}, ValueError, "offset_noise is drawn from rng"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
        ({"dtype": torch.float64}, TypeError, "float64 is for float64 x0 only"),
        ({"stream": -3}, ValueError, "stream must be in"),
    ],
)
def test_bad_input(changed, error, message):
    arguments = {"x0": X0, "t": T2, "table": TABLE, "noise": NOISE, **changed}
    with pytest.raises(error, match=message):
        ops.q_sample(**arguments)
