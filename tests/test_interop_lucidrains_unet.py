"""Networks and checkpoints of lucidrains' own package: exact to the bit, and what a checkpoint lacks is named."""

import copy
import inspect
import random

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")
pytest.importorskip("safetensors", reason="pip install safetensors")

import diffusers
import safetensors.torch
import torch
from rms_configs import OPTIONS, SMALL, config_of, inputs_of
from torch import nn

import ddpm_fast
from ddpm_fast.interop import lucidrains as ours
from ddpm_fast.interop._lucidrains_unet import BUFFERS, unet_arguments
from ddpm_fast.interop.lucidrains import from_lucidrains, load_unet
from ddpm_fast.nn import RMSNormUNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def theirs(lucidrains):
    """(name, **changes) -> the package's network of that config, in eval mode."""

    def make(name="plain", seed=0, **changes):
        torch.manual_seed(seed)
        return lucidrains.Unet(**{**config_of(name), **changes}).eval()

    return make


@pytest.fixture
def trainer(lucidrains, theirs, tmp_path):
    """A Trainer of the real package on a CPU, after two updates of its average; no images are read."""
    image = pytest.importorskip("PIL.Image")
    for i in range(100):
        image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    diffusion = lucidrains.GaussianDiffusion(theirs("self condition").train(), image_size=8, timesteps=10)
    trainer = lucidrains.Trainer(
        diffusion, str(tmp_path), results_folder=str(tmp_path / "results"), calculate_fid=False, ema_update_every=1
    )
    for _ in range(2):
        trainer.ema.update()
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter += 0.25  # the average stays behind
    trainer.step = 3
    return trainer


def assert_same_state(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def test_the_class_is_ours():
    assert ours.Unet is RMSNormUNet


@pytest.mark.parametrize("name", OPTIONS)
def test_objects_and_state_dicts_bit_for_bit(name, theirs):
    model = theirs(name)
    net = from_lucidrains(model)
    assert_same_state(net, model)
    assert not net.training
    assert {key: p.requires_grad for key, p in net.named_parameters()} == {
        key: p.requires_grad for key, p in model.named_parameters()
    }
    wanted = {**RMSNormUNet(**config_of(name)).config}
    if not net.random_or_learned_sinusoidal_cond:
        wanted["learned_sinusoidal_dim"] = 16  # says nothing then
    assert net.config == wanted
    # what leaves no trace in the weights is given, the rest is read off them
    silent = {"sinusoidal_pos_emb_theta", "dropout", "random_fourier_features", "flash_attn", "self_condition"}
    given = {key: value for key, value in OPTIONS[name].items() if key in silent}
    loaded = load_unet(model.state_dict(), **given)
    assert_same_state(loaded, model)
    assert loaded.config == wanted
    model.load_state_dict(net.state_dict(), strict=True)
    x, t, condition = inputs_of(name)
    with torch.no_grad():
        expected = model(x, t, condition)
        for got in (net, loaded):
            assert float((got(x, t, condition) - expected).abs().max() / expected.abs().max()) < 2e-5


def test_mode_dtype_and_flags_come_along(theirs):
    model = theirs("dropout").to(torch.bfloat16).train()
    model.init_conv.weight.requires_grad_(False)
    net = from_lucidrains(model)
    assert net.training
    assert net.dtype == torch.bfloat16
    assert net.config["dropout"] == 0.3
    assert not net.init_conv.weight.requires_grad
    assert net.final_conv.weight.requires_grad
    assert_same_state(net, model)
    with torch.no_grad():
        net.init_conv.weight.zero_()
    assert bool(model.init_conv.weight.any())  # copies
    frozen = theirs("learned sinusoids").requires_grad_(False)
    assert not any(p.requires_grad for p in from_lucidrains(frozen).parameters())


def test_files_of_the_real_trainer(trainer, tmp_path):
    trainer.save(7)
    path = tmp_path / "results" / "model-7.pt"
    averaged, trained = trainer.ema.ema_model.model, trainer.model.model
    assert not torch.equal(averaged.init_conv.weight, trained.init_conv.weight)
    net = load_unet(path)
    assert_same_state(net, averaged)
    assert not net.training
    assert net.self_condition
    assert_same_state(load_unet(str(path), ema=False), trained)
    assert_same_state(load_unet(torch.load(path, weights_only=True)), averaged)
    with pytest.raises(FileNotFoundError, match=r"no file .*model-8\.pt; in .*results there are model-7\.pt$"):
        load_unet(path.with_name("model-8.pt"))
    with pytest.raises(FileNotFoundError, match=r"no file .*results; in .*results there are model-7\.pt$"):
        load_unet(path.parent)
    broken = torch.load(path, weights_only=True)
    del broken["ema"]
    with pytest.raises(ValueError, match="the state dict holds no averaged weights under 'ema'; pass ema=False"):
        load_unet(broken)
    assert_same_state(load_unet(broken, ema=False), trained)
    with pytest.raises(ValueError, match=r"holds an average without ema_model\.\*"):
        load_unet({**broken, "ema": {"initted": torch.tensor(True)}})


@pytest.mark.parametrize(
    "kind", ["GaussianDiffusion", "LearnedGaussianDiffusion", "WeightedObjectiveGaussianDiffusion"]
)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_files_of_a_diffusion(kind, form, lucidrains, theirs, tmp_path):
    out_dim = {"GaussianDiffusion": 3, "LearnedGaussianDiffusion": 6}.get(kind, 8)
    model = theirs(out_dim=out_dim)
    state = getattr(lucidrains, kind)(model, image_size=8, timesteps=10).state_dict()
    assert {key for key in state if not key.startswith("model.")} == set(BUFFERS)
    path = tmp_path / f"weights.{form}"
    torch.save(state, path) if form == "pt" else safetensors.torch.save_file(state, path)
    net = load_unet(path)
    assert_same_state(net, model)
    assert net.config["learned_variance"] == (out_dim == 6)
    assert net.out_dim == out_dim


def test_as_many_channels_out_as_in(theirs):
    """self_condition with learned variance looks like six plain channels, unless told."""
    state = theirs("both").state_dict()
    assert (load_unet(state).channels, load_unet(state).self_condition) == (6, False)
    told = load_unet(state, self_condition=True)
    assert (told.channels, told.self_condition, told.config["learned_variance"]) == (3, True, True)
    six = theirs(channels=6, out_dim=3).state_dict()
    assert load_unet(six).self_condition
    assert load_unet(six, channels=6).channels == 6
    assert not load_unet(six, channels=6).self_condition


def test_the_package_is_not_needed(theirs, tmp_path, monkeypatch):
    import sys

    state = theirs().state_dict()
    for name in [name for name in sys.modules if name.split(".")[0] == "denoising_diffusion_pytorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert_same_state(load_unet(state), theirs())


# -- what is not covered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("init_conv.weight"), r"no lucidrains Unet: init_conv\.weight is missing$"),
        (lambda s: s.pop("mid_attn.mem_kv"), r"does not fit the network; missing: mid_attn\.mem_kv$"),
        (lambda s: s.update(extra=torch.zeros(1)), "does not fit the network; unexpected: extra$"),
        (
            lambda s: s.update({"init_conv.weight": torch.zeros(16, 3, 3, 3)}),
            r"init_conv\.weight has shape \(16, 3, 3, 3\), expected \(any, any, 7, 7\)$",
        ),
        (
            lambda s: s.update({"ups.0.0.block1.proj.weight": torch.zeros(32, 3, 3, 3)}),
            r"ups\.0\.0\.block1\.proj\.weight has shape \(32, 3, 3, 3\), expected \(32, 48, 3, 3\)$",
        ),
        (
            lambda s: s.update({"downs.1.3.weight": torch.zeros(24, 16, 3, 3)}),
            r"stage 1 has 24 channels, which is no multiple of 64 / 4",
        ),
        (
            lambda s: s.update({"final_conv.bias": "three"}),
            r"must hold tensors by name, got str under 'final_conv\.bias'",
        ),
        (
            lambda s: s.update({"init_conv.bias": torch.zeros(16, dtype=torch.int64)}),
            r"not floating: init_conv\.bias is torch\.int64",
        ),
        (lambda s: s.clear(), r"no lucidrains Unet: init_conv\.weight is missing$"),
    ],
)
def test_spoiled_state_dicts(change, message):
    state = RMSNormUNet(**SMALL).state_dict()
    change(state)
    with pytest.raises(ValueError, match="the state dict .*" + message):
        load_unet(state)


RUBBISH = [
    b"",
    b"rubbish",
    b"\x80\x02r",  # cut off inside a number: struct.error in the unpickler
    b"\x80\x02a.",  # appends to nothing: IndexError
    b"\x80\x02]q\x01}q\x02h\x07.",
    b"PK\x03\x04" + bytes(40),
    b"PK\x05\x06" + bytes(18),
]


@pytest.mark.parametrize("content", RUBBISH)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_rubbish_is_one_line(content, suffix, tmp_path):
    path = tmp_path / f"model-1{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model-1\.\w+ is cut off or ") as error:
        load_unet(path)
    assert "\n" not in str(error.value)


def test_a_pickled_network_is_no_program_to_run(tmp_path):
    torch.save(RMSNormUNet(**SMALL), tmp_path / "model-1.pt")
    with pytest.raises(ValueError, match=r"holds something other than weights: Unsupported .*RMSNormUNet") as error:
        load_unet(tmp_path / "model-1.pt")
    assert "\n" not in str(error.value)


def test_checkpoints_of_other_classes(lucidrains, theirs, tmp_path):
    import importlib

    cfg = importlib.import_module("denoising_diffusion_pytorch.classifier_free_guidance")
    openai = {"input_blocks.0.0.weight": torch.zeros(8, 3, 3, 3), "time_embed.0.weight": torch.zeros(32, 8)}
    paper = diffusers.UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    old = {"init_conv.weight": torch.zeros(8, 3, 7, 7), "downs.0.2.fn.fn.to_qkv.weight": torch.zeros(1)}
    for state, whose in (
        (paper.state_dict(), r"a diffusers network: ddpm_fast\.interop\.load_unet"),
        (openai, r"an OpenAI network: ddpm_fast\.interop\.openai"),
        (ddpm_fast.UNet(width=8, depth=1).state_dict(), "the tutorial's U-Net"),
        (cfg.Unet(16, num_classes=2, dim_mults=(1,)).state_dict(), "the Unet of classifier_free_guidance"),
        (
            lucidrains.KarrasUnet(
                image_size=8, dim=16, dim_max=16, num_downsamples=1, num_blocks_per_stage=1
            ).state_dict(),
            "a KarrasUnet",
        ),
        (old, "a Unet1D or a Unet of an older version"),
    ):
        with pytest.raises(ValueError, match=f"the state dict holds no lucidrains Unet but {whose}"):
            load_unet(state)
    one_d = lucidrains.Unet1D(16, dim_mults=(1,))
    for state in (one_d.state_dict(), lucidrains.GaussianDiffusion1D(one_d, seq_length=8).state_dict()):
        with pytest.raises(ValueError, match="no lucidrains Unet but a Unet1D"):
            load_unet(state)
    with pytest.raises(ValueError, match="holds 'classes' beside the network, which no GaussianDiffusion has"):
        load_unet({"model.init_conv.weight": torch.zeros(1), "classes": torch.zeros(1)})
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights\.pt is cut off or holds something other than weights"):
        load_unet(tmp_path / "weights.pt")
    torch.save([1, 2], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt must hold a state dict"):
        load_unet(tmp_path / "weights.pt")


def test_arguments_that_do_not_fit(theirs):
    state = theirs().state_dict()
    with pytest.raises(ValueError, match="the state dict: dropout must be a probability below 1, got 2"):
        load_unet(state, dropout=2)
    with pytest.raises(ValueError, match=r"the state dict: .*unexpected keyword argument 'widths'"):
        load_unet(state, widths=3)
    with pytest.raises(ValueError, match=r"does not fit the network; .*init_conv\.weight has shape \(16, 3, 7, 7\)"):
        load_unet(state, channels=1)
    with pytest.raises(ValueError, match="does not fit the network; missing: "):
        load_unet(state, full_attn=True)
    known = set(inspect.signature(RMSNormUNet).parameters)
    assert set(unet_arguments(state)) <= known


def replaced(name, module):
    """Changes that put a module in place of another."""

    def change(unet):
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, module)

    return change


def assigned(name, attribute, value):
    return lambda unet: setattr(unet.get_submodule(name), attribute, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u.final_conv.register_buffer("lora", torch.zeros(1)), r"unexpected: final_conv\.lora$"),
        (replaced("mid_block1.block1.act", nn.ReLU()), r"altered: mid_block1\.block1\.act is a ReLU, expected SiLU"),
        (replaced("time_mlp.2", nn.SiLU()), r"altered: time_mlp\.2 is a SiLU, expected GELU"),
        (replaced("time_mlp.0", nn.Identity()), r"altered: time_mlp\.0 is a Identity, which has no theta"),
        (replaced("mid_attn.attend", nn.Identity()), r"altered: mid_attn\.attend is a Identity, which has no flash"),
        (assigned("time_mlp.2", "approximate", "tanh"), r"time_mlp\.2\.approximate is 'tanh', expected 'none'"),
        (assigned("init_conv", "padding_mode", "circular"), r"init_conv\.padding_mode is 'circular', expected 'zeros'"),
        (assigned("downs.0.0.block1.dropout", "p", 0.5), r"downs\.0\.0\.block1\.dropout\.p is 0\.5, expected 0\.0"),
        (assigned("ups.0.3.0", "mode", "bilinear"), r"ups\.0\.3\.0\.mode is 'bilinear', expected 'nearest'"),
        (assigned("mid_attn", "heads", 4), r"mid_attn\.heads is 4, expected 2"),
        (assigned("", "forward", lambda x, t: x), "it has another forward"),
    ],
)
def test_an_altered_network_is_named(change, message, theirs):
    model = theirs()
    change(model)
    with pytest.raises(ValueError, match=f"the Unet .*({message})"):
        from_lucidrains(model)


def test_bad_arguments(lucidrains, theirs):
    import importlib

    cfg = importlib.import_module("denoising_diffusion_pytorch.classifier_free_guidance")
    for other in (RMSNormUNet(**SMALL), cfg.Unet(16, num_classes=2, dim_mults=(1,)), "a string"):
        with pytest.raises(TypeError, match=r"unet must be a Unet of denoising_diffusion_pytorch\.\w+, got "):
            from_lucidrains(other)

    class Own(lucidrains.Unet):
        def forward(self, x, time, x_self_cond=None):
            return x

    with pytest.raises(ValueError, match="another forward"):
        from_lucidrains(Own(**SMALL))

    class Named(lucidrains.Unet):
        pass

    model = Named(**SMALL)
    assert_same_state(from_lucidrains(copy.deepcopy(model)), model)


def test_the_packages_diffusion_trains_and_samples_ours(lucidrains, theirs):
    """What wraps a Unet there wraps ours: the same loss and gradients, and a step of sampling."""
    model = theirs("self condition")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for network in (model, from_lucidrains(model)):
        diffusion = lucidrains.GaussianDiffusion(network, image_size=8, timesteps=10)
        torch.manual_seed(1)
        random.seed(1)  # 0.13: conditioned on its own estimate
        loss = diffusion(images)
        loss.backward()
        with torch.no_grad():
            sampled, _ = diffusion.p_sample(2 * images - 1, 0, images)
        results.append((loss.detach(), network.init_conv.weight.grad, sampled))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
