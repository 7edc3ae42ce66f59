"""What `Sampler` computes: the textbook's numbers, and the same bits however the work is split."""

import sys

import numpy as np
import pytest
import torch
from sampler_models import SHAPE, Mlp, Net, textbook_loop, threads, tutorial_loop

from ddpm_fast import ops
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule

T = 100
LINEAR = Schedule.linear(T)


def drawn(n, streams, shape=SHAPE, seed=0):
    """The noise that the sampler draws: one tensor per stream."""
    return torch.stack([ops.normal(n, shape, seed=seed, stream=stream) for stream in streams])


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def net():
    return Net()


class TestNumbers:
    def test_equals_the_tutorial_loop(self, net):
        net.eval()
        x = ops.normal(3, SHAPE, seed=5)
        noise = drawn(3, range(1, T + 1), seed=5)  # noise[t] is that of the step that leaves t
        sampler = Sampler(net, LINEAR, like="tutorial")
        expected = dict(tutorial_loop(net, T, x, noise))
        for step in sampler.stream(3, SHAPE, seed=5):
            # float32 tables and another order of the same sums; nothing accumulates beyond that.
            torch.testing.assert_close(step.x, expected[step.t], rtol=0, atol=2e-5)
        image = sampler.sample(3, SHAPE, seed=5)
        torch.testing.assert_close(image, (expected[0].clamp(-1, 1) + 1) / 2, rtol=0, atol=2e-5)

    def test_one_step_equals_the_tutorial_step(self, net):
        net.eval()
        noise = drawn(2, range(1, T + 1))
        states = [ops.normal(2, SHAPE, seed=0)] + [
            x for _, x in tutorial_loop(net, T, ops.normal(2, SHAPE, seed=0), noise)
        ]
        sampler = Sampler(net, LINEAR)
        for row in (0, 1, T // 2, T - 2, T - 1):
            step = next(sampler.stream(2, SHAPE, seed=0, x=states[row], start=row))
            assert step.t == T - 1 - row
            torch.testing.assert_close(step.x, states[row + 1], rtol=1e-6, atol=2e-6)

    @pytest.mark.parametrize("method", ["ddpm", "ddim"])
    @pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
    @pytest.mark.parametrize("clip", [None, 0.8])
    def test_respaced_equals_the_float64_formulas(self, net, method, prediction, clip):
        net.eval()
        x, noise = ops.normal(2, SHAPE, seed=1), torch.randn(12, 2, *SHAPE, generator=torch.Generator().manual_seed(2))
        eta = 0.6 if method == "ddim" else 0.0
        sampler = Sampler(
            net,
            LINEAR,
            steps=12,
            method=method,
            prediction=prediction,
            variance="fixed_small",
            clip=clip,
            eta=eta,
        )
        choice = {"method": method, "prediction": prediction, "clip": clip, "eta": eta}
        expected = textbook_loop(net, LINEAR.alphas_cumprod, sampler.timesteps, x, noise, **choice)
        for given in (noise, lambda row, t: noise[row]):
            result = sampler.sample(2, SHAPE, x=x, noise=given)
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)

    def test_given_noise_is_asked_for_by_row_and_timestep_and_never_in_the_last_row(self, net):
        asked = []

        def noise(row, t):
            asked.append((row, t))
            return torch.zeros(2, *SHAPE)

        Sampler(net, LINEAR, steps=[90, 40, 7]).sample(2, SHAPE, seed=0, noise=noise)
        assert asked == [(0, 90), (1, 40)]

    def test_drawing_equals_being_given_the_same_noise(self, net):
        sampler = Sampler(net, LINEAR, steps=10, clip=1.0)
        noise = drawn(2, [1 + t for t in sampler.timesteps], seed=9)
        given = sampler.sample(2, SHAPE, x=ops.normal(2, SHAPE, seed=9), noise=noise)
        assert torch.equal(given, sampler.sample(2, SHAPE, seed=9))
        half = sampler.sample(2, SHAPE, x=ops.normal(2, SHAPE, seed=9), noise=noise[4:], start=4)
        assert torch.equal(half, sampler.sample(2, SHAPE, x=ops.normal(2, SHAPE, seed=9), noise=noise, start=4))

    def test_ddim_without_eta_has_no_noise(self, net):
        sampler = Sampler(net, LINEAR, steps=8, method="ddim")
        x = ops.normal(2, SHAPE, seed=3)
        assert torch.equal(sampler.sample(2, SHAPE, x=x, seed=1), sampler.sample(2, SHAPE, x=x, seed=2))
        noisy = Sampler(net, LINEAR, steps=8, method="ddim", eta=1.0)
        assert not torch.equal(noisy.sample(2, SHAPE, x=x, seed=1), noisy.sample(2, SHAPE, x=x, seed=2))

    def test_dynamic_thresholding(self, net):
        sampler = Sampler(net, LINEAR, steps=6, method="ddim", thresholding=(0.9, 2.0))
        before = x = ops.normal(2, SHAPE, seed=4)
        table = sampler.choices.steps.coefficients
        for step in sampler.stream(2, SHAPE, x=x):
            with torch.no_grad():
                m = net.eval()(before, torch.full((2,), step.t))
            x0 = table[step.row, 0] * before - table[step.row, 1] * m
            bound = x0.abs().flatten(1).quantile(0.9, dim=1).clamp(1.0, 2.0)[:, None, None, None]
            torch.testing.assert_close(step.x0, x0.clamp(-bound, bound) / bound, rtol=1e-4, atol=1e-5)
            before = step.x
        assert sampler.choices.thresholding == (0.9, 2.0)

    def test_dynamic_thresholding_leaves_small_values_alone(self):
        small = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) - 0.5
        sampler = Sampler(lambda x, t: small, LINEAR, steps=3, method="ddim", prediction="x0", thresholding=True)
        assert torch.equal(next(sampler.stream(2, (3,), seed=0)).x0, small)

    def test_zero_terminal_snr_with_v(self, net):
        schedule = LINEAR.rescale_zero_terminal_snr()
        result = Sampler(net, schedule, steps=9, prediction="v").sample(2, SHAPE, seed=0)
        assert torch.isfinite(result).all()

    def test_vectors(self):
        model = Mlp()
        sampler = Sampler(model, LINEAR, steps=20)
        points = sampler.sample(5, (2,), seed=7)
        assert points.shape == (5, 2)
        noise = drawn(5, [1 + t for t in sampler.timesteps], shape=(2,), seed=7)
        x = ops.normal(5, (2,), seed=7)
        small = Sampler(model, LINEAR, steps=20, variance="fixed_small").sample(5, 2, seed=7)
        expected = textbook_loop(model, LINEAR.alphas_cumprod, sampler.timesteps, x, noise, method="ddpm")
        torch.testing.assert_close(small.double(), expected, rtol=1e-5, atol=1e-5)


class TestConditioning:
    def test_guidance_in_one_pass_equals_two_passes(self):
        net = Net(num_classes=4)
        labels, seen = torch.tensor([0, 3, 2]), []

        def two_passes(x, t):
            return uncond(x, t) + 2.5 * (net(x, t, labels) - uncond(x, t))

        def uncond(x, t):
            return net(x, t, torch.full((len(x),), 4))

        sampler = Sampler(net, LINEAR, steps=15, clip=1.0)
        handle = net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        guided = sampler.sample(3, SHAPE, seed=1, labels=labels, guidance=2.5)
        handle.remove()
        assert seen == [6] * 15  # labelled and unlabelled halves in one batch, once a step
        expected = Sampler(two_passes, LINEAR, steps=15, clip=1.0)
        net.eval()
        torch.testing.assert_close(guided, expected.sample(3, SHAPE, seed=1), rtol=0, atol=2e-5)

    def test_guidance_1_is_one_plain_pass(self):
        net = Net(num_classes=4)
        seen = []
        handle = net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        plain = Sampler(net, LINEAR, steps=5).sample(3, SHAPE, seed=1, labels=[1, 2, 3])
        handle.remove()
        assert seen == [3] * 5
        net.eval()
        by_hand = Sampler(lambda x, t: net(x, t, torch.tensor([1, 2, 3])), LINEAR, steps=5)
        assert torch.equal(plain, by_hand.sample(3, SHAPE, seed=1))

    def test_labels_as_int_list_and_tensor(self):
        sampler = Sampler(Net(num_classes=4), LINEAR, steps=3)
        forms = [2, [2, 2], torch.tensor([2, 2]), torch.tensor([2, 2], dtype=torch.int32), np.array([2, 2])]
        first, *others = [sampler.sample(2, SHAPE, seed=0, labels=labels) for labels in forms]
        assert all(torch.equal(first, other) for other in others)
        assert not torch.equal(first, sampler.sample(2, SHAPE, seed=0, labels=[2, 1]))

    def test_null_label_may_be_given(self):
        net = Net(num_classes=4)
        ours = Sampler(net, LINEAR, steps=3).sample(2, SHAPE, seed=0, labels=[0, 1], guidance=3.0)
        other = Sampler(net, LINEAR, steps=3, null_label=0).sample(2, SHAPE, seed=0, labels=[0, 1], guidance=3.0)
        assert not torch.equal(ours, other)

    def test_conditions_that_are_not_classes(self):
        def model(x, t, condition):
            return x * 0.1 + condition[:, :, None, None]

        condition = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        sampler = Sampler(model, LINEAR, steps=4, null_label=torch.zeros(3))
        guided = sampler.sample(2, SHAPE, seed=0, labels=condition, guidance=2.0)
        twice = sampler.sample(2, SHAPE, seed=0, labels=2 * condition)  # linear, so guidance 2 is twice the condition
        torch.testing.assert_close(guided, twice, rtol=0, atol=1e-5)


class TestSplitting:
    def test_noise_of_a_sample_does_not_depend_on_the_batch(self):
        # A network that treats elements alone has no batch effects of its own, so nothing may differ.
        sampler = Sampler(lambda x, t: 0.1 * x, LINEAR, steps=10)
        whole = sampler.sample(8, SHAPE, seed=3)
        parts = [sampler.sample(n, SHAPE, seed=3, first_sample=first) for first, n in ((0, 1), (1, 4), (5, 3))]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, sampler.sample(8, SHAPE, seed=4))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_deterministic_gives_the_same_bits_for_any_split(self, dtype, guidance):
        torch.set_num_threads(2)  # until the fixture ends: threads divide the batch among them
        net = Net(num_classes=5).to(dtype)
        sampler = Sampler(net, LINEAR, steps=6, deterministic=True, chunk=4)
        labels = torch.arange(11) % 5

        def share(first, n):
            chosen = labels[first : first + n]
            return sampler.sample(n, SHAPE, seed=3, first_sample=first, labels=chosen, guidance=guidance)

        whole = share(0, 11)
        for cut in ([11], [1] * 11, [3, 8], [8, 3], [5, 1, 5]):
            ends = np.cumsum([0, *cut])
            assert torch.equal(whole, torch.cat([share(int(a), n) for a, n in zip(ends, cut, strict=False)])), cut

    def test_deterministic_feeds_one_size_and_one_place_per_sample(self):
        seen = []

        def model(x, t):
            seen.append(x.clone())
            return x * 0.1

        Sampler(model, LINEAR, steps=1, deterministic=True, chunk=4).sample(5, (3,), seed=0, first_sample=6)
        assert [x.shape for x in seen] == [(4, 3)] * 2
        noise = ops.normal(5, (3,), seed=0, first_sample=6)
        assert torch.equal(seen[0][2:], noise[:2])  # samples 6 and 7 in places 2 and 3
        assert torch.equal(seen[1][:3], noise[2:])  # samples 8 to 10 from place 0
        assert not seen[0][:2].any()
        assert not seen[1][3:].any()

    def test_chunk_alone_bounds_the_batch(self, net):
        seen = []
        net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        chunked = Sampler(net, LINEAR, steps=3, chunk=2).sample(5, SHAPE, seed=0)
        assert seen == [2] * 9
        seen.clear()
        Sampler(net, LINEAR, steps=3, chunk=100).sample(2, SHAPE, seed=0)
        assert seen == [2] * 3
        torch.testing.assert_close(chunked, Sampler(net, LINEAR, steps=3).sample(5, SHAPE, seed=0), rtol=0, atol=1e-5)

    def test_a_network_may_return_one_buffer_every_time(self):
        buffer = torch.empty(2, 3)

        def model(x, t):
            return buffer.copy_(x * 0.1)

        once = Sampler(lambda x, t: x * 0.1, LINEAR, steps=4).sample(5, (3,), seed=0)
        assert torch.equal(Sampler(model, LINEAR, steps=4, chunk=2).sample(5, (3,), seed=0), once)

    def test_cudnn_flags_are_put_back(self, net):
        cudnn = torch.backends.cudnn
        seen, before = [], (cudnn.benchmark, cudnn.deterministic)
        net.register_forward_hook(lambda *_: seen.append((cudnn.benchmark, cudnn.deterministic)))
        Sampler(net, LINEAR, steps=1, deterministic=True).sample(1, SHAPE, seed=0)
        assert seen == [(False, True)]
        assert (cudnn.benchmark, cudnn.deterministic) == before


class TestStreamAndResume:
    def test_stream_ends_where_sample_does(self, net):
        sampler = Sampler(net, LINEAR, steps=7, clip=1.0)
        steps = list(sampler.stream(2, SHAPE, seed=5))
        assert [step.row for step in steps] == list(range(7))
        assert [step.t for step in steps] == sampler.timesteps == list(sampler.choices.steps.timesteps)
        assert torch.equal(steps[-1].x, sampler.sample(2, SHAPE, seed=5))
        assert torch.equal(steps[-1].x, steps[-1].x0)  # the last row lands on its estimate
        assert max(step.x0.abs().max() for step in steps) <= 1.0

    def test_a_step_is_the_callers_own(self, net):
        sampler = Sampler(net, LINEAR, steps=5)
        untouched = [step.x.clone() for step in sampler.stream(2, SHAPE, seed=5)]
        for step, expected in zip(sampler.stream(2, SHAPE, seed=5), untouched, strict=True):
            assert torch.equal(step.x, expected)
            step.x.zero_()
            step.x0.zero_()

    @pytest.mark.parametrize("method", ["ddpm", "ddim"])
    def test_resuming_gives_the_same_bits(self, net, method):
        sampler = Sampler(net, LINEAR, steps=9, method=method, eta=0.5 if method == "ddim" else None, clip=1.0)
        whole = sampler.sample(3, SHAPE, seed=8, first_sample=100)
        for step in sampler.stream(3, SHAPE, seed=8, first_sample=100):
            torch.manual_seed(step.row)
            assert torch.equal(sampler.sample(3, SHAPE, **step.state()), whole)
        state = next(sampler.stream(3, SHAPE, seed=8, first_sample=100)).state()
        assert torch.equal([step.x for step in sampler.stream(3, **state)][-1], whole)
        assert sorted(state) == ["first_sample", "seed", "start", "x"]

    def test_nothing_left_to_do_gives_x_back(self, net):
        sampler, x = Sampler(net, LINEAR, steps=4), torch.ones(2, *SHAPE)
        assert torch.equal(sampler.sample(2, SHAPE, x=x, start=4, seed=0), x)
        assert list(sampler.stream(2, SHAPE, x=x, start=4)) == []

    def test_two_streams_side_by_side(self, net):
        sampler = Sampler(net, LINEAR, steps=5)
        pairs = list(zip(sampler.stream(2, SHAPE, seed=1), sampler.stream(2, SHAPE, seed=2), strict=True))
        assert torch.equal(pairs[-1][0].x, sampler.sample(2, SHAPE, seed=1))
        assert torch.equal(pairs[-1][1].x, sampler.sample(2, SHAPE, seed=2))

    def test_given_x_is_not_written_to(self, net):
        x = ops.normal(2, SHAPE, seed=0)
        before = x.clone()
        Sampler(net, LINEAR, steps=3).sample(2, x=x, seed=0)
        assert torch.equal(x, before)


class TestOutputs:
    def test_ranges(self, net):
        sampler = Sampler(net, LINEAR, steps=5)
        x = sampler.sample(2, SHAPE, seed=0)
        assert torch.equal(x, sampler.sample(2, SHAPE, seed=0, output="model"))
        assert torch.equal(sampler.sample(2, SHAPE, seed=0, output="unit_unclamped"), (x + 1) / 2)
        assert torch.equal(sampler.sample(2, SHAPE, seed=0, output="unit"), ((x + 1) / 2).clamp(0, 1))
        pixels = sampler.sample(2, SHAPE, seed=0, output="uint8")
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels.numpy(), np.rint(np.clip((x.numpy() + 1) * np.float32(127.5), 0, 255)))

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
    def test_pil(self, channels, mode):
        sampler = Sampler(lambda x, t: x * 0.1, LINEAR, steps=2, shape=(channels, 4, 6))
        images, pixels = sampler.sample(3, seed=0, output="pil"), sampler.sample(3, seed=0, output="uint8")
        assert [image.mode for image in images] == [mode] * 3
        assert images[0].size == (6, 4)
        for image, pixel in zip(images, pixels, strict=True):
            np.testing.assert_array_equal(np.array(image).reshape(4, 6, channels), pixel.permute(1, 2, 0).numpy())

    def test_pil_without_pillow(self, net, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match="pip install pillow"):
            Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0, output="pil")

    @pytest.mark.parametrize("output", ["model", "unit", "unit_unclamped", "uint8"])
    def test_results_may_take_part_in_autograd(self, net, output):
        with torch.inference_mode():
            inside = Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0, output=output)
        for result in (inside, Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0, output=output)):
            assert not result.is_inference()
            assert not result.requires_grad
        weight = torch.ones((), requires_grad=True)
        (weight * result).sum().backward()
        assert weight.grad is not None

    @pytest.mark.parametrize(("output", "dtype"), [("model", torch.float32), ("uint8", torch.uint8)])
    def test_no_samples(self, output, dtype):
        def never(x, t):
            raise AssertionError("the model was called for no samples")

        sampler = Sampler(never, LINEAR)
        result = sampler.sample(0, SHAPE, seed=0, output=output)
        assert result.shape == (0, *SHAPE)
        assert result.dtype == dtype
        assert sampler.sample(0, SHAPE, seed=0, output="pil") == []
        assert list(sampler.stream(0, SHAPE, seed=0)) == []
        assert sampler.sample(0, SHAPE, labels=[], seed=0).shape == (0, *SHAPE)


class TestSeed:
    def test_without_a_seed_torch_draws_and_the_sampler_remembers(self, net):
        sampler = Sampler(net, LINEAR, steps=3)
        torch.manual_seed(11)
        first, seed = sampler.sample(1, SHAPE), sampler.last_seed
        second = sampler.sample(1, SHAPE)
        assert not torch.equal(first, second)
        assert torch.equal(first, sampler.sample(1, SHAPE, seed=seed))
        assert sampler.last_seed == seed
        torch.manual_seed(11)
        assert torch.equal(first, sampler.sample(1, SHAPE))

    def test_with_a_seed_torchs_generator_is_left_alone(self, net):
        before = torch.get_rng_state()
        Sampler(net, LINEAR, steps=3).sample(1, SHAPE, seed=0)
        list(Sampler(net, LINEAR, steps=3).stream(1, SHAPE, seed=0))
        assert torch.equal(before, torch.get_rng_state())

    def test_the_largest_seed(self, net):
        assert Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=2**64 - 1).shape == (1, *SHAPE)
