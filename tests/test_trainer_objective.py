"""The loss of training and its gradients against a formula written down here, in float64 and without the ops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import Schedule, noise
from ddpm_fast.training.objective import Objective
from ddpm_fast.training.weights import loss_weights

N, SHAPE, T, SEED, FIRST = 6, (2, 4, 4), 50, 5, 1000
SCHEDULE = Schedule.cosine(T)
PREDICTIONS, LOSSES, WEIGHTINGS = ("eps", "x0", "v"), ("mse", "l1", "huber"), (None, "min-snr", "p2")


class Net(nn.Module):
    """Something that depends on everything it is given."""

    def __init__(self, self_condition: bool = False, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=dtype)
        self.label = nn.Embedding(4, 2, dtype=dtype)
        self.told = nn.Conv2d(2, 2, 1, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        self.calls: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def forward(self, x, t, labels=None, x_self_cond=None):
        y = self.conv(x) * (1 + t / T).to(x.dtype).view(-1, 1, 1, 1)
        if labels is not None:
            y = y + self.label(labels)[:, :, None, None]
        self.calls.append((x.detach(), x_self_cond))
        return y if x_self_cond is None else y + self.told(x_self_cond)


def rng():
    return noise.make_rng(SEED, FIRST)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, *SHAPE), dtype=np.uint8))


def drawn(offset_noise: float = 0.0):
    """(t, eps) of the images by the NumPy specification, float64."""
    bits = noise.random_bits(SEED, FIRST, N, noise.STREAM_TRAIN_T, 1)[:, 0].astype(np.uint64)
    t = (bits * np.uint64(T) >> np.uint64(32)).astype(np.int64)
    eps = noise.normal(SEED, FIRST, N, noise.STREAM_TRAIN_NOISE, 32).reshape(N, *SHAPE).astype(np.float64)
    channel = noise.normal(SEED, FIRST, N, noise.STREAM_OFFSET_NOISE, 2).astype(np.float64)
    return t, torch.from_numpy(eps + offset_noise * channel[:, :, None, None])


def by_hand(net, images, prediction, loss, weighting, *, delta=1.0, gamma=5.0, k=1.0, power=1.0, offset_noise=0.0):
    """The same loss from the paper's formulas; sqrt(ab) and sqrt(1 - ab) rounded to float32, as the table has them."""
    t, eps = drawn(offset_noise)
    ab = np.cumprod(1 - SCHEDULE.betas)[t]
    signal, sigma = (
        torch.from_numpy(np.sqrt(v).astype(np.float32).astype(np.float64)).view(N, 1, 1, 1) for v in (ab, 1 - ab)
    )
    x0 = images.double() / 127.5 - 1
    target = {"eps": eps, "x0": x0, "v": signal * eps - sigma * x0}[prediction]
    m = net(signal * x0 + sigma * eps, torch.from_numpy(t))
    distance = {
        "mse": lambda: F.mse_loss(m, target, reduction="none"),
        "l1": lambda: F.l1_loss(m, target, reduction="none"),
        "huber": lambda: F.huber_loss(m, target, reduction="none", delta=delta),
    }[loss]()
    snr = ab / (1 - ab)
    capped = np.minimum(snr, gamma)
    weight = {
        None: np.ones(N),
        "p2": 1 / (k + snr) ** power,
        "min-snr": {"eps": capped / snr, "x0": capped, "v": capped / (snr + 1)}[prediction],
    }[weighting]
    return (torch.from_numpy(weight) * distance.mean(dim=(1, 2, 3))).mean()


def gradients(net, loss):
    return torch.autograd.grad(loss, [*net.conv.parameters()])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_and_gradients_are_the_formulas(prediction, images):
    for loss, weighting in itertools.product(LOSSES, WEIGHTINGS):
        options = {"min_snr_gamma": 3.0, "p2_gamma": 0.7, "p2_k": 0.4}
        net, twin = Net(), Net()
        objective = Objective(
            SCHEDULE,
            prediction=prediction,
            loss=loss,
            huber_delta=0.3,
            weights=loss_weights(SCHEDULE, weighting, prediction, **options),
            dtype=torch.float64,
        )
        ours = objective(net, images, None, rng())
        theirs = by_hand(twin, images, prediction, loss, weighting, delta=0.3, gamma=3.0, k=0.4, power=0.7)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        for one, other in zip(gradients(net, ours), gradients(twin, theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_is_the_same_stored_or_drawn_again(prediction, images):
    """Whether the target is stored is a matter of speed: the loss and its gradients keep their bits."""
    found = []
    for stored in (True, False):
        net = Net(dtype=torch.float32)
        objective = Objective(SCHEDULE, prediction=prediction, loss="huber", offset_noise=0.1, stored=stored)
        loss = objective(net, images, None, rng())
        found.append((loss, *gradients(net, loss), net.calls[0][0]))
        wide = by_hand(Net(), images, prediction, "huber", None, offset_noise=0.1)
        assert loss.item() == pytest.approx(wide.item(), rel=2e-6)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_floats_are_taken_as_they_are(images):
    objective = Objective(SCHEDULE)
    net = Net(dtype=torch.float32)
    floats = images.float() / torch.tensor(127.5) - 1
    assert torch.equal(objective(net, images, None, rng()), objective(net, floats, None, rng()))
    assert torch.equal(net.calls[0][0], net.calls[1][0])


def test_a_network_in_bfloat16_learns_the_unrounded_target(images):
    net = Net(dtype=torch.bfloat16)
    loss = Objective(SCHEDULE, dtype=torch.bfloat16)(net, images, None, rng())
    assert net.calls[0][0].dtype == torch.bfloat16
    assert loss.item() == pytest.approx(by_hand(Net(), images, "eps", "mse", None).item(), rel=2e-2)
    t, eps = drawn()
    exact = F.mse_loss(Net(dtype=torch.bfloat16)(net.calls[0][0], torch.from_numpy(t)).double(), eps)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_flips_and_label_dropout_are_keyed_by_position(images):
    labels = torch.arange(N) % 3
    seen = []

    class Spy(Net):
        def forward(self, x, t, labels):
            seen.append(labels)
            return super().forward(x, t, labels)

    net = Spy(dtype=torch.float32)
    objective = Objective(SCHEDULE, flip=True, label_dropout=0.5, null_label=3)
    objective(net, images, labels, rng())
    mirrored = noise.random_bits(SEED, FIRST, N, noise.STREAM_FLIP, 1)[:, 0] < 2**31
    dropped = noise.random_bits(SEED, FIRST, N, noise.STREAM_LABEL_DROPOUT, 1)[:, 0] < 2**31
    assert 0 < mirrored.sum() < N
    assert 0 < dropped.sum() < N
    assert seen[0].tolist() == [3 if gone else int(label) for gone, label in zip(dropped, labels, strict=True)]
    by_eye = torch.stack([image.flip(-1) if flip else image for image, flip in zip(images, mirrored, strict=True)])
    Objective(SCHEDULE)(net, by_eye, labels, rng())
    assert torch.equal(net.calls[0][0], net.calls[1][0])


def test_what_is_drawn_does_not_depend_on_how_a_batch_is_cut(images):
    objective = Objective(SCHEDULE, flip=True, offset_noise=0.2)
    whole, parts = Net(dtype=torch.float32), Net(dtype=torch.float32)
    loss = objective(whole, images, None, rng())
    mean = sum(
        objective(parts, images[i : i + 2], None, noise.make_rng(SEED, FIRST + i)) / 3 for i in range(0, N, 2)
    )  # fmt: skip
    assert torch.equal(torch.cat([x for x, _ in parts.calls]), whole.calls[0][0])
    torch.testing.assert_close(mean, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False])
def test_a_self_conditioned_network_is_told_its_own_estimate(prediction, clip, images):
    objective = Objective(SCHEDULE, prediction=prediction, self_condition=True, clip=clip, dtype=torch.float64)
    net = Net()
    loss = objective(net, images, None, rng(), told=True)
    (x_t, zeros), (again, told) = net.calls
    assert torch.equal(x_t, again)
    assert not zeros.any()
    t, _ = drawn()
    ab = torch.from_numpy(SCHEDULE.alphas_cumprod[t]).view(N, 1, 1, 1)
    m = Net()(x_t, torch.from_numpy(t), x_self_cond=zeros).detach()
    x0 = {
        "eps": (x_t - (1 - ab).sqrt() * m) / ab.sqrt(),
        "x0": m,
        "v": ab.sqrt() * x_t - (1 - ab).sqrt() * m,
    }[prediction]
    torch.testing.assert_close(told, x0.clamp(-1, 1) if clip else x0, rtol=1e-5, atol=1e-5)
    assert not told.requires_grad
    loss.backward()
    assert net.told.weight.grad.abs().sum() > 0
    objective(net, images, None, rng(), told=False)
    assert len(net.calls) == 3
    assert not net.calls[2][1].any()


def test_self_conditioning_under_autocast_keeps_the_gradients(images):
    """Weights that autocast casts in the pass without a gradient must not be what the second pass computes with."""
    found = {}
    for precise in (True, False):
        net = Net(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            loss = Objective(SCHEDULE, self_condition=True)(net, images, None, rng(), told=True)
        loss.backward()
        found[precise] = net.conv.weight.grad
    torch.testing.assert_close(found[False], found[True], rtol=0.1, atol=0.02)


def test_weights_at_the_ends():
    schedule = Schedule.linear(1000).rescale_zero_terminal_snr()
    for prediction, last in (("eps", 1.0), ("x0", 0.0), ("v", 0.0)):
        weights = loss_weights(schedule, "min-snr", prediction)
        assert torch.isfinite(weights).all()
        assert weights[-1] == last
    assert loss_weights(schedule, "p2", "eps", p2_k=1.0)[-1] == 1.0
    assert loss_weights(schedule, None, "v") is None
