"""OpenAI's checkpoints: the published architecture, written anew in openai_unet.py, beside ours."""

import copy

import pytest
import torch
from openai_unet import CONFIGS, authority, flags_of, inputs_of

from ddpm_fast.interop.openai import UNetModel, from_openai, load_unet, to_openai
from ddpm_fast.nn import DDPMUNet

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 2e-5


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def same(got, expected):
    assert list(got) == list(expected)
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []


def model_of(name):
    """Our drop-in class, told what OpenAI's would be told."""
    config = {"multipliers": (1, 2), "factors": (2,), "num_channels": 32, "num_res_blocks": 1, **CONFIGS[name]}
    return UNetModel(
        8,
        3,
        config["num_channels"],
        config.get("out_channels", 3),
        config["num_res_blocks"],
        config["factors"],
        channel_mult=config["multipliers"],
        num_classes=config.get("num_classes"),
        dropout=config.get("dropout", 0),
        use_scale_shift_norm=config.get("scale_shift", False),
        resblock_updown=config.get("updown", False),
        **flags_of(name),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_same_output_and_back_bit_for_bit(name):
    theirs, flags = authority(name), flags_of(name)
    net = from_openai(theirs.state_dict(), **flags)
    assert type(net) is DDPMUNet
    assert not net.training
    x, t, y = inputs_of(name)
    with torch.no_grad():
        expected = theirs(x, t, y)
        assert relative(net(x, t, y), expected) < BOUND
        assert relative(net(x, t.float() + 0.25, y), theirs(x, t + 0.25, y)) < BOUND
    same(to_openai(net, use_new_attention_order=flags["use_new_attention_order"]), theirs.state_dict())

    model = model_of(name)
    model.load_state_dict(theirs.state_dict())
    same(model.state_dict(), theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(x, t, y), net(x, t, y))


def test_order_and_heads_matter():
    """So the agreement above is one of the layouts, not of what does not depend on them."""
    theirs, (x, t, _) = authority("heads_on_all_levels"), inputs_of("plain")
    with torch.no_grad():
        expected = theirs(x, t)
        for flags in ({"num_heads": 4, "use_new_attention_order": True}, {"num_heads": 2}, {"num_head_channels": 16}):
            assert relative(from_openai(theirs.state_dict(), **flags)(x, t), expected) > 1e-3
