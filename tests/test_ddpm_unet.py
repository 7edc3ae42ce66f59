"""The paper's U-Net beside diffusers' own: same keys, same start, same numbers and gradients; bad input is named."""

import inspect

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")

import diffusers
import torch
from torch import nn
from unet_configs import OPTIONS, SMALL, config_of, inputs_of

import ddpm_fast
from ddpm_fast.nn import DDPMUNet
from ddpm_fast.nn.ddpm_config import OWN

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 2e-5


def pair(config, seed=0):
    """Ours and diffusers' network of one config and one torch seed."""
    models = []
    for build in (DDPMUNet, diffusers.UNet2DModel):
        torch.manual_seed(seed)
        models.append(build(**config))
    return models


def shaken(model, seed=5):
    """Norms and biases start as ones and zeros, which would hide mistakes: move every parameter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def same_masks(monkeypatch):
    """Dropout whose masks do not depend on how a tensor lies in memory, as torch's do."""

    def dropped(self, h):
        if not self.training or not self.p:
            return h
        drawn = torch.rand(h.shape, generator=torch.Generator().manual_seed(h.shape[1]))
        return h * (drawn >= self.p) / (1 - self.p)

    monkeypatch.setattr(nn.Dropout, "forward", dropped)


@pytest.mark.parametrize("name", OPTIONS)
def test_matches_diffusers_with_gradients(name, monkeypatch):
    same_masks(monkeypatch)
    config = config_of(name)
    ours, theirs = pair(config)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    if config.get("time_embedding_type") != "fourier":  # whose features theirs draws twice
        assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    shaken(theirs)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, labels = inputs_of(config)
    results = []
    for model in (ours, theirs):
        model.train()
        leaf = x.clone().requires_grad_()
        y = model(leaf, t, labels)
        y = y if model is ours else y.sample
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        results.append((y, leaf.grad, {key: p.grad for key, p in model.named_parameters()}))
    (y, dx, grads), (y_expected, dx_expected, grads_expected) = results
    assert relative(y, y_expected) < BOUND
    assert relative(dx, dx_expected) < BOUND
    assert list(grads) == list(grads_expected)
    largest = max(float(g.norm()) for g in grads_expected.values() if g is not None)
    for key, gradient in grads.items():
        if grads_expected[key] is None:  # the fixed Fourier features
            assert gradient is None
            continue
        # In front of a group norm a bias's gradient, and everywhere a key's bias's, may be zero but for rounding.
        scale = max(float(grads_expected[key].norm()), 1e-2 * largest)
        assert float((gradient - grads_expected[key]).norm()) < BOUND * scale, key


def test_defaults_are_the_papers_network():
    ours, theirs = pair(DDPMUNet().config)
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    assert len(ours.state_dict()) == 328
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    # the published config of google/ddpm-cifar10-32
    published = {
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
        "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
        "norm_eps": 1e-6, "norm_num_groups": 32, "time_embedding_type": "positional", "act_fn": "silu",
        "center_input_sample": False, "mid_block_scale_factor": 1,
    }  # fmt: skip
    assert {key: ours.config[key] for key in published} == published
    ours.load_state_dict(shaken(theirs).state_dict())
    x, t, _ = inputs_of(ours.config, 2)
    with torch.no_grad():
        assert relative(ours.eval()(x, t), theirs.eval()(x, t).sample) < BOUND


def test_config_builds_the_network_again():
    net = DDPMUNet(**config_of("three_levels"))
    assert [*net.config, *OWN] == list(inspect.signature(DDPMUNet).parameters)
    again = DDPMUNet(**net.config)
    again.load_state_dict(net.state_dict())
    assert again.config == net.config
    assert (net.in_channels, net.sample_size, net.num_classes, net.null_label) == (2, 8, None, None)
    assert DDPMUNet(**config_of("classes")).num_classes == 5
    listed = DDPMUNet(**{**SMALL, "block_out_channels": [8, 16], "sample_size": [8, 16]})
    assert (listed.config["block_out_channels"], listed.sample_size) == ((8, 16), (8, 16))


def test_heads_by_number_and_sinusoids_of_another_length():
    """Against heads by their size, and against the sinusoids by their formula."""
    by_size = DDPMUNet(**SMALL).eval()  # heads of 4 of 16 channels
    by_number = DDPMUNet(**{**SMALL, **HEADS, "num_attention_heads": 4}).eval()
    by_number.load_state_dict(by_size.state_dict())
    x, t, _ = inputs_of(SMALL)
    with torch.no_grad():
        assert torch.equal(by_number(x, t), by_size(x, t))
    heads = DDPMUNet(**{**SMALL, **HEADS, "num_attention_heads": (4, 2)})
    assert heads.config["num_attention_heads"] == (4, 2)
    found = [(name[:4], part.heads) for name, part in heads.named_modules() if hasattr(part, "heads")]
    assert set(found) == {("down", 4), ("mid_", 4), ("up_b", 2)}

    net = DDPMUNet(**{**SMALL, "time_proj_dim": 12, "time_embedding_dim": 20})
    assert net.time_embedding.linear_1.weight.shape == (20, 12)
    angles = t[:, None] * 10000.0 ** (-torch.arange(6) / 6)
    torch.testing.assert_close(net.time_proj(t), torch.cat([angles.cos(), angles.sin()], dim=1), atol=2e-4, rtol=0)
    assert DDPMUNet(**net.config).config == net.config


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0), 7.0])
def test_one_time_for_all_images(t):
    ours, theirs = pair(SMALL)
    x, _, _ = inputs_of(SMALL)
    with torch.no_grad():
        got = ours(x, t)
        assert torch.equal(got, ours(x, torch.full((3,), 7)))
        assert relative(got, theirs(x, t).sample) < BOUND


def test_fractional_times_are_not_cut_off():
    net = DDPMUNet(**SMALL)
    x, _, _ = inputs_of(SMALL)
    with torch.no_grad():
        assert torch.equal(net(x, 7.5), net(x, torch.full((3,), 7.5)))
        assert not torch.equal(net(x, 7.5), net(x, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["plain", "scale_shift", "fourier", "classes"])
def test_other_dtypes(name, dtype):
    """No further from float64 than diffusers' network is, give or take what its own rounding varies by."""
    config = config_of(name)
    ours, theirs = pair(config)
    ours.load_state_dict(shaken(theirs).state_dict())
    x, t, labels = inputs_of(config)
    with torch.no_grad():
        truth = theirs.double()(x.double(), t, labels).sample
        ours, x = ours.to(dtype), x.to(dtype)
        y = ours(x, t, labels)
        assert y.dtype == dtype
        if dtype == torch.float64:
            assert relative(y, truth) < 1e-5  # float32 sinusoids
            return
        assert relative(y, truth) < 1.3 * relative(theirs.to(dtype)(x, t, labels).sample, truth)


def test_class_times_in_half_precision():
    """diffusers feeds the class embedding float32 and fails; ours is as close to float32 as bfloat16 allows."""
    config = config_of("class_times")
    ours, theirs = pair(config)
    x, t, labels = inputs_of(config)
    with torch.no_grad():
        truth = ours(x, t, labels)
        with pytest.raises(RuntimeError, match="same dtype"):
            theirs.bfloat16()(x.bfloat16(), t, labels)
        assert relative(ours.bfloat16()(x.bfloat16(), t, labels), truth) < 0.03


def test_channels_last():
    net = DDPMUNet(**SMALL).to(memory_format=torch.channels_last)
    x, t, _ = inputs_of(SMALL)
    with torch.no_grad():
        y = net(x.to(memory_format=torch.channels_last), t)
        assert relative(y, net.to(memory_format=torch.contiguous_format)(x, t)) < 1e-6
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.no_poison
@pytest.mark.parametrize("name", ["plain", "scale_shift"])
def test_traces_as_one_graph(name):
    config = config_of(name)
    if name == "plain":  # what is traced differently is within a block: one stage of them, of two in the other
        one = {key: config[key][-1:] for key in ("block_out_channels", "down_block_types")}
        config = {**config, **one, "up_block_types": config["up_block_types"][:1]}
    net = shaken(DDPMUNet(**config))
    x, t, _ = inputs_of(config)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for model in (net, compiled):
        net.zero_grad()
        y = model(x, t)
        y.square().sum().backward()
        results.append((y, net.conv_in.weight.grad))
    assert relative(results[1][0], results[0][0]) < 1e-6
    assert relative(results[1][1], results[0][1]) < BOUND


def test_old_attention_names_load():
    net, other = DDPMUNet(**SMALL), DDPMUNet(**SMALL)
    old = {}
    for key, value in net.state_dict().items():
        for new, name in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
            key = key.replace(new, name)
        old[key] = value
    assert old.keys() != net.state_dict().keys()
    before = list(old)
    assert other.load_state_dict(old, strict=True)
    assert list(old) == before  # the caller's dict is left alone
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


def test_sampler_knows_shape_and_labels():
    schedule = ddpm_fast.Schedule.linear(20)
    net = DDPMUNet(**{**config_of("classes"), "sample_size": (8, 16)})
    sampler = ddpm_fast.Sampler(net, schedule)
    assert sampler.sample(2, seed=0, labels=[0, 4]).shape == (2, 2, 8, 16)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, got 0\.\.5"):
        sampler.sample(2, seed=0, labels=[0, 5])
    with pytest.raises(ValueError, match="no null_label"):
        sampler.sample(2, seed=0, labels=[0, 4], guidance=2.0)
    guided = ddpm_fast.Sampler(net, schedule, null_label=4).sample(2, seed=0, labels=[0, 1], guidance=2.0)
    assert bool(guided.isfinite().all())


HEADS = {"attention_head_dim": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, r"down_block_types\[1\] is 'SkipDownBlock2D'"),
        ({"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}, r"up_block_types\[0\] is 'CrossAttnUpBlock2D'"),
        ({"down_block_types": ("DownBlock2D",)}, "one entry per level, got 1, 2 and 2"),
        ({"down_block_types": ()}, "down_block_types must be a list or tuple"),
        ({"block_out_channels": (8, 10)}, "norm_num_groups must divide .* got 4 of 10"),
        ({"block_out_channels": 8}, "block_out_channels must be a list or tuple"),
        ({"block_out_channels": (8, 0)}, r"block_out_channels\[1\] must be at least 1"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type must be one of .*CrossAttn"),
        ({"norm_num_groups": None}, "norm_num_groups must be an int, got None"),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups must divide"),
        ({"attention_head_dim": 32}, "attention_head_dim must be at most 16"),
        ({"num_attention_heads": 2}, "num_attention_heads=2 and attention_head_dim=4 exclude each other"),
        ({**HEADS, "num_attention_heads": 3}, "must divide the channels of every attention, got 3 of 16"),
        ({**HEADS, "num_attention_heads": (2, 3)}, "must divide the channels of every attention, got 3 of 16"),
        ({**HEADS, "num_attention_heads": (2, 2, 2)}, "must be an int or two, for the ways down and up"),
        ({**HEADS, "num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"time_proj_dim": 0}, "time_proj_dim must be at least 1"),
        ({"downsample_padding": 2}, "downsample_padding must be one of 0, 1, got 2"),
        ({"downsample_type": "fir"}, "downsample_type must be one of"),
        ({"upsample_type": None}, "upsample_type must be one of"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be one of"),
        ({"time_embedding_type": "sinus"}, "time_embedding_type must be one of"),
        ({"time_embedding_type": "learned"}, "needs num_train_timesteps"),
        ({"class_embed_type": "projection"}, "class_embed_type must be one of"),
        ({"act_fn": "tanh"}, "act_fn must be one of"),
        ({"freq_shift": 4}, "freq_shift must not be half"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"layers_per_block": 1.5}, "layers_per_block must be an int"),
        ({"norm_eps": -1.0}, "norm_eps must be positive"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor must be positive"),
        ({"sample_size": (8, 8, 8)}, "sample_size must be None"),
        ({"dropout": 1.5}, "dropout"),
    ],
)  # fmt: skip
def test_bad_config_is_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DDPMUNet(**{**SMALL, **change})


def test_bad_input_is_named():
    net, classes = DDPMUNet(**SMALL), DDPMUNet(**config_of("classes"))
    x, t, _ = inputs_of(SMALL)
    cases = [
        (net, (x[:, :1], t), ValueError, r"x must have shape \(N, 2, H, W\)"),
        (net, (x[..., :7], t), ValueError, r"multiples of 2 .* next valid size \(8, 8\)"),
        (net, (x, t[:2]), ValueError, r"t must have shape \(3,\)"),
        (net, (x, t > 5), TypeError, "t must be an integer or floating"),
        (net, (x, t, t), ValueError, "unconditional"),
        (classes, (x, t), ValueError, "labels are required"),
        (classes, (x, t, torch.tensor([0, 1])), ValueError, r"labels must have shape \(3,\), got \(2,\)"),
        (classes, (x, t, torch.tensor([0, 1, 5])), ValueError, r"labels must be in 0\.\.4, got 0\.\.5"),
        (classes, (x, t, torch.zeros(3)), TypeError, "labels must be int64 or int32"),
        (DDPMUNet(**config_of("learned_times")), (x, 1000), ValueError, r"t must be in 0\.\.999"),
        (DDPMUNet(**config_of("class_vectors")), (x, t, t), ValueError, r"labels must have shape \(3, 32\)"),
    ]
    for model, arguments, error, message in cases:
        with pytest.raises(error, match=message):
            model(*arguments)


def test_dropout_is_off_in_eval_and_random_in_training():
    net = DDPMUNet(**config_of("dropout"))
    assert isinstance(net.mid_block.resnets[0].dropout, nn.Dropout)
    x, t, _ = inputs_of(SMALL)
    with torch.no_grad():
        assert not torch.equal(net.train()(x, t), net(x, t))
        assert torch.equal(net.eval()(x, t), net(x, t))
