"""The fused plan of `DDPMUNet` against the module in float64: the options that a plan covers, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import pytest
import torch
from inference_models import exact, inputs, measured_anew, one_thread, relative_error
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import inference
from ddpm_fast.inference import known, module, times, trial
from ddpm_fast.inference.network import Attention, Conv, Linear, Norm
from ddpm_fast.nn import DDPMUNet

pytestmark = pytest.mark.usefixtures(one_thread.__name__, measured_anew.__name__)

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
THREE = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (16, 32, 48),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
NETS = [
    # n, shape, options beside SMALL's
    (2, (3, 16, 16), {}),
    (1, (3, 16, 24), {"downsample_padding": 1, "attention_head_dim": 8}),
    (3, (1, 8, 8), {"in_channels": 1, "out_channels": 1, "resnet_time_scale_shift": "scale_shift"}),
    (3, (3, 8, 8), {"num_class_embeds": 4}),
    (2, (3, 8, 8), {"out_channels": 6}),
    (2, (3, 8, 8), {"mid_block_type": None, "layers_per_block": 2}),
    (2, (3, 8, 8), {"add_attention": False, "block_out_channels": (20, 36), "norm_num_groups": 4}),  # none of ours
    (2, (3, 8, 12), THREE),
    (2, (3, 8, 12), RESNETS),
    (2, (3, 8, 8), {**RESNETS, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 4}),
    (2, (3, 4, 4), {**THREE, "flip_sin_to_cos": True, "freq_shift": 0}),
    (
        *(2, (3, 8, 8)),
        {
            "down_block_types": ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",),
            "block_out_channels": (32,),
            "time_embedding_dim": 48,
        },
    ),
]


def make_net(seed: int = 0, **options: Any) -> DDPMUNet:
    """In eval mode, with norms that scale and shift, and weights with which every layer shows in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DDPMUNet(**{**SMALL, **options}).eval()
        for part in net.modules():
            if isinstance(part, nn.GroupNorm):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.2)
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
                nn.init.normal_(part.bias, std=0.1)
    return net


def labels_for(net: DDPMUNet, n: int) -> Tensor | None:
    return None if net.num_classes is None else torch.arange(n) % net.num_classes


@pytest.mark.parametrize("deterministic", [False, True], ids=["trial", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "shape", "options"), NETS)
def test_matches_the_model(n, shape, options, dtype, deterministic, monkeypatch) -> None:
    monkeypatch.setattr(module.Module, "beats", lambda *_: None)  # the plan itself, however fast it is
    monkeypatch.setattr(trial, "ROUNDS", 1)
    net, (x, t) = make_net(**options), inputs(n, shape)
    labels = labels_for(net, n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = inference.compile(net, dtype=dtype, deterministic=deterministic, timesteps=t)
        got = fused(x, t, labels)
    expected = exact(net, x, t, labels)
    wrong = relative_error(got, expected)
    if fused.plan(n, *shape[1:]).dtype == torch.float32:
        assert wrong < 5e-6
    else:
        half = copy.deepcopy(net).to(dtype)
        with torch.no_grad():
            assert wrong < relative_error(half(x.to(dtype), t, labels), expected)
    at_rows = fused.at_rows(x, torch.arange(n), labels)  # embeddings computed beforehand
    assert relative_error(at_rows, got) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("options", [{}, {"num_class_embeds": 3}, {"resnet_time_scale_shift": "scale_shift"}])
def test_the_time_table_is_every_block_s_own_projection(options) -> None:
    net = make_net(**options)
    time, t, labels = known.read(net).time, torch.tensor([0, 17, 999]), torch.tensor([2, 0, 1])
    assert time.joint == ("num_class_embeds" in options)
    out = torch.zeros(3, len(time.weight))
    times.embed(time, t, labels if time.joint else None, out)
    double = copy.deepcopy(net).double()
    emb = double.time_embedding(net.time_proj(t).double())
    if time.joint:
        emb = emb + double.class_embedding(labels)
        again = torch.zeros_like(out)
        times.finish(time, times.embeddings(time, t), labels, again)
        assert relative_error(again, out) < 1e-6
    else:
        assert relative_error(times.table(time, t), out) < 1e-6
    stages = [*double.down_blocks, double.mid_block, *double.up_blocks]
    blocks = [block for stage in stages for block in stage.resnets]
    expected = torch.cat([block.time_emb_proj(nn.functional.silu(emb)) for block in blocks], dim=1)
    assert relative_error(out, expected) < 1e-6


def test_what_a_plan_of_it_is_made_of() -> None:
    """q, k and v in one product, norm and SiLU in one layer, nothing that only copies."""
    net = make_net(**THREE)
    network = known.read(net)
    resnets = [part for part in net.modules() if hasattr(part, "time_emb_proj")]
    attentions = [part for part in net.modules() if hasattr(part, "to_q")]
    shortcuts = [part for part in resnets if part.conv_shortcut is not None]

    def count(kind: type) -> int:
        return sum(isinstance(layer, kind) for layer in network.layers)

    assert count(Norm) == 2 * len(resnets) + len(attentions) + 1
    assert count(Attention) == len(attentions)
    assert count(Linear) == 2 * len(attentions) + len(shortcuts)
    assert count(Conv) == 2 * len(resnets) + 1 + 2 * (len(THREE["block_out_channels"]) - 1)
    assert len(network.layers) == count(Norm) + count(Attention) + count(Linear) + count(Conv) + 1


def test_every_channel_is_written_before_it_is_read() -> None:
    network = known.read(make_net(**THREE))
    written: set[tuple[str, int]] = set()
    for layer in network.layers:
        for part in (layer.source, getattr(layer, "residual", None)):
            if part is not None:
                channels = range(part.first, part.first + part.channels)
                assert all((part.buffer.name, c) in written for c in channels), f"{layer.name} reads what nobody wrote"
        target = getattr(layer, "target", None)
        if target is not None:
            own = {(target.buffer.name, target.first + c) for c in range(target.channels)}
            for part in (layer.source, getattr(layer, "residual", None)):
                if part is not None:
                    read = {(part.buffer.name, part.first + c) for c in range(part.channels)}
                    assert not own & read, f"{layer.name} writes what it reads"
            written |= own


def test_a_changed_weight_or_eps_is_noticed() -> None:
    net, (x, t) = make_net(), inputs(2, (3, 8, 8))
    fused = inference.compile(net)
    before = fused(x, t)
    with torch.no_grad():
        net.down_blocks[1].attentions[0].to_k.weight.mul_(3)
        net.time_embedding.linear_1.bias.add_(1)
    changed = fused(x, t)
    assert relative_error(changed, before) > 1e-4
    assert relative_error(changed, exact(net, x, t)) < 5e-6
    net.mid_block.resnets[0].norm2.eps = 0.5
    assert relative_error(fused(x, t), exact(net, x, t)) < 5e-6


@pytest.mark.parametrize("options", [{}, {"num_class_embeds": 4}])
def test_sampler_gives_the_same_images_with_and_without_the_plan(options) -> None:
    net, schedule = make_net(**options), ddpm_fast.Schedule.linear(1000)
    labels = labels_for(net, 3)
    plain, fused = (
        ddpm_fast.Sampler(net, schedule, steps=12, clip=1.0, shape=(3, 8, 8), fused=fused) for fused in (False, True)
    )
    assert fused.fused
    images = plain.sample(3, seed=0, labels=labels), fused.sample(3, seed=0, labels=labels)
    assert (images[0] - images[1]).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_learned_variance_is_sampled_with_and_without_the_plan(method, chunk) -> None:
    net, schedule = make_net(out_channels=6), ddpm_fast.Schedule.linear(1000)
    plain, fused = (
        ddpm_fast.Sampler(
            net, schedule, steps=8, method=method, variance="learned_range", clip=1.0, chunk=chunk, fused=fused
        )
        for fused in (False, True)
    )
    assert fused.fused
    one, other = (sampler.sample(3, (3, 8, 8), seed=0) for sampler in (plain, fused))
    assert (one - other).abs().max() < 1e-4


def test_labels_are_asked_for_where_no_label_means_none() -> None:
    net, (x, t) = make_net(num_class_embeds=4), inputs(2, (3, 8, 8))
    fused = inference.compile(net)
    assert (fused.num_classes, fused.null_label) == (4, None)
    with pytest.raises(ValueError, match="labels are needed: the model has 4 classes"):
        fused(x, t)
    with pytest.raises(ValueError, match=r"labels must be in 0..3 \(3 = the last class\), got 0..4"):
        fused(x, t, torch.tensor([0, 4]))


def _hooked() -> DDPMUNet:
    net = make_net()
    net.mid_block.attentions[0].to_v.register_forward_hook(lambda *_: None)
    return net


def _regrouped() -> DDPMUNet:
    net = make_net()
    net.down_blocks[0].resnets[0].norm1.num_groups = 4
    return net


def _other_heads() -> DDPMUNet:
    net = make_net()
    net.mid_block.attentions[0].heads = 2
    return net


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_net(act_fn="mish"), "act_fn='mish', only 'silu'"),
        (lambda: make_net(center_input_sample=True), "center_input_sample=True, only False"),
        (lambda: make_net(time_embedding_type="fourier"), "time_embedding_type='fourier'"),
        (lambda: make_net(class_embed_type="identity"), "class_embed_type='identity'"),
        (_hooked, "mid_block.attentions.0.to_v has forward hooks"),
        (_regrouped, "down_blocks.0.resnets.0.norm1 is GroupNorm"),
        (_other_heads, "mid_block.attentions.0 is"),
    ],
)
def test_what_no_plan_covers_is_refused_with_the_reason(make, reason) -> None:
    net = make()
    assert not inference.knows(net)
    with pytest.raises(TypeError, match=reason):
        inference.compile(net)


class TestOfDiffusers:
    """Networks of diffusers' class are read as the `DDPMUNet` that they are."""

    @pytest.fixture(params=["diffusers", "ddpm_fast.interop.diffusers"])
    def unet(self, request: pytest.FixtureRequest) -> nn.Module:
        pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")
        package = importlib.import_module(request.param)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet: nn.Module = package.UNet2DModel(**SMALL).eval()
        return unet

    def test_its_plan_gives_what_it_gives(self, unet) -> None:
        x, t = inputs(2, (3, 16, 16))
        fused = inference.compile(unet)

        def expected() -> Tensor:
            with torch.no_grad():
                return copy.deepcopy(unet).double()(x.double(), t).sample

        assert relative_error(fused(x, t), expected()) < 5e-6
        with torch.no_grad():
            unet.conv_out.weight.mul_(2)  # the object itself is watched
            unet.mid_block.attentions[0].to_q.bias.add_(1)
        assert relative_error(fused(x, t), expected()) < 5e-6

    def test_where_it_is_faster_it_runs_itself(self, unet, monkeypatch) -> None:
        monkeypatch.setattr(module.Module, "beats", lambda *_: 1.0)
        x, t = inputs(2, (3, 16, 16))
        with torch.no_grad():
            assert relative_error(inference.compile(unet)(x, t), unet(x, t).sample) < 1e-6

    def test_altered_it_is_refused(self, unet) -> None:
        unet.conv_in.register_forward_hook(lambda *_: None)
        assert "conv_in has forward hooks" in str(inference.unknown_reason(unet))

    def test_with_other_blocks_it_is_refused(self) -> None:
        diffusers = pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")
        blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
        unet = diffusers.UNet2DModel(**{**SMALL, **blocks, "block_out_channels": (32, 32)})
        assert "no fused plan covers this UNet2DModel" in str(inference.unknown_reason(unet))
