"""What a Trainer makes of unusual models, optimisers and surroundings: the same run, or one line before it begins."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_fast import Schedule, Trainer
from ddpm_fast.training import checkpoints
from ddpm_fast.training.settings import Settings

SCHEDULE = Schedule.linear(10)
IMAGES = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)


class Pair(nn.Module):
    """Two convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.second(torch.tanh(self.first(x)))


class Product(nn.Module):
    """x @ weight, of any weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x, t):
        return x @ self.weight


def trainer(model=None, out=None, data=IMAGES, **options):
    model = Pair() if model is None else model
    return Trainer(model, SCHEDULE, data, out=out, **{"batch_size": 4, "images": 16, **options})


def bits(run):
    return {name: value.contiguous().reshape(-1).view(torch.uint8).tolist() for name, value in run.state()[0].items()}


@pytest.fixture
def expected(one_thread):
    run = trainer()
    run.train()
    return bits(run)


# -- settings, and what a file has to hold -----------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers_of_python(tmp_path):
    settings = Settings(batch_size=np.int64(8), lr=np.float32(0.5), ema=np.float64(0.9), seed=np.uint64(2**63), keep=1)
    assert {type(settings.batch_size), type(settings.seed)} == {int}
    assert {type(settings.lr), type(settings.ema)} == {float}
    run = trainer(out=tmp_path, batch_size=np.int64(4), lr=np.float32(1e-3), images=np.int32(4))
    run.train(until=np.int64(4))
    assert checkpoints.find(tmp_path).name == checkpoints.file_name(4)


def with_buffer(value):
    model = Pair()
    model.register_buffer("odd", value)
    return model


class Extra(Pair):
    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: with_buffer(torch.ones(2, dtype=torch.complex128)), "model.odd must be a dense tensor of a dtype"),
        (lambda: with_buffer(torch.eye(2).to_sparse()), "model.odd must be a dense tensor"),
        (Extra, "a checkpoint holds a model's tensors; _extra_state is a dict"),
    ],
)
def test_what_no_checkpoint_could_hold_is_said_before_training(tmp_path, model, said):
    with pytest.raises(TypeError, match=said):
        trainer(model(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_optimizers_state_is_looked_at_after_the_first_step(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["odd"] = object()

    run = trainer(out=tmp_path, optimizer=lambda parameters: Odd(parameters, lr=0.1))
    with pytest.raises(TypeError, match="its state odd is a object"):
        run.train()
    assert run.steps_done == 1


# -- models ------------------------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyConv2d(1, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x)


def made_in_inference_mode():
    with torch.inference_mode():
        return Pair()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: Pair().to("meta"), "first.weight is on the meta device and has no values"),
        (Lazy, "layer.weight has no shape yet: call the model once"),
        (made_in_inference_mode, "first.weight was made under torch.inference_mode"),
        (lambda: Product(torch.randn(1, 8).expand(8, 8)), "weight is expanded, so that its elements share memory"),
        (lambda: nn.DataParallel(Pair()), "got it in a DataParallel: give model.module"),
    ],
)
def test_models_that_cannot_be_trained(model, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        trainer(model(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_thread")
def test_parts_of_larger_tensors_are_trained_and_their_neighbours_are_not():
    """torch's fused AdamW walks on through memory."""
    base = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    before = base.clone()
    part, whole = trainer(Product(base[:, ::2]), ema=None), trainer(Product(base[:, ::2].clone()), ema=None)
    part.train()
    whole.train()
    torch.testing.assert_close(part.model.weight, whole.model.weight)
    assert torch.equal(base[:, 1::2], before[:, 1::2])


class Spectrum(nn.Module):
    """Complex weights, and a layer that has them in two places."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(8, 8, dtype=torch.complex64))
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.again = self.layer

    def forward(self, x, t):
        return self.again(self.layer(torch.fft.ifft2(torch.fft.fft2(x) * self.filter).real))


@pytest.mark.usefixtures("one_thread")
def test_complex_and_shared_weights_are_averaged_saved_and_go_on(tmp_path):
    torch.manual_seed(1)
    model = Spectrum()
    whole, part = trainer(copy.deepcopy(model)), trainer(copy.deepcopy(model), out=tmp_path)
    whole.train()
    part.train(until=8)
    again = trainer(copy.deepcopy(model), out=tmp_path)
    assert again.images_seen == 8
    again.train()
    assert bits(again) == bits(whole)
    average, weight = whole.ema.ema_model.filter, whole.model.filter
    assert not torch.equal(weight, model.filter)
    assert not torch.equal(average, model.filter)
    assert not torch.equal(average, weight)


class Away(Pair):
    def forward(self, x, t):
        return super().forward(x, t).detach()


def test_an_output_that_does_not_depend_on_weights():
    with pytest.raises(ValueError, match="the loss depends on no parameter that requires grad"):
        trainer(Away()).train()


# -- optimisers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda parameters: None, TypeError, "optimizer must be a function .*; it gave NoneType"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), TypeError, "optimizer must be a function .* got SGD"),
        (lambda parameters: torch.optim.Adam(Pair().parameters()), ValueError, "it has others than the model's"),
    ],
)
def test_optimizers_of_something_else(make, error, said):
    with pytest.raises(error, match=said):
        trainer(optimizer=make)


@pytest.mark.usefixtures("one_thread")
def test_parameters_that_the_optimizer_leaves_out(tmp_path):
    """Their gradients do not pile up, nor count in the norm."""

    def second_only(parameters):
        return torch.optim.SGD(list(parameters)[2:], lr=0.1)

    frozen = Pair()
    frozen.first.requires_grad_(False)
    left, without = trainer(optimizer=second_only), trainer(frozen, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    left.train()
    without.train()
    assert torch.equal(left.model.second.weight, without.model.second.weight)
    assert torch.equal(left.model.first.weight, Pair().first.weight)
    assert all(parameter.grad is None for parameter in left.model.parameters())


# -- surroundings ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_callers_modes_do_not_matter(mode, expected):
    run = trainer()
    with mode():
        run.train()
    assert bits(run) == expected


@pytest.mark.usefixtures("one_thread")
def test_callbacks_that_meddle(expected):
    class Meddler:
        def on_step(self, trainer, report):
            torch.manual_seed(7)
            trainer.model.eval()
            with torch.enable_grad():
                trainer.model(torch.ones(1, 1, 8, 8), torch.zeros(1)).sum().backward()
            torch.set_grad_enabled(False)

    run = trainer()
    run.callbacks.append(Meddler())
    try:
        run.train()
    finally:
        torch.set_grad_enabled(True)
    assert bits(run) == expected


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("again", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_copies_go_on_alone(again, expected):
    run = trainer()
    run.step()
    twin = again(run)
    twin.train()
    assert run.images_seen == 4
    assert bits(twin) == expected
    run.train()
    assert bits(run) == expected


@pytest.mark.parametrize("until", ["8", 8.5, True, float("nan")])
def test_until_is_a_number_of_images(until):
    with pytest.raises(TypeError, match="until must be a number of images"):
        trainer().train(until)


@pytest.mark.parametrize("device", ["gpu", "meta", True, "cuda:99"])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match="device"):
        trainer(device=device)


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        (lambda i: IMAGES[i % 4][:2], ValueError, r"batch\(\) must give torch.uint8 of shape \(4, 1, 8, 8\)"),
        (lambda i: IMAGES[i % 4][..., :4], ValueError, r"got torch.uint8 of shape \(4, 1, 8, 4\)"),
        (lambda i: IMAGES[i % 4].double(), ValueError, "got torch.float64"),
        (lambda i: IMAGES[i % 4].numpy(), TypeError, "must give a tensor, got ndarray"),
    ],
)
def test_data_that_gives_something_else_than_it_says(batch, error, said):
    class Own:
        name, shape, dtype, labels, num_classes = "own", (1, 8, 8), torch.uint8, None, None

        def __len__(self):
            return 4

        def batch(self, indices):
            return batch(indices)

        def fingerprint(self):
            return "00"

    with pytest.raises(error, match=said):
        trainer(data=Own()).train()


def test_a_run_stays_where_it_was_begun(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = trainer(out="run")
    run.step()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.save()
    assert checkpoints.find(tmp_path / "run").name == checkpoints.file_name(4)
    with pytest.raises(ValueError, match="out must name a folder"):
        trainer(out="")


def test_a_folder_that_was_deleted_meanwhile_is_made_again(tmp_path):
    run = trainer(out=tmp_path / "run")
    run.step()
    (tmp_path / "run" / "checkpoints").rmdir()
    (tmp_path / "run").rmdir()
    assert run.save().exists()
