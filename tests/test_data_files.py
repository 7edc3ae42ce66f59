"""Data of files: IDX, .npz and tensors, by name and by path, and what is wrong with bad ones."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.training.data import open as module
from ddpm_fast.training.data import open_data

RNG = np.random.default_rng(0)
FASHION = Path("/usr/share/datasets/fashion-mnist")


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def every(data) -> np.ndarray:
    return data.batch(torch.arange(len(data))).numpy()


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray | None, suffix: str = ".gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress if suffix else bytes
    (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(packed(idx_bytes(images)))
    if labels is not None:
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(packed(idx_bytes(labels)))


@pytest.fixture
def mnist(tmp_path):
    images, labels = pixels(7, 6, 5), np.array([9, 0, 1, 2, 3, 4, 5], np.uint8)
    write_idx(tmp_path / "mnist", "train", images[:5], labels[:5])
    write_idx(tmp_path / "mnist", "t10k", images[5:], labels[5:], suffix="")
    return tmp_path / "mnist", images[:, None], labels


def test_idx_files_by_folder_name_and_file(mnist, monkeypatch):
    folder, images, labels = mnist
    monkeypatch.setenv("DDPM_FAST_DATA", str(folder.parent))
    for data in (
        open_data("mnist"),
        open_data("mnist", path=folder),
        open_data("mnist", path=folder.parent),
        open_data("idx", path=folder),
        open_data(folder),
        open_data(folder / "train-images-idx3-ubyte.gz"),
    ):
        assert np.array_equal(every(data), images[:5])
        assert data.labels.tolist() == labels[:5].tolist()
        assert (data.shape, data.dtype, data.num_classes) == ((1, 6, 5), torch.uint8, 10)
    assert [open_data("mnist").name, open_data(folder).name] == ["mnist", "mnist"]
    test = open_data("mnist", split="test", labels=False)
    assert np.array_equal(every(test), images[5:])
    assert test.labels is None
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    assert open_data(folder).labels is None


def test_the_names_that_torchvision_and_emnist_use(tmp_path):
    write_idx(tmp_path / "FashionMNIST/raw", "train", pixels(2, 4, 4), np.arange(2, dtype=np.uint8))
    data = open_data("fashion-mnist", path=tmp_path)
    assert data.class_names[:2] == ("T-shirt/top", "trouser")
    assert data.num_classes == 10
    for kind in ("letters", "digits"):
        write_idx(tmp_path / "emnist", f"emnist-{kind}-test", pixels(3, 4, 4), np.arange(3, dtype=np.uint8), suffix="")
    with pytest.raises(ValueError, match=r"several sets of IDX files \(emnist-digits-test-, emnist-letters-test-\)"):
        open_data("idx", path=tmp_path / "emnist", split="test")
    assert len(open_data(tmp_path / "emnist/emnist-letters-test-images-idx3-ubyte")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin 00 00 08 03 or 00 00 08 04, got $"),
        (b"\x89PNG....", "not an IDX file of bytes: .* got 89 50 4e 47"),
        (struct.pack(">HBBI", 0, 8, 1, 5) + bytes(5), "got 00 00 08 01"),
        (struct.pack(">HBB3I", 0, 13, 3, 1, 1, 1) + bytes(4), "got 00 00 0d 03"),
        (struct.pack(">HBB2I", 0, 8, 3, 1, 4), "is cut off, or empty"),
        (struct.pack(">HBB3I", 0, 8, 3, 0, 4, 4), "is cut off, or empty"),
        (idx_bytes(np.zeros((3, 4, 4), np.uint8))[:-1], "must hold 48 bytes after its header, got only 47"),
        (idx_bytes(np.zeros((3, 4, 4), np.uint8)) + b"\0", "must hold 48 bytes after its header, got more"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_files(tmp_path, content, message, packed):
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message):
        open_data(path)


def test_damaged_gzip_and_a_wrong_number_of_labels(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = gzip.compress(idx_bytes(pixels(50, 4, 4)))
    for content in (whole[:-20], whole[: len(whole) // 2], b"\x1f\x8b" + bytes(20), whole[:200] + b"xx" + whole[202:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is cut off or damaged \(.*\): download it"):
            open_data(tmp_path)
    write_idx(tmp_path, "train", pixels(4, 4, 4), np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), one for each image, got \(3,\)"):
        open_data(tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="apt install dataset-fashion-mnist")
def test_the_real_fashion_mnist(monkeypatch):
    monkeypatch.delenv("DDPM_FAST_DATA", raising=False)
    data = open_data("fashion-mnist", split="test")
    assert repr(data) == "fashion-mnist: 10,000 of shape 1x28x28, uint8, 10 classes"
    assert data.labels.bincount().tolist() == [1000] * 10
    assert data.fingerprint() == "c7dbbf48cf7f3630"
    assert data.class_names[int(data.labels[0])] == "ankle boot"


@pytest.mark.parametrize(
    ("names", "labels"),
    [("images", "labels"), ("x", "y"), ("arr_0", "arr_1"), ("x_train", "y_train"), ("train_images", "train_labels")],
)
def test_npz_files_by_their_usual_names(tmp_path, names, labels):
    images, numbers = pixels(4, 6, 5, 3), np.array([[1], [0], [2], [1]])
    np.savez(tmp_path / "a.npz", **{names: images, labels: numbers, "x_test": images[:1]})
    data = open_data(tmp_path / "a.npz")
    assert np.array_equal(every(data), images.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [1, 0, 2, 1]
    assert data.name == "a"
    assert len(open_data("npz", path=tmp_path / "a.npz", split="test")) == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((4, 6, 5), "u1", (1, 6, 5)),
        ((4, 6, 5, 1), "u1", (1, 6, 5)),
        ((4, 3, 6, 5), "u1", (3, 6, 5)),
        ((4, 6, 5, 4), "u1", (4, 6, 5)),
        ((4, 3, 3, 1), "u1", (1, 3, 3)),
        ((4, 3, 8, 3), "u1", (3, 8, 3)),  # both could be: N, C, H, W
        ((4, 6, 5, 3), "f4", (3, 6, 5)),
        ((4, 6, 6, 4), "f4", (6, 6, 4)),  # latents of 6 channels
        ((4, 16, 2, 2), "f4", (16, 2, 2)),
        ((4, 9), "f4", (9,)),
        ((4, 5, 7), "f4", (5, 7)),
    ],
)
def test_layouts_of_arrays(tmp_path, shape, dtype, expected):
    array = pixels(*shape) if dtype == "u1" else RNG.uniform(-1, 1, shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    data = open_data(tmp_path / "a.npy")
    assert data.shape == expected
    moved = array.reshape(4, *expected) if expected[0] == 1 else array
    if data.shape != array.shape[1:] and expected[0] != 1:
        moved = array.transpose(0, 3, 1, 2)
    assert np.array_equal(every(data), moved)


def test_tensors_in_files(tmp_path):
    latents, labels = torch.linspace(-5, 5, 96).view(6, 4, 2, 2), torch.arange(6)
    torch.save(latents, tmp_path / "one.pt")
    torch.save({"latents": latents.half(), "labels": labels}, tmp_path / "two.pth")
    files = ["one.pt", "two.pth"]
    try:
        from safetensors.torch import save_file
    except ImportError:
        pass
    else:
        save_file({"latents": latents, "y": labels}, tmp_path / "three.safetensors")
        files.append("three.safetensors")
    for name in files:
        data = open_data(tmp_path / name)
        assert (data.shape, data.dtype) == ((4, 2, 2), torch.float32)
        assert np.allclose(every(data), latents.numpy(), atol=2e-3)
        assert (data.num_classes is None) == (name == "one.pt")


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_files_of_arrays(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "other.npz", a=pixels(2, 4), b=pixels(2, 4))
    with pytest.raises(ValueError, match=r"has no train images: they are looked for as images, x, .* it has a, b"):
        open_data(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"has no test images: .* x_test or test_images"):
        open_data(tmp_path / "other.npz", split="test")
    mixed = np.empty(2, object)
    mixed[:] = [pixels(4, 4), Hostile(mark)]
    np.savez(tmp_path / "mixed.npz", images=mixed)
    with pytest.raises(ValueError, match=r"mixed\.npz: images cannot be read: Object arrays cannot be loaded"):
        open_data(tmp_path / "mixed.npz")
    torch.save({"images": Hostile(mark)}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile\.pt must be what torch\.save wrote of a tensor or a dict"):
        open_data(tmp_path / "hostile.pt")
    assert not mark.exists()
    np.savez(tmp_path / "whole.npz", images=pixels(50, 8, 8))
    for name, content in (
        ("cut.npz", (tmp_path / "whole.npz").read_bytes()[:500]),
        ("cut.npy", b"\x93NUMPY"),
        ("text.npz", b"text"),
        ("text.pt", b"text"),
        ("text.safetensors", b"text"),
    ):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            open_data(tmp_path / name)


def test_channels_are_converted_as_pillow_does(tmp_path):
    image = pytest.importorskip("PIL.Image")
    colour = pixels(5, 7, 6, 4)
    np.savez(tmp_path / "a.npz", images=colour[..., :3])
    np.savez(tmp_path / "b.npz", images=colour)
    grey = np.stack([np.asarray(image.fromarray(x).convert("L")) for x in colour[..., :3]])[:, None]
    assert np.array_equal(every(open_data(tmp_path / "a.npz", channels=1)), grey)
    np.savez(tmp_path / "c.npz", images=grey)
    assert np.array_equal(every(open_data(tmp_path / "c.npz", channels=3)), grey.repeat(3, axis=1))
    flat = open_data(tmp_path / "b.npz", channels=3)
    alpha = colour[..., 3:] / 255
    white = np.rint(colour[..., :3] * alpha + 255 * (1 - alpha)).transpose(0, 3, 1, 2)
    assert np.array_equal(every(flat), white)
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 5, 6, 7), np.uint8))
    with pytest.raises(ValueError, match=r"d: channels=3 is of images with 1 or 3 channels, .* \(5, 6, 7\)"):
        open_data(tmp_path / "d.npz", channels=3)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_another_size(tmp_path, fit, channels):
    image = pytest.importorskip("PIL.Image")
    array = pixels(3, 6, 8, channels)
    np.save(tmp_path / "a.npy", array)
    small = open_data(tmp_path / "a.npy", image_size=4, fit=fit)
    assert small.shape == (channels, 4, 4)
    whole = image.fromarray(array[1].squeeze())
    bilinear = image.Resampling.BILINEAR
    if fit == "pad":
        expected = np.zeros((4, 4, channels), np.uint8)
        expected[:3] = np.asarray(whole.resize((4, 3), bilinear)).reshape(3, 4, channels)
    else:
        box = (1, 0, 7, 6) if fit == "crop" else None
        expected = np.asarray(whole.resize((4, 4), bilinear, box=box)).reshape(4, 4, channels)
    assert np.array_equal(every(small)[1], expected.transpose(2, 0, 1))


def test_images_in_the_middle_of_black(tmp_path, recwarn):
    array = pixels(2, 5, 4, 1) | 1
    np.save(tmp_path / "a.npy", array)
    np.save(tmp_path / "f.npy", (array / 255).astype("f4"))
    padded = every(open_data(tmp_path / "a.npy", image_size=(8, 7), fit="pad"))
    assert not recwarn.list
    assert np.array_equal(padded[:, :, 1:6, 1:5], array.transpose(0, 3, 1, 2))
    assert padded.astype(int).sum() == array.astype(int).sum()
    floats = every(open_data(tmp_path / "f.npy", image_size=(8, 7), fit="pad"))
    assert (floats == -1).sum() == 2 * (56 - 20)


def test_images_smaller_than_asked_are_enlarged_with_one_warning(tmp_path):
    pytest.importorskip("PIL.Image")
    np.save(tmp_path / "a.npy", pixels(9, 4, 4))
    with pytest.warns(UserWarning, match="a: images of 4x4 are smaller than 8x8 and are enlarged") as warned:
        assert open_data(tmp_path / "a.npy", image_size=8).shape == (1, 8, 8)
    assert len(warned) == 1
    assert warned[0].filename == __file__


def test_digits():
    pytest.importorskip("sklearn")
    train, test = open_data("digits"), open_data("digits", split="test")
    assert (len(train), len(test), train.shape, train.num_classes) == (1438, 359, (1, 8, 8), 10)
    assert every(train).min() == 0
    assert every(train).max() == 255
    assert test.labels.bincount().min() > 20
    assert train.fingerprint() == "4d5dbe2eb84f9e9d"
    with pytest.raises(ValueError, match="digits come with scikit-learn: path must be None"):
        open_data("digits", path="x")


def test_missing_packages(monkeypatch, tmp_path):
    np.save(tmp_path / "a.npy", pixels(2, 4, 4))
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="digits come with scikit-learn; pip install scikit-learn"):
        open_data("digits")
    with pytest.raises(ImportError, match=r"reading images needs Pillow; pip install ddpm_fast\[images\]"):
        open_data(tmp_path / "a.npy", image_size=2)
    with pytest.raises(ImportError, match=r"pip install ddpm_fast\[interop\]"):
        open_data(tmp_path / "a.safetensors")
    assert len(open_data(tmp_path / "a.npy", image_size=6, fit="pad")) == 2


def test_what_is_not_found_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("DDPM_FAST_DATA", raising=False)
    monkeypatch.setattr(module, "_DEBIAN", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match=r"looked in: .*debian\. To have it, apt install dataset-fashion"):
        open_data("fashion-mnist")
    with pytest.raises(FileNotFoundError, match=r"no mnist data found, looked in: nowhere, .* train-images-idx3-ubyte"):
        open_data("mnist")
    with pytest.raises(FileNotFoundError, match=r"looked in: x, x/cifar10, .* put cifar-10-python\.tar\.gz, or"):
        open_data("cifar10", path="x")
    with pytest.raises(FileNotFoundError, match=r"no folder or file fashion_mnist; did you mean 'fashion-mnist'\?"):
        open_data("fashion_mnist")
    with pytest.raises(FileNotFoundError, match=r"no folder or file .*absent; Known by name are fashion-mnist, mnist"):
        open_data(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has no IDX files of the train part"):
        open_data("idx", path=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "cover"}, "fit must be stretch, crop or pad, got 'cover'"),
        ({"split": "val"}, "split must be train or test, got 'val'"),
        ({"channels": 4}, "channels must be 1 or 3, or None .* got 4"),
        ({"image_size": 0}, "image_size must be one or two positive numbers, got 0"),
        ({"image_size": 2.5}, "image_size must be one or two positive numbers, got 2.5"),
        ({"image_size": True}, "image_size must be one or two positive numbers, got True"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    np.save(tmp_path / "a.npy", pixels(2, 4, 4))
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path / "a.npy", **options)


def test_sources_that_do_not_fit_their_path(tmp_path):
    np.save(tmp_path / "a.npy", pixels(2, 9))
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"")
    for call, message in (
        (lambda: open_data("folder"), "source 'folder' needs path"),
        (lambda: open_data("npz", path=tmp_path), r"is a folder, source is 'npz'"),
        (lambda: open_data("folder", path=tmp_path / "a.npy"), r"is a file, source is 'folder'"),
        (lambda: open_data("what", path=tmp_path), "source must be fashion-mnist, .* got 'what' with path"),
        (lambda: open_data(tmp_path / "a.png"), "no kind of data that is known .* a picture's folder is meant"),
        (lambda: open_data(tmp_path / "a.txt"), "no kind of data that is known"),
        (lambda: open_data(tmp_path / "a.npy", image_size=4), r"image_size is of images \(N, C, H, W\), got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
