"""What a U-Net does in training mode on a CPU: the fused norm, and weight gradients made of matrix products."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support import rand
from torch import nn

from ddpm_fast.nn import ConvBlock, UNet, convolution

SHAPES = [(4, 5, 6, 2, 2), (4, 3, 7, 4, 4), (5, 4, 4, 1, 1), (4, 4, 5, 1, 7), (6, 2, 3, 5, 1), (4, 3, 3, 2, 5)]


@pytest.fixture
def small(monkeypatch):
    """The products serve layers of few channels, too, and the first layer's way is that of no other."""
    monkeypatch.setattr(convolution, "FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(convolution, "FEWEST_TRANSPOSED", 1)


def layer_of(inputs, outputs, **options):
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def run(function, layer, x, g):
    """Output, and the gradients of x and the layer's parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = function(x, layer)
    y.backward(g.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


HALF = {"rtol": 2e-2, "atol": 3e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_layer(small, shape, kind, dtype):
    n, inputs, outputs, *image = shape
    layer = layer_of(inputs, outputs).to(dtype)
    x, g = rand((n, inputs, *image), dtype, 1, kind), rand((n, outputs, *image), dtype, 2)
    got = run(convolution.conv3x3, layer, x, g)
    exact = run(lambda x, layer: layer(x), copy.deepcopy(layer).double(), x.double(), g.double())
    close = HALF if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for mine, true in zip(got, exact, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, **close)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 3, 8, 7, 5), (5, 1, 4, 6, 6)], ids=str)
def test_the_first_layer(shape, kind):
    """Few channels, no gradient of the image: its neighbourhoods as columns."""
    n, inputs, outputs, *image = shape
    layer = layer_of(inputs, outputs).bfloat16()
    x, g = rand((n, inputs, *image), torch.bfloat16, 1, kind), rand((n, outputs, *image), torch.bfloat16, 2)
    assert convolution._kind(x, layer, torch.bfloat16) == "columns"
    assert convolution._kind(x, layer, torch.float32) == "onednn"
    exact = copy.deepcopy(layer).double()
    convolution.conv3x3(x, layer).backward(g)
    exact(x.double()).backward(g.double())
    for mine, true in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, **HALF)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 6, 4, 3, 5), (1, 2, 3, 1, 1), (4, 5, 1, 2, 2)], ids=str)
def test_transposed_gradients_are_those_of_the_layer(small, shape, kind):
    n, inputs, outputs, height, width = shape
    layer = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    x, g = rand((n, inputs, height, width), seed=1, kind=kind), rand((n, outputs, 2 * height, 2 * width), seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(convolution.conv_transpose2x2, layer, x, g)
        assert "_ConvTranspose2x2" in type(convolution.conv_transpose2x2(x, layer).grad_fn).__name__
    exact = run(lambda x, layer: layer(x), copy.deepcopy(layer).double(), x.double(), g.double())
    assert [value.dtype for value in got] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, true in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, **HALF)
    plain = convolution.conv_transpose2x2(x.requires_grad_(), layer)  # float32: the layer itself
    assert "_ConvTranspose2x2" not in type(plain.grad_fn).__name__


@pytest.mark.parametrize("image", [(4, 4), (2, 2), (1, 2), (1, 4)], ids=str)
def test_gradients_under_autocast(small, image):
    """Products in bfloat16, gradients of the float32 weights in float32, no further from float64 than eager's."""
    layer = layer_of(12, 10)
    x, g = rand((8, 12, *image), seed=1), rand((8, 10, *image), seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(convolution.conv3x3, layer, x, g)
        theirs = run(lambda x, layer: layer(x), layer_of(12, 10), x, g)
    exact = run(lambda x, layer: layer(x), layer_of(12, 10).double(), x.double(), g.double())
    for ours, eager, true in zip(mine, theirs, exact, strict=True):
        assert ours.dtype == eager.dtype
        assert (ours - true).norm() <= 1.1 * (eager - true).norm() + 1e-6


class Shouting(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_only_plain_layers_are_replaced(small, monkeypatch):
    monkeypatch.setattr(convolution._Conv3x3, "apply", lambda *a: pytest.fail("a layer that is not plain was replaced"))
    hooked = layer_of(3, 3)
    hooked.register_forward_hook(lambda module, args, y: y * 2)
    frozen = layer_of(3, 3).requires_grad_(False)
    others = [
        Shouting(3, 3, 3, padding=1), layer_of(3, 3, stride=2), layer_of(3, 3, padding_mode="circular"), hooked, frozen,
        nn.Conv2d(3, 3, 1), layer_of(3, 3, groups=3),
    ]  # fmt: skip
    x = rand((4, 3, 4, 4))
    for layer in others:
        torch.testing.assert_close(convolution.conv3x3(x, layer), layer(x))
    plain = layer_of(3, 3)
    convolution.conv3x3(x[:3], plain)
    convolution.conv3x3(rand((4, 3, 5, 5)), plain)
    with torch.no_grad():
        convolution.conv3x3(x, plain)


def plain_block(block, x, t_emb):
    h = F.silu(block.norm1(block.conv1(x))) + block.time_mlp(t_emb)[:, :, None, None]
    return F.silu(block.norm2(block.conv2(h)))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return ConvBlock(6, 8, 32)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_a_block_trains_as_its_layers_do(small, block, kind):
    theirs = copy.deepcopy(block)
    x, t_emb, g = rand((5, 6, 4, 4), seed=1, kind=kind), rand((5, 32), seed=2), rand((5, 8, 4, 4), seed=3)
    y, expected = block(x, t_emb), plain_block(theirs, x, t_emb)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.backward(g)
    expected.backward(g)
    # The convolutions' biases have no effect on what is normalised: their gradients are 0 but for rounding.
    for (name, mine), true in zip(block.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)
    for mine, true in zip(block.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-6)
    assert int(block.norm1.num_batches_tracked) == 1


def test_other_norms_are_called(block):
    """A norm with a hook, another class, a cumulative average: what it does is done."""
    x, t_emb = rand((5, 6, 4, 4), seed=1), rand((5, 32), seed=2)
    seen = []
    block.norm1.register_forward_hook(lambda *a: seen.append(1))
    block(x, t_emb)
    assert seen == [1]
    block.norm2.momentum = None
    block.norm2.reset_running_stats()
    torch.testing.assert_close(block(x, t_emb), plain_block(block, x, t_emb))
    assert int(block.norm2.num_batches_tracked) == 2
    block.norm1, block.norm2 = nn.Identity(), nn.BatchNorm2d(8, track_running_stats=False, affine=False)
    torch.testing.assert_close(block(x, t_emb), plain_block(block, x, t_emb), rtol=1e-5, atol=1e-5)


@pytest.mark.no_poison
def test_training_compiles_whole(small):
    torch.manual_seed(0)
    unet = UNet(1, 32, width=4, depth=1)
    x, t = rand((4, 1, 4, 4)), torch.tensor([1, 2, 3, 4])
    compiled = torch.compile(copy.deepcopy(unet), fullgraph=True, backend="eager")
    compiled(x, t).square().mean().backward()
    unet(x, t).square().mean().backward()
    for mine, true in zip(compiled.parameters(), unet.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-4, atol=1e-5)
    for mine, true in zip(compiled.buffers(), unet.buffers(), strict=True):
        torch.testing.assert_close(mine, true)
