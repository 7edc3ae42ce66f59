"""`Trainer`: a run that is cut anywhere is the same run; a step against plain PyTorch."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpm_fast
from ddpm_fast import Schedule, Trainer, UNet, noise, ops
from ddpm_fast.training import steps, streams
from ddpm_fast.training.learning_rate import factor

SCHEDULE = Schedule.linear(100)


class MLP(nn.Module):
    """Two dimensions in and out; with dropout, and able to be told its own estimate."""

    def __init__(self, dropout=0.0, self_condition=False, num_classes=None, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.self_condition, self.num_classes, self.null_label = self_condition, num_classes, num_classes
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 2)
        self.labels = nn.Embedding(1 + (num_classes or 0), width)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[torch.Tensor] = []

    def forward(self, x, t, labels=None, x_self_cond=None):
        if self.training:
            self.seen.append(x.detach())
        told = torch.zeros_like(x) if x_self_cond is None else x_self_cond
        h = self.first(torch.cat([x, told, t[:, None].to(x) / 100], dim=1))
        if labels is not None:
            h = h + self.labels(labels).to(h.dtype)
        return self.second(self.dropout(F.silu(h)))


def points(n: int = 50) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def pictures(n: int = 20):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.arange(n) % 3


def mlp_trainer(**options) -> Trainer:
    dropout, told = options.pop("dropout", 0.0), options.pop("told", False)
    return Trainer(MLP(dropout, told), SCHEDULE, points(), **{"images": 320, "batch_size": 32, **options})


def unet_trainer(**options) -> Trainer:
    torch.manual_seed(0)
    model = UNet(1, 8, width=4, depth=1, num_classes=3)
    defaults = {"images": 40, "batch_size": 8, "label_dropout": 0.2, "flip": True, "warmup": 40}
    return Trainer(model, SCHEDULE, pictures(), **{**defaults, **options})


def everything(trainer: Trainer):
    """Weights, average, moments and counters, as a checkpoint file would give them back."""
    tensors, state = trainer.state()
    return {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(state))


def assert_equal(one: Trainer, other: Trainer) -> None:
    (tensors, state), (others, other_state) = everything(one), everything(other)
    assert state == other_state
    assert tensors.keys() == others.keys()
    different = [name for name, value in tensors.items() if not torch.equal(value, others[name])]
    assert not different


MAKERS = {
    "unet": unet_trainer,
    "unet-bf16-huber-v": lambda: unet_trainer(
        precision="bf16", prediction="v", loss="huber", weighting="min-snr", accumulate=2
    ),
    "mlp-dropout-told": lambda: mlp_trainer(dropout=0.3, told=True, lr_schedule="cosine", accumulate=4),
    "mlp-sgd": lambda: mlp_trainer(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)
    ),
    "mlp-adam-no-average": lambda: mlp_trainer(optimizer=lambda p: torch.optim.Adam(p, amsgrad=True), ema=None),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_a_run_that_is_cut_is_the_same_run(maker):
    """Into a new process's trainer, whose generators have seen other things, bit for bit."""
    whole = maker()
    step = whole.settings.batch_size
    whole.train()
    assert whole.images_seen == whole.settings.images
    part = maker()
    for cut in (step, 3 * step):
        part.train(cut)
        assert part.images_seen == cut
        torch.manual_seed(cut)
        following = maker()
        following.load_state(*everything(part))
        part = following
    part.train()
    assert_equal(whole, part)


@pytest.mark.usefixtures("one_thread")
def test_the_state_is_a_copy_of_nothing_and_loading_copies():
    trainer = mlp_trainer(images=64)
    trainer.train()
    tensors, state = trainer.state()
    assert tensors["model.first.weight"].data_ptr() == trainer.model.first.weight.data_ptr()
    other = mlp_trainer()
    other.load_state(tensors, state)
    before = {name: value.clone() for name, value in tensors.items()}
    other.train()
    assert all(torch.equal(before[name], value) for name, value in tensors.items())
    assert tensors["schedule.betas"].dtype == torch.float64
    assert set(state) >= {"images_seen", "step", "seed", "batch_size", "ema_step", "optimizer", "scaler"}


def test_moments_are_laid_out_like_the_weights():
    """Fused optimisers walk through both by address, and files know no channels_last."""
    trainer = unet_trainer()
    trainer.step()
    tensors, state = trainer.state()
    other = unet_trainer()
    other.load_state({name: value.contiguous() for name, value in tensors.items()}, state)
    for parameter in other.model.parameters():
        for value in other.optimizer.state[parameter].values():
            assert value.shape != parameter.shape or value.stride() == parameter.stride()
    assert any(not parameter.is_contiguous() for parameter in other.model.parameters())


def test_state_keeps_its_dtype():
    """torch itself would cast float32 moments to the bfloat16 of their weights."""
    trainer = Trainer(MLP().bfloat16(), SCHEDULE, points(), batch_size=10, ema=None)
    for parameter in trainer.optimizer.param_groups[0]["params"]:
        moments = {name: torch.rand(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
        trainer.optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    tensors, state = everything(trainer)
    other = Trainer(MLP().bfloat16(), SCHEDULE, points(), batch_size=10, ema=None)
    other.load_state(tensors, state)
    assert torch.equal(other.state()[0]["optimizer.0.exp_avg"], tensors["optimizer.0.exp_avg"])
    assert other.state()[0]["optimizer.0.exp_avg"].dtype == torch.float32


@pytest.mark.usefixtures("one_thread")
def test_steps_are_plain_pytorchs():
    """Images in the order of the epochs, timesteps and noise by position, AdamW, warm-up, clipping and average."""
    trainer = mlp_trainer(lr=0.01, warmup=64, max_grad_norm=0.5, ema=0.9, ema_power=None, weight_decay=0.1)
    twin = copy.deepcopy(trainer.model)
    average = copy.deepcopy(twin)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    order, table = streams.Order(0, 50), SCHEDULE.noising_table()
    clipped = 0
    for step in range(6):
        first = 32 * step
        rng = noise.make_rng(0, first)
        t = streams.timesteps(rng, 32, 100)
        eps = ops.normal(32, (2,), seed=0, first_sample=first, stream=noise.STREAM_TRAIN_NOISE)
        a, b = table[t].unbind(1)
        x_t = a[:, None] * points()[order.indices(first, 32)] + b[:, None] * eps
        loss = F.mse_loss(twin(x_t, t), eps)
        optimizer.zero_grad()
        loss.backward()
        clipped += nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (first + 1) / 64)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), twin.parameters(), strict=True):
                mean.copy_(weight if step == 0 else 0.9 * mean + 0.1 * weight)
        assert trainer.step() == pytest.approx(loss.item(), rel=1e-6)
        assert torch.equal(trainer.model.seen[-1], x_t)
    assert 0 < clipped < 6
    for found, expected in ((trainer.model, twin), (trainer.ema.ema_model, average)):
        for one, other in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_micro_batches_are_the_batch():
    """The same x_t bits; losses and weights to the order of summation."""
    whole, cut = mlp_trainer(), mlp_trainer(accumulate=8)
    for _ in range(4):
        assert cut.step() == pytest.approx(whole.step(), rel=1e-6)
    assert torch.equal(torch.cat(cut.model.seen)[:32], whole.model.seen[0])
    assert len(cut.model.seen) == 8 * len(whole.model.seen)
    for one, other in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_the_generators_of_torch_are_left_as_they_were():
    trainer = mlp_trainer(dropout=0.5)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    losses = [trainer.step() for _ in range(3)]
    assert torch.equal(torch.rand(3), expected)
    again = mlp_trainer(dropout=0.5)
    torch.manual_seed(99)
    assert [again.step() for _ in range(3)] == losses
    other = mlp_trainer(dropout=0.5, seed=1)
    assert other.step() != losses[0]


@pytest.mark.usefixtures("one_thread")
def test_self_conditioning_tosses_a_coin_a_step():
    trainer = mlp_trainer(told=True, accumulate=2)
    calls = []
    for step in range(8):
        before = len(trainer.model.seen)
        trainer.step()
        calls.append(len(trainer.model.seen) - before)
        assert calls[-1] == (4 if streams.batch_coin(0, 32 * step, 0.5) else 2)
    assert set(calls) == {2, 4}
    trainer = mlp_trainer(told=True, self_condition=False)
    trainer.step()
    assert len(trainer.model.seen) == 1


@pytest.mark.usefixtures("one_thread")
def test_what_is_not_finite_stops_before_weights_change():
    trainer = mlp_trainer()
    trainer.train(64)
    before, state = everything(trainer)
    model = trainer.model
    forward = model.forward
    model.forward = lambda *arguments, **named: forward(*arguments, **named) * math.nan
    with pytest.raises(FloatingPointError, match=r"stopped at step 3 \(after 64 images\): the loss is nan; the w"):
        trainer.train()
    model.forward = lambda *arguments, **named: forward(*arguments, **named) * 1e30
    with pytest.raises(FloatingPointError, match=r"the loss is inf|the gradient's norm is inf"):
        trainer.step()
    after, same = everything(trainer)
    assert state == same
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.forward = forward
    trainer.train()  # with the images that the stopped step had drawn
    whole = mlp_trainer()
    whole.train()
    assert_equal(trainer, whole)


@pytest.mark.usefixtures("one_thread")
def test_the_scaled_loss_of_fp16(monkeypatch):
    """GradScaler runs on a CPU too, which is good enough to test with: its scale belongs to the state."""
    monkeypatch.setattr(steps, "check_precision", lambda precision, device: None)
    plain, trainer = mlp_trainer(), mlp_trainer(precision="fp16", images=10_000)
    for _ in range(3):
        assert trainer.step() == pytest.approx(plain.step(), rel=2e-2)
    scaler = trainer._update.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**12})
    other = mlp_trainer(precision="fp16")
    other.load_state(*everything(trainer))
    assert other._update.scaler.get_scale() == 2.0**12
    forward = trainer.model.forward
    trainer.model.forward = lambda *arguments, **named: forward(*arguments, **named).float() * 1e18
    before = trainer.model.first.weight.clone()
    with pytest.raises(FloatingPointError, match=r"norm is (inf|nan) in fp16 whatever the loss is scaled by"):
        trainer.train(10**9)
    assert torch.equal(trainer.model.first.weight, before)


class Spy:
    """Notes what it is told."""

    def __init__(self):
        self.events = []

    def on_start(self, trainer):
        self.events.append(("start", trainer.images_seen))

    def on_step(self, trainer, report):
        self.events.append(report)

    def on_end(self, trainer):
        self.events.append(("end", trainer.images_seen))


@pytest.mark.usefixtures("one_thread")
def test_callbacks_and_reports():
    trainer = mlp_trainer(images=70, lr=0.5, lr_schedule="cosine", max_grad_norm=None)
    spy = Spy()
    trainer.callbacks += [spy, object()]
    trainer.train()
    start, *reports, end = spy.events
    assert (start, end) == (("start", 0), ("end", 96))  # the last batch is whole
    assert [(report.images_seen, report.step) for report in reports] == [(32, 1), (64, 2), (96, 3)]
    assert [report.lr for report in reports] == [0.25 * (1 + math.cos(math.pi * i / 70)) for i in (0, 32, 64)]
    assert all(report.loss > 0 and report.grad_norm > 0 and report.seconds > 0 for report in reports)
    trainer.train()  # there is nothing left to do
    assert len(spy.events) == 7
    trainer = mlp_trainer()
    trainer.train(until=33)
    assert trainer.images_seen == 64


def test_the_learning_rate_is_a_function_of_images():
    constant = [factor(i, images=100, warmup=10) for i in (0, 4, 9, 10, 1000)]
    assert constant == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = [factor(i, images=110, warmup=10, schedule="cosine") for i in (4, 10, 60, 110, 500)]
    assert cosine == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0])


@pytest.mark.usefixtures("one_thread")
def test_the_average_copies_buffers():
    trainer = unet_trainer(ema=0.9999)
    for _ in range(3):
        trainer.step()
    model, average = trainer.model.state_dict(), trainer.ema.ema_model.state_dict()
    for name, value in model.items():
        copied = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(average[name], value) == copied
    assert average["down1.norm1.num_batches_tracked"] == 3


@pytest.mark.usefixtures("one_thread")
def test_sampling_from_what_was_trained():
    trainer = mlp_trainer(prediction="v", told=True)
    trainer.train(64)
    sampler = trainer.sampler(steps=4)
    assert sampler.model is trainer.ema.ema_model
    assert sampler.self_condition is True
    assert sampler.sample(3, seed=0).shape == (3, 2)
    by_hand = ddpm_fast.Sampler(trainer.ema.ema_model, SCHEDULE, steps=4, prediction="v", shape=2)
    assert torch.equal(sampler.sample(3, seed=0), by_hand.sample(3, seed=0))
    assert trainer.sampler(ema=False).model is trainer.model
    assert mlp_trainer(ema=None).sampler().model.first.weight.shape == (16, 5)


@pytest.mark.usefixtures("one_thread")
def test_training_learns():
    """A line that is sampled is the line of the data, and not as it was before."""
    u = torch.linspace(-1, 1, 64)
    data = torch.stack([u, 0.5 * u], dim=1)
    schedule = Schedule.linear(50, 1e-3, 0.2)
    trainer = Trainer(MLP(width=64), schedule, data, images=38_400, batch_size=128, lr=2e-2, ema=0.99)

    def off_the_line():
        drawn = trainer.sampler().sample(200, seed=0)
        return (drawn[:, 1] - 0.5 * drawn[:, 0]).abs().median(), drawn[:, 0].std()

    before, _ = off_the_line()
    trainer.train()
    after, spread = off_the_line()
    assert after < 0.25 < before
    assert 0.4 < spread < 0.8


@pytest.mark.usefixtures("one_thread")
@pytest.mark.no_poison
def test_compiled_training_follows_the_same_path(monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: compiler(model, backend="eager")
    )  # Inductor takes half a minute
    plain = mlp_trainer(images=96)
    compiled = mlp_trainer(images=96, compile=True)
    for _ in range(3):
        assert compiled.step() == pytest.approx(plain.step(), rel=1e-4)
    assert compiled.state()[0].keys() == plain.state()[0].keys()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.no_poison
def test_a_model_that_is_compiled_already_has_the_networks_own_keys():
    model = MLP()
    trainer = Trainer(torch.compile(model, backend="eager"), SCHEDULE, points(), images=64, batch_size=32)
    plain = mlp_trainer(images=64)
    assert trainer.step() == pytest.approx(plain.step(), rel=1e-4)
    assert trainer.model is model
    assert trainer.state()[0].keys() == plain.state()[0].keys()
