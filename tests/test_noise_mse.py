"""noise_mse: the training loss with regenerated noise, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, IMAGE, MEMORY, SHAPES, TOLERANCES, assert_same, rand, reference, to
from test_q_sample import RNG, TABLE, timesteps

from ddpm_fast import ops

LOSSES = ("mse", "l1", "huber")
REDUCTION = TOLERANCES["reduction"]


def options(target, shape=IMAGE, drawn=False):
    chosen = {"target": target}
    if target != "eps":
        chosen["x0"] = rand(shape, seed=3)
    if target == "v":
        chosen.update(t=timesteps(shape[0]), table=TABLE)
    if target != "x0":
        chosen.update({"rng": RNG, "offset_noise": 0.2} if drawn else {"noise": rand(shape, seed=1)})
    return chosen


def check(device, pred, **chosen):
    expected = reference(ops.noise_mse, pred, reduction="none", **chosen)
    got = ops.noise_mse(to(device, pred), reduction="none", **to(device, chosen))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), expected, **REDUCTION, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, target, loss):
    check(device, rand(IMAGE, dtype), loss=loss, huber_delta=0.7, **options(target))


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("target", ["eps", "v"])
def test_matches_reference_with_drawn_noise(device, target, kind):
    check(device, rand(IMAGE, kind=kind), **options(target, drawn=True))


@pytest.mark.parametrize("shape", [*(s for s in SHAPES if 0 not in s), (2, 3, 40, 40)], ids=str)
def test_on_awkward_inputs(device, shape):
    check(device, rand(shape), **options("eps", shape, drawn=True))
    check(device, rand(shape, torch.bfloat16, kind="offset"), **options("v", shape))


def test_no_samples_and_no_elements(device):
    assert ops.noise_mse(to(device, rand((0, 3, 4))), rng=to(device, RNG), reduction="none").shape == (0,)
    empty = ops.noise_mse(to(device, rand((2, 0))), rng=to(device, RNG), reduction="none")
    assert bool(empty.isnan().all()), "the mean of nothing, as in torch"


def test_regenerates_the_unrounded_noise_of_q_sample(device):
    """For bf16 images too: predicting eps exactly costs nothing."""
    x0, t = to(device, rand(IMAGE, torch.bfloat16)), to(device, timesteps(2))
    rng, table = to(device, RNG), to(device, TABLE)
    ops.q_sample(x0, t, table, rng=rng, offset_noise=0.1)
    _, eps = ops.q_sample(x0, t, table, rng=rng, offset_noise=0.1, target="eps", dtype=torch.float32)
    assert ops.noise_mse(eps, rng=rng, offset_noise=0.1).item() == 0


def test_bytes_are_images(device):
    x0 = rand(IMAGE, torch.uint8)
    check(device, rand(IMAGE), target="x0", x0=x0)
    exact = to(device, x0.float() / 127.5 - 1)
    assert ops.noise_mse(exact, target="x0", x0=to(device, x0)).item() == 0


@pytest.mark.parametrize(("loss", "eager"), [("mse", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss)])
def test_no_further_from_float64_than_eager(device, loss, eager):
    pred, noise = rand((4, 3, 64, 64)), rand((4, 3, 64, 64), seed=1)
    exact = eager(pred.double(), noise.double())
    got = ops.noise_mse(to(device, pred), noise=to(device, noise), loss=loss)
    assert abs(got.cpu().double() - exact) <= max(abs(eager(pred, noise).double() - exact), 2**-23 * exact)


def test_weighted_mean(device):
    pred, noise, weight = rand(IMAGE), rand(IMAGE, seed=1), torch.tensor([0.5, 3.0])
    expected = (weight * (pred - noise).square().mean((1, 2, 3))).mean()
    got = ops.noise_mse(to(device, pred), noise=to(device, noise), weight=to(device, weight))
    torch.testing.assert_close(got.cpu(), expected, **REDUCTION)


def gradient(where, dtype, kind, loss, chosen):
    pred = to(where, rand(IMAGE, dtype, kind=kind)).requires_grad_()
    value = ops.noise_mse(pred, loss=loss, huber_delta=0.7, reduction="none", **to(where, chosen))
    return torch.autograd.grad(value, pred, to(where, rand((2,), seed=8)))[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    ("dtype", "kind"), [(d, "contiguous") for d in DTYPES] + [(torch.float32, k) for k in MEMORY[1:]]
)
def test_gradients_match_reference(device, dtype, kind, target, loss):
    arguments = (dtype, kind, loss, options(target, drawn=True))
    assert_same(gradient(device, *arguments), reference(gradient, torch.device("cpu"), *arguments))


@pytest.mark.parametrize(("loss", "eager"), [("mse", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss)])
def test_gradients_equal_eager(device, loss, eager):
    pred, noise = rand(IMAGE).requires_grad_(), rand(IMAGE, seed=1)
    (theirs,) = torch.autograd.grad(eager(pred, noise), pred)
    mine = to(device, pred.detach()).requires_grad_()
    (got,) = torch.autograd.grad(ops.noise_mse(mine, noise=to(device, noise), loss=loss), mine)
    torch.testing.assert_close(got.cpu(), theirs, **REDUCTION)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_gradcheck_in_float64(target, loss):
    shape = (2, 2, 3)
    chosen = {k: v.double() if k == "noise" else v for k, v in options(target, shape).items()}
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    pred = rand(shape, seed=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, w: ops.noise_mse(p, loss=loss, weight=w, **chosen), (pred, weight))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "sliced"])
def test_opcheck(device, kind):
    pred = to(device, rand(IMAGE, kind=kind)).requires_grad_()
    arguments = (pred, to(device, rand(IMAGE, seed=3)), to(device, timesteps(2)), to(device, TABLE), None)
    torch.library.opcheck(
        torch.ops.ddpm_fast.noise_mse.default, (*arguments, to(device, RNG), 5, 0.1, "v", "huber", 0.5)
    )


PRED, NOISE = rand(IMAGE), rand(IMAGE, seed=1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"noise": None}, ValueError, "noise or rng is needed"),
        ({"noise": NOISE[:1]}, ValueError, r"noise must have shape \(2, 3, 6, 6\), got \(1, 3, 6, 6\)"),
        (
            {"noise": NOISE.clone().requires_grad_()},
            ValueError,
            r"noise is a constant of the loss.*pass noise.detach\(\)",
        ),
        ({"target": "x"}, ValueError, "target must be one of 'eps', 'x0', 'v', got 'x'"),
        ({"target": "x0"}, ValueError, "target 'x0' needs x0"),
        ({"target": "v", "x0": PRED}, ValueError, "target 'v' needs x0, t and table"),
        ({"loss": "mae"}, ValueError, "loss must be one of 'mse', 'l1', 'huber', got 'mae'"),
        ({"huber_delta": 0.0}, ValueError, "huber_delta must be a finite number > 0"),
        ({"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none', got 'sum'"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(2,\), got \(3,\)"),
        ({"weight": torch.ones(2), "reduction": "none"}, ValueError, "weight goes with reduction='mean'"),
        ({"pred": PRED.int()}, TypeError, "pred must be float32, bfloat16, float16 or float64, got int32"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        ops.noise_mse(**{"pred": PRED, "noise": NOISE, **changed})
