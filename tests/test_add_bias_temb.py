"""add_bias_temb: y = act(h + bias[c]) + temb[n, c], forward and backward."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, IMAGE, MEMORY, SHAPES, TOLERANCES, assert_same, rand, reference, to, ulp_error

from ddpm_fast import ops

PARTS = [(True, True), (True, False), (False, True), (False, False)]


def inputs(shape=IMAGE, dtype=torch.float32, kind="contiguous", bias=True, temb=True):
    return {
        "h": rand(shape, dtype, kind=kind),
        "bias": rand(shape[1:2], seed=1) if bias else None,
        "temb": rand(shape[:2], dtype, seed=2) if temb else None,
    }


def check(device, act, **options):
    arguments = inputs(**options)
    expected = reference(ops.add_bias_temb, **arguments, act=act)
    got = ops.add_bias_temb(**to(device, arguments), act=act)
    assert_same(got, expected)
    assert got.stride() == torch.empty_like(arguments["h"]).stride()


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, kind, act):
    check(device, act, dtype=dtype, kind=kind)


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize(("bias", "temb"), PARTS)
def test_every_part_is_optional(device, bias, temb, act):
    check(device, act, bias=bias, temb=temb, kind="channels_last")
    check(device, act, bias=bias, temb=temb)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 37, 2, 2), (1, 64, 8, 8), (3, 5, 40, 33)], ids=str)
def test_on_awkward_inputs(device, shape):
    for kind in ("contiguous", "channels_last", "offset"):
        check(device, "silu", shape=shape, kind=kind)
        check(device, None, shape=shape, kind=kind)


def test_equals_eager_pytorch_bit_for_bit_without_activation(device):
    a = inputs()
    eager = a["h"] + a["bias"][None, :, None, None] + a["temb"][:, :, None, None]
    assert_same(ops.add_bias_temb(**to(device, a)), eager)


def test_silu_is_within_3_ulp_of_float64(device):
    """Over all magnitudes, down to results below the smallest normal float."""
    v = torch.cat([torch.linspace(-110, 110, 40001), rand((20000,)) * 4, -torch.logspace(-44, 2, 2000)])
    v = torch.cat([v, v.new_tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, -87.3, -88.8, -103.9])])
    got = ops.add_bias_temb(to(device, v[None]), act="silu").cpu()[0]
    exact = v.double() * torch.exp(torch.nn.functional.logsigmoid(v.double()))
    assert ulp_error(got, exact).max().item() <= 3


def test_silu_of_the_non_finite(device):
    v = torch.tensor([[float("inf"), -float("inf"), float("nan")]])
    got = ops.add_bias_temb(to(device, v), act="silu").cpu()[0]
    assert got[0] == float("inf")
    assert got[1] == 0
    assert got[2].isnan()


def gradients(where, act, dtype=torch.float32, kind="contiguous", shape=IMAGE, bias=True, temb=True):
    arguments = to(where, inputs(shape, dtype, kind, bias, temb))
    leaves = [value.requires_grad_() for value in arguments.values() if value is not None]
    y = ops.add_bias_temb(**arguments, act=act)
    g = to(where, rand(shape, dtype, seed=9, kind=kind if kind != "sliced" else "contiguous"))
    return torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_reference(device, dtype, kind, act):
    """The gradient of h is exact; those of bias and temb are sums, rounded to the parameter's dtype."""
    got = gradients(device, act, dtype, kind)
    expected = reference(gradients, torch.device("cpu"), act, dtype, kind)
    assert_same(got[0], expected[0])
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert mine.dtype == theirs.dtype
        tolerance = TOLERANCES[theirs.dtype]
        torch.testing.assert_close(mine.cpu(), theirs, **tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 2, 2), (1, 64, 8, 8), (3, 5, 40, 33), (2, 3), (0, 3, 4)], ids=str)
@pytest.mark.parametrize(("bias", "temb"), PARTS[:3])
def test_gradients_on_awkward_shapes(device, shape, bias, temb):
    for kind in ("contiguous", "channels_last"):
        got = gradients(device, "silu", shape=shape, kind=kind, bias=bias, temb=temb)
        expected = reference(gradients, torch.device("cpu"), "silu", shape=shape, kind=kind, bias=bias, temb=temb)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, **TOLERANCES[torch.float32])


def test_sums_are_no_further_from_float64_than_eager(device):
    shape = (4, 8, 64, 64)
    for kind in ("contiguous", "channels_last"):
        got = gradients(device, None, shape=shape, kind=kind)
        a = inputs(shape, kind=kind)
        leaves = [value.requires_grad_() for value in a.values()]
        eager = a["h"] + a["bias"][None, :, None, None] + a["temb"][:, :, None, None]
        g = rand(shape, seed=9, kind=kind)
        theirs = torch.autograd.grad(eager, leaves, g)
        exact = (g.double().sum((0, 2, 3)), g.double().sum((2, 3)))
        for mine, other, true in zip(got[1:], theirs[1:], exact, strict=True):
            error, eager_error = (mine.cpu().double() - true).abs().max(), (other.double() - true).abs().max()
            assert error <= max(eager_error, 2**-23 * true.abs().max())


@pytest.mark.parametrize("act", [None, "silu"])
def test_gradcheck_in_float64(act):
    h, bias, temb = (rand(shape, seed=i).double().requires_grad_() for i, shape in enumerate([(2, 3, 4), (3,), (2, 3)]))
    assert torch.autograd.gradcheck(lambda *a: ops.add_bias_temb(*a, act=act), (h, bias, temb))


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "sliced"])
def test_opcheck(device, kind, act):
    arguments = [value.requires_grad_() for value in to(device, inputs(kind=kind)).values()]
    torch.library.opcheck(torch.ops.ddpm_fast.add_bias_temb.default, (*arguments, act))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(3,\), got \(4,\)"),
        ({"temb": torch.zeros(3, 2)}, ValueError, r"temb must have shape \(2, 3\), got \(3, 2\)"),
        ({"temb": torch.zeros(2, 3).long()}, TypeError, "temb must be float32, bfloat16 or float16, got int64"),
        ({"temb": torch.zeros(2, 3).to("meta")}, ValueError, "temb must be on cpu like h, got meta"),
        ({"bias": torch.zeros(3).double()}, TypeError, "bias must be float32, bfloat16 or float16, got float64"),
        ({"h": torch.zeros(3)}, ValueError, r"h must have shape \(N, C, ...\)"),
        ({"act": "relu"}, ValueError, "act must be one of None, 'silu', got 'relu'"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        ops.add_bias_temb(**{**inputs(), **changed})
