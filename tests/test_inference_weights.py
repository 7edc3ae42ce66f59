"""A plan never computes with old weights, however they were changed; and reads them again without moving its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from inference_models import exact, inputs, make_unet, measured_anew, one_thread, relative_error
from torch import nn

from ddpm_fast import UNet, inference
from ddpm_fast.inference import watch

pytestmark = pytest.mark.usefixtures(one_thread.__name__, measured_anew.__name__)

Change = Callable[[UNet], None]


def _load(net: UNet) -> None:
    net.load_state_dict(make_unet(seed=5, num_classes=2).state_dict())


def _assign(net: UNet) -> None:
    net.load_state_dict(make_unet(seed=5, num_classes=2).state_dict(), assign=True)


def _optimise(net: UNet) -> None:
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net(*inputs(1, (3, 8, 8))).square().sum().backward()
    optimiser.step()


@torch.no_grad()
def _in_place(net: UNet) -> None:
    net.conv_up1.conv2.weight[3, 2, 1, 1] += 5


@torch.no_grad()
def _statistics(net: UNet) -> None:
    net.down2.norm1.running_var.mul_(1.5)


@torch.no_grad()
def _train_and_back(net: UNet) -> None:
    net.train()
    net(*inputs(4, (3, 8, 8)))
    net.eval()


def _eps(net: UNet) -> None:
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1


def _parameter(net: UNet) -> None:
    net.output.bias = nn.Parameter(net.output.bias + 1)


def _submodule(net: UNet) -> None:
    net.bottleneck.conv1 = nn.Conv2d(32, 64, 3, padding=1)


def _data(net: UNet) -> None:
    net.up1.weight.data = net.up1.weight.data * 2


def _average(net: UNet) -> None:
    """As an exponential average is often copied back: nothing counts this."""
    other = make_unet(seed=5, num_classes=2)
    for own, theirs in zip(net.parameters(), other.parameters(), strict=True):
        own.data.copy_(theirs.data)


def _embedding(net: UNet) -> None:
    net.label_embedding.weight.data.neg_()


def _dtype(net: UNet) -> None:
    net.bfloat16()


CHANGES = [_load, _assign, _optimise, _in_place, _statistics, _train_and_back, _parameter, _submodule, _data]
CHANGES += [_eps, _average, _embedding, _dtype]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("how", ["call", "rows"])
def test_changed_weights_are_read_again(change: Change, how: str) -> None:
    net = make_unet(num_classes=2)
    x, t = inputs(2, (3, 8, 8))
    fused = inference.compile(net, timesteps=torch.arange(1000), dtype=torch.float32)

    def run() -> torch.Tensor:
        if how == "call":
            return fused(x, t)
        fused.refresh_if_changed()
        return fused.at_rows(x, t)

    before = run()
    change(net)
    after = run()
    assert relative_error(before, exact(net, x, t)) > 1e-4, "the change changes nothing: no test"
    assert relative_error(after, exact(net, x, t)) < 1e-5


def test_a_single_uncounted_write_is_found_by_looking_at_everything() -> None:
    net = make_unet()
    x, t = inputs(1, (3, 8, 8))
    fused = inference.compile(net)
    fused(x, t)
    weight = net.bottleneck.conv2.weight
    weight.data.view(-1)[weight.numel() // 2 + 777] += 30
    fused.refresh_if_changed()
    assert relative_error(fused(x, t), exact(net, x, t)) < 1e-5


def test_a_channels_last_model_is_watched_too() -> None:
    net = make_unet().to(memory_format=torch.channels_last)
    x, t = inputs(1, (3, 8, 8))
    fused = inference.compile(net)
    fused(x, t)
    net.down1.conv2.weight.data.mul_(2)
    assert relative_error(fused(x, t), exact(net, x, t)) < 1e-5
    net.down1.conv2.weight.data[7, 7, 2, 2] += 30
    fused.refresh_if_changed()
    assert relative_error(fused(x, t), exact(net, x, t)) < 1e-5


def test_unchanged_weights_are_not_read_again(monkeypatch) -> None:
    net = make_unet()
    x, t = inputs(1, (3, 8, 8))
    fused = inference.compile(net)
    monkeypatch.setattr(fused, "refresh", lambda: pytest.fail("read again"))
    for _ in range(3):
        fused(x, t)
        fused.refresh_if_changed()
    copy.deepcopy(net).load_state_dict(net.state_dict())
    fused(x, t)


def test_everything_stays_where_it_is() -> None:
    """A captured CUDA graph, and a program of addresses, go on with the new weights."""
    net = make_unet(num_classes=2)
    x, t = inputs(2, (3, 8, 8))
    fused = inference.compile(net, timesteps=torch.arange(10))
    fused(x, t)
    plan = fused.plan(2, 8, 8)
    tensors = [*fused._network.tensors(), fused._table]
    tensors += [packed for _, packed in fused._packs._kept.values() if not packed.is_mkldnn]
    places = [tensor.data_ptr() for tensor in tensors]
    _load(net)
    fused(x, t)
    assert fused.plan(2, 8, 8) is plan
    now = [*fused._network.tensors(), fused._table]
    now += [packed for _, packed in fused._packs._kept.values() if not packed.is_mkldnn]
    assert [tensor.data_ptr() for tensor in now] == places


def test_a_model_that_moved_where_the_images_are_not_is_refused() -> None:
    net = make_unet()
    x, t = inputs(1, (3, 8, 8))
    fused = inference.compile(net)
    fused(x, t)
    net.to("meta")
    with pytest.raises(ValueError, match="x must be on meta, where the model is, got cpu"):
        fused(x, t)


def _other_part(net: UNet) -> None:
    net.bottleneck.norm2 = nn.Identity()


def _hook(net: UNet) -> None:
    net.up1.register_forward_hook(lambda *_: None)


def _forward(net: UNet) -> None:
    net.forward = lambda x, t: x  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_part, r"bottleneck\.norm2 is a Identity"),
        (_hook, "up1 has forward hooks"),
        (_forward, "the forward of the model was replaced"),
    ],
)
def test_a_model_that_became_another_is_refused(change: Change, message: str) -> None:
    net = make_unet()
    x, t = inputs(1, (3, 8, 8))
    fused = inference.compile(net)
    fused(x, t)
    change(net)
    for _ in range(2):  # and stays so
        with pytest.raises(TypeError, match=message):
            fused(x, t)


def test_weights_are_left_alone() -> None:
    net = make_unet(num_classes=2)
    before = copy.deepcopy(net.state_dict())
    fused = inference.compile(net, dtype=torch.bfloat16)
    fused(*inputs(2, (3, 8, 8)))
    assert net.state_dict().keys() == before.keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("together", [1 << 24, 1000])
def test_what_a_gpu_adds_up_in_groups_shows_every_change(monkeypatch, together) -> None:
    """The way of a GPU, on a CPU: of bfloat16 with an odd number of values and of parts of a tensor, too."""
    monkeypatch.setattr(watch, "_on_host", lambda tensors: False)
    monkeypatch.setattr(watch, "TOGETHER", together)
    net = nn.Sequential(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.Linear(3, 5).bfloat16())
    net.append(nn.BatchNorm2d(8)).append(nn.Linear(40, 30))
    net[1].weight = nn.Parameter(torch.randn(5, 6, dtype=torch.bfloat16)[:, ::2])
    seen = watch.Watch(net)
    assert len(seen._groups) == (1 if together > 1000 else 3)
    assert [tensor.shape for tensor in seen._others] == [(5, 3), (5,)]
    assert not seen.contents_changed()
    for tensor in [value for value in net.state_dict().values() if value.is_floating_point()]:
        for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
            tensor.data[np.unravel_index(place, tensor.shape)] += 0.5
            assert not seen.moved()
            assert seen.contents_changed()
            seen.note()
    assert not seen.contents_changed()
