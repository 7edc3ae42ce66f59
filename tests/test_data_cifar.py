"""CIFAR-10's python batches, as a folder and an archive; pickles of other things never run."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from ddpm_fast.training.data import open_data


def every(data) -> np.ndarray:
    return data.batch(torch.arange(len(data))).numpy()


def batch(n: int, seed: int, **more: object) -> dict:
    rng = np.random.default_rng(seed)
    return {b"data": rng.integers(0, 256, (n, 3072), np.uint8), b"labels": rng.integers(0, 10, n).tolist(), **more}


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2 and its NumPy wrote: strings instead of bytes everywhere."""
    shape = b"".join(b"J" + struct.pack("<i", n) for n in data.shape)
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = b"T" + struct.pack("<i", data.size) + data.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    array += b"(K\x01(" + shape + b"t" + dtype + b"\x89" + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"U\x0bbatch_labelU\x04nameu."


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = [batch(2, i, batch_label=f"batch {i}", filenames=["a.png", "b.png"]) for i in range(6)]
    for i, one in enumerate(batches[:5], 1):
        content = python2_pickle(one[b"data"], one[b"labels"]) if i == 1 else pickle.dumps(one, protocol=1 + i % 4)
        (folder / f"data_batch_{i}").write_bytes(content)
    (folder / "test_batch").write_bytes(pickle.dumps(batches[5], protocol=2))
    names = [f"class {i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names, b"num_vis": 3072}, protocol=2))
    return folder, batches


def test_cifar_batches_of_a_folder_and_of_the_archive(cifar, tmp_path, monkeypatch):
    folder, batches = cifar
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-py")
    images = np.concatenate([one[b"data"] for one in batches]).reshape(-1, 3, 32, 32)
    labels = [label for one in batches for label in one[b"labels"]]
    monkeypatch.setenv("DDPM_FAST_DATA", str(tmp_path))
    for data in (
        open_data("cifar10"),
        open_data("cifar10", path=folder),
        open_data(folder),
        open_data("cifar10", path=tmp_path / "cifar-10-python.tar.gz"),
        open_data(tmp_path / "cifar-10-python.tar.gz"),
    ):
        assert np.array_equal(every(data), images[:10])
        assert data.labels.tolist() == labels[:10]
        assert (data.name, data.num_classes, data.class_names[3]) == ("cifar10", 10, "class 3")
    test = open_data("cifar10", split="test")
    assert np.array_equal(every(test), images[10:])


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_a_hostile_pickle_is_refused_and_never_runs(cifar, tmp_path):
    folder, _ = cifar
    mark = tmp_path / "mark"
    for content, wanted in (
        (Hostile(os.system, f"touch {mark}"), "it wants (posix|nt).system"),
        ({b"data": Hostile(open, str(mark), "w")}, "it wants (builtins|io|_io).open"),
        ({b"data": np.array([Hostile(os.mkdir, str(mark))], object)}, "it wants (posix|nt).mkdir"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "an array that is not of bytes"),
        ({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}, r"shape \(2, 3072\) as it has labels, got \(2, 9\)"),
        ({b"data": [1, 2], b"labels": [0, 1]}, r"must hold data and labels, got \['data', 'labels'\]"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["x"]}, "must hold data and labels"),
        ([1, 2], "not a CIFAR-10 python batch"),
    ):
        (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=rf"test_batch.* is not a CIFAR.*{wanted}|test_batch.*{wanted}"):
            open_data(folder, split="test")
    assert not mark.exists()


def test_damaged_and_missing_cifar_files(cifar, tmp_path):
    folder, _ = cifar
    whole = (folder / "test_batch").read_bytes()
    for content in (b"", whole[:1000], b"<html>"):
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match="test_batch is not a CIFAR-10 python batch, or is damaged"):
            open_data(folder, split="test")
    (folder / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="lacks data_batch_3 of CIFAR-10's python batches"):
        open_data(folder)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "cifar-10-batches-py")
    for content in (archive.read_bytes()[:3000], b"<html>"):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"is cut off, or no \.tar\.gz"):
            open_data(archive)
