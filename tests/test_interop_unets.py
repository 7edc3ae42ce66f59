"""Networks and folders exchanged with diffusers' own package: exact to the bit, and a folder's defects are named."""

import inspect
import json
import sys

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")
pytest.importorskip("safetensors", reason="pip install safetensors")

import diffusers
import safetensors.torch
import torch
from unet_configs import OPTIONS, SMALL, config_of, inputs_of

from ddpm_fast.interop import _unets, from_diffusers, load_unet, new_keys, old_keys, save_unet, to_diffusers
from ddpm_fast.interop._unets import unet_arguments
from ddpm_fast.nn import DDPMUNet

pytestmark = pytest.mark.usefixtures("one_thread")

UNet2DModel = diffusers.UNet2DModel
WEIGHTS = "diffusion_pytorch_model"


def theirs(name="plain", seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(**config_of(name)).eval()


def assert_same_state(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def test_defaults_are_diffusers():
    signature = inspect.signature(UNet2DModel.__init__).parameters
    assert {name: p.default for name, p in signature.items() if name != "self"} == _unets.DEFAULTS
    assert list(inspect.signature(DDPMUNet).parameters) == [*(n for n in signature if n != "self"), *_unets.OWN]


@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back_bit_for_bit(name):
    model = theirs(name)
    net = from_diffusers(model)
    assert_same_state(net, model)
    assert not net.training
    back = to_diffusers(net)
    assert type(back) is UNet2DModel
    assert not back.training
    assert_same_state(back, model)
    assert {key: p.requires_grad for key, p in back.named_parameters()} == {
        key: p.requires_grad for key, p in model.named_parameters()
    }
    wanted = {key: back.config[key] for key in _unets.DEFAULTS}
    assert wanted == {**{key: model.config[key] for key in wanted}, **without_prefix(model.config)}
    x, t, labels = inputs_of(config_of(name))
    with torch.no_grad():
        assert torch.equal(back(x, t, labels).sample, model(x, t, labels).sample)


def test_what_diffusers_has_not_is_named(tmp_path):
    for own in ({"num_attention_heads": 2, "attention_head_dim": None}, {"time_proj_dim": 12}):
        net = DDPMUNet(**{**SMALL, **own})
        with pytest.raises(ValueError, match=f"UNet2DModel has no {next(iter(own))}.*to_openai"):
            to_diffusers(net)
        with pytest.raises(ValueError, match=f"UNet2DModel has no {next(iter(own))}"):
            save_unet(net, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def without_prefix(config):
    """The first releases' names of blocks, as they are called now."""
    names = ("down_block_types", "up_block_types")
    return {name: tuple(block.removeprefix("UNetRes") for block in config[name]) for name in names}


def test_mode_dtype_and_flags_come_along():
    model = theirs().to(torch.bfloat16).train()
    model.conv_in.weight.requires_grad_(False)
    net = from_diffusers(model)
    assert net.training
    assert net.dtype == torch.bfloat16
    assert not net.conv_in.weight.requires_grad
    assert net.conv_out.weight.requires_grad
    assert_same_state(net, model)
    with torch.no_grad():
        net.conv_in.weight.zero_()
    assert bool(model.conv_in.weight.any())  # copies
    assert_same_state(to_diffusers(net), net)


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "bin shards", "fp16", "fp16 shards", "old names"])
def test_folders_saved_by_diffusers(form, tmp_path):
    model = theirs("scale_shift")
    expected = model
    options = {"safe_serialization": "bin" not in form}
    if "shards" in form:
        options["max_shard_size"] = "20KB"
    if "fp16" in form:
        options["variant"] = "fp16"
        expected = model.half()
    model.save_pretrained(tmp_path, **options)
    if form == "old names":
        path = tmp_path / f"{WEIGHTS}.safetensors"
        safetensors.torch.save_file(old_keys(safetensors.torch.load_file(path)), path)
        assert any(".query." in key for key in safetensors.torch.load_file(path))
    net = load_unet(tmp_path, variant=options.get("variant"), dtype=expected.dtype)
    assert ("shards" in form) == bool(list(tmp_path.glob("*index*")))
    assert_same_state(net, expected)
    assert not net.training
    assert load_unet(tmp_path, variant=options.get("variant")).dtype == torch.float32


@pytest.mark.parametrize("safe", [True, False])
def test_folders_that_diffusers_reads(safe, tmp_path):
    torch.manual_seed(0)
    net = DDPMUNet(**config_of("three_levels"))
    save_unet(net, tmp_path / "new" / "folder", safe_serialization=safe)
    model = UNet2DModel.from_pretrained(tmp_path / "new" / "folder", use_safetensors=safe)
    assert_same_state(model, net)
    again = load_unet(tmp_path / "new" / "folder")
    assert_same_state(again, net)
    assert again.config == net.config


def test_saving_replaces_older_weights(tmp_path):
    first, second = DDPMUNet(**SMALL), DDPMUNet(**SMALL)
    save_unet(first, tmp_path)
    loaded = load_unet(tmp_path)
    save_unet(second, tmp_path)
    assert_same_state(loaded, first)  # not a view of the file
    assert_same_state(load_unet(tmp_path), second)
    save_unet(first, tmp_path, safe_serialization=False)
    assert_same_state(load_unet(tmp_path), first)
    save_unet(second.half(), tmp_path, variant="fp16")
    assert_same_state(load_unet(tmp_path), first)
    assert_same_state(load_unet(tmp_path, variant="fp16", dtype=torch.float16), second)
    assert not list(tmp_path.glob("*.part"))


def test_old_and_new_keys():
    state = theirs("three_levels").state_dict()
    old = old_keys(state)
    assert set(old) - set(state) == {key for key in old if any(f".{n}." in key for n in _unets.OLD_ATTENTION)}
    assert len(set(old) - set(state)) == 8 * (1 + 1 + 2)  # weight and bias of four layers: down, middle, up twice
    assert list(new_keys(old)) == list(state)
    assert list(old_keys(new_keys(old))) == list(old)
    with pytest.raises(ValueError, match=r"down_blocks\.1\.attentions\.0\.to_q\.weight twice"):
        new_keys({**state, **old})


# -- defects of a folder --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A good folder; each test spoils it."""
    save_unet(DDPMUNet(**SMALL), tmp_path)
    return tmp_path


def change(folder, function):
    path = folder / f"{WEIGHTS}.safetensors"
    state = safetensors.torch.load_file(path)
    function(state)
    safetensors.torch.save_file(state, path)


def configured(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


SPOILED = {
    "a missing key": (
        lambda f: change(f, lambda s: s.pop("conv_in.bias")),
        ValueError,
        r"safetensors does not fit the network; missing: conv_in\.bias$",
    ),
    "an unexpected key": (
        lambda f: change(f, lambda s: s.update(extra=torch.zeros(1))),
        ValueError,
        r"unexpected: extra$",
    ),
    "many missing keys": (
        lambda f: change(f, lambda s: [s.pop(key) for key in list(s) if key.startswith("mid_block")]),
        ValueError,
        r"missing: mid_block\.\S+, mid_block\.\S+, mid_block\.\S+ and 27 more$",
    ),
    "a wrong shape": (
        lambda f: change(f, lambda s: s.update({"conv_in.weight": torch.zeros(8, 3, 3, 3)})),
        ValueError,
        r"conv_in\.weight has shape \(8, 3, 3, 3\), expected \(8, 2, 3, 3\)$",
    ),
    "whole numbers": (
        lambda f: change(f, lambda s: s.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)})),
        ValueError,
        r"not floating: conv_in\.bias is torch\.int64",
    ),
    "cut off": (
        lambda f: (f / f"{WEIGHTS}.safetensors").write_bytes((f / f"{WEIGHTS}.safetensors").read_bytes()[:-100]),
        ValueError,
        r"safetensors is cut off or no safetensors file: ",
    ),
    "an empty file": (
        lambda f: (f / f"{WEIGHTS}.safetensors").write_bytes(b""),
        ValueError,
        r"safetensors is cut off or no safetensors file: ",
    ),
    "no safetensors": (
        lambda f: (f / f"{WEIGHTS}.safetensors").write_bytes(b"something else altogether" * 9),
        ValueError,
        r"safetensors is cut off or no safetensors file: ",
    ),
    "no weights": (
        lambda f: (f / f"{WEIGHTS}.safetensors").unlink(),
        FileNotFoundError,
        r"no diffusion_pytorch_model\.safetensors or .*; it has no weights",
    ),
    "another variant": (
        lambda f: (f / f"{WEIGHTS}.safetensors").rename(f / f"{WEIGHTS}.fp16.safetensors"),
        FileNotFoundError,
        r"there are diffusion_pytorch_model\.fp16\.safetensors: pass variant=",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"no config\.json in "),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json is not JSON"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), ValueError, "must hold a JSON object"),
    "another block": (
        lambda f: configured(f, down_block_types=["DownBlock2D", "AttnSkipDownBlock2D"]),
        ValueError,
        r"config\.json: down_block_types\[1\] is 'AttnSkipDownBlock2D', which is not covered; covered are DownBlock2D",
    ),
    "another option": (
        lambda f: configured(f, resnet_time_scale_shift="spatial"),
        ValueError,
        r"config\.json: resnet_time_scale_shift must be one of 'default', 'scale_shift', got 'spatial'",
    ),
    "another type": (lambda f: configured(f, in_channels="3"), ValueError, r"config\.json: in_channels must be an int"),
    "another key": (lambda f: configured(f, cross_attention_dim=3), ValueError, "has the key 'cross_attention_dim'"),
    "another class": (
        lambda f: configured(f, _class_name="UNet2DConditionModel"),
        ValueError,
        "is the config of a UNet2DConditionModel, which is not covered; covered is UNet2DModel",
    ),
    "another width": (
        lambda f: configured(f, block_out_channels=[8, 32]),
        ValueError,
        r"does not fit the network; \S+ has shape \(16,\), expected \(32,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", SPOILED)
def test_a_spoiled_folder_is_named(defect, folder):
    spoil, error, message = SPOILED[defect]
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        load_unet(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


class Program:
    """What a pickle may do to whoever opens it."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.opened_a_program = True",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Program(), "bin is cut off or holds something other than weights"),
        (DDPMUNet(**SMALL), "bin is cut off or holds something other than weights"),
        ([torch.zeros(1)], "bin must hold a state dict, tensors by name, got list"),
        ({"state_dict": {"conv_in.bias": torch.zeros(8)}}, "bin must hold tensors by name, got dict under"),
        ({0: torch.zeros(8)}, "bin must hold tensors by name, got Tensor under 0"),
        (None, "bin is cut off or holds something other than weights"),
    ],
    ids=["program", "module", "list", "nested", "numbers", "cut off"],
)  # fmt: skip
def test_a_pickle_that_is_no_weights(content, message, folder):
    import builtins

    path = folder / f"{WEIGHTS}.bin"
    (folder / f"{WEIGHTS}.safetensors").unlink()
    if content is None:
        torch.save(DDPMUNet(**SMALL).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-5000])
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_unet(folder)
    assert "\n" not in str(caught.value)
    assert not hasattr(builtins, "opened_a_program")


def test_spoiled_shards_are_named(tmp_path):
    theirs().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / f"{WEIGHTS}.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    shard = tmp_path / places["conv_in.weight"]
    content = shard.read_bytes()

    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is not beside it"):
        load_unet(tmp_path)
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} is cut off"):
        load_unet(tmp_path)
    shard.write_bytes(content)

    def indexed(weight_map):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    indexed({**places, "conv_in.weight": "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="must name files beside it"):
        load_unet(tmp_path)
    indexed({key: name for key, name in places.items() if key != "conv_in.weight"})
    with pytest.raises(ValueError, match=r"holds conv_in\.weight, which .* does not expect there"):
        load_unet(tmp_path)
    indexed({**places, "more": shard.name})
    with pytest.raises(ValueError, match="keys that its files do not hold: more"):
        load_unet(tmp_path)
    indexed({})
    with pytest.raises(ValueError, match='must hold "weight_map"'):
        load_unet(tmp_path)


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="must be a diffusers UNet2DModel, got DDPMUNet"):
        from_diffusers(DDPMUNet(**SMALL))
    with pytest.raises(TypeError, match="net must be a DDPMUNet, got UNet2DModel"):
        to_diffusers(theirs())
    with pytest.raises(TypeError, match="net must be a DDPMUNet, got UNet2DModel"):
        save_unet(theirs(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_unet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'SkipDownBlock2D', which is not covered"):
        from_diffusers(
            UNet2DModel(
                block_out_channels=(32, 64),
                down_block_types=("SkipDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "SkipUpBlock2D"),
            )
        )
    altered = theirs()
    altered.conv_out.register_buffer("lora", torch.zeros(1))
    with pytest.raises(ValueError, match=r"the UNet2DModel does not fit the network; unexpected: conv_out\.lora"):
        from_diffusers(altered)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"to_diffusers needs diffusers .*pip install ddpm_fast\[diffusers\]"):
        to_diffusers(DDPMUNet(**SMALL))


def test_folders_need_no_diffusers(folder, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert load_unet(folder).config == DDPMUNet(**SMALL).config


def test_without_safetensors(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs the safetensors package: pip install"):
        load_unet(folder)
    save_unet(DDPMUNet(**SMALL), folder, safe_serialization=False)
    assert load_unet(folder).sample_size == 8


def test_a_silent_config_means_diffusers_defaults():
    arguments = unet_arguments({"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "sample_size": 4})
    assert arguments == {**_unets.DEFAULTS, "sample_size": 4}
