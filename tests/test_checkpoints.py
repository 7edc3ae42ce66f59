"""Checkpoint files: what is written is read back bit for bit, and whatever is wrong with a file is one clear error."""

import errno
import json
import os
import resource
import signal
import warnings

import pytest
import torch
from torch import nn

from ddpm_fast.nn import DDPMUNet, RMSNormUNet, UNet
from ddpm_fast.schedule import Schedule
from ddpm_fast.training import checkpoint_file, checkpoints, tensor_file

CONFIG = {
    "network": {"kind": "UNet", "options": None},
    "schedule": {"label": "Schedule.linear(10)"},
    "training": {"prediction": "v"},
    "data": {"name": "x", "shape": [1, 8, 8], "num_classes": None, "fingerprint": "ab", "images": 3},
}


def tensors_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(4, 3, 3, 3, generator=g).to(memory_format=torch.channels_last),
        "model.half": torch.randn(5, generator=g).half(),
        "model.bfloat": torch.randn((), generator=g).bfloat16(),
        "model.count": torch.tensor(7),
        "model.none": torch.zeros(0, 3),
        "model.flags": torch.tensor([True, False, True]),
        "model.bytes": torch.arange(9, dtype=torch.uint8)[::2],
        "model.nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "model.complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "schedule.betas": torch.from_numpy(Schedule.linear(10).betas.copy()),
    }


def written(path, images_seen=5, seed=0, **state):
    checkpoints.write(path, tensors_of(seed), {"images_seen": images_seen, **state}, CONFIG)
    return path


def same_bits(a, b):
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_round_trip(tmp_path):
    path = written(tmp_path / "a.safetensors", lr=0.1 + 0.2, big=2**60, infinite=float("inf"))
    found = checkpoints.read(path)
    expected = tensors_of()
    assert found.tensors.keys() == expected.keys() == set(found.keys)
    assert all(same_bits(found.tensors[key], value) for key, value in expected.items())
    assert found.state == {"images_seen": 5, "lr": 0.1 + 0.2, "big": 2**60, "infinite": float("inf")}
    assert found.config == CONFIG
    assert found.images_seen == 5
    assert found.path == path
    assert found.part("schedule").keys() == {"betas"}
    header = checkpoints.read_header(path)
    assert header.tensors == {}
    assert header.checksum == found.checksum
    assert header.state == found.state
    some = checkpoints.read(path, wanted=lambda key: key == "model.half")
    assert some.tensors.keys() == {"model.half"}
    assert same_bits(some.tensors["model.half"], expected["model.half"])


def test_other_programs_read_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = written(tmp_path / "a.safetensors")
    found = safetensors.load_file(path)
    assert all(same_bits(found[key], value) for key, value in tensors_of().items())
    with open(path, "rb") as file:
        assert int.from_bytes(file.read(8), "little") % 8 == 0  # so that tensors are aligned where the file is mapped


def test_equal_contents_are_equal_files(tmp_path):
    first, second = (written(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    assert first == second
    assert written(tmp_path / "a.safetensors", seed=1).read_bytes() != first
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.safetensors", "b.safetensors"]


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = written(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}
    for size in sorted(places):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut off|empty"):
            checkpoints.read(path)
        with pytest.raises(ValueError, match=r"cut off|empty"):
            checkpoints.read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="damaged: it has"):
        checkpoints.read(path)


def test_every_bit_counts(tmp_path):
    """One bit turned over anywhere, the length and the header included, and the file is not read."""
    path = written(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    places = list(range(60)) + list(range(60, len(whole), 37)) + [len(whole) - 1]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << (place % 8)
        path.write_bytes(altered)
        with pytest.raises(ValueError):
            checkpoints.read(path)
    path.write_bytes(whole)
    checkpoints.read(path)


def test_files_of_other_formats(tmp_path):
    path = tmp_path / "a.safetensors"
    for content, said in (
        (b"not a checkpoint at all, but text that is long enough", "no safetensors file"),
        ((4).to_bytes(8, "little") + b"[1] ", "header cannot be read"),
        ((2).to_bytes(8, "little") + b"{}", "no checkpoint of ddpm_fast"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            checkpoints.read(path)
    tensor_file.write_tensors(path, {"weight": torch.ones(3)}, {"format": "pt"})
    with pytest.raises(ValueError, match="no checkpoint of ddpm_fast"):
        checkpoints.read_header(path)
    tensor_file.write_tensors(path, {}, {"format": "ddpm_fast.checkpoint", "version": "1", "state": "{}"})
    with pytest.raises(ValueError, match="does not say what it is"):
        checkpoints.read_header(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.read(tmp_path / "nothing.safetensors")


def test_a_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "VERSION", 2)
    path = written(tmp_path / "a.safetensors")
    monkeypatch.undo()
    for use in (checkpoints.read, checkpoints.read_header, checkpoints.load_network):
        with pytest.raises(ValueError, match=r"made by a newer ddpm_fast \(format 2\); this one reads 1; upgrade"):
            use(path)
    written(tmp_path / "b.safetensors", 3)
    with pytest.raises(ValueError, match="newer ddpm_fast"):  # going back to the older file would lose what it holds
        checkpoints.latest(tmp_path)


def test_what_cannot_be_held(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"images_seen": 1}
    for tensors, said in (
        ({"model.x": torch.ones(2).to_sparse()}, "model.x must be a dense tensor"),
        ({"model.x": [1.0]}, "got list"),
        ({"model.x": torch.ones(2, dtype=torch.complex128)}, "complex128"),
    ):
        with pytest.raises(TypeError, match=said):
            checkpoints.write(path, tensors, state, CONFIG)
    for bad in ({}, {"images_seen": 1.0}, {"images_seen": 1, "x": torch.ones(1)}):
        with pytest.raises(TypeError):
            checkpoints.write(path, {}, bad, CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*passed over")  # those not asked for below
def test_latest_goes_by_content(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    newest = written(tmp_path / "a.safetensors", 30)
    older = written(tmp_path / checkpoints.file_name(20), 20)
    oldest = written(tmp_path / "z.safetensors", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest(tmp_path) == newest
        assert checkpoints.find(tmp_path) == newest
        assert checkpoints.find(oldest) == oldest
    altered = bytearray(newest.read_bytes())
    altered[-1] ^= 1
    newest.write_bytes(altered)
    with pytest.warns(UserWarning, match=r"a\.safetensors is damaged.*passed over"):
        assert checkpoints.latest(tmp_path) == older
    os.truncate(older, 1000)
    with pytest.warns(UserWarning, match="cut off"):
        assert checkpoints.latest(tmp_path) == oldest
    oldest.write_bytes(b"")
    with pytest.warns(UserWarning, match="is empty"):
        assert checkpoints.latest(tmp_path) is None


def test_find_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="run's folder was expected there"):
        checkpoints.find(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*checkpoints or"):
        checkpoints.find(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path = written(folder / checkpoints.file_name(4), 4)
    assert checkpoints.find(tmp_path) == checkpoints.find(folder) == path


def test_prune_keeps_the_newest(tmp_path):
    paths = [written(tmp_path / f"{7 - n}.safetensors", n) for n in range(5)]  # names the other way round
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.prune(tmp_path, 3)
    assert [path.exists() for path in paths] == [False, False, True, True, True]
    for path in paths[3:]:  # the two newest break on the disk: the one that is whole stays, however old
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
    with pytest.warns(UserWarning, match="damaged"):
        checkpoints.prune(tmp_path, 1)
    assert [path.exists() for path in paths] == [False, False, True, False, True]
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoints.prune(tmp_path, 0)


def full_disk(tmp_path, limit):
    """Writes over a checkpoint in a process that may make no file larger than `limit` bytes; what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "it was written"
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            written(tmp_path / checkpoints.file_name(5), seed=1)
        except OSError as error:
            said = json.dumps([error.errno, error.strerror])
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with open(read) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_full_disk(tmp_path):
    path = written(tmp_path / checkpoints.file_name(5))
    before = path.read_bytes()
    for limit in (0, 100, len(before) - 1):
        number, said = json.loads(full_disk(tmp_path, limit))
        assert number == errno.EFBIG
        assert str(path) in said
        assert "files written before are untouched" in said
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == before
    assert full_disk(tmp_path, len(before)) == "it was written"


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_errors_at_the_end(tmp_path, monkeypatch, where):
    path = written(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: No space left on device; files") as caught:
        written(path, seed=1)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_nowhere_to_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot write"):
        written(tmp_path / "missing" / "a.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot write"):
        written(tmp_path / "file" / "a.safetensors")


def test_temporaries_of_killed_runs_go(tmp_path):
    kept = written(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors.123.part").write_bytes(b"half")
    (tmp_path / "mine.part").write_text("not ours")
    assert checkpoints.remove_temporaries(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, "mine.part"}


# -- networks --------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(2, width)


def save_network(path, model, ema=None):
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"ema.{key}": value for key, value in (ema.state_dict() if ema else {}).items()}
    tensors["schedule.betas"] = torch.from_numpy(Schedule.cosine(7).betas.copy())
    config = {**CONFIG, "network": checkpoints.network_config(model)}
    checkpoints.write(path, tensors, {"images_seen": 9}, config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(1, 32, width=4, depth=1, num_classes=3),
        lambda: RMSNormUNet(8, dim_mults=(1, 2), channels=1, attn_heads=1),
        lambda: DDPMUNet(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
                         up_block_types=("UpBlock2D",) * 2),
    ],
    ids=["UNet", "RMSNormUNet", "DDPMUNet"],
)  # fmt: skip
def test_networks_are_built_again(tmp_path, make):
    path = tmp_path / "a.safetensors"
    model, average = make(), make()
    save_network(path, model, average)
    before = torch.get_rng_state()
    for ema, source in ((True, average), (False, model)):
        loaded = checkpoints.load_network(path, ema=ema)
        assert type(loaded.network) is type(model)
        assert not loaded.network.training
        assert loaded.ema is ema
        state = loaded.network.state_dict()
        assert all(same_bits(state[key], value) for key, value in source.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.schedule == Schedule.cosine(7)
    assert repr(loaded.schedule) == "Schedule.linear(10)"
    assert (loaded.prediction, loaded.shape, loaded.path) == ("v", (1, 8, 8), path)
    assert loaded.state == {"images_seen": 9}
    assert loaded.checksum == checkpoints.read_header(path).checksum


def test_a_run_without_average(tmp_path):
    model = UNet(1, 32, width=4, depth=1)
    save_network(tmp_path / "a.safetensors", model)
    loaded = checkpoints.load_network(tmp_path)
    assert not loaded.ema
    assert torch.equal(loaded.network.output.weight, model.output.weight)


def test_networks_of_other_classes(tmp_path):
    path = tmp_path / "a.safetensors"
    model = Own()
    save_network(path, model)
    with pytest.raises(ValueError, match=r"class test_checkpoints\.Own, which ddpm_fast cannot build.*pass model="):
        checkpoints.load_network(path)
    mine = Own()
    assert checkpoints.load_network(path, model=mine).network is mine
    assert torch.equal(mine.layer.weight, model.layer.weight)
    wide = Own(5)
    before = wide.layer.weight.clone()
    with pytest.raises(ValueError, match=r"another model: layer\.weight has shape \(4, 2\), the model's has \(5, 2\)"):
        checkpoints.load_network(path, model=wide)
    assert torch.equal(wide.layer.weight, before)
    with pytest.raises(ValueError, match=r"0\.weight is missing; .*layer\.weight is not in the model"):
        checkpoints.load_network(path, model=nn.Sequential(nn.Linear(2, 4, bias=False)))

    class UNet(nn.Linear):  # a name of ours does not make it ours
        config = {"in_channels": 1}  # noqa: RUF012

    assert checkpoints.network_config(UNet(1, 1))["options"] is None
