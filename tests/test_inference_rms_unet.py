"""The fused plan of `RMSNormUNet`, lucidrains' U-Net, against the module in float64; what it notices and refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from inference_models import inputs, measured_anew, one_thread, relative_error
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import inference
from ddpm_fast.inference import known, module, times, trial
from ddpm_fast.inference.network import Attention, Conv, Down, Linear, LinearAttention, RMSNorm
from ddpm_fast.nn import RMSNormUNet, rms_blocks

pytestmark = pytest.mark.usefixtures(one_thread.__name__, measured_anew.__name__)

SMALL: dict[str, Any] = {"dim": 16, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 16}
NETS = [
    # n, height and width, options beside SMALL's
    (2, (16, 16), {}),
    (3, (8, 12), {"self_condition": True, "channels": 1}),
    (2, (8, 8), {"self_condition": True, "learned_variance": True}),  # as many channels out as the stem reads
    (2, (4, 6), {"dim_mults": (3,), "init_dim": 32}),  # one stage: nothing is halved
    (1, (16, 24), {"dim_mults": (1, 2, 2), "full_attn": (False, True, False), "attn_heads": (1, 2, 4)}),
    (2, (8, 8), {"dim_mults": (1, 1), "full_attn": (True, True), "attn_dim_head": (8, 32), "out_dim": 5}),
    (2, (8, 8), {"dim": 20, "attn_heads": 3, "attn_dim_head": 10}),  # none of ours
    (1, (32, 32), {"dim": 32, "dim_mults": (1, 2, 4, 8), "attn_heads": 4, "attn_dim_head": 32}),
    (2, (8, 8), {"random_fourier_features": True, "learned_sinusoidal_dim": 6, "dropout": 0.5}),
]


def make_net(seed: int = 0, **options: Any) -> RMSNormUNet:
    """In eval mode, with norms that scale, and weights with which every layer shows in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = RMSNormUNet(**{**SMALL, **options}).eval()
        for part in net.modules():
            if isinstance(part, rms_blocks.RMSNorm):
                nn.init.uniform_(part.g, 0.5, 1.5)
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
                if part.bias is not None:
                    nn.init.normal_(part.bias, std=0.1)
            if isinstance(part, rms_blocks.FourierFeatures):
                part.weights.data /= 1000  # t of whole thousands times these is no angle that a float knows
    return net


def condition_for(net: RMSNormUNet, x: Tensor) -> dict[str, Tensor]:
    """As keyword arguments."""
    return {"x_self_cond": torch.tanh(x.flip(3))} if net.self_condition else {}


@torch.no_grad()
def exact(net: nn.Module, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """What the model computes in float64."""
    return copy.deepcopy(net).double()(x.double(), t, **{name: value.double() for name, value in condition.items()})


@pytest.mark.parametrize("deterministic", [False, True], ids=["trial", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "size", "options"), NETS)
def test_matches_the_model(n, size, options, dtype, deterministic, monkeypatch) -> None:
    monkeypatch.setattr(module.Module, "beats", lambda *_: None)  # the plan itself, however fast it is
    monkeypatch.setattr(trial, "ROUNDS", 1)
    net = make_net(**options)
    x, t = inputs(n, (net.channels, *size))
    condition = condition_for(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = inference.compile(net, dtype=dtype, deterministic=deterministic, timesteps=t)
        got = fused(x, t, **condition)
    expected = exact(net, x, t, **condition)
    wrong = relative_error(got, expected)
    if fused.plan(n, *size).dtype == torch.float32:
        assert wrong < 5e-6
    else:
        half = copy.deepcopy(net).to(dtype)
        given = {name: value.to(dtype) for name, value in condition.items()}
        with torch.no_grad():
            # Both round as often; Winograd's transforms come to ours.
            assert wrong < 1.3 * relative_error(half(x.to(dtype), t, **given), expected)
    at_rows = fused.at_rows(x, torch.arange(n), **condition)  # embeddings computed beforehand
    assert relative_error(at_rows, got) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("options", [{}, {"random_fourier_features": True}, {"learned_sinusoidal_cond": True}])
def test_the_time_table_is_every_block_s_own_projection(options) -> None:
    net = make_net(**options)
    time, t = known.read(net).time, torch.tensor([0, 17, 999])
    out = torch.zeros(3, len(time.weight))
    times.embed(time, t, None, out)
    assert relative_error(out, times.table(time, t)) < 3e-6
    features, *mlp = net.time_mlp
    emb = copy.deepcopy(nn.Sequential(*mlp)).double()(features(t).double())
    blocks = [part for part in net.modules() if isinstance(part, rms_blocks.ResnetBlock)]
    order = [*blocks[: len(net.downs) * 2], net.mid_block1, net.mid_block2]
    order += [block for stage in net.ups for block in stage[:2]] + [net.final_res_block]
    expected = torch.cat([copy.deepcopy(block.mlp).double()(emb) for block in order], dim=1)
    assert relative_error(out, expected) < 3e-6  # t itself, up to 999, is among the learned features


def test_what_a_plan_of_it_is_made_of() -> None:
    """Norm, scale and shift, activation and residual in one layer; q, k and v in one product; nothing that copies."""
    net = make_net(dim_mults=(1, 2, 2), full_attn=(False, True, False))
    network = known.read(net)

    def parts(kind: type) -> int:
        return sum(isinstance(part, kind) for part in net.modules())

    def count(kind: type) -> int:
        return sum(isinstance(layer, kind) for layer in network.layers)

    resnets, shortcuts = parts(rms_blocks.ResnetBlock), 2 * 3 + 1
    linear, full = parts(rms_blocks.LinearAttention), parts(rms_blocks.Attention)
    assert (linear, full) == (4, 3)
    assert count(RMSNorm) == 2 * resnets + 2 * linear + full
    assert (count(LinearAttention), count(Attention)) == (linear, full)
    assert count(Linear) == 2 * (linear + full) + shortcuts
    assert count(Down) == 2
    assert count(Conv) == 2 * resnets + 1 + 2 + 2
    assert len(network.layers) == sum(map(count, (RMSNorm, LinearAttention, Attention, Linear, Down, Conv))) + 1
    assert network.divisor == net.downsample_factor == 4
    assert len(network.time.weight) == sum(
        block.mlp[1].out_features for block in net.modules() if hasattr(block, "mlp")
    )


def test_every_channel_is_written_before_it_is_read() -> None:
    network = known.read(make_net(dim_mults=(1, 2, 2), full_attn=(False, True, False)))
    written: set[tuple[str, int]] = set()
    sizes: dict[str, tuple[int, int]] = {}

    def channels(part: Any) -> set[tuple[str, int]]:
        assert sizes.setdefault(part.buffer.name, (part.buffer.channels, part.buffer.level)) == (
            part.buffer.channels,
            part.buffer.level,
        )
        return {(part.buffer.name, part.first + c) for c in range(part.channels)}

    for layer in network.layers:
        read = [channels(part) for part in (layer.source, getattr(layer, "residual", None)) if part is not None]
        assert all(part <= written for part in read), f"{layer.name} reads what nobody wrote"
        target = getattr(layer, "target", None)
        if target is not None:
            assert not any(channels(target) & part for part in read), f"{layer.name} writes what it reads"
            written |= channels(target)


def test_without_a_condition_it_is_zeros_and_nothing_is_left_of_the_last_one() -> None:
    net = make_net(self_condition=True)
    x, t = inputs(2, (3, 8, 8))
    fused = inference.compile(net, timesteps=t)
    assert (fused.self_condition, fused.in_channels) == (True, 3)
    zeros = fused(x, t, x_self_cond=torch.zeros_like(x))
    given = fused(x, t, x_self_cond=torch.ones_like(x))
    assert relative_error(given, zeros) > 1e-2
    assert torch.equal(fused(x, t), zeros)
    assert torch.equal(fused.at_rows(x, torch.arange(2), x_self_cond=torch.ones_like(x).bfloat16()), given)
    assert fused.whole_step(x, x, torch.zeros(1, dtype=torch.int64), None, (x, x), x, x) is None


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {}, "x_self_cond was given to a model that was built with self_condition=False"),
        (
            {"self_condition": True},
            {"shape": (2, 3, 8, 4)},
            r"of x's shape \(2, 3, 8, 8\), got torch.float32 \(2, 3, 8, 4",
        ),
        ({"self_condition": True}, {"dtype": torch.int64}, "must be a floating tensor .* got torch.int64"),
        ({"self_condition": True}, {"requires_grad": True}, "x_self_cond requires a gradient"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(options, arguments, message) -> None:
    x, t = inputs(2, (3, 8, 8))
    fused = inference.compile(make_net(**options), timesteps=t)
    condition = torch.zeros(arguments.pop("shape", x.shape), **arguments)
    with pytest.raises(ValueError, match=message):
        fused(x, t, x_self_cond=condition)
    with pytest.raises(ValueError, match=message):
        fused.at_rows(x, torch.arange(2), x_self_cond=condition)


def test_an_image_that_does_not_fit_is_refused() -> None:
    fused = inference.compile(make_net(self_condition=True))
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, H, W\), got \(1, 6, 8, 8\)"):
        fused(torch.zeros(1, 6, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match=r"must be multiples of 2, got \(7, 8\)"):
        fused.prepare(1, (3, 7, 8))


def test_a_changed_weight_is_noticed() -> None:
    net, (x, t) = make_net(learned_sinusoidal_cond=True), inputs(2, (3, 8, 8))
    fused = inference.compile(net)
    before = fused(x, t)
    for change in (
        lambda: net.downs[0][2].mem_kv.mul_(3),
        lambda: net.mid_attn.mem_kv.add_(1),
        lambda: net.downs[0][0].block1.norm.g.mul_(2),
        lambda: net.downs[0][3][1].weight.mul_(2),
        lambda: net.time_mlp[0].weights.mul_(1.5),
        lambda: net.init_conv.weight.mul_(2),
    ):
        with torch.no_grad():
            change()
        changed = fused(x, t)
        assert relative_error(changed, before) > 1e-4
        with torch.no_grad():
            assert relative_error(changed, net(x, t)) < 5e-6
        before = changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reading_changes_and_shares_nothing(dtype) -> None:
    net = make_net(learned_sinusoidal_cond=True).to(dtype)
    before, t = copy.deepcopy(net.state_dict()), torch.tensor([3, 500])
    network = known.read(net)
    features = network.time.features(t)
    for tensor in network.tensors():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(features, net.time_mlp[0](t))
    assert not torch.equal(network.time.features(t), features), "it computes with what is among the tensors"


def test_a_model_that_does_not_run_in_a_dtype_is_no_rival(monkeypatch) -> None:
    def refuses(*_: object) -> Tensor:
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    net, (x, t) = make_net(), inputs(2, (3, 8, 8))
    expected = exact(net, x, t)
    monkeypatch.setattr(RMSNormUNet, "forward", refuses)
    assert relative_error(inference.compile(net)(x, t), expected) < 5e-6


def test_where_it_is_faster_the_model_runs_itself_with_its_condition(monkeypatch) -> None:
    monkeypatch.setattr(module.Module, "beats", lambda *_: 1.0)
    net, (x, t) = make_net(self_condition=True), inputs(2, (3, 8, 8))
    fused, condition = inference.compile(net, timesteps=t), condition_for(net, x)
    for got in (fused(x, t, **condition), fused.at_rows(x, torch.arange(2), **condition)):
        assert relative_error(got, exact(net, x, t, **condition)) < 5e-6
    assert relative_error(fused(x, t), exact(net, x, t)) < 5e-6


def test_it_is_compared_with_the_model_under_a_condition_too(monkeypatch) -> None:
    seen = []
    beats = module.Module.beats

    def noted(self, plan, x, labels=None, x_self_cond=None):
        seen.append((x.shape, None if x_self_cond is None else x_self_cond.shape))
        return beats(self, plan, x, labels, x_self_cond)

    monkeypatch.setattr(module.Module, "beats", noted)
    inference.compile(make_net(self_condition=True)).prepare(2, (3, 8, 8))
    inference.compile(make_net()).prepare(2, (3, 8, 8))
    assert seen == [((2, 3, 8, 8), (2, 3, 8, 8)), ((2, 3, 8, 8), None)]


def test_the_plan_says_layer_by_layer_what_it_runs() -> None:
    net = make_net()
    lines = inference.compile(net, deterministic=True).describe(2, 8, 8).splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == [layer.name for layer in known.read(net).layers]
    assert {"init_conv", "downs.0.3", "mid_attn.attention", "ups.0.3", "final_conv"} <= set(names)


class TestSampler:
    @pytest.mark.parametrize("options", [{}, {"self_condition": True}])
    @pytest.mark.parametrize("chunk", [None, 2])
    def test_gives_the_same_images_with_and_without_the_plan(self, options, chunk) -> None:
        net, schedule = make_net(**options), ddpm_fast.Schedule.linear(1000)
        with torch.no_grad():
            net.final_conv.weight.mul_(0.2)  # else x0, which is fed back, makes much of every rounding
        plain, fused = (
            ddpm_fast.Sampler(net, schedule, steps=6, clip=1.0, shape=(3, 8, 8), chunk=chunk, fused=fused)
            for fused in (False, True)
        )
        assert fused.fused
        assert (plain.sample(3, seed=0) - fused.sample(3, seed=0)).abs().max() < 1e-4

    @pytest.mark.parametrize("options", [{}, {"self_condition": True}])
    def test_an_image_has_the_same_bits_in_any_batch_when_deterministic(self, options) -> None:
        net = make_net(**options)
        sampler = ddpm_fast.Sampler(
            net, ddpm_fast.Schedule.linear(1000), steps=4, shape=(3, 8, 8), fused=True, deterministic=True, chunk=2
        )
        images = sampler.sample(5, seed=3)
        assert torch.equal(sampler.sample(2, seed=3, first_sample=3), images[3:])

    def test_a_learned_variance(self) -> None:
        net, schedule = make_net(learned_variance=True, self_condition=True), ddpm_fast.Schedule.linear(1000)
        plain, fused = (
            ddpm_fast.Sampler(net, schedule, steps=6, variance="learned_range", clip=1.0, fused=fused)
            for fused in (False, True)
        )
        assert fused.fused
        one, other = (sampler.sample(2, (3, 8, 8), seed=0) for sampler in (plain, fused))
        assert (one - other).abs().max() < 1e-4


class TestOfThePackage:
    """Networks of lucidrains' own class are read as the `RMSNormUNet` that they are."""

    @pytest.fixture
    def unet(self, lucidrains) -> nn.Module:
        unet: nn.Module = lucidrains.Unet(**SMALL, self_condition=True).eval()
        unet.load_state_dict(make_net(self_condition=True).state_dict())
        return unet

    def test_its_plan_gives_what_it_gives(self, unet) -> None:
        x, t = inputs(2, (3, 16, 16))
        fused, condition = inference.compile(unet), torch.tanh(x.flip(3))

        def expected() -> Tensor:
            with torch.no_grad():
                return unet(x, t, x_self_cond=condition)  # type: ignore[no-any-return]

        assert relative_error(fused(x, t, x_self_cond=condition), expected()) < 5e-6
        with torch.no_grad():
            unet.mid_attn.to_qkv.weight.mul_(2)  # the object itself is watched
            unet.downs[1][0].block2.norm.g.add_(1)
        assert relative_error(fused(x, t, x_self_cond=condition), expected()) < 5e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_its_plan_is_made_in_either_dtype(self, unet, dtype) -> None:
        """In half precision the package's own network does not run, and is not compared with."""
        x, t = inputs(2, (3, 8, 8))
        with torch.no_grad():
            expected = unet(x, t)
        assert relative_error(inference.compile(unet, dtype=dtype)(x, t), expected) < 2e-2

    def test_altered_it_is_refused(self, unet) -> None:
        unet.mid_attn.to_qkv.register_forward_hook(lambda *_: None)
        assert "mid_attn.to_qkv has forward hooks" in str(inference.unknown_reason(unet))


def _hooked() -> RMSNormUNet:
    net = make_net()
    net.mid_attn.to_qkv.register_forward_hook(lambda *_: None)
    return net


def _other(path: str, name: str, value: object) -> RMSNormUNet:
    net = make_net()
    setattr(net.get_submodule(path), name, value)
    return net


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_hooked, "mid_attn.to_qkv has forward hooks"),
        (lambda: _other("downs.0.2", "heads", 4), "downs.0.2 is LinearAttention"),
        (lambda: _other("downs.0.2", "scale", 1.0), "downs.0.2 is LinearAttention"),
        (lambda: _other("time_mlp", "2", nn.GELU(approximate="tanh")), "time_mlp.2 is GELU"),
        (lambda: _other("time_mlp.0", "theta", 100), "time_mlp.0 is Sinusoids"),
        (lambda: _other("ups.0.3.0", "mode", "bilinear"), "ups.0.3.0 is Upsample"),
        (lambda: _other("downs.0.0.block1", "norm", nn.GroupNorm(1, 16)), "downs.0.0.block1.norm is a GroupNorm"),
        (lambda: _other("", "self_condition", True), "the model is RMSNormUNet"),
    ],
)
def test_what_a_plan_would_not_compute_is_refused_with_the_reason(make, reason) -> None:
    net = make()
    assert not inference.knows(net)
    with pytest.raises(TypeError, match=reason):
        inference.compile(net)
