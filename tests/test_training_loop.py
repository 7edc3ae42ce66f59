"""One optimiser step: accumulation and clipping against plain PyTorch, the scaled loss of fp16, interrupts, files."""

from __future__ import annotations

import copy
import math
import signal
import threading

import pytest
import torch
from torch import nn

from ddpm_fast.training import EMA, Loop, files, loop
from ddpm_fast.training.loop import uninterrupted

CPU = torch.device("cpu")


class Regression(nn.Module):
    """model(batch) is a loss, in the dtype that autocast makes of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.dtypes = []

    def forward(self, batch):
        y = self.linear(batch)
        self.dtypes.append(y.dtype)
        return (y.float() - batch.roll(1, 1)).square().mean()


def batches(count, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return iter([scale * torch.randn(8, 4, generator=generator) for _ in range(count)])


def test_a_step_is_plain_pytorchs():
    model = Regression()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.5) for net in (model, twin)]
    ema = EMA(model, update_every=1)
    runner = Loop(model, optimizers[0], device=CPU, ema=ema, accumulate=3, max_grad_norm=0.1)
    fed = batches(6)
    for _ in range(2):
        loss = runner.step(fed)
    for chunk in torch.stack(list(batches(6))).chunk(2):
        whole = twin(chunk.flatten(0, 1))  # one batch as large as the three
        whole.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert norm > 0.1
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(model.linear.weight, twin.linear.weight)
    assert torch.equal(ema.ema_model.linear.weight, model.linear.weight)
    assert model.linear.weight.grad is None
    assert set(model.dtypes) == {torch.float32}


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    model = Regression()
    Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), device=CPU, precision="bf16").step(batches(1))
    assert model.dtypes == [torch.bfloat16]
    assert model.linear.weight.dtype == torch.float32


@pytest.fixture
def fp16_anywhere(monkeypatch):
    """GradScaler also runs on a CPU, which is good enough to test with."""
    monkeypatch.setattr(loop, "check_precision", lambda precision, device: None)


@pytest.mark.usefixtures("fp16_anywhere")
def test_the_scaled_loss_of_fp16():
    model = Regression()
    twin = copy.deepcopy(model)
    scaled = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), device=CPU, precision="fp16", max_grad_norm=0.3)
    plain = Loop(twin, torch.optim.SGD(twin.parameters(), lr=0.1), device=CPU, max_grad_norm=0.3)
    scaled.scaler.load_state_dict({**scaled.scaler.state_dict(), "scale": 256.0})  # what does not overflow
    fed, again = batches(5), batches(5)
    for _ in range(5):
        assert scaled.step(fed) == pytest.approx(plain.step(again), rel=1e-2)
    assert set(model.dtypes) == {torch.float16}
    torch.testing.assert_close(model.linear.weight, twin.linear.weight, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("fp16_anywhere")
def test_a_gradient_that_overflows_is_skipped_and_the_scale_halved():
    model = Regression()
    runner = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), device=CPU, precision="fp16")
    before, scale = model.linear.weight.clone(), runner.scaler.get_scale()
    assert math.isfinite(runner.step(batches(1, scale=200.0)))
    assert torch.equal(model.linear.weight, before)
    assert runner.scaler.get_scale() == scale / 2
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        runner.step(batches(1, scale=math.nan))
    runner.step(batches(1, scale=0.1))
    assert not torch.equal(model.linear.weight, before)


def test_an_error_leaves_no_gradient_behind():
    model = Regression()
    runner = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), device=CPU, accumulate=2)
    with pytest.raises(StopIteration):
        runner.step(batches(1))
    assert model.linear.weight.grad is None


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", "fp16 trains on CUDA devices only, and the model is on cpu; use bf16"),
        ("half", "fp16 or bf16, got 'half'"),
    ],
)
def test_bad_precision(precision, message):
    with pytest.raises(ValueError, match=message):
        Loop(Regression(), None, device=CPU, precision=precision)


def test_interrupts_wait_for_the_end():
    done = []

    def work():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    with uninterrupted():
        pass  # one that was handled is not raised again


def test_other_handlers_and_threads_are_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *arguments: seen.append(1))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]

    def elsewhere():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen[1] is signal.default_int_handler


def test_files(tmp_path):
    path = tmp_path / "a.pt"
    files.write(path, {"x": torch.arange(3)})
    assert torch.equal(files.read(path, CPU)["x"], torch.arange(3))
    before, whole = path.stat().st_ino, path.read_bytes()
    files.write(path, {"x": torch.arange(3)})
    assert path.stat().st_ino != before, "another file in its place: whoever reads the old one reads it to its end"
    for content in (whole[: len(whole) // 2], b"", b"\x80\x02rubbish", b"q" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pt is cut off or no checkpoint: [^\n]*$"):
            files.read(path, CPU)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "absent.pt", CPU)
