"""Data in memory and Datasets: what training gets of a tensor, an array, (images, labels), or items one by one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ddpm_fast.training.data import Data, TensorData, as_data, base, prefetch


def pixels(n: int = 6, *shape: int) -> torch.Tensor:
    shape = shape or (1, 4, 4)
    return torch.arange(n * int(np.prod(shape))).remainder(256).to(torch.uint8).view(n, *shape)


def test_a_batch_is_these_rows_and_nothing_is_copied():
    images, labels = pixels(6), [0, 1, 2, 0, 1, 2]
    data = as_data((images, labels))
    assert isinstance(data, Data)
    assert data.images.data_ptr() == images.data_ptr()
    some = torch.tensor([5, 0, 0, 3])
    assert torch.equal(data.batch(some), images[some])
    assert data.batch(some).dtype == data.dtype == torch.uint8
    assert (len(data), data.shape, data.num_classes) == (6, (1, 4, 4), 3)
    assert data.labels.dtype == torch.int64
    assert repr(data) == "tensor: 6 of shape 1x4x4, uint8, 3 classes"
    with pytest.raises(IndexError):
        data.batch(torch.tensor([6]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_come_as_float32(dtype):
    images = torch.linspace(-1, 1, 24).to(dtype).view(4, 6)
    batch = as_data(images).batch(torch.arange(4))
    assert batch.dtype == as_data(images).dtype == torch.float32
    assert torch.equal(batch, images.float())


def test_arrays_of_every_layout():
    plain = pixels(5).numpy()
    read_only = plain.copy()
    read_only.flags.writeable = False
    floats = np.linspace(-1, 1, 10).reshape(5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in (plain[::-1], plain.transpose(0, 1, 3, 2), read_only, floats[:, ::-1]):
            expected = array.astype("f4" if array.dtype.kind == "f" else "u1")
            assert np.array_equal(as_data(array).batch(torch.arange(5)).numpy(), expected)
        assert as_data(floats.astype(">f4")).batch(torch.arange(5)).tolist() == floats.astype("f4").tolist()
    assert as_data((plain, np.arange(5, dtype=np.uint8))).labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: as_data([pixels(), pixels()]), TypeError, "data must be a tensor or array .* got list"),
        (lambda: as_data("digits"), TypeError, "or what open_data gives, got 'digits'"),
        (lambda: as_data(DataLoader(TensorDataset(pixels()))), TypeError, "not a DataLoader.* give its .dataset"),
        (
            lambda: as_data(pixels().long()),
            ValueError,
            "must be uint8 .* or floating .* got int64: if its values",
        ),
        (lambda: as_data(np.zeros((2, 3), bool)), ValueError, "got bool"),
        (lambda: as_data(np.array([["a"]])), TypeError, "of numbers, got ndarray of dtype <U1"),
        (lambda: as_data(torch.zeros(4)), ValueError, r"shape \(N, ...\) with nothing of size 0, got \(4,\)"),
        (lambda: as_data(torch.zeros(0, 3)), ValueError, r"nothing of size 0, got \(0, 3\)"),
        (lambda: TensorData([np.zeros((1, 2)), np.zeros((2, 2))]), ValueError, "must all have one shape, got several"),
        (lambda: as_data(torch.tensor([[0.0, torch.nan]])), ValueError, "must be finite, got NaN"),
        (lambda: as_data(torch.tensor([[0.0, -torch.inf]])), ValueError, "must be finite"),
        (lambda: as_data(pixels().float()), ValueError, "whole numbers from 0 to 95, pixels: convert them to uint8"),
        (lambda: as_data((pixels(6), [0] * 5)), ValueError, r"labels must have shape \(6,\), .* got \(5,\)"),
        (lambda: as_data((pixels(6), torch.eye(6).long())), ValueError, r"labels must have shape \(6,\)"),
        (lambda: as_data((pixels(2), [0, -1])), ValueError, "labels must be in 0..0, got -1 to 0"),
        (lambda: as_data((pixels(2), [0.0, 1.0])), TypeError, "labels must be integers, got float64"),
        (lambda: as_data((pixels(2), [True, False])), TypeError, "labels must be integers, got bool"),
        (lambda: TensorData(pixels(2), [0, 3], num_classes=3), ValueError, "labels must be in 0..2, got 0 to 3"),
        (lambda: TensorData(pixels(2), num_classes=3), ValueError, "num_classes=3 needs labels"),
        (lambda: TensorData(pixels(2), [0, 1], class_names=["a"]), ValueError, "must name 2 classes, got 1"),
    ],
)
def test_bad_data_is_one_clear_error(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.linspace(0, 1, 24).view(2, 3, 2, 2), r"are in \[0, 1\], but models are trained in \[-1, 1\]"),
        (torch.linspace(-0.42, 2.8, 24).view(2, 3, 2, 2), r"reach from -0.42 to 2.8, but"),
        (torch.linspace(-1, 1, 24).view(2, 3, 2, 2), None),
        (torch.linspace(-9, 9, 32).view(2, 4, 2, 2), None),  # latents
        (torch.linspace(0, 1, 24).view(2, 12), None),  # vectors
    ],
)
def test_floats_that_are_hardly_in_model_range(images, message):
    if message is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            as_data(images)
    else:
        with pytest.warns(UserWarning, match=message):
            as_data(images)


def test_fingerprints_are_the_same_everywhere_and_change_with_the_data(monkeypatch):
    images, labels = pixels(6), [0, 1, 2, 0, 1, 2]
    ours = as_data((images, labels)).fingerprint()
    assert ours == "2a1c6eef81cfcce9"
    assert as_data(images).fingerprint() == "5d5d2d0b1816ecb4"
    assert as_data(torch.tensor([[-1, 0.5], [0.25, 1]])).fingerprint() == "19858f2835b1233c"
    other = images.clone()
    other[5, 0, 3, 3] += 1
    seen = {
        ours,
        as_data((other, labels)).fingerprint(),
        as_data((images, [0, 1, 2, 0, 2, 1])).fingerprint(),
        as_data((images.view(6, 1, 2, 8), labels)).fingerprint(),
        as_data((images[:5], labels[:5])).fingerprint(),
        as_data((images.flip(0), labels)).fingerprint(),
    }
    assert len(seen) == 6
    # Of large data some rows, the first one among them.
    monkeypatch.setattr(base, "_HASHED_WHOLE", 10)
    monkeypatch.setattr(base, "_HASHED_ROWS", 2)
    assert as_data((images, labels)).fingerprint() != ours
    assert as_data((other, labels)).fingerprint() == as_data((images, labels)).fingerprint()
    other[0] += 1
    assert as_data((other, labels)).fingerprint() != as_data((images, labels)).fingerprint()


class Items(Dataset):
    """Any items; a count of how many were asked for."""

    def __init__(self, items, **attributes):
        self.items, self.asked = items, 0
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked += 1
        return self.items[index]


def test_datasets_of_pairs_mappings_and_plain_images():
    images, labels = pixels(5, 3, 2, 2), torch.tensor([2, 0, 1, 1, 0])
    every = torch.arange(5)
    for items in (
        list(zip(images, labels, strict=True)),
        [{"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True)],
        [(image.numpy(), label) for image, label in zip(images, labels.tolist(), strict=True)],
    ):
        data = as_data(Items(items))
        assert isinstance(data, Data)
        assert torch.equal(data.batch(every), images)
        assert (data.shape, data.dtype, data.num_classes) == ((3, 2, 2), torch.uint8, 3)
        assert torch.equal(data.labels, labels)
    plain = as_data(Items(list(images)))
    assert plain.labels is plain.num_classes is None
    assert torch.equal(plain.batch(torch.tensor([4, 1])), images[[4, 1]])
    captions = as_data(Items([(image, "a cat") for image in images]))
    assert captions.labels is None
    assert as_data(Items(list(images.double() / 255 * 2 - 1))).batch(every).dtype == torch.float32


def test_labels_that_a_dataset_knows_are_not_read_one_by_one():
    images, labels = pixels(5), [2, 0, 1, 1, 0]
    dataset = Items(list(zip(images, labels, strict=True)), targets=labels)
    assert as_data(dataset).labels.tolist() == labels
    assert dataset.asked == 1
    some = as_data(Subset(dataset, [4, 0]))
    assert some.labels.tolist() == [0, 2]
    assert torch.equal(some.batch(torch.arange(2)), images[[4, 0]])


def test_pillow_images_of_a_dataset():
    image = pytest.importorskip("PIL.Image")
    colour = pixels(3, 4, 5, 3).numpy()
    data = as_data(Items([(image.fromarray(x), 0) for x in colour]))
    assert data.shape == (3, 4, 5)
    assert np.array_equal(data.batch(torch.arange(3)).numpy(), colour.transpose(0, 3, 1, 2))
    assert as_data(Items([image.fromarray(colour[0, ..., 0])])).shape == (1, 4, 5)


def test_bad_items_of_a_dataset():
    with pytest.raises(ValueError, match="at least one image, got an empty Items"):
        as_data(Items([]))
    with pytest.raises(TypeError, match=r"Items\[0\] must be or begin with an image: .* got 'text'"):
        as_data(Items(["text"]))
    with pytest.raises(TypeError, match=r"Items\[0\] must be .* got None"):
        as_data(Items([{"text": 1}]))
    mixed = as_data(Items([pixels(1)[0], pixels(1, 1, 4, 5)[0], pixels(1)[0].float() / 255]))
    for index, got in ((1, r"uint8 \(1, 4, 5\)"), (2, r"float32 \(1, 4, 4\)")):
        with pytest.raises(ValueError, match=rf"Items\[{index}\] must be uint8 \(1, 4, 4\) as item 0 is, got {got}"):
            mixed.batch(torch.tensor([index]))
    with pytest.warns(UserWarning, match=r"are in \[0, 1\]"):
        as_data(Items([(pixels(1, 3, 4, 4)[0].float() / 255, 0)]))


@pytest.mark.parametrize("workers", [None, 0, 3])
def test_prefetch_of_data_in_memory_is_its_batches_in_order(workers):
    data = as_data(pixels(10))
    indices = [torch.tensor(some) for some in ([3, 1], [9], [0, 0, 2])]
    batches = list(prefetch(data, iter(indices), workers))
    assert all(torch.equal(batch, data.images[some]) for batch, some in zip(batches, indices, strict=True))
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="workers must be a number of processes, 0 or more"):
            prefetch(data, indices, bad)
