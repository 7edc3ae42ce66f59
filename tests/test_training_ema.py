"""The average of the weights, beside ema_pytorch over hundreds of updates, and its state dicts both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ddpm_fast.training import EMA

ema_pytorch = pytest.importorskip("ema_pytorch", reason="pip install ema-pytorch")


def small_model() -> nn.Module:
    """With a floating buffer and one of integers, which is not averaged."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2, dtype=torch.float64))


def walk(model: nn.Module, step: int) -> None:
    """What an optimiser step might do, the same for every caller."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            else:
                tensor += 1


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = ours.state_dict(), theirs.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.995, "update_every": 10},
        {"beta": 0.9, "update_every": 1, "update_after_step": 20},
        {"beta": 0.9999, "update_every": 7, "update_after_step": 0, "power": 0.75, "inv_gamma": 2.0},
        {"beta": 0.999, "update_every": 3, "update_after_step": 50, "min_value": 0.4},
        {"beta": 1.0, "update_every": 2, "update_after_step": 40},
    ],
    ids=lambda options: f"beta{options['beta']}-every{options['update_every']}",
)
def test_the_rule_is_ema_pytorchs(options):
    model = small_model()
    ours, theirs = EMA(model, **options), ema_pytorch.EMA(model, **options)
    for step in range(300):
        walk(model, step)
        ours.update()
        theirs.update()
        if step % 37 == 0:
            assert_same(ours, theirs)
    assert_same(ours, theirs)
    assert int(ours.step) == 300
    average, current = ours.ema_model[0].weight, model[0].weight
    assert not torch.equal(average, current)


def test_a_step_by_hand():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.9, update_every=1, update_after_step=2)
    for step, weight in enumerate([1.0, 2.0, 3.0, 4.0, 5.0]):
        with torch.no_grad():
            model.weight.fill_(weight)
        ema.update()
        if step <= 2:
            assert ema.ema_model.weight.item() == weight
    decay = [1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3)]  # of the two calls after update_after_step
    expected = 3 * decay[0] + 4 * (1 - decay[0])
    expected = expected * decay[1] + 5 * (1 - decay[1])
    assert ema.ema_model.weight.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("direction", ["to ours", "to theirs"])
def test_state_dicts_go_both_ways(direction):
    """Loaded in the middle, the other one goes on as the first would have done."""
    options = {"beta": 0.95, "update_every": 5, "update_after_step": 30}
    model = small_model()
    first = (ema_pytorch.EMA if direction == "to ours" else EMA)(model, **options)
    for step in range(133):
        walk(model, step)
        first.update()
    state = copy.deepcopy(first.state_dict())
    other_model = small_model()
    second = (EMA if direction == "to ours" else ema_pytorch.EMA)(other_model, **options)
    second.load_state_dict(state)
    for step in range(133, 180):
        for one, ema in ((model, first), (other_model, second)):
            walk(one, step)
            ema.update()
    assert_same(*((second, first) if direction == "to ours" else (first, second)))


def test_copied_buffers_and_averaged_weights():
    """Integers too; tied weights are averaged once."""
    model = small_model()
    model.append(nn.Linear(4, 2))
    model[3].weight = model[2].weight = nn.Parameter(torch.ones(2, 4))
    ema = EMA(model, 0.5, update_every=1, update_after_step=0, min_value=0.5, buffers="copy")
    expected = None
    for step in range(4):
        walk(model, step)
        ema.update()
        weight = model[3].weight.detach().clone()
        expected = weight if expected is None else 0.5 * expected + 0.5 * weight
    for name, value in model.named_buffers():
        assert torch.equal(ema.ema_model.get_buffer(name), value), name
    assert ema.ema_model[1].num_batches_tracked == 4
    torch.testing.assert_close(ema.ema_model[3].weight, expected)
    assert ema.ema_model[2].weight is ema.ema_model[3].weight


def test_going_on_from_a_step():
    """What `ema_model` and a number of calls are enough for."""
    options = {"update_every": 3, "update_after_step": 4}
    model, other = small_model(), small_model()
    first, second = EMA(model, **options), EMA(other, **options)
    for step in range(20):
        walk(model, step)
        first.update()
    other.load_state_dict(model.state_dict())
    second.ema_model.load_state_dict(first.ema_model.state_dict())
    second.go_on_from(20)
    for step in range(20, 30):
        for one, ema in ((model, first), (other, second)):
            walk(one, step)
            ema.update()
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_files_of_old_releases_load():
    model = small_model()
    state = {**EMA(model).state_dict(), "initted": torch.tensor([1.0]), "step": torch.tensor([57])}
    ema = EMA(model)
    ema.load_state_dict(state)
    assert bool(ema.initted)
    assert int(ema.step) == 57
    before = copy.deepcopy(ema.ema_model.state_dict())
    walk(model, 0)
    ema.update()  # the 58th call, which update_every=10 does not divide
    assert all(torch.equal(value, before[key]) for key, value in ema.ema_model.state_dict().items())


def test_what_is_averaged_is_a_copy_without_gradients():
    model = small_model()
    ema = EMA(model, update_every=1)
    assert ema.online_model is model
    assert not any(parameter.requires_grad for parameter in ema.ema_model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    version = ema.ema_model[0].weight._version
    ema.update()
    assert ema.ema_model[0].weight._version > version, "plans made of the average notice that it moved"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, "beta must be in 0..1, got 1.5"),
        ({"update_every": 0}, "update_every must be at least 1, got 0"),
        ({"buffers": "keep"}, "buffers must be 'average' or 'copy', got 'keep'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(nn.Linear(1, 1), **options)
