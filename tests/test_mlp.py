"""The MLP for vectors: the text's network, what it is told, how Sampler, Trainer and checkpoints take it; bad input."""

import pytest
import torch
from torch import nn

import ddpm_fast
from ddpm_fast.nn import MLP
from ddpm_fast.training import checkpoints

T = 50


def make(seed=0, **options):
    torch.manual_seed(seed)
    return MLP(**{"dim": 2, "num_timesteps": T, "width": 8, **options})


def inputs(n=5, dim=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.randint(0, T, (n,), generator=generator)


def test_is_the_texts_network():
    """A chain of linear layers and ReLU on [x, rescaled time], built in that order."""
    torch.manual_seed(3)
    chain = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    model = make(seed=3)
    x, t = inputs()
    counted_from_1 = t + 1
    rescaled = (counted_from_1 - 1) / (T - 1) - 0.5
    assert torch.equal(model(x, t), chain(torch.cat([x, rescaled[:, None]], dim=1)))
    assert model(x, t).shape == x.shape


def test_time_reaches_from_minus_to_plus_one_half():
    model, seen = make(), []
    model.hidden[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0][:, 2]))
    model(torch.zeros(3, 2), torch.tensor([0, (T - 1) // 2, T - 1]))
    assert seen[0].tolist() == pytest.approx([-0.5, 24 / 49 - 0.5, 0.5])
    assert torch.isfinite(make(num_timesteps=1)(torch.zeros(1, 2), torch.zeros(1))).all()


def test_residual_adds_after_the_first_layer():
    model = make(residual=True, depth=2)
    x, t = inputs()
    h = torch.cat([x, (t.float() / (T - 1) - 0.5)[:, None]], dim=1)
    h = model.hidden[0](h).relu()
    h = h + model.hidden[1](h).relu()
    assert torch.equal(model(x, t), model.output(h))


def test_labels_decide_and_none_is_the_null_label():
    model = make(num_classes=4)
    x, t = inputs()
    assert model.null_label == model.num_classes == 4
    assert model.label_embedding.weight.shape == (5, 2)
    null = torch.full((5,), 4)
    assert torch.equal(model(x, t), model(x, t, null))
    assert not torch.equal(model(x, t), model(x, t, null - 1))
    model(x, t, torch.tensor([0, 1, 2, 3, 4])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert make().null_label is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = make(num_classes=3)
    x, t = inputs()
    labels = torch.tensor([0, 1, 2, 3, 0])
    expected = model(x, t, labels)
    got = model.to(dtype)(x.to(dtype), t, labels)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected, atol=0.05 if dtype == torch.bfloat16 else 1e-6)


def test_sampler_needs_no_shape():
    model = make(num_classes=3)
    sampler = ddpm_fast.Sampler(model, ddpm_fast.Schedule.linear(T))
    x = sampler.sample(4, seed=0, labels=[0, 1, 2, 0], guidance=2.0)
    assert x.shape == (4, 2)
    assert torch.equal(x, sampler.sample(4, (2,), seed=0, labels=[0, 1, 2, 0], guidance=2.0))
    assert sampler.sample(4, 2, seed=0).shape == (4, 2)


def test_trained_saved_and_loaded(tmp_path):
    model = make(num_classes=2, residual=True, depth=2)
    data = (torch.randn(64, 2), torch.arange(64) % 2)
    schedule = ddpm_fast.Schedule.linear(T)
    trainer = ddpm_fast.Trainer(
        model, schedule, data, out=tmp_path, images=128, batch_size=32, label_dropout=0.2, device="cpu"
    )
    trainer.train()
    loaded = checkpoints.load_network(tmp_path, ema=False)
    assert type(loaded.network) is MLP
    assert loaded.network.config == model.config
    assert loaded.shape == model.sample_shape == (2,)
    x, t = inputs()
    assert torch.equal(loaded.network(x, t), model.eval()(x, t))


X, STEPS = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3, 1), STEPS), "x must have shape (N, 2), got (3, 1)"),
        ((torch.zeros(3, 2, 1), STEPS), "x must have shape (N, 2), got (3, 2, 1)"),
        ((X, STEPS[:2]), "t must have shape (3,), one per vector, got (2,)"),
        ((X, STEPS.bool()), "t must be an integer or floating tensor, got torch.bool"),
        ((X, STEPS + T), "t must be in 0..49 (num_timesteps=50), got 50..50; build the MLP with the T of the schedule"),
        ((X, STEPS, STEPS), "labels were given to an unconditional MLP; build it with num_classes=K"),
    ],
)
def test_input_that_does_not_fit(args, message):
    with pytest.raises(ValueError) as error:
        make()(*args)
    assert str(error.value) == message


def test_labels_that_do_not_fit():
    model = make(num_classes=3)
    for labels, message in (
        (STEPS[:2], "labels must have shape (3,), got (2,)"),
        (X[:, 0], "labels must be int64 or int32, got torch.float32"),
        (STEPS + 4, "labels must be in 0..3 (3 = no label), got 4..4"),
    ):
        with pytest.raises(ValueError) as error:
            model(X, STEPS, labels)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an int, got 2.5"),
        ({"depth": True}, TypeError, "depth must be an int, got True"),
        ({"num_timesteps": 0}, ValueError, "num_timesteps must be at least 1, got 0"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_work(options, kind, message):
    with pytest.raises(kind) as error:
        make(**options)
    assert str(error.value) == message


def test_compiles_and_moves_device():
    model = make(num_classes=2)
    assert model.device == torch.device("cpu")
    assert MLP(**model.config, device="meta").device.type == "meta"
    program = torch.compile(model, backend="eager", fullgraph=True)
    x, t = inputs()
    labels = torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(program(x, t, labels), model(x, t, labels))
