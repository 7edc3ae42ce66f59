"""`RMSNormUNet` beside lucidrains' `Unet`: same keys, same start, same numbers and gradients; bad input is named."""

import copy
import inspect
import io

import pytest
import torch
from rms_configs import OPTIONS, SMALL, config_of, inputs_of
from torch import nn

import ddpm_fast
from ddpm_fast.nn import RMSNormUNet

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 2e-5


def pair(lucidrains, config, seed=0):
    """Ours and the package's network of one config and one torch seed."""
    models = []
    for build in (RMSNormUNet, lucidrains.Unet):
        torch.manual_seed(seed)
        models.append(build(**config))
    return models


def shaken(model, seed=5):
    """Gains start as ones, which would hide mistakes: move every parameter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model


def twins(lucidrains, name):
    """Both networks of a config with the same shaken weights."""
    ours, theirs = pair(lucidrains, config_of(name))
    assert ours.load_state_dict(shaken(theirs).state_dict(), strict=True)
    return ours, theirs


def relative(got, expected):
    """Largest difference over the largest value."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture
def same_masks(monkeypatch):
    """Dropout whose masks do not depend on how a tensor lies in memory, as torch's do."""

    def dropped(self, h):
        if not self.training or not self.p:
            return h
        drawn = torch.rand(h.shape, generator=torch.Generator().manual_seed(h.shape[1]))
        return h * (drawn >= self.p) / (1 - self.p)

    monkeypatch.setattr(nn.Dropout, "forward", dropped)


@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_package_with_gradients(name, lucidrains, same_masks):
    config = config_of(name)
    ours, theirs = pair(lucidrains, config)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    flags = [(key, p.requires_grad) for key, p in theirs.named_parameters()]
    assert [(key, p.requires_grad) for key, p in ours.named_parameters()] == flags
    for attribute in (
        "channels", "out_dim", "self_condition", "downsample_factor", "random_or_learned_sinusoidal_cond",
    ):  # fmt: skip
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    shaken(theirs)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, condition = inputs_of(name)
    results = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf, t, condition)
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        results.append((y, leaf.grad, {key: p.grad for key, p in model.named_parameters()}))
    (y, dx, grads), (y_expected, dx_expected, grads_expected) = results
    assert relative(y, y_expected) < BOUND
    assert relative(dx, dx_expected) < BOUND
    largest = max(float(g.abs().max()) for g in grads_expected.values() if g is not None)
    for key, gradient in grads.items():
        if grads_expected[key] is None:  # the fixed frequencies
            assert gradient is None
            continue
        # Where nothing but rounding is left of a gradient, it is compared with the others'.
        scale = max(float(grads_expected[key].abs().max()), 1e-2 * largest)
        assert float((gradient - grads_expected[key]).abs().max()) < BOUND * scale, key


@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_package_in_float64(name, lucidrains):
    ours, theirs = (model.double().eval() for model in twins(lucidrains, name))
    x, t, condition = inputs_of(name)
    condition = None if condition is None else condition.double()
    with torch.no_grad():  # whose linear layers want the time's features in float64, too
        assert relative(ours(x.double(), t.double(), condition), theirs(x.double(), t.double(), condition)) < 1e-12


def test_signature_and_defaults(lucidrains):
    def arguments(kind):
        return {name: p.default for name, p in inspect.signature(kind).parameters.items()}

    assert arguments(RMSNormUNet) == arguments(lucidrains.Unet)
    assert list(arguments(RMSNormUNet)) == list(arguments(lucidrains.Unet))
    assert list(inspect.signature(RMSNormUNet.forward).parameters) == ["self", "x", "time", "x_self_cond"]
    ours, theirs = pair(lucidrains, {"dim": 64})
    assert sum(p.numel() for p in ours.parameters()) == 35_711_491  # published as 35.71 M
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([321])
    with torch.no_grad():
        assert relative(ours(x, t), theirs(x, t)) < BOUND


def test_config_builds_the_network_again():
    net = RMSNormUNet(16, dim_mults=[1, 2], attn_heads=[2, 4], learned_variance=True)
    assert list(net.config) == list(inspect.signature(RMSNormUNet).parameters)
    assert (net.config["init_dim"], net.config["out_dim"], net.config["full_attn"]) == (16, 6, (False, True))
    assert (net.config["attn_heads"], net.config["attn_dim_head"]) == ((2, 4), (32, 32))
    again = RMSNormUNet(**net.config)
    again.load_state_dict(net.state_dict())
    assert again.config == net.config
    assert RMSNormUNet(16, dim_mults=(1, 2), full_attn=False).config["full_attn"] == (False, True)  # as theirs


def test_no_condition_is_zeros(lucidrains):
    ours, theirs = twins(lucidrains, "self condition")
    x, t, condition = inputs_of("self condition")
    with torch.no_grad():
        expected = theirs(x, t)
        assert relative(ours(x, t), expected) < BOUND
        assert torch.equal(ours(x, t), ours(x, t, torch.zeros_like(x)))
        assert relative(ours(x, t, condition), expected) > 1e-3


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0), 7.0])
def test_one_time_for_all_images(t):
    net = RMSNormUNet(**SMALL)
    x, _, _ = inputs_of("self condition")
    with torch.no_grad():
        assert torch.equal(net(x, t), net(x, torch.full((2,), 7)))
        assert not torch.equal(net(x, 7.5), net(x, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["all full", "learned sinusoids", "three equal stages"])
def test_half_precision(name, dtype, lucidrains):
    """Closer to float64 than the package with autocast, or as close: it cannot be cast itself."""
    ours, theirs = twins(lucidrains, name)
    x, t, _ = inputs_of(name)
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(x.double(), t.double())
        with torch.autocast("cpu", dtype=dtype):
            expected = relative(theirs(x, t), truth)
            y = ours(x, t)
        assert y.dtype == dtype
        assert relative(y, truth) < 1.5 * expected
        y = ours.to(dtype)(x.to(dtype), t)
        assert y.dtype == dtype
        assert relative(y, truth) < 2 * expected  # weights are rounded, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_do_not_round_the_frequencies(dtype):
    net = RMSNormUNet(**config_of("learned sinusoids"))
    features, t = net.time_mlp[0], torch.tensor([999])
    expected, weights = features(t), features.weights
    expected.sum().backward()
    gradient = weights.grad.clone()
    net.to(dtype)
    assert net.dtype == dtype
    assert features.weights is weights  # an optimizer's
    assert torch.equal(features(t), expected)
    assert weights.grad.dtype == torch.float32
    assert relative(weights.grad, gradient) < 0.01
    assert net.double().time_mlp[0].weights.dtype == torch.float64


def test_autocast_trains():
    """Gradients under autocast are finite, in the parameters' dtype, and near those without it."""
    net, x, t = shaken(RMSNormUNet(**SMALL)), torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    grads = []
    for enabled in (True, False):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = net(x, t).float().square().mean()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert grads[0].dtype == torch.float32
    assert float(torch.cosine_similarity(grads[0], grads[1], dim=0)) > 0.99


def test_channels_last():
    net = shaken(RMSNormUNet(**SMALL))
    x, t = torch.randn(2, 3, 8, 16), torch.tensor([3, 900])
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        net = net.to(memory_format=memory)
        net.zero_grad()
        y = net(x.to(memory_format=memory), t)
        y.square().mean().backward()
        results.append((y, net.init_conv.weight.grad.clone()))
    assert relative(results[1][0], results[0][0]) < 1e-5
    assert relative(results[1][1], results[0][1]) < 1e-4
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.no_poison
def test_traces_as_one_graph():
    config = {**config_of("self condition"), "dim_mults": (1,), "full_attn": (False,)}  # full in the middle
    net = shaken(RMSNormUNet(**config))
    x, t, condition = inputs_of("self condition")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for model in (net, compiled):
        net.zero_grad()
        y = model(x, t, condition)
        y.square().sum().backward()
        results.append((y, net.init_conv.weight.grad.clone()))
    assert relative(results[1][0], results[0][0]) < 1e-6
    assert relative(results[1][1], results[0][1]) < BOUND


def test_copies_and_pickles():
    net = shaken(RMSNormUNet(**SMALL))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([5])
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    with torch.no_grad():
        expected = net(x, t)
        for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
            assert torch.equal(other(x, t), expected)
            assert other.config == net.config
            other.init_conv.weight.zero_()
        assert torch.equal(net(x, t), expected)


def test_sampler_knows_the_channels():
    net = RMSNormUNet(**{**SMALL, "channels": 1})
    sampler = ddpm_fast.Sampler(net, ddpm_fast.Schedule.linear(4))
    assert sampler.sample(2, shape=8, seed=0).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 15}, ValueError, "dim must be even and at least 4, .* got 15"),
        ({"dim": 2}, ValueError, "dim must be even and at least 4, .* got 2"),
        ({"dim": 16.0}, TypeError, "dim must be an int, got 16.0"),
        ({"dim_mults": ()}, ValueError, r"dim_mults must be a list or tuple .* at least one, got \(\)"),
        ({"dim_mults": 2}, ValueError, "dim_mults must be a list or tuple"),
        ({"dim_mults": (1, 1.5)}, TypeError, r"dim_mults\[1\] must be an int, got 1.5"),
        ({"channels": -1}, ValueError, "channels must be at least 1, got -1"),
        ({"init_dim": 0}, ValueError, "init_dim must be at least 1, got 0"),
        ({"out_dim": 1.5}, TypeError, "out_dim must be an int, got 1.5"),
        ({"full_attn": (True,)}, ValueError, "full_attn must be one value or one per stage, 2 as dim_mults has, got 1"),
        ({"full_attn": (0, 1)}, TypeError, r"full_attn\[0\] must be True or False, got 0"),
        ({"attn_heads": (1, 2, 3)}, ValueError, "attn_heads must be one value or one per stage, 2 .* got 3"),
        ({"attn_heads": 0}, ValueError, r"attn_heads\[0\] must be at least 1, got 0"),
        ({"attn_dim_head": None}, TypeError, r"attn_dim_head\[0\] must be an int, got None"),
        ({"dropout": 1.0}, ValueError, "dropout must be a probability below 1, got 1.0"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"self_condition": 1}, TypeError, "self_condition must be True or False, got 1"),
        ({"sinusoidal_pos_emb_theta": 0}, ValueError, "theta must be positive and finite, got 0"),
        (
            {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 5},
            ValueError,
            "learned_sinusoidal_dim must be even, got 5",
        ),
    ],
)
def test_bad_config_is_named(change, error, message):
    with pytest.raises(error, match=message):
        RMSNormUNet(**{**SMALL, **change})


def test_bad_input_is_named():
    net, conditioned = RMSNormUNet(**SMALL), RMSNormUNet(**SMALL, self_condition=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"multiples of 2 \(2 stages\), got \(8, 9\); .* nearest .* \(8, 8\)$"):
        net(torch.randn(2, 3, 8, 9), t)
    with pytest.raises(ValueError, match=r"multiples of 2 .* got \(0, 3\); .*\(2, 4\)$"):
        net(torch.randn(2, 3, 0, 3), t)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, H, W\), got \(2, 1, 8, 8\)"):
        net(x[:, :1], t)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, H, W\), got \(3, 8, 8\)"):
        net(x[0], t)
    with pytest.raises(ValueError, match=r"time must have shape \(2,\), one per image, or be one number, got \(3,\)"):
        net(x, torch.arange(3))
    with pytest.raises(TypeError, match=r"time must be an integer or floating tensor, got torch\.bool"):
        net(x, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="x_self_cond was given to a network without it"):
        net(x, t, x)
    with pytest.raises(ValueError, match=r"x_self_cond must have shape \(2, 3, 8, 8\), like x, got \(1, 3, 8, 8\)"):
        conditioned(x, t, x[:1])


@pytest.mark.parametrize("full", [False, True])
def test_no_images_give_none(lucidrains, full) -> None:
    options = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2, "full_attn": full}
    x, t = torch.zeros(0, 3, 8, 12, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for net in (RMSNormUNet(**options), lucidrains.Unet(**options)):
        y = net(x, t)
        assert y.shape == x.shape
        y.sum().backward()
