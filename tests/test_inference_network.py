"""Reading a model: BatchNorm folded, time embeddings tabulated, altered models refused, nothing shared or changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from inference_models import make_unet, relative_error
from torch import nn

from ddpm_fast import UNet, inference
from ddpm_fast.inference import known, times
from ddpm_fast.inference.fold import conv_bn
from ddpm_fast.inference.network import Conv, Network, Output, Up


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_convolution_is_convolution_and_norm(bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(5, 7, 3, padding=1, bias=bias), nn.BatchNorm2d(7, affine=affine, eps=1e-3).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.01, 3)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    expected = norm.double()(conv.double()(x))
    weight, folded = conv_bn(conv.float(), norm.float())
    assert weight.dtype == folded.dtype == torch.float32
    assert relative_error(F.conv2d(x, weight.double(), folded.double(), padding=1), expected) < 1e-7


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_run_from_the_image_to_the_output(depth: int) -> None:
    net = make_unet(depth=depth)
    network = known.read(net)
    assert len(network.layers) == 4 * depth + 2 + depth + 1
    assert network.divisor == 2**depth
    written = set()
    for i, layer in enumerate(network.layers):
        if layer.source is None:
            assert i == 0
        else:
            for channel in range(layer.source.first, layer.source.first + layer.source.channels):
                assert (layer.source.buffer.name, channel) in written, f"{layer.name} reads what nobody wrote"
        for part in (getattr(layer, "target", None), getattr(layer, "pooled", None)):
            if part is not None:
                written |= {(part.buffer.name, part.first + c) for c in range(part.channels)}
    assert isinstance(network.layers[-1], Output)
    assert sum(isinstance(layer, Up) for layer in network.layers) == depth
    assert sum(isinstance(layer, Conv) and layer.pooled is not None for layer in network.layers) == depth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_changes_and_shares_nothing(dtype: torch.dtype) -> None:
    net = make_unet(num_classes=3).to(dtype)
    before = copy.deepcopy(net.state_dict())
    network = known.read(net)
    for tensor in network.tensors():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        tensor.zero_()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class TestTimeTable:
    @pytest.mark.parametrize("timesteps", [torch.arange(1000), torch.linspace(0, 999, 37)], ids=["index", "rescaled"])
    def test_every_row_is_the_modules_own_embedding(self, timesteps: torch.Tensor) -> None:
        net = make_unet(time_dim=64)
        network = known.read(net)
        table = times.table(network.time, timesteps)
        assert table.shape == (len(timesteps), network.time.weight.shape[0])
        assert table.dtype == torch.float32
        double = copy.deepcopy(net).double()
        features = double.time_embedding(timesteps).double()
        for layer in network.layers:
            if isinstance(layer, Conv) and layer.temb is not None:
                block = double.get_submodule(layer.name.removesuffix(".conv1"))
                expected = block.time_mlp(features)
                got = table[:, layer.temb : layer.temb + expected.shape[1]]
                assert float((got - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-6

    def test_another_t_gets_the_same_embedding(self) -> None:
        network = known.read(make_unet())
        t = torch.tensor([0, 17, 999])
        out = torch.zeros(3, network.time.weight.shape[0])
        times.embed(network.time, t, None, out)
        assert relative_error(out, times.table(network.time, t)) < 1e-6

    def test_a_label_adds_its_embedding_through_the_same_weights(self) -> None:
        net = make_unet(num_classes=4)
        network = known.read(net)
        assert network.time.null_label == 4
        assert network.time.labels is not None
        assert network.time.labels.shape == (5, network.time.weight.shape[0])
        layer = next(layer for layer in network.layers if isinstance(layer, Conv) and layer.name == "bottleneck.conv1")
        expected = net.label_embedding.weight.double() @ net.bottleneck.time_mlp.weight.double().T
        got = network.time.labels[:, layer.temb : layer.temb + expected.shape[1]]
        assert relative_error(got, expected) < 1e-6


class Other(UNet):
    """May have another forward; here it has not, but who is to know."""


def _hooked() -> UNet:
    net = make_unet()
    net.down1.conv2.register_forward_hook(lambda *_: None)
    return net


def _replaced() -> UNet:
    net = make_unet()
    net.bottleneck.norm1 = nn.GroupNorm(1, 64)
    return net


def _parametrised() -> UNet:
    net = make_unet()
    nn.utils.parametrizations.weight_norm(net.down1.conv1)
    return net.eval()


def _other_forward() -> UNet:
    net = make_unet()
    net.forward = lambda x, t: x  # type: ignore[method-assign, assignment]
    return net


def _batch_statistics() -> UNet:
    net = make_unet()
    net.down2.norm2 = nn.BatchNorm2d(32, track_running_stats=False).eval()
    return net


def _wider() -> UNet:
    """Runs, and reads and writes 96 channels where a plan of the class would keep 64."""
    net = make_unet()
    net.bottleneck.conv1, net.bottleneck.norm1 = nn.Conv2d(32, 96, 3, padding=1), nn.BatchNorm2d(96).eval()
    net.bottleneck.conv2, net.bottleneck.time_mlp = nn.Conv2d(96, 64, 3, padding=1), nn.Linear(32, 96)
    return net


def _dilated() -> UNet:
    net = make_unet()
    net.down1.conv1.dilation = net.down1.conv1.padding = (2, 2)
    return net


def _without_bias() -> UNet:
    net = make_unet()
    net.up1.bias = None
    return net


class TestWhatIsKnown:
    def test_the_unet_is(self) -> None:
        assert inference.knows(make_unet())
        assert inference.unknown_reason(make_unet()) is None
        assert isinstance(known.read(make_unet()), Network)

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda: nn.Conv2d(3, 3, 3), r"Conv2d; known are exactly: ddpm_fast\.nn\.unet\.UNet"),
            (lambda: Other(width=16, depth=1).eval(), "known for Other"),
            (lambda: lambda x, t: x, "known for function"),
            (_hooked, "down1.conv2 has forward hooks"),
            (_replaced, "bottleneck.norm1 is a GroupNorm"),
            (_parametrised, "down1.conv1 is a Parametrized"),
            (_other_forward, "forward of the model was replaced"),
            (_wider, r"bottleneck.conv1 is Conv2d\(32, 96,.*has Conv2d\(32, 64"),
            (_dilated, r"down1.conv1 is Conv2d\(.*dilation"),
            (_without_bias, "up1 is ConvTranspose2d"),
            (_batch_statistics, "down2.norm2 has no running statistics"),
        ],
    )
    def test_anything_else_is_refused_with_the_reason(self, make, reason: str) -> None:
        model = make()
        assert not inference.knows(model)
        with pytest.raises(TypeError, match=reason):
            inference.compile(model)
