"""OpenAI's checkpoints: the published architecture, written anew in openai_unet.py, beside ours."""

import argparse
import copy
import pickle

import pytest
import torch
from openai_unet import CONFIGS, OpenAIUNet, authority, flags_of, inputs_of

from ddpm_fast.interop import to_diffusers
from ddpm_fast.interop._openai_keys import to_ours, to_theirs
from ddpm_fast.interop.openai import (
    UNetModel,
    add_dict_to_argparser,
    args_to_dict,
    create_model,
    create_model_and_diffusion,
    from_openai,
    load_unet,
    model_and_diffusion_defaults,
    to_openai,
)
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


@pytest.mark.parametrize("name", ["heads_on_all_levels", "guided"])
def test_gradients(name):
    theirs = authority(name)
    model = model_of(name).eval()
    model.load_state_dict(theirs.state_dict())
    x, t, y = inputs_of(name)
    for net in (theirs, model):
        (net(x, t, y) ** 2).mean().backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    got = to_theirs(grads, model.config, model.use_new_attention_order)
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    for key, parameter in theirs.named_parameters():  # some are 0 but for rounding, as of a bias before a norm
        scale = max(float(parameter.grad.abs().max()), 1e-3 * largest)
        assert float((got[key] - parameter.grad).abs().max()) < 1e-4 * scale, key


# -- files and flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt", "legacy", "safetensors"])
def test_files(kind, tmp_path):
    theirs = authority("classes_scale_shift")
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=kind == "pt")
    net = load_unet(path, image_size=8, num_heads=4)
    assert (net.sample_size, net.num_classes, net.training) == (8, 7, False)
    same(to_openai(net), theirs.state_dict())


def test_half_precision_is_read():
    theirs = authority("heads")
    for part in (theirs.input_blocks, theirs.middle_block, theirs.output_blocks):
        part.half()  # as convert_to_fp16 does there
    state = theirs.state_dict()
    net = from_openai(state, num_heads=4, use_fp16=True)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert torch.equal(net.mid_block.resnets[0].conv1.weight, state["middle_block.0.in_layers.2.weight"].float())
    assert from_openai(state, num_heads=4, dtype=torch.bfloat16).dtype == torch.bfloat16
    model = model_of("heads")
    model.load_state_dict(state)
    x, t, _ = inputs_of("heads")
    with torch.no_grad():
        expected = model.eval()(x, t)
        model.convert_to_fp16()
        got = model(x, t)
        assert got.dtype == torch.float32
        assert 0 < relative(got, expected) < 0.02
        model.convert_to_fp32()
        assert model(x, t).dtype == torch.float32


def test_what_weights_say_agrees_with_flags():
    """All flags of a script at once, those of the process among them, and those that are wrong are named."""
    config = {"num_channels": 32, "multipliers": (1, 2, 2, 2), "factors": (2, 4), "scale_shift": True, "num_heads": 4}
    state = OpenAIUNet(**config, num_res_blocks=2).state_dict()
    flags = {**model_and_diffusion_defaults(), "image_size": 32, "num_channels": 32}
    net = from_openai(state, **flags)
    assert net.config["attention_head_dim"] == 16  # of 64 channels, everywhere
    assert (net.sample_size, net.config["layers_per_block"]) == (32, 2)
    assert from_openai(state, num_heads=1).config["attention_head_dim"] == 64
    assert from_openai(state, num_head_channels=16).config["attention_head_dim"] == 16
    wrong = {
        "num_channels": (64, "num_channels is 64 by the flags, but the state dict has 32"),
        "num_res_blocks": (3, "num_res_blocks is 3 by the flags, but the state dict has 2"),
        "learn_sigma": (True, "learn_sigma is True by the flags, but the state dict has False"),
        "class_cond": (True, "class_cond is True by the flags"),
        "use_scale_shift_norm": (False, "use_scale_shift_norm is False by the flags"),
        "resblock_updown": (True, "resblock_updown is True by the flags"),
        "channel_mult": ("1,2,3,4", r"makes levels of \(32, 64, 96, 128\) channels, but the state dict has \(32, 64"),
        "attention_resolutions": ("8", "is '8' by the flags, but the state dict has '16,8'"),
        "image_size": (36, r"image_size must be a multiple of 8 \(4 levels\), got 36"),
        "num_heads": (3, "num_heads must divide the channels of every attention, got 3 of 64"),
        "num_head_channels": (48, "num_head_channels must divide the channels of every attention, got 48 of 64"),
        "conv_resample": (False, "conv_resample=False is not covered"),
        "dims": (3, "dims=3 is not covered"),
        "small_size": (64, "'small_size' is no flag of improved- or guided-diffusion"),
    }
    for name, (value, message) in wrong.items():
        one_line(message, lambda value=value, name=name: from_openai(state, **{**flags, name: value}))
    one_line("num_heads or num_head_channels is needed", lambda: from_openai(state))
    one_line("pass image_size too", lambda: from_openai(state, num_heads=4, attention_resolutions="16,8"))
    one_line("must look like", lambda: from_openai(state, **{**flags, "channel_mult": "one"}))
    one_line("must look like", lambda: from_openai(state, **{**flags, "attention_resolutions": "16,x"}))


def one_line(message, call, kind=ValueError):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    state = authority("heads").state_dict()
    bad = {
        "missing: middle_block.1.proj_out.bias": without(state, "middle_block.1.proj_out.bias"),
        "unexpected: middle_block.3.weight": {**state, "middle_block.3.weight": torch.zeros(1)},
        "missing: input_blocks.1.0.in_layers.2.weight": without(state, "input_blocks.1.0.in_layers.2.weight"),
        r"out.0.weight has shape \(31,\), expected \(32,\)": {**state, "out.0.weight": torch.zeros(31)},
        "no weights for input_blocks.2.*conv_resample=False": without(
            state, "input_blocks.2.0.op.weight", "input_blocks.2.0.op.bias"
        ),
        "classifier, EncoderUNetModel": {key: v for key, v in state.items() if "output_blocks" not in key},
        "UNet2DModel; see ddpm_fast.interop.load_unet": to_ours(state, DDPMUNet_of("heads"), False),
        "lucidrains' Unet": {"init_conv.weight": torch.zeros(8, 3, 7, 7)},
        "prefix 'module.'": {f"module.{key}": value for key, value in state.items()},
        "something else: its keys are a, b": {"a": torch.zeros(1), "b": torch.zeros(1)},
        "something else: its keys are none": {},
        "must hold tensors by name, got int under 'step'": {"step": 3},
        "covered is dims=2 only": {**state, "input_blocks.0.0.weight": torch.zeros(32, 3, 3)},
        "SuperResModel": authority("heads", in_channels=6).state_dict(),
        "takes 3 channels and gives 4": authority("heads", out_channels=4).state_dict(),
    }
    for message, wrong in bad.items():
        one_line(message, lambda wrong=wrong: from_openai(wrong, num_heads=4))
    path = tmp_path / "ema.pt"
    one_line("no file", lambda: load_unet(path, num_heads=4), FileNotFoundError)
    path.write_bytes(b"no weights")
    one_line("cut off or holds something other than weights", lambda: load_unet(path, num_heads=4))
    torch.save([1, 2], path)
    one_line("ema.pt must hold a state dict", lambda: load_unet(path, num_heads=4))
    torch.save(without(state, "out.2.bias"), path)
    one_line("ema.pt does not fit the network; missing: out.2.bias", lambda: load_unet(path, num_heads=4))
    model = model_of("heads")
    one_line("missing: out.2.bias", lambda: model.load_state_dict(without(state, "out.2.bias")), RuntimeError)
    assert model.load_state_dict(without(state, "out.2.bias"), strict=False).missing_keys == ["conv_out.bias"]


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


def DDPMUNet_of(name):
    return from_openai(authority(name).state_dict(), **flags_of(name)).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freq_shift": 1}, "has no freq_shift=1, only 0"),
        ({"downsample_padding": 0}, "has no downsample_padding=0, only 1"),
        ({"mid_block_type": None}, "has no mid_block_type=None"),
        ({"down_block_types": ("DownBlock2D", "DownBlock2D")}, "attention"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}, "resamples either by residual blocks"),
        ({"resnet_time_scale_shift": "scale_shift"}, "has no attn_norm_num_groups=None, only 32"),
        ({"attention_head_dim": 24}, "heads that divide the 64 channels"),
        ({"time_embedding_dim": 64}, "time_embedding_dim of 128, not 64"),
    ],
)
def test_networks_that_openai_cannot_hold_are_named(change, message):
    config = {**DDPMUNet_of("plain"), **change}
    one_line(message, lambda: to_openai(DDPMUNet(**config)))
    with pytest.raises(TypeError, match="net must be a DDPMUNet, got Linear"):
        to_openai(torch.nn.Linear(1, 1))


def test_diffusers_takes_what_it_has_words_for():
    diffusers = pytest.importorskip("diffusers")
    for name in ("guided", "updown_scale_shift", "one_head_everywhere"):
        net = from_openai(authority(name).state_dict(), **flags_of(name))
        x, t, y = inputs_of(name)
        with torch.no_grad():
            assert relative(to_diffusers(net)(x, t, y).sample, net(x, t, y)) < BOUND
    assert diffusers.UNet2DModel is type(to_diffusers(net))
    uneven = from_openai(authority("heads_on_all_levels").state_dict(), num_heads=4)
    one_line("UNet2DModel has no num_attention_heads", lambda: to_diffusers(uneven))


# -- the class as code uses it ----------------------------------------------------------------------------------------


def test_state_dicts_in_all_the_ways_that_modules_have():
    theirs, model = authority("heads"), model_of("heads")
    state = theirs.state_dict()
    model.load_state_dict(state, assign=True)
    own = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    assert "conv_in.weight" in own
    other = model_of("heads")
    other.load_state_dict(own)  # DDPMUNet's names, as named_parameters gives them
    same(other.state_dict(), state)
    # as OpenAI's training loop stores averaged weights: by the parameters' names, over the network's own state dict
    stored = {**model_of("heads").state_dict(), **own}
    other = model_of("heads")
    other.load_state_dict(stored)
    same(other.state_dict(), state)
    whole = torch.nn.ModuleDict({"net": model_of("heads"), "more": torch.nn.Linear(2, 2)})
    expected = {**{f"net.{key}": value for key, value in state.items()}, "more.weight": torch.ones(2, 2)}
    whole.load_state_dict({**expected, "more.bias": torch.zeros(2)})
    same({key: value for key, value in whole.state_dict().items() if key != "more.bias"}, expected)
    same(copy.deepcopy(model).state_dict(), state)
    same(pickle.loads(pickle.dumps(model)).state_dict(), state)


def test_created_as_scripts_create_it():
    flags = model_and_diffusion_defaults(guided=True)
    flags |= {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "class_cond": True, "learn_sigma": True}
    flags |= {"num_head_channels": 32, "resblock_updown": True, "timestep_respacing": "250", "channel_mult": "1,2,2"}
    model, diffusion = create_model_and_diffusion(**flags)
    assert (diffusion.num_timesteps, diffusion.original_num_steps, diffusion.rescale_timesteps) == (250, 1000, False)
    assert (model.image_size, model.num_classes, model.out_channels, model.channel_mult) == (64, 1000, 6, (1, 2, 2))
    assert model.attention_resolutions == (4,)  # 16 of 64, and 8 is below the last level
    config = {"num_channels": 32, "multipliers": (1, 2, 2), "factors": (4,), "num_head_channels": 32, "updown": True}
    expected = OpenAIUNet(**config, num_classes=1000, out_channels=6, scale_shift=True).state_dict()
    got = model.state_dict()
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in expected.items()}
    zero = [key for key, value in got.items() if key.endswith("weight") and not value.any()]
    ends = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
    assert zero == [key for key in got if key.endswith(ends)]
    x, y = torch.randn(1, 3, 64, 64), torch.tensor([3])
    with torch.no_grad():
        assert not model(x, torch.tensor([5]), y).any()
    one_line("takes y, labels in 0..999, and none was given", lambda: model(x, torch.tensor([5])))
    one_line("takes no y, and one was given", lambda: model_of("plain")(x, torch.tensor([5]), y))


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_channel_mult_of_every_image_size(size):
    widths = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
    expected = tuple(64 * m for m in widths.get(size, (0.5, 1, 1, 2, 2, 4, 4)))
    with torch.device("meta"):
        model = create_model(size, 64, 1, attention_resolutions="32,16,8", num_heads=4)
    assert model.config["block_out_channels"] == expected
    attends = tuple(block.startswith("Attn") for block in model.config["down_block_types"])
    assert attends == tuple(size >> level in (32, 16, 8) for level in range(len(expected)))


def test_flags_and_the_command_line():
    improved, guided = model_and_diffusion_defaults(), model_and_diffusion_defaults(guided=True)
    assert (len(improved), len(guided)) == (19, 23)
    assert (improved["rescale_timesteps"], improved["rescale_learned_sigmas"]) == (True, True)
    assert (guided["rescale_timesteps"], guided["rescale_learned_sigmas"]) == (False, False)
    assert set(improved) - set(guided) == {"sigma_small"}
    assert set(guided) - set(improved) == {
        *("num_head_channels", "channel_mult", "resblock_updown", "use_fp16", "use_new_attention_order")
    }
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**guided, "model_path": None})
    args = parser.parse_args(
        ["--learn_sigma=True", "--use_fp16=no", "--num_channels=192", "--dropout=0.1", "--model_path=a"]
    )
    read = args_to_dict(args, guided)
    assert read == {**guided, "learn_sigma": True, "num_channels": 192, "dropout": 0.1}
    assert args.model_path == "a"
    with pytest.raises(SystemExit):
        parser.parse_args(["--learn_sigma", "maybe"])
    one_line("rescale_timesteps is needed", lambda: create_model_and_diffusion(image_size=64))
    one_line("'large_size' is no flag", lambda: create_model_and_diffusion(**guided, large_size=256))
    one_line("image_size must be one of 512, 256, 128, 64, 32 without", lambda: create_model(48, 32, 1))
    one_line("must be a multiple of 8", lambda: create_model(36, 32, 1, channel_mult="1,2,2,2"))
    one_line("dims=3 is not covered", lambda: UNetModel(8, 3, 32, 3, 1, (), dims=3))


RELEASED = {"attention_resolutions": "32,16,8", "learn_sigma": True, "resblock_updown": True}


@pytest.mark.parametrize(
    ("millions", "flags"),
    [
        (296, {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64, **RELEASED}),
        (559, {"image_size": 512, "num_channels": 256, "num_res_blocks": 2, "num_head_channels": 64, **RELEASED}),
    ],
)
def test_as_large_as_published(millions, flags):
    """Dhariwal & Nichol 2021, tables 11 and 12: the parameters of the ImageNet models."""
    with torch.device("meta"):
        model = create_model(**flags, class_cond=True, use_scale_shift_norm=True)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_flags_may_be_text():
    """As an ArgumentParser without types gives them; "False" is not true."""
    text = {
        "image_size": "32", "num_channels": "32", "num_res_blocks": "1", "channel_mult": "1,1", "num_heads": "2",
        "attention_resolutions": "16", "dropout": "0.1", "class_cond": "True", "learn_sigma": "False",
        "use_scale_shift_norm": "False", "diffusion_steps": "20", "rescale_timesteps": "False",
        "rescale_learned_sigmas": "false", "timestep_respacing": "5",
    }  # fmt: skip
    model, diffusion = create_model_and_diffusion(**text)
    assert (model.config["num_class_embeds"], model.config["out_channels"]) == (1000, 3)
    assert model.config["resnet_time_scale_shift"] == "default"
    assert (diffusion.num_timesteps, diffusion.rescale_timesteps) == (5, False)
    net = from_openai(model.state_dict(), use_new_attention_order="False", **text)
    assert net.config == model.config
    reordered = from_openai(model.state_dict(), use_new_attention_order="True", **text)
    assert not torch.equal(reordered.mid_block.attentions[0].to_k.weight, net.mid_block.attentions[0].to_k.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_cond": "maybe"}, "class_cond must be True or False, got 'maybe'"),
        ({"class_cond": 1}, "class_cond must be True or False, got 1"),
        ({"num_channels": "many"}, "num_channels must be a whole number, got 'many'"),
        ({"num_channels": 32.5}, r"num_channels must be a whole number, got 32\.5"),
        ({"num_heads": True}, "num_heads must be a whole number, got True"),
        ({"dropout": "a"}, "dropout must be a number, got 'a'"),
        ({"diffusion_steps": None}, "diffusion_steps must be a whole number, got None"),
    ],
)
def test_flags_of_another_type_are_named(change, message):
    flags = {**model_and_diffusion_defaults(guided=True), "image_size": 32, "num_channels": 32, "channel_mult": "1"}
    with pytest.raises(ValueError, match=message):
        create_model_and_diffusion(**{**flags, **change})


@pytest.mark.parametrize("key", ["out.2.weight", "label_emb.weight", "input_blocks.1.0.in_layers.2.weight"])
def test_a_number_in_place_of_a_weight_is_named(key):
    state = UNetModel(32, 3, 32, 3, 1, (), num_classes=4, channel_mult=(1, 1)).state_dict()
    with pytest.raises(ValueError, match=rf"{key} is a single number"):
        from_openai({**state, key: torch.tensor(1.0)}, num_heads=1)
