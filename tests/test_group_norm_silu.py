"""group_norm_silu: y = act(GroupNorm(h + bias[c] + temb[n, c])), forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import CLOSE, CLOSE_SUMS, DTYPES, MEMORY, assert_same, rand, reference, to

from ddpm_fast import ops
from ddpm_fast.backends import native_norm

try:
    from ddpm_fast.backends.triton import _group_norm as triton_norm
except ImportError:  # no Triton
    triton_norm = None

IMAGE, GROUPS = (2, 6, 6, 6), 3
NAMES = ("h", "weight", "beta", "bias", "temb")

# (shape, groups): one group, one channel a group, one place, odd sizes, groups wider and narrower than a cache line,
# vectors, volumes, one element, groups of several pieces, nothing.
AWKWARD = [
    ((2, 6, 5, 7), 1),
    ((2, 6, 5, 7), 6),
    ((3, 8, 1, 1), 2),
    ((1, 1, 1), 1),
    ((2, 12), 4),
    ((1, 70, 3, 3), 2),
    ((1, 36, 9, 11), 12),
    ((2, 4, 3, 2, 5), 2),
    ((1, 4, 50, 43), 2),
    ((1, 32, 16, 10), 8),
    ((0, 6, 4, 4), 3),
    ((2, 6, 0, 4), 3),
]


def inputs(shape=IMAGE, dtype=torch.float32, kind="contiguous", bias=True, temb=True, affine=True):
    channels, sample = shape[1:2], shape[:2]
    h = rand(shape, dtype, kind=kind)
    if kind == "channels_last" and len(shape) > 2:
        h = h.movedim(1, -1).contiguous().movedim(-1, 1)
    return {
        "h": h,
        "weight": rand(channels, seed=3) if affine else None,
        "beta": rand(channels, dtype, seed=4) if affine else None,
        "bias": rand(channels, seed=1) if bias else None,
        "temb": rand(sample, dtype, seed=2) if temb else None,
    }


def call(arguments, groups=GROUPS, act="silu", **more):
    a = arguments
    return ops.group_norm_silu(a["h"], groups, a["weight"], a["beta"], bias=a["bias"], temb=a["temb"], act=act, **more)


def eager(arguments, groups=GROUPS, act="silu", eps=1e-5):
    """What a user would write in PyTorch."""
    a, v = arguments, arguments["h"]
    for value in (a["bias"], a["temb"]):
        if value is not None:
            v = v + value.reshape(-1, v.shape[1], *[1] * (v.dim() - 2))
    u = F.group_norm(v, groups, a["weight"], a["beta"], eps)
    return F.silu(u) if act == "silu" else u


def check(device, groups=GROUPS, act="silu", **options):
    arguments = inputs(**options)
    expected = reference(call, arguments, groups, act)
    got = call(to(device, arguments), groups, act)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.cpu(), expected, **CLOSE[got.dtype], equal_nan=True)
    assert got.stride() == torch.empty_like(arguments["h"]).stride()


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, kind, act):
    check(device, act=act, dtype=dtype, kind=kind)


@pytest.mark.parametrize("parts", [{"bias": False}, {"temb": False}, {"affine": False}, {"bias": False, "temb": False}])
def test_every_part_is_optional(device, parts):
    check(device, kind="channels_last", **parts)
    check(device, **parts)


@pytest.mark.parametrize(("shape", "groups"), AWKWARD, ids=str)
def test_on_awkward_inputs(device, shape, groups):
    check(device, groups, "silu", shape=shape, kind="offset")
    check(device, groups, "silu", shape=shape, kind="channels_last")
    check(device, groups, None, shape=shape, dtype=torch.bfloat16, kind="channels_last")


def test_equals_the_layers_that_it_replaces(device):
    a = inputs()
    norm = torch.nn.GroupNorm(GROUPS, IMAGE[1], eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(a["weight"])
        norm.bias.copy_(a["beta"])
        expected = torch.nn.functional.silu(norm(a["h"]))
    got = call(to(device, {**a, "bias": None, "temb": None}), eps=1e-6)
    torch.testing.assert_close(got.cpu(), expected, **CLOSE[torch.float32])


def double(arguments):
    return {name: None if value is None else value.double() for name, value in arguments.items()}


def hard(case, kind):
    """Groups that lose digits where sums are careless: a far mean, and a first element far from the rest."""
    a = inputs((2, 16, 24, 24), kind=kind, bias=False, temb=False)
    if case == "far mean":
        a["h"] += 1000
    elif case == "outlier":
        a["h"][:, ::4, 0, 0] = 300
    elif case == "far channels":
        a["h"] += 50 * rand((16, 1, 1), seed=8)
    return a


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["normal", "far mean", "outlier", "far channels"])
def test_is_no_further_from_float64_than_eager(device, case, kind):
    a = hard(case, kind)
    exact = eager(double(a), 4)
    error = (call(to(device, a), 4).cpu().double() - exact).abs().max()
    eager_error = (eager(a, 4).double() - exact).abs().max()
    # Or within 8 ulp of the largest: 3 of SiLU, 4 operations before it, and the statistics.
    assert error <= max(eager_error, 2**-20 * exact.abs().max())


@pytest.fixture
def small_parts(monkeypatch):
    """Groups of more than 256 elements are cut into parts on a GPU, and programs are small."""
    monkeypatch.setattr(native_norm, "ELEMENTS_OF_PART", 256)
    if triton_norm is not None:
        monkeypatch.setattr(triton_norm, "PART_ELEMENTS", 256)
        monkeypatch.setattr(triton_norm, "INTERPRETED_ELEMENTS", 128)


@pytest.mark.parametrize(("shape", "groups"), [((1, 8, 16, 12), 2), ((2, 6, 13, 15), 3), ((1, 70, 3, 3), 1)], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_large_groups_in_parts(device, small_parts, shape, groups, kind):
    check(device, groups, shape=shape, kind=kind)
    options = {"groups": groups, "shape": shape, "kind": kind}
    check_gradients(gradients(device, **options), reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_a_nan_stays_in_its_group(device, kind):
    a = inputs(kind=kind)
    a["h"][1, 2, 3, 3] = float("nan")
    got = call(to(device, a)).cpu()
    assert got[1, 2:4].isnan().all()
    assert not got[0].isnan().any()
    assert not got[1, :2].isnan().any()
    assert not got[1, 4:].isnan().any()


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(device, kind):
    a = inputs((3, 32, 20, 12), kind=kind)
    one = {**a, "h": a["h"][1:2], "temb": a["temb"][1:2]}
    assert_same(call(to(device, one), 8), call(to(device, a), 8)[1:2].cpu())


def conditioning(dtype=torch.float32):
    return {"scale": rand(IMAGE[:2], dtype, seed=5), "shift": rand(IMAGE[:2], dtype, seed=6)}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("names", [("scale", "shift"), ("scale",), ("shift",)], ids=" ".join)
def test_scale_and_shift(device, names, affine):
    a, more = inputs(affine=affine), {name: conditioning()[name] for name in names}
    u = eager(double(a), act=None)
    if "scale" in more:
        u = u * (1 + more["scale"].double()[:, :, None, None])
    if "shift" in more:
        u = u + more["shift"].double()[:, :, None, None]
    got = call(to(device, a), **to(device, more))
    torch.testing.assert_close(got.cpu(), F.silu(u).float(), **CLOSE[torch.float32])


def gradients(
    where, groups=GROUPS, act="silu", dtype=torch.float32, kind="contiguous", shape=IMAGE, more=None, **parts
):
    arguments, more = to(where, inputs(shape, dtype, kind, **parts)), to(where, dict(more or {}))
    leaves = [value.requires_grad_() for value in (*arguments.values(), *more.values()) if value is not None]
    y = call(arguments, groups, act, **more)
    g = to(where, rand(shape, dtype, seed=9, kind=kind if kind != "sliced" else "contiguous"))
    return torch.autograd.grad(y, leaves, g)


def check_gradients(got, expected):
    """The gradient of h, and the sums over places (and samples) that the others are."""
    for k, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert mine.dtype == theirs.dtype
        close = CLOSE if k == 0 else CLOSE_SUMS
        torch.testing.assert_close(mine.cpu(), theirs, **close[theirs.dtype], msg=lambda text, k=k: f"{k}: {text}")


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_reference(device, dtype, kind, act):
    options = {"act": act, "dtype": dtype, "kind": kind}
    check_gradients(gradients(device, **options), reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("parts", [{"bias": False}, {"temb": False}, {"affine": False}, {"more": conditioning()}])
def test_gradients_of_every_part(device, parts):
    for kind in ("contiguous", "channels_last"):
        expected = reference(gradients, torch.device("cpu"), kind=kind, **parts)
        check_gradients(gradients(device, kind=kind, **parts), expected)


@pytest.mark.parametrize(("shape", "groups"), AWKWARD, ids=str)
def test_gradients_on_awkward_shapes(device, shape, groups):
    for kind in ("contiguous", "channels_last"):
        options = {"groups": groups, "shape": shape, "kind": kind}
        check_gradients(gradients(device, **options), reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone_is_the_same(device, wanted):
    a = to(device, inputs())
    g = to(device, rand(IMAGE, seed=9))
    a[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(call(a), a[wanted], g)
    assert_same(alone, gradients(device)[NAMES.index(wanted)].cpu())


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_gradients_are_no_further_from_float64_than_eager(device, kind):
    a = inputs((2, 16, 24, 24), kind=kind)
    g = rand((2, 16, 24, 24), seed=9)

    def of(function, arguments, g):
        leaves = [value.detach().requires_grad_() for value in arguments.values()]
        return torch.autograd.grad(function(dict(zip(NAMES, leaves, strict=True)), 4), leaves, g)

    exact, theirs = of(eager, double(a), g.double()), of(eager, a, g)
    for mine, other, true in zip(of(call, to(device, a), to(device, g)), theirs, exact, strict=True):
        error, eager_error = (mine.cpu().double() - true).abs().max(), (other.double() - true).abs().max()
        assert error <= max(eager_error, 2**-21 * true.abs().max())


@pytest.mark.parametrize("act", [None, "silu"])
def test_gradcheck_in_float64(act):
    arguments = [value.double().requires_grad_() for value in inputs((2, 4, 3)).values()]
    arguments += [rand((2, 4), seed=seed).double().requires_grad_() for seed in (5, 6)]

    def function(h, weight, beta, bias, temb, scale, shift):
        return ops.group_norm_silu(h, 2, weight, beta, bias=bias, temb=temb, scale=scale, shift=shift, act=act)

    assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.parametrize(("kind", "act"), [("contiguous", "none"), ("channels_last", "silu"), ("sliced", "silu")])
def test_opcheck(device, kind, act):
    a = {name: value.requires_grad_() for name, value in to(device, inputs(kind=kind)).items()}
    arguments = (a["h"], a["bias"], a["temb"], a["weight"], a["beta"], GROUPS, 1e-5, act)
    torch.library.opcheck(torch.ops.ddpm_fast.group_norm_silu.default, arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_groups": 4}, ValueError, "num_groups must be an integer >= 1 that divides the 6 channels, got 4"),
        ({"num_groups": 0}, ValueError, "num_groups must be an integer >= 1 that divides the 6 channels, got 0"),
        ({"num_groups": 2.0}, ValueError, "num_groups must be an integer"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \(6,\), got \(5,\)"),
        ({"beta": torch.zeros(6).long()}, TypeError, "beta must be float32, bfloat16 or float16, got int64"),
        ({"bias": torch.zeros(6).double()}, TypeError, "bias must be float32, bfloat16 or float16, got float64"),
        ({"temb": torch.zeros(6, 2)}, ValueError, r"temb must have shape \(2, 6\), got \(6, 2\)"),
        ({"scale": torch.zeros(6)}, ValueError, r"scale must have shape \(2, 6\), got \(6,\)"),
        ({"shift": torch.zeros(2, 6).to("meta")}, ValueError, "shift must be on cpu like h, got meta"),
        ({"h": torch.zeros(6)}, ValueError, r"h must have shape \(N, C, ...\)"),
        ({"eps": -1e-5}, ValueError, "eps must be a finite number >= 0, got -1e-05"),
        ({"act": "relu"}, ValueError, "act must be one of None, 'silu', got 'relu'"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        ops.group_norm_silu(**{**inputs(), "num_groups": GROUPS, **changed})
