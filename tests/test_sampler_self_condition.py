"""Self-conditioning (Chen et al. 2022): the network is told the x0 of the row before, however the run is made."""

from __future__ import annotations

import pytest
import torch
from sampler_models import SHAPE, threads
from torch import Tensor, nn

from ddpm_fast import inference, ops
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(40)


class Conditioned(nn.Module):
    """(x, t[, labels], x_self_cond=None) -> like x, and what it was told, call by call."""

    self_condition = True

    def __init__(self, num_classes: int | None = None, dims: int = 2) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.seen = 3, num_classes, []
        conv = nn.Conv2d if dims == 2 else nn.Conv1d
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = conv(6, 8, 3, padding=1), conv(8, 3, 3, padding=1)
            if num_classes is not None:
                self.embedding, self.null_label = nn.Embedding(num_classes + 1, 8), num_classes

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        self.seen.append(None if x_self_cond is None else x_self_cond.float().clone())
        told = torch.zeros_like(x) if x_self_cond is None else x_self_cond
        h = self.first(torch.cat([told, x], dim=1)) + torch.sin(t.to(x.dtype) / 20).view(-1, *[1] * (x.dim() - 1))
        if labels is not None:
            h = h + self.embedding(labels)[:, :, None, None]
        return self.last(nn.functional.silu(h))


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@torch.no_grad()
def by_hand(net: Conditioned, sampler: Sampler, n: int, seed: int = 0) -> Tensor:
    """Row by row with the op alone."""
    x = ops.normal(n, SHAPE, seed=seed)
    rng, table = torch.tensor([seed, 0]), sampler.choices.steps
    told, x0 = None, torch.zeros_like(x)
    for row, t in enumerate(sampler.timesteps):
        m = net(x, torch.full((n,), t), x_self_cond=told)
        history = told if table.needs_history and told is not None else torch.zeros_like(x)
        x0 = torch.empty_like(x)
        ops.ddpm_step(x, m, table.table, table.t_of_row, torch.tensor([row]), rng, x0_prev=history, x0_out=x0)
        told = x0
    return x


CASES = [
    {},
    {"clip": 1.0},
    {"clip": 0.7, "steps": 9, "method": "ddim", "eta": 0.5},
    {"method": "dpmsolver++", "steps": 7, "clip": 1.0},
    {"prediction": "v", "clip": 1.0},
    {"prediction": "x0"},
]


@pytest.mark.parametrize("choice", CASES, ids=str)
def test_is_told_the_x0_of_the_row_before(choice) -> None:
    net = Conditioned()
    sampler = Sampler(net, LINEAR, **choice)
    assert sampler.self_condition
    torch.testing.assert_close(sampler.sample(3, SHAPE, seed=0), by_hand(net, sampler, 3), rtol=1e-5, atol=1e-5)


def test_each_row_sees_what_the_stream_showed() -> None:
    net = Conditioned()
    steps = list(Sampler(net, LINEAR, steps=6, clip=1.0).stream(2, SHAPE, seed=1))
    assert torch.equal(net.seen[0], torch.zeros(2, *SHAPE))
    for told, step in zip(net.seen[1:], steps, strict=False):
        assert torch.equal(told, step.x0)
        assert told.abs().max() <= 1.0


def test_it_matters_and_can_be_switched_off() -> None:
    net = Conditioned()
    told = Sampler(net, LINEAR).sample(2, SHAPE, seed=0)
    off = Sampler(net, LINEAR, self_condition=False)
    net.seen.clear()
    assert (off.sample(2, SHAPE, seed=0) - told).abs().max() > 1e-3
    assert set(net.seen) == {None}
    with pytest.raises(TypeError, match="self_condition must be True, False or None, got 1"):
        Sampler(net, LINEAR, self_condition=1)


def test_a_plain_function_is_told_when_asked() -> None:
    seen = []

    def model(x, t, x_self_cond):
        seen.append(x_self_cond.clone())
        return x_self_cond  # gives its condition itself back, which the step is about to write to

    sampler = Sampler(model, LINEAR, steps=3, self_condition=True, prediction="x0")
    last = list(sampler.stream(1, (2,), seed=0))[-1]
    assert len(seen) == 3
    assert torch.equal(last.x0, torch.zeros(1, 2))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_give_the_same(chunk) -> None:
    net = Conditioned()
    whole = Sampler(net, LINEAR, clip=1.0).sample(5, SHAPE, seed=2)
    got = Sampler(net, LINEAR, clip=1.0, chunk=chunk).sample(5, SHAPE, seed=2)
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)


def test_deterministic_images_do_not_depend_on_the_batch() -> None:
    sampler = Sampler(Conditioned(), LINEAR, deterministic=True, chunk=4, clip=1.0)
    whole = sampler.sample(6, SHAPE, seed=3)
    parts = [sampler.sample(n, SHAPE, seed=3, first_sample=first) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert torch.equal(torch.cat(parts), whole)


def test_half_precision_feeds_the_condition_too() -> None:
    net = Conditioned().to(torch.bfloat16)
    half = Sampler(net, LINEAR, clip=1.0).sample(2, SHAPE, seed=0)
    full = Sampler(Conditioned(), LINEAR, clip=1.0).sample(2, SHAPE, seed=0)
    assert 0 < (half - full).abs().max() < 0.1


@pytest.mark.parametrize("chunk", [None, 2])
def test_guidance_tells_both_halves_the_same(chunk) -> None:
    net = Conditioned(num_classes=4)
    arguments = {"labels": [0, 1, 3], "guidance": 3.0, "seed": 0}
    steps = list(Sampler(net, LINEAR, steps=5, clip=1.0, chunk=chunk).stream(3, SHAPE, **arguments))
    told = net.seen[1] if chunk is None else net.seen[2]
    n = len(told) // 2
    assert torch.equal(told[:n], told[n:])
    assert torch.equal(told[:n], steps[0].x0[:n])
    assert steps[-1].x0.ne(Sampler(net, LINEAR, steps=5, clip=1.0).sample(3, SHAPE, labels=[0, 1, 3], seed=0)).any()


@pytest.mark.parametrize("choice", [{}, {"method": "dpmsolver++"}, {"method": "ddim"}], ids=str)
def test_resumes_bit_for_bit(choice) -> None:
    sampler = Sampler(Conditioned(), LINEAR, steps=8, clip=1.0, **choice)
    whole = sampler.sample(2, SHAPE, seed=4)
    for step in sampler.stream(2, SHAPE, seed=4):
        assert torch.equal(sampler.sample(2, SHAPE, **step.state()), whole)
    state = next(sampler.stream(2, SHAPE, seed=4)).state()
    given = state.pop("x0_prev")
    with pytest.raises(ValueError, match=r"start=1 resumes a .* run and needs x0_prev, the x0 of row 0"):
        sampler.sample(2, SHAPE, **state)
    with pytest.raises(ValueError, match="start=0 has no row before it"):
        sampler.sample(2, SHAPE, x0_prev=given)


def test_an_earlier_run_leaves_nothing_behind() -> None:
    sampler = Sampler(Conditioned(), LINEAR, steps=5)
    plan = sampler._plan(torch.device("cpu"))
    from ddpm_fast.sampling.loop import Layout, Loop, Start

    loop = Loop(plan, Layout(n=2, shape=SHAPE, chunk=2))
    with torch.no_grad():
        runs = []
        for seed in (1, 2, 1):
            loop.load(Start(seed=seed))
            for _ in range(5):
                loop.step()
            runs.append(loop.x.clone())
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], sampler.sample(2, SHAPE, seed=2))


def test_signals_and_a_dynamic_threshold() -> None:
    net = Conditioned(dims=1)
    steps = list(Sampler(net, LINEAR, steps=4, thresholding=0.9).stream(2, (3, 16), seed=0))
    assert torch.equal(net.seen[1], steps[0].x0)
    assert steps[-1].x.shape == (2, 3, 16)


class StandIn:
    """What a Sampler asks of a fused plan, answered by the model."""

    def __init__(self, model: Conditioned, timesteps: Tensor) -> None:
        self.model, self.timesteps, self.out_channels, self.calls = model, timesteps, 3, 0

    def prepare(self, n, shape):
        return None

    def refresh_if_changed(self, full=True):
        return None

    def at_rows(self, x, rows, labels=None, out=None, x_self_cond=None):
        self.calls += 1
        t = self.timesteps[rows].expand(len(x))
        return out.copy_(self.model(x, t, *(() if labels is None else (labels,)), x_self_cond=x_self_cond))


@pytest.mark.parametrize(
    "arguments", [{}, {"chunk": 2}, {"deterministic": True, "chunk": 4}, {"dtype": torch.bfloat16}], ids=str
)
def test_a_fused_plan_is_told(arguments, monkeypatch) -> None:
    net = Conditioned()
    monkeypatch.setattr(inference, "unknown_reason", lambda model: None)
    monkeypatch.setattr(inference, "compile", lambda model, *, timesteps, **_: StandIn(model, timesteps))
    fused = Sampler(net, LINEAR, clip=1.0, fused=True, **arguments)
    got = fused.sample(3, SHAPE, seed=6)
    assert fused.compiled is not None
    assert fused.compiled.calls == len(LINEAR) * (2 if arguments.get("chunk") == 2 else 1)
    torch.testing.assert_close(got, Sampler(net, LINEAR, clip=1.0).sample(3, SHAPE, seed=6), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_captured_step_is_told(chunk) -> None:
    net = Conditioned().cuda()
    graph = Sampler(net, LINEAR, clip=1.0, chunk=chunk, cuda_graph=True)
    eager = Sampler(net, LINEAR, clip=1.0, chunk=chunk, cuda_graph=False)
    for seed in (1, 2, 1):
        torch.testing.assert_close(
            graph.sample(3, SHAPE, seed=seed), eager.sample(3, SHAPE, seed=seed), rtol=1e-4, atol=1e-4
        )
