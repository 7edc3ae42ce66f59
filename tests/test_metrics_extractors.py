"""Features: the small classifier, Inception's wiring with weights of random numbers, and what may go wrong."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast.metrics import Extractor, features, frechet_distance, inception, small_classifier, trained_classifier
from ddpm_fast.metrics.evaluation import Evaluation, Part, real_parts
from ddpm_fast.metrics.features import choose, find_inception_weights, pixels
from ddpm_fast.metrics.small_classifier import Classifier
from ddpm_fast.training.data import TensorData

pytestmark = pytest.mark.usefixtures("one_thread")


def shapes(n=512, seed=0, labels=True, size=(12, 12)):
    """Bars, upright or lying, with noise: two classes that a classifier learns at once."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (n, 1, *size), generator=generator, dtype=torch.uint8)
    kinds = torch.arange(n) % 2
    images[kinds == 0, :, :, 4:6] = 255
    images[kinds == 1, :, 4:6, :] = 255
    return TensorData(images, kinds if labels else None, name="bars")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DDPM_FAST_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


def weights_of(network):
    return torch.cat([tensor.flatten().float() for tensor in network.state_dict().values()])


def test_the_classifier_is_a_function_of_data_and_seed(cache, tmp_path):
    data, said = shapes(), []
    before = torch.get_rng_state()
    first = trained_classifier(data, images=1024, say=said.append)
    assert torch.equal(torch.get_rng_state(), before)
    again = trained_classifier(data, images=1024, cache=tmp_path / "elsewhere")
    assert torch.equal(weights_of(first), weights_of(again))
    assert not torch.equal(weights_of(first), weights_of(trained_classifier(data, images=1024, seed=1)))
    right = first.predict(data.images) == data.labels
    assert right.float().mean() > 0.95
    assert not first.training
    assert "2 classes" in said[0]
    # Kept, and found again: under another name for other data.
    (kept,) = [path for path in cache.iterdir() if str(path) in said[1]]
    kept_at = kept.stat().st_mtime_ns
    found = trained_classifier(data, images=1024, say=said.append)
    assert torch.equal(weights_of(first), weights_of(found))
    assert "trained on bars before" in said[-1]
    assert kept.stat().st_mtime_ns == kept_at
    trained_classifier(shapes(seed=5), images=256)
    assert len(list(cache.iterdir())) == 3
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="holds no weights of the classifier that is wanted"):
        mended = trained_classifier(data, images=1024)
    assert torch.equal(weights_of(first), weights_of(mended))


def test_predictions_are_the_likeliest_classes_whatever_the_type_and_the_number(monkeypatch):
    data = shapes(100)
    network = trained_classifier(data, images=1024)
    with torch.no_grad():
        expected = network(data.images).argmax(1)
    assert expected.unique().tolist() == [0, 1]
    monkeypatch.setattr(small_classifier, "_LOOKED_AT", 30)
    for images in (data.images, data.images.float() / 127.5 - 1):
        found = network.predict(images)
        assert (found.dtype, found.tolist()) == (torch.int64, expected.tolist())
    assert network.predict(data.images[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 1, H, W\), got \(2, 3, 12, 12\)"):
        network.predict(torch.zeros(2, 3, 12, 12))


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the classifier could not be kept"):
        trained_classifier(shapes(64), images=128, cache=tmp_path / "file")


@pytest.mark.parametrize("size", [(12, 12), (12, 9)], ids=["turned", "mirrored"])
def test_without_labels_it_tells_how_an_image_was_turned(size):
    said = []
    network = trained_classifier(shapes(labels=False, size=size), images=512, say=said.append)
    assert network.head.out_features == 4
    assert "four ways to turn an image" in said[0]


def test_large_images_and_any_shape():
    for channels, size in ((3, (100, 60)), (1, (5, 3)), (2, (32, 32))):
        network = Classifier(channels, size, 3).eval()
        assert network.features(torch.zeros(2, channels, *size, dtype=torch.uint8)).shape == (2, 128)
    with pytest.raises(ValueError, match=r"features are of images \(C, H, W\), this data has shape \(4,\)"):
        trained_classifier(TensorData(torch.zeros(8, 4)))


class Pair:
    """Two processes in turn: what rank 0 broadcasts, rank 1 receives."""

    size = 2

    def __init__(self, rank, box):
        self.rank, self.box = rank, box

    def broadcast_(self, tensors):
        if self.rank == 0:
            self.box.extend(tensor.clone() for tensor in tensors)
        else:
            for tensor, sent in zip(tensors, self.box, strict=True):
                tensor.copy_(sent)


def test_of_several_processes_one_trains():
    box, said = [], []
    ours = trained_classifier(shapes(64), images=256, world=Pair(0, box))
    theirs = trained_classifier(shapes(64), images=256, world=Pair(1, box), say=said.append)
    assert torch.equal(weights_of(ours), weights_of(theirs))
    assert not said


def test_classifier_features_tell_samples_apart():
    data = shapes()
    extractor = classifier_of(data)
    assert extractor.note == "not comparable with published FID"
    real, other = extractor(data.images[:256]), extractor(data.images[256:])
    noise = extractor(torch.randint(0, 256, (256, 1, 12, 12), dtype=torch.uint8))
    assert real.shape == (256, 128)
    assert real.dtype == torch.float32

    def distance(x, y):
        x, y = x.double().numpy(), y.double().numpy()
        return frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))

    assert distance(real, noise) > 20 * distance(real, other)


def classifier_of(data):
    network = trained_classifier(data, images=1024)
    return Extractor("test", features.NOT_COMPARABLE, network.features)


# -- Inception --------------------------------------------------------------------------------------------------------


class FakeInception(nn.Module):
    """Called and built like torch-fidelity's, with two weights."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
        super().__init__()
        assert features_list == ["2048"]
        self.scale = nn.Parameter(torch.ones(1))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        self.requires_grad_(False)

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (x.float().mean(dim=(2, 3)).repeat(1, 683)[:, :2048] * self.scale,)


@pytest.fixture
def fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_is_fed_what_it_expects(fidelity, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"scale": torch.full((1,), 2.0)}, path)
    extractor = inception(path)
    assert "the weights are not the published ones" in extractor.note
    grey = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    rows = extractor(grey)
    assert rows.shape == (3, 2048)
    torch.testing.assert_close(rows[:, :1], 2 * grey.float().mean(dim=(2, 3)))
    torch.testing.assert_close(extractor(grey.float() / 127.5 - 1), rows)  # floats become the pixels that they were
    with pytest.raises(ValueError, match=r"images \(N, 1 or 3, H, W\), got \(3, 2, 4, 4\)"):
        extractor(torch.zeros(3, 2, 4, 4, dtype=torch.uint8))


def test_where_the_weights_are_looked_for(fidelity, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*weights-inception-2015-12-05-6726825d.pth"):
        find_inception_weights()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    theirs = folder / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({"scale": torch.ones(1)}, theirs)
    assert find_inception_weights() == theirs
    named = tmp_path / "named.pth"
    torch.save({"scale": torch.ones(1)}, named)
    monkeypatch.setenv("DDPM_FAST_INCEPTION", str(named))
    assert find_inception_weights() == named
    assert find_inception_weights(theirs) == theirs
    assert choose("auto", shapes(8)).name == "Inception v3, 2048"
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*other.pth"):
        find_inception_weights(tmp_path / "other.pth")


def test_weights_that_are_none(fidelity, tmp_path):
    path = tmp_path / "weights.pth"
    for content in ({"scale": torch.ones(2)}, {"other": torch.ones(1)}, types.SimpleNamespace(run="code")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"weights.pth must hold the weights of torch-fidelity's InceptionV3"):
            inception(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"weights.pth must hold the weights"):
        inception(path)


def test_without_torch_fidelity(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    with pytest.raises(ImportError, match=r"Inception features need torch-fidelity .*: pip install torch-fidelity"):
        inception(path)


def test_choosing(monkeypatch):
    monkeypatch.setattr("ddpm_fast.metrics.small_classifier.IMAGES", 128)
    said = []
    assert choose("auto", shapes(64), say=said.append).name == "small classifier of bars, 128"
    assert "no Inception here" in said[0]
    assert choose("auto", TensorData(torch.randn(8, 2))).name == "values, flattened"
    with pytest.raises(ValueError, match="features must be one of auto, inception, classifier, pixels, got 'clip'"):
        choose("clip", shapes(8))
    bad = Extractor("bad", "", lambda images: images)
    with pytest.raises(ValueError, match=r"features must have shape \(2, D\) for 2 images, got \(2, 1, 3\)"):
        bad(torch.zeros(2, 1, 3))


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_parts_of_sources_with_and_without_splits():
    splits = {"train": shapes(32), "test": shapes(16, seed=1)}
    reference, floor = real_parts(splits.__getitem__, "test", 0)
    assert (len(reference), reference.name) == (16, "bars test")
    assert (len(floor), floor.name) == (32, "bars train")

    def only_train(split):
        if split == "test":
            raise FileNotFoundError
        return splits["train"]

    for open_split in (only_train, lambda split: splits["train"]):
        reference, floor = real_parts(open_split, "train", 3)
        assert (reference.name, floor.name) == ("one half of bars", "the other half of bars")
        assert sorted([*reference.indices.tolist(), *floor.indices.tolist()]) == list(range(32))


def test_an_evaluation_of_real_images_is_near_its_floor():
    data, others = shapes(600), shapes(600, seed=1)
    parts = Part(data, torch.arange(600), "bars"), Part(others, torch.arange(600), "others")
    evaluation = Evaluation(pixels(), *parts, metrics=("frechet", "kid", "precision-recall"), num=200)
    floor = evaluation.floor_figures()
    fresh = evaluation.of(shapes(200, seed=2).images.split(64))
    assert set(fresh) == set(floor) == {"frechet", "kid", "precision", "recall", "density", "coverage"}
    assert fresh["frechet"] == pytest.approx(floor["frechet"], rel=0.2)
    black = evaluation.of([torch.zeros(200, 1, 12, 12, dtype=torch.uint8)])
    assert black["frechet"] > 3 * floor["frechet"]
    assert black["kid"] > floor["kid"] + 0.01
    assert black["recall"] == 0
    with pytest.raises(ValueError, match="200 images were to be measured, got 10"):
        evaluation.of([black_images(10)])
    with pytest.raises(ValueError, match="metrics must be some of frechet, kid, precision-recall, got 'fid'"):
        Evaluation(pixels(), *parts, metrics=("fid",), num=200)
    with pytest.raises(ValueError, match="num must be at least 4 images, got 3"):
        Evaluation(pixels(), *parts, metrics=("kid",), num=3)


def black_images(n):
    return torch.zeros(n, 1, 12, 12, dtype=torch.uint8)
