"""DPM-Solver++(2M): diffusers' own scheduler, the exact solution of an ODE, and what a run has to carry along."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sampler_models import SHAPE, Net, threads

from ddpm_fast import ops
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(1000)
SPACINGS = {"linspace": "linspace_open", "leading": "leading_open", "trailing": "trailing"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def net():
    return Net().eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestAgainstDiffusers:
    @pytest.fixture
    def scheduler(self):
        return pytest.importorskip("diffusers").DPMSolverMultistepScheduler

    @pytest.mark.parametrize("theirs", SPACINGS)
    @pytest.mark.parametrize("T", [1000, 97])
    def test_timesteps(self, scheduler, theirs, T):
        peer = scheduler(num_train_timesteps=T, timestep_spacing=theirs)
        for steps in [*range(1, 60), T // 3, T // 2 + 1, T - 1]:
            peer.set_timesteps(steps)
            expected = peer.timesteps.tolist()
            if expected[-1] == -1:  # its grid of float64 goes one stride too far; before t = 0 there is no timestep
                expected.pop()
            assert Schedule.linear(T).timesteps(steps, SPACINGS[theirs]).tolist() == expected

    @pytest.mark.parametrize("steps", [8, 20])
    @pytest.mark.parametrize("order", [1, 2])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("thresholding", [None, (0.9, 1.7)])
    def test_trajectory(self, scheduler, net, steps, order, prediction, thresholding):
        options = {"prediction_type": PREDICTIONS[prediction], "solver_order": order}
        if thresholding:
            ratio, most = thresholding
            options |= {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": most}
        # 8 steps are fewer than 15, where lower_order_final might matter; its final sigma of 0 decides the last row.
        for lower_order_final in (True, False):
            peer = scheduler(lower_order_final=lower_order_final, **options)
            compared(peer, net, steps, prediction=prediction, solver_order=order, thresholding=thresholding)

    @pytest.mark.parametrize("theirs", SPACINGS)
    def test_other_spacings_and_schedules(self, scheduler, net, theirs):
        compared(scheduler(timestep_spacing=theirs), net, 20, spacing=SPACINGS[theirs])
        peer = scheduler(beta_schedule="scaled_linear", timestep_spacing=theirs)
        compared(peer, net, 20, schedule=Schedule.scaled_linear(1000), spacing=SPACINGS[theirs])

    def test_the_presets_choices_are_its_own(self, scheduler, net):
        peer = scheduler()
        compared(peer, net, 20, like="diffusers")
        assert Sampler(net, LINEAR, like="diffusers", method="dpmsolver++", steps=20).choices.clip is False


@torch.no_grad()
def compared(peer, net, steps, schedule=LINEAR, **choices):
    """Every state of a run, from the same x_T, to within float32's roundings of its tables and ours."""
    x = ops.normal(2, SHAPE, seed=0)
    sampler = Sampler(net, schedule, method="dpmsolver++", steps=steps, **choices)
    peer.set_timesteps(steps)
    assert sampler.timesteps == peer.timesteps.tolist()
    for step in sampler.stream(2, SHAPE, x=x):
        x = peer.step(net(x, torch.full((2,), step.t)), step.t, x).prev_sample
        assert (step.x - x).abs().max() <= 2e-5 * x.abs().max(), step.row


class TestOrder:
    """Data N(mean, spread^2): eps is known, and so is where the probability flow ODE leads."""

    MEAN, SPREAD = 0.4, 0.3
    FINE = Schedule.linear(4000, 0.25e-4, 0.005)

    @staticmethod
    def equal_in_lambda(schedule, begin, end, count):
        A = schedule.alphas_cumprod
        lam = 0.5 * np.log(A / (1 - A))
        at = np.interp(-np.linspace(lam[begin], lam[end], count), -lam, np.arange(len(lam)))
        return [int(t) for t in at.round()]

    def solve(self, x, timesteps, **choices):
        """The states from x on, all rows but the last, in float64."""
        steps = self.FINE.step_table(timesteps, **choices)
        x0_prev = 0.0
        for (a, b, c1, c2, c3, c4, *_), t in zip(steps.coefficients[:-1], steps.timesteps, strict=False):
            signal = math.sqrt(self.FINE.alphas_cumprod[t])
            variance = 1 - signal**2
            eps = math.sqrt(variance) * (x - signal * self.MEAN) / (signal**2 * self.SPREAD**2 + variance)
            x0 = a * x - b * eps
            x = c1 * x0 + c2 * x + c3 * eps + c4 * x0_prev
            x0_prev = x0
        return x

    def exact(self, x, begin, end):
        """The flow keeps (x - sqrt(A) mean) / std, std^2 = A spread^2 + 1 - A."""
        A, P = self.FINE.alphas_cumprod[[begin, end]]
        std_A, std_P = (math.sqrt(level * self.SPREAD**2 + 1 - level) for level in (A, P))
        return math.sqrt(P) * self.MEAN + std_P / std_A * (x - math.sqrt(A) * self.MEAN)

    def errors(self, **choices):
        """Largest error of 20, 40 and 80 steps, equal in lambda, between two timesteps that are always the same."""
        x = np.linspace(-2.0, 2.0, 9)
        for steps in (20, 40, 80):
            timesteps = self.equal_in_lambda(self.FINE, 3000, 400, steps + 1)
            yield abs(self.solve(x, timesteps, **choices) - self.exact(x, 3000, 400)).max()

    def test_is_two(self):
        second = list(self.errors(method="dpmsolver++"))
        for coarse, fine in itertools.pairwise(second):
            assert 3.8 < coarse / fine < 4.4
        first = list(self.errors(method="ddim"))
        for coarse, fine in itertools.pairwise(first):
            assert 1.8 < coarse / fine < 2.2
        assert all(a < b / 9 for a, b in zip(second, first, strict=True))
        np.testing.assert_allclose(list(self.errors(method="dpmsolver++", solver_order=1)), first, rtol=1e-6)

    def test_twenty_steps_beat_ddims(self):
        """Down to the data, by the sampler itself, in float32."""
        A, mean, spread = torch.tensor(LINEAR.alphas_cumprod), self.MEAN, self.SPREAD

        def model(x, t):
            signal = A[t].float()[:, None]
            noise = 1 - signal
            return noise.sqrt() * (x - signal.sqrt() * mean) / (signal * spread**2 + noise)

        x = torch.linspace(-2.5, 2.5, 64)[:, None]
        last = float(A[-1])
        exact = mean + spread / math.sqrt(last * spread**2 + 1 - last) * (x - math.sqrt(last) * mean)
        timesteps = self.equal_in_lambda(LINEAR, 999, 1, 20)
        second, first = (
            float((Sampler(model, LINEAR, method=method, steps=timesteps).sample(64, x=x) - exact).abs().max())
            for method in ("dpmsolver++", "ddim")
        )
        assert second < 0.012
        assert second < first / 8


class TestSampler:
    def test_x0_is_what_the_step_used(self, net):
        for choices in ({}, {"clip": 0.8}, {"thresholding": (0.9, 2.0)}):
            sampler = Sampler(net, LINEAR, method="dpmsolver++", steps=6, **choices)
            table = sampler.choices.steps.coefficients
            before = ops.normal(2, SHAPE, seed=4)
            previous = torch.zeros_like(before)
            for step in sampler.stream(2, SHAPE, x=before):
                a, b, c1, c2, c3, c4, _, bound = table[step.row]
                with torch.no_grad():
                    m = net(before, torch.full((2,), step.t))
                x0 = a * before - b * m
                if "thresholding" in choices:
                    limit = x0.abs().flatten(1).quantile(0.9, dim=1).clamp(1.0, 2.0)[:, None, None, None]
                    x0 = x0.clamp(-limit, limit) / limit
                else:
                    x0 = x0.clamp(-bound, bound)
                torch.testing.assert_close(step.x0, x0, rtol=1e-4, atol=1e-5)
                expected = c1 * step.x0 + c2 * before + c3 * m + c4 * previous
                torch.testing.assert_close(step.x, expected, rtol=1e-4, atol=1e-5)
                before, previous = step.x, step.x0
            assert torch.equal(step.x, sampler.sample(2, SHAPE, x=ops.normal(2, SHAPE, seed=4)))

    @pytest.mark.parametrize("choices", [{}, {"clip": 1.0, "deterministic": True, "chunk": 2}])
    def test_resuming_gives_the_same_bits(self, net, choices):
        sampler = Sampler(net, LINEAR, method="dpmsolver++", steps=9, **choices)
        whole = sampler.sample(3, SHAPE, seed=8)
        states = [step.state() for step in sampler.stream(3, SHAPE, seed=8)]
        for row, state in enumerate(states):
            assert ("x0_prev" in state) == (row < 8)
            assert torch.equal(sampler.sample(3, SHAPE, **state), whole)
        *_, last = sampler.stream(3, **states[4])
        assert torch.equal(last.x, whole)

    def test_resuming_without_the_history(self, net):
        sampler = Sampler(net, LINEAR, method="dpmsolver++", steps=9)
        x = torch.zeros(2, *SHAPE)
        with pytest.raises(ValueError, match=r"start=4 resumes a multistep run and needs x0_prev, the x0 of row 3"):
            sampler.sample(2, x=x, start=4)
        assert torch.equal(sampler.sample(2, x=x, start=9), x)
        for wrong, error, message in (
            (x[:1], ValueError, r"x0_prev must have shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"),
            ([0.0], TypeError, "x0_prev must be a tensor, got list"),
            (x / 0, ValueError, "x0_prev must be finite"),
        ):
            with pytest.raises(error, match=message):
                sampler.stream(2, x=x, start=4, x0_prev=wrong)
        with pytest.raises(ValueError, match=r"x0_prev is for resuming .* start=0 has no row before it; leave it out"):
            sampler.sample(2, x=x, x0_prev=x)
        with pytest.raises(ValueError, match=r"x0_prev is for resuming .* no step of this sampler looks back"):
            Sampler(net, LINEAR, steps=9).sample(2, x=x, start=4, x0_prev=x)

    def test_a_run_that_broke_leaves_no_history_behind(self, net):
        seen = []

        def model(x, t):
            seen.append(t)
            return net(x, t) if len(seen) > 3 else torch.full_like(x, float("nan"))

        sampler = Sampler(model, LINEAR, method="dpmsolver++", steps=3)
        with pytest.raises(RuntimeError, match="stopped being finite in row 0"):
            sampler.sample(2, SHAPE, seed=0)
        expected = Sampler(net, LINEAR, method="dpmsolver++", steps=3).sample(2, SHAPE, seed=0)
        assert torch.equal(sampler.sample(2, SHAPE, seed=0), expected)

    def test_guidance_and_half_precision(self):
        net = Net(num_classes=4).eval()
        call = {"seed": 1, "labels": [0, 3, 2], "guidance": 2.5}
        sampler = Sampler(net, LINEAR, method="dpmsolver++", steps=12, clip=1.0)
        guided = sampler.sample(3, SHAPE, **call)

        def two_passes(x, t):
            plain = net(x, t, torch.full((3,), 4))
            return plain + 2.5 * (net(x, t, torch.tensor(call["labels"])) - plain)

        by_hand = Sampler(two_passes, LINEAR, method="dpmsolver++", steps=12, clip=1.0)
        torch.testing.assert_close(guided, by_hand.sample(3, SHAPE, seed=1), rtol=0, atol=2e-5)
        half = Sampler(net.bfloat16(), LINEAR, method="dpmsolver++", steps=12, clip=1.0).sample(3, SHAPE, **call)
        assert (half - guided).abs().mean() < 0.02

    def test_adds_no_noise_and_says_what_it_is(self, net):
        sampler = Sampler(net, LINEAR, method="dpmsolver++", steps=5)
        x = ops.normal(2, SHAPE, seed=3)
        assert torch.equal(sampler.sample(2, x=x, seed=1), sampler.sample(2, x=x, seed=2))
        assert "steps=5, method='dpmsolver++', prediction='eps', solver_order=2, clip=False" in repr(sampler)
        with pytest.raises(ValueError, match=r'eta=0\.5 belongs to method="ddim"'):
            Sampler(net, LINEAR, method="dpmsolver++", eta=0.5)
