"""batch_norm_silu: y = act(BatchNorm(h)) + temb, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import CLOSE, DTYPES, MEMORY, TOLERANCES, assert_same, rand, reference, to

from ddpm_fast import ops

IMAGE = (2, 6, 6, 6)
NAMES = ("h", "weight", "bias", "temb")

# Sums of up to a few thousand such values per channel, in float32 or better.
CLOSE_SUMS = {**TOLERANCES, torch.float32: {"rtol": 1e-5, "atol": 4e-5}}

# Odd sizes, one place, one channel, one sample, vectors, volumes, more channels than a sum takes at once, rows longer
# than it takes at once, samples in pieces, nothing.
AWKWARD = [
    (2, 6, 5, 7),
    (3, 8, 1, 1),
    (2, 1, 1),
    (2, 1, 5, 5),
    (1, 1, 70, 61),
    (5, 12),
    (5, 259),
    (1, 70, 3, 3),
    (2, 4, 3, 2, 5),
    (1, 34, 16, 11),
    (7, 3, 2, 2),
    (2, 12, 40, 41),
    (2, 0, 3, 3),
]
# Of the C++ half: more samples than a sum takes at once, and than it has parts. Elsewhere a sample is a program.
BATCHES = [(33, 12), (9, 1023), (8, 2500), (70, 3, 2, 2)]


def inputs(shape=IMAGE, dtype=torch.float32, kind="contiguous", leave_out=()):
    h = rand(shape, dtype, 0, kind)
    if kind == "channels_last" and len(shape) > 2:
        h = h.movedim(1, -1).contiguous().movedim(-1, 1)
    given = {
        "h": h,
        "weight": rand(shape[1:2], seed=1),
        "bias": rand(shape[1:2], seed=2),
        "temb": rand(shape[:2], dtype, seed=3),
    }
    return {name: None if name in leave_out else value for name, value in given.items()}


def call(arguments, act="silu", **more):
    return ops.batch_norm_silu(**arguments, act=act, **more)


def eager(arguments, act="silu", eps=1e-5, running=(None, None), training=True):
    """What a user would write in PyTorch."""
    h, temb = arguments["h"], arguments["temb"]
    u = F.batch_norm(h, *running, arguments["weight"], arguments["bias"], training, eps=eps)
    y = F.silu(u) if act == "silu" else u
    return y if temb is None else y + temb.reshape(*temb.shape, *[1] * (h.dim() - 2))


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


@pytest.mark.parametrize("leave_out", [("weight",), ("bias",), ("temb",), NAMES[1:]], ids=" ".join)
def test_every_part_is_optional(device, leave_out):
    for kind in ("contiguous", "channels_last"):
        options = {"kind": kind, "leave_out": leave_out}
        check(device, **options)
        check_gradients(gradients(device, **options), reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_on_awkward_inputs(device, shape):
    check(device, shape=shape, kind="offset")
    check(device, shape=shape, kind="channels_last")
    check(device, None, shape=shape, dtype=torch.bfloat16, kind="channels_last")


@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_of_many_samples(shape):
    for kind in ("offset", "channels_last"):
        options = {"shape": shape, "kind": kind}
        check(torch.device("cpu"), **options)
        own = gradients(torch.device("cpu"), **options)
        check_gradients(own, reference(gradients, torch.device("cpu"), **options))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", [None, "silu"])
def test_is_the_layers_that_it_replaces(device, act, kind):
    """The reference and the kernels against torch's own, so that both cannot be wrong together."""
    a = inputs((3, 24, 7, 5), kind=kind)
    torch.testing.assert_close(call(to(device, a), act).cpu(), eager(a, act), **CLOSE[torch.float32])
    torch.testing.assert_close(reference(call, a, act), eager(a, act), **CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_statistics(device, momentum, dtype):
    a = inputs((4, 12, 5, 5), dtype)
    layer = torch.nn.BatchNorm2d(12, momentum=momentum)
    running = to(device, {"running_mean": layer.running_mean.clone(), "running_var": layer.running_var.clone()})
    for _ in range(2):
        layer(a["h"].float())
        call(to(device, a), **running, momentum=momentum)
    for name, value in running.items():
        torch.testing.assert_close(value.cpu(), getattr(layer, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_given_statistics(device, kind):
    """training=False: the running ones are used, are left alone, and are constants of the gradient."""
    a, g = inputs(kind=kind), rand(IMAGE, seed=9, kind=kind)
    running = {"running_mean": rand((6,), seed=5), "running_var": rand((6,), seed=6).square() + 0.1}
    moved = to(device, running)
    before = {name: value.clone() for name, value in moved.items()}

    def ours(given):
        return call(given, **moved, training=False)

    def theirs(given):
        return eager(given, running=tuple(running.values()), training=False)

    torch.testing.assert_close(ours(to(device, a)).cpu(), theirs(a), **CLOSE[torch.float32])
    for mine, true in zip(of_all(ours, to(device, a), to(device, g)), of_all(theirs, a, g), strict=True):
        torch.testing.assert_close(mine.cpu(), true, **CLOSE_SUMS[torch.float32])
    for name, value in moved.items():
        assert_same(value, before[name].cpu())
    empty = to(device, inputs((0, 6, 4, 4), kind=kind))
    assert ours(empty).shape == (0, 6, 4, 4)


def double(arguments):
    return {name: None if value is None else value.double() for name, value in arguments.items()}


def hard(case, kind, shape=(3, 20, 12, 20)):
    """Channels that lose digits where sums are careless."""
    a = inputs(shape, kind=kind, leave_out=("temb",))
    if case == "far mean":
        a["h"] += 1000
    elif case == "outlier first":
        a["h"][0, :, 0, 0] = 300
    elif case == "samples far apart":
        a["h"] += 100 * torch.arange(3)[:, None, None, None]
    elif case == "large":
        a["h"] *= 1e15
    elif case == "small":
        a["h"] *= 1e-10
    return a


CASES = ["normal", "far mean", "outlier first", "samples far apart", "large", "small"]


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_is_no_further_from_float64_than_eager(device, case, kind):
    a = hard(case, kind)
    exact = eager(double(a))
    error = (call(to(device, a)).cpu().double() - exact).abs().max()
    eager_error = (eager(a).double() - exact).abs().max()
    # Or within 8 ulp of the largest: 3 of SiLU, 4 operations before it, and rstd.
    assert error <= max(eager_error, 2**-20 * exact.abs().max())


# Not "far mean": there the rounding of the kept mean to float32, here as in eager, is all of the error.
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "far mean"])
def test_gradients_are_no_further_from_float64_than_eager(device, case, kind):
    a = hard(case, kind)
    g = rand((3, 20, 12, 20), seed=9)
    exact, theirs = of_all(eager, double(a), g.double()), of_all(eager, a, g)
    for mine, other, true in zip(of_all(call, to(device, a), to(device, g)), theirs, exact, strict=True):
        error, eager_error = (mine.cpu().double() - true).abs().max(), (other.double() - true).abs().max()
        assert error <= max(eager_error, 2**-20 * true.abs().max())


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_a_nan_stays_in_its_channel(device, kind):
    a = inputs(kind=kind)
    a["h"][1, 2, 3, 3] = float("nan")
    got = call(to(device, a)).cpu()
    assert got[:, 2].isnan().all()
    got[:, 2] = 0
    assert not got.isnan().any()


def test_a_constant_channel_is_its_bias(device):
    a = inputs((4, 6, 9, 9))
    a["h"][:, 3] = 7.5
    got = of_all(call, to(device, a), to(device, rand((4, 6, 9, 9), seed=9)))
    assert all(bool(value.isfinite().all()) for value in got)
    y = F.silu(a["bias"][3]) + a["temb"][:, 3, None, None].expand(4, 9, 9)
    torch.testing.assert_close(call(to(device, a)).cpu()[:, 3], y, **CLOSE[torch.float32])


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads, kind):
    shape = (5, 64, 32, 33)
    a, g = inputs(shape, torch.bfloat16, kind), rand(shape, torch.bfloat16, seed=9)
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


def test_gradient_of_another_dtype_and_format(device):
    a = inputs((3, 8, 6, 5), torch.bfloat16, "channels_last")
    g = rand((3, 8, 6, 5), torch.bfloat16, seed=9)
    mine = of_all(call, to(device, a), to(device, g))
    check_gradients(mine, reference(of_all, call, a, g))


def test_keeps_no_more_than_h_and_its_statistics():
    saved = []
    a = {name: value.requires_grad_() for name, value in inputs().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call(a)
    images = [value for value in saved if value.shape == IMAGE]
    assert [value.data_ptr() for value in images] == [a["h"].data_ptr()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act", [None, "silu"])
def test_gradcheck_in_float64(act, training):
    arguments = [value.double().requires_grad_() for value in inputs((3, 4, 3)).values()]
    running = {} if training else {"running_mean": rand((4,), seed=5).double(), "running_var": torch.ones(4).double()}
    assert torch.autograd.gradcheck(
        lambda *a: call(dict(zip(NAMES, a, strict=True)), act, training=training, **running), arguments
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("kind", "act"), [("contiguous", "none"), ("channels_last", "silu"), ("sliced", "silu")])
def test_opcheck(device, kind, act, given):
    a = {name: value.requires_grad_() for name, value in to(device, inputs(kind=kind)).items()}
    running = (a["bias"].detach(), a["weight"].detach().square()) if given else (None, None)
    arguments = (a["h"], a["temb"], a["weight"], a["bias"], *running, 1e-5, act)
    torch.library.opcheck(torch.ops.ddpm_fast.batch_norm_silu.default, arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": torch.zeros(1, 6, 1, 1)}, ValueError, r"weight must have shape \(6,\), got \(1, 6, 1, 1\)"),
        ({"weight": torch.zeros(6).double()}, TypeError, "weight must be float32, bfloat16 or float16, got float64"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"temb": torch.zeros(6)}, ValueError, r"temb must have shape \(2, 6\), got \(6,\)"),
        ({"temb": torch.zeros(2, 6).to("meta")}, ValueError, "temb must be on cpu like h, got meta"),
        ({"temb": 1.0}, TypeError, "temb must be a torch.Tensor, got float"),
        ({"h": torch.zeros(6)}, ValueError, r"h must have shape \(N, C, ...\)"),
        ({"h": torch.zeros(IMAGE).long()}, TypeError, "h must be float32, bfloat16, float16 or float64, got int64"),
        ({"h": torch.zeros(1, 6, 1, 1), "temb": None}, ValueError, r"at least 2 values per channel.*\(1, 6, 1, 1\)"),
        ({"running_mean": torch.zeros(6)}, ValueError, "running_mean and running_var belong together"),
        ({"running_mean": torch.zeros(5), "running_var": torch.zeros(6)}, ValueError, r"running_mean must have shape"),
        (
            {"running_mean": torch.zeros(6), "running_var": torch.zeros(6).requires_grad_()},
            ValueError,
            "running_var is no variable of the gradient",
        ),
        ({"training": False}, ValueError, "training=False needs running_mean and running_var"),
        ({"momentum": 1.5}, ValueError, "momentum must be a number in 0..1, got 1.5"),
        ({"momentum": None}, TypeError, "momentum must be a number in 0..1, got None"),
        ({"eps": -1e-5}, ValueError, "eps must be a finite number >= 0, got -1e-05"),
        ({"act": "relu"}, ValueError, "act must be one of None, 'silu', got 'relu'"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        ops.batch_norm_silu(**{**inputs(), **changed})
