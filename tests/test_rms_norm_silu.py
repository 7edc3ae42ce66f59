"""rms_norm_silu: y = act(RMSNorm(h) (1 + scale) + shift) + residual, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import CLOSE, CLOSE_SUMS, DTYPES, MEMORY, assert_same, rand, reference, to

from ddpm_fast import ops
from ddpm_fast.backends import native_rms_norm

IMAGE = (2, 6, 6, 6)
NAMES = ("h", "weight", "scale", "shift", "residual")

# Odd sizes, one place, one channel, one element, vectors, volumes, more channels than a sum takes at once, more places
# than a tile has, many parts, 3 and 1023 elements, nothing.
AWKWARD = [
    (2, 6, 5, 7),
    (3, 8, 1, 1),
    (1, 1, 1),
    (2, 1, 5, 5),
    (1, 1, 70, 61),
    (2, 12),
    (1, 3),
    (1, 1023),
    (3, 2500),
    (1, 70, 3, 3),
    (2, 4, 3, 2, 5),
    (1, 130, 16, 11),
    (1, 700, 40),
    (0, 6, 4, 4),
    (2, 6, 0, 4),
    (2, 0, 3, 3),
]


def inputs(shape=IMAGE, dtype=torch.float32, kind="contiguous", leave_out=()):
    channels, sample = shape[1:2], shape[:2]
    images = [rand(shape, dtype, seed, kind) for seed in (0, 4)]
    if kind == "channels_last" and len(shape) > 2:
        images = [image.movedim(1, -1).contiguous().movedim(-1, 1) for image in images]
    if shape[1] == 1:  # then the gradient is 0, as a difference of terms of size 1 / |h|
        images[0] += images[0].sign()
    given = {
        "h": images[0],
        "weight": rand(channels, seed=1),
        "scale": rand(sample, dtype, seed=2),
        "shift": rand(sample, dtype, seed=3),
        "residual": images[1],
    }
    return {name: None if name in leave_out else value for name, value in given.items()}


def call(arguments, act="silu", **more):
    return ops.rms_norm_silu(**arguments, act=act, **more)


def eager(arguments, act="silu", eps=1e-12):
    """What a user would write in PyTorch."""
    h = arguments["h"]

    def each(name, otherwise):
        value = arguments[name]
        return otherwise if value is None else value.reshape(-1, h.shape[1], *[1] * (h.dim() - 2))

    u = F.normalize(h, dim=1, eps=eps) * h.shape[1] ** 0.5 * each("weight", 1)
    u = u * (1 + each("scale", 0)) + each("shift", 0)
    y = F.silu(u) if act == "silu" else u
    return y if arguments["residual"] is None else y + arguments["residual"]


def check(device, act="silu", **options):
    arguments = inputs(**options)
    expected = reference(call, arguments, act)
    got = call(to(device, arguments), act)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.cpu(), expected, **CLOSE[got.dtype])
    assert got.stride() == torch.empty_like(arguments["h"]).stride()


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, kind, act):
    check(device, act, dtype=dtype, kind=kind)


LEFT_OUT = [("weight",), ("scale",), ("shift",), ("residual",), ("scale", "shift"), NAMES[1:]]


@pytest.mark.parametrize("leave_out", LEFT_OUT, ids=" ".join)
def test_every_part_is_optional(device, leave_out):
    for kind in ("contiguous", "channels_last"):
        check(device, kind=kind, leave_out=leave_out)
        options = {"kind": kind, "leave_out": leave_out}
        check_gradients(gradients(device, **options), reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_on_awkward_inputs(device, shape):
    check(device, shape=shape, kind="offset")
    check(device, shape=shape, kind="channels_last")
    check(device, None, shape=shape, dtype=torch.bfloat16, kind="channels_last")


def test_images_in_other_formats_than_h(device):
    a = inputs(kind="channels_last")
    a["residual"] = a["residual"].contiguous()
    got = call(to(device, a))
    torch.testing.assert_close(got.cpu(), reference(call, a), **CLOSE[torch.float32])
    assert got.stride() == a["h"].stride()


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", [None, "silu"])
def test_is_the_layers_that_it_replaces(device, act, kind):
    """The reference and the kernels against the plain formula, so that both cannot be wrong together."""
    a = inputs((2, 24, 7, 5), kind=kind)
    torch.testing.assert_close(call(to(device, a), act).cpu(), eager(a, act), **CLOSE[torch.float32])
    torch.testing.assert_close(reference(call, a, act), eager(a, act), **CLOSE[torch.float32])


def test_is_the_norm_of_the_real_package(device, lucidrains):
    norm = lucidrains.denoising_diffusion_pytorch.RMSNorm(6)
    h, weight = rand(IMAGE), rand((1, 6, 1, 1), seed=1)
    norm.g.data.copy_(weight)
    got = ops.rms_norm_silu(to(device, h), to(device, weight.flatten()), act=None)
    torch.testing.assert_close(got.cpu(), norm(h).detach(), **CLOSE[torch.float32])


def double(arguments):
    return {name: None if value is None else value.double() for name, value in arguments.items()}


def hard(case, kind, shape=(2, 96, 12, 20)):
    """Places that lose digits where sums are careless."""
    a = inputs(shape, kind=kind, leave_out=("residual",))
    if case == "far mean":
        a["h"] += 1000
    elif case == "outlier":
        a["h"][:, 5] = 300
    elif case == "large":
        a["h"] *= 1e15
    elif case == "small":
        a["h"] *= 1e-10
    return a


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["normal", "far mean", "outlier", "large", "small"])
def test_is_no_further_from_float64_than_eager(device, case, kind):
    a = hard(case, kind)
    exact = eager(double(a))
    error = (call(to(device, a)).cpu().double() - exact).abs().max()
    eager_error = (eager(a).double() - exact).abs().max()
    # Or within 8 ulp of the largest: 3 of SiLU, 4 operations before it, and the factor.
    assert error <= max(eager_error, 2**-20 * exact.abs().max())


@pytest.fixture
def small_parts(monkeypatch):
    """The sums of samples of more than 32 places are taken in parts on a GPU."""
    monkeypatch.setattr(native_rms_norm, "PLACES_OF_PART", 32)


@pytest.mark.parametrize("shape", [(1, 8, 16, 12), (2, 6, 13, 15), (1, 70, 9, 9)], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_gradients_summed_in_parts(device, small_parts, shape, kind):
    options = {"shape": shape, "kind": kind}
    check_gradients(gradients(device, **options), reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_a_nan_stays_in_its_place(device, kind):
    a = inputs(kind=kind)
    a["h"][1, 2, 3, 3] = float("nan")
    got = call(to(device, a)).cpu()
    assert got[1, :, 3, 3].isnan().all()
    got[1, :, 3, 3] = 0
    assert not got.isnan().any()


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(device, kind):
    a = to(device, inputs((3, 32, 20, 13), kind=kind))
    one = {name: value if name == "weight" else value[1:2] for name, value in a.items()}
    assert_same(call(one), call(a)[1:2].cpu())
    g = to(device, rand((3, 32, 20, 13), seed=9, kind=kind))
    (_, *all_sums, _), (_, *one_sums, _) = of_all(call, a, g), of_all(call, one, g[1:2])
    for mine, theirs in zip(one_sums[1:], all_sums[1:], strict=True):  # over the places: scale and shift
        assert_same(mine, theirs[1:2].cpu())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads):
    a, g = inputs((3, 64, 32, 33), torch.bfloat16), rand((3, 64, 32, 33), torch.bfloat16, seed=9)
    expected, gradient = call(a), of_all(call, a, g)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same(call(a), expected)
        for mine, theirs in zip(of_all(call, a, g), gradient, strict=True):
            assert_same(mine, theirs)
    finally:
        torch.set_num_threads(before)


def of_all(function, arguments, g):
    copies = {name: value.detach().requires_grad_() for name, value in arguments.items() if value is not None}
    given = {**dict.fromkeys(NAMES), **copies}
    return torch.autograd.grad(function(given), list(copies.values()), g)


def gradients(where, act="silu", dtype=torch.float32, kind="contiguous", shape=IMAGE, leave_out=()):
    arguments = to(where, inputs(shape, dtype, kind, leave_out))
    g = to(where, rand(shape, dtype, seed=9, kind=kind if kind != "sliced" else "contiguous"))
    return of_all(lambda given: call(given, act), arguments, g)


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


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_gradients_on_awkward_shapes(device, shape):
    for kind in ("contiguous", "channels_last"):
        options = {"shape": shape, "kind": kind}
        check_gradients(gradients(device, **options), reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone_is_the_same(device, wanted):
    a = to(device, inputs())
    g = to(device, rand(IMAGE, seed=9))
    a[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(call(a), a[wanted], g)
    assert_same(alone, gradients(device)[NAMES.index(wanted)].cpu())


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["normal", "outlier", "large", "small"])
def test_gradients_are_no_further_from_float64_than_eager(device, case, kind):
    a = hard(case, kind)
    g = rand((2, 96, 12, 20), seed=9)
    exact, theirs = of_all(eager, double(a), g.double()), of_all(eager, a, g)
    for mine, other, true in zip(of_all(call, to(device, a), to(device, g)), theirs, exact, strict=True):
        error, eager_error = (mine.cpu().double() - true).abs().max(), (other.double() - true).abs().max()
        assert error <= max(eager_error, 2**-21 * true.abs().max())


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_places_of_no_norm(device, kind):
    """Channels that are all 0, or whose norm is below eps, then a constant: no NaN."""
    a = inputs((2, 8, 5, 6), kind=kind)
    a["h"][0, :, 1:3] = 0
    a["h"][1, :, 0, 0] *= 1e-14
    g = rand((2, 8, 5, 6), seed=9)
    torch.testing.assert_close(call(to(device, a)).cpu(), eager(a), **CLOSE[torch.float32])
    for mine, exact in zip(
        of_all(call, to(device, a), to(device, g)), of_all(eager, double(a), g.double()), strict=True
    ):
        assert not mine.isnan().any()
        torch.testing.assert_close(mine.cpu().double(), exact, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("eps", [0.0, 1.5, 1e-3])
def test_eps_bounds_the_norm(device, eps):
    a, g = inputs(leave_out=("residual",)), rand(IMAGE, seed=9)
    small = a["h"].square().sum(1).sqrt() < 1.5
    assert small.any()
    assert not small.all()
    torch.testing.assert_close(call(to(device, a), eps=eps).cpu(), eager(a, eps=eps), **CLOSE[torch.float32])
    mine = of_all(lambda given: call(given, eps=eps), to(device, a), to(device, g))
    exact = of_all(lambda given: eager(given, eps=eps), double(a), g.double())
    for got, true in zip(mine, exact, strict=True):
        torch.testing.assert_close(got.cpu(), true.float(), **CLOSE_SUMS[torch.float32])


@pytest.mark.parametrize("act", [None, "silu"])
def test_gradcheck_in_float64(act):
    arguments = [value.double().requires_grad_() for value in inputs((2, 4, 3)).values()]
    assert torch.autograd.gradcheck(lambda *a: call(dict(zip(NAMES, a, strict=True)), act), arguments)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("kind", "act"), [("contiguous", "none"), ("channels_last", "silu"), ("sliced", "silu")])
def test_opcheck(device, kind, act, per_sample):
    a = {name: value.requires_grad_() for name, value in to(device, inputs(kind=kind)).items()}
    affine = (a["scale"], a["shift"]) if per_sample else (a["weight"], None)
    arguments = (a["h"], *affine, a["residual"], 1e-12, act)
    torch.library.opcheck(torch.ops.ddpm_fast.rms_norm_silu.default, arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": torch.zeros(1, 6, 1, 1)}, ValueError, r"weight must have shape \(6,\), got \(1, 6, 1, 1\)"),
        ({"weight": torch.zeros(6).double()}, TypeError, "weight must be float32, bfloat16 or float16, got float64"),
        ({"scale": torch.zeros(6)}, ValueError, r"scale must have shape \(2, 6\), got \(6,\)"),
        ({"scale": torch.zeros(2, 6).long()}, TypeError, "scale must be float32, bfloat16 or float16, got int64"),
        ({"shift": torch.zeros(2, 6).to("meta")}, ValueError, "shift must be on cpu like h, got meta"),
        ({"residual": torch.zeros(2, 6, 6)}, ValueError, r"residual must have shape \(2, 6, 6, 6\), got \(2, 6, 6\)"),
        ({"residual": torch.zeros(IMAGE).half()}, TypeError, "residual must be float32, got float16"),
        ({"residual": 1.0}, TypeError, "residual must be a torch.Tensor, got float"),
        ({"h": torch.zeros(6)}, ValueError, r"h must have shape \(N, C, ...\)"),
        ({"h": torch.zeros(IMAGE).long()}, TypeError, "h must be float32, bfloat16, float16 or float64, got int64"),
        ({"eps": -1e-5}, ValueError, "eps must be a finite number >= 0, got -1e-05"),
        ({"act": "relu"}, ValueError, "act must be one of None, 'silu', got 'relu'"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm_silu(**{**inputs(), **changed})
