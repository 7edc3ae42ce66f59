"""How `Sampler` treats the caller's network, and what it says to arguments and networks that cannot work."""

import types

import pytest
import torch
from sampler_models import SHAPE, Mlp, Net, threads
from torch import nn

from ddpm_fast.sampler import Sampler
from ddpm_fast.sampling import progress as progress_module
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(50)


def identity(x, t):
    return x


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def net():
    return Net()


class TestMode:
    def mixed(self):
        net = Net(num_classes=3)
        net.train()
        net.norm.eval()  # a frozen batch norm inside a network in training
        return net, {name: part.training for name, part in net.named_modules()}

    def test_runs_in_eval_mode_and_is_given_back(self):
        net, before = self.mixed()
        seen = []
        net.drop.register_forward_hook(lambda module, *_: seen.append(module.training))
        sampler = Sampler(net, LINEAR, steps=3)
        first = sampler.sample(1, SHAPE, seed=0)
        assert seen == [False] * 3
        assert {name: part.training for name, part in net.named_modules()} == before
        assert torch.equal(first, sampler.sample(1, SHAPE, seed=0))

    def test_given_back_after_an_exception_and_between_streamed_rows(self):
        net, before = self.mixed()
        sampler = Sampler(net, LINEAR, steps=3)
        for _ in sampler.stream(1, SHAPE, seed=0):
            assert {name: part.training for name, part in net.named_modules()} == before
            break

        def fail(*_):
            raise KeyError("inside the network")

        net.drop.register_forward_hook(fail)
        with pytest.raises(KeyError, match="inside the network"):
            sampler.sample(1, SHAPE, seed=0)
        assert {name: part.training for name, part in net.named_modules()} == before

    def test_a_bound_method_knows_its_module(self):
        net, before = self.mixed()
        expected = Sampler(net, LINEAR, steps=3).sample(1, SHAPE, seed=0)
        assert torch.equal(Sampler(net.forward, LINEAR, steps=3).sample(1, SHAPE, seed=0), expected)
        assert {name: part.training for name, part in net.named_modules()} == before

    def test_no_gradients_are_recorded(self, net):
        seen = []
        net.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
        Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0)
        assert seen == [False, False]


class TestWhatAModelMayBe:
    def test_outputs_that_are_understood(self, net):
        net.eval()
        expected = Sampler(net, LINEAR, steps=3).sample(2, SHAPE, seed=0)
        wrappers = {
            "object": lambda x, t: types.SimpleNamespace(sample=net(x, t)),
            "mapping": lambda x, t: {"sample": net(x, t)},
            "tuple": lambda x, t: (net(x, t), "more"),
            "double": lambda x, t: net(x, t).double(),
        }
        for name, model in wrappers.items():
            assert torch.equal(Sampler(model, LINEAR, steps=3).sample(2, SHAPE, seed=0), expected), name

    def test_a_model_may_return_its_own_input(self):
        by_hand = Sampler(lambda x, t: x.clone(), LINEAR, steps=4).sample(2, (3,), seed=0)
        assert torch.equal(Sampler(identity, LINEAR, steps=4).sample(2, (3,), seed=0), by_hand)
        half = Sampler(identity, LINEAR, steps=4, dtype=torch.bfloat16).sample(2, (3,), seed=0)
        torch.testing.assert_close(half, by_hand, rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_is_fed_the_dtype_of_its_parameters(self, dtype):
        net, seen = Net().to(dtype), []
        net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
        result = Sampler(net, LINEAR, steps=4, clip=1.0).sample(2, SHAPE, seed=0)
        assert seen == [dtype] * 4
        assert result.dtype == torch.float32
        full = Sampler(Net(), LINEAR, steps=4, clip=1.0).sample(2, SHAPE, seed=0)
        torch.testing.assert_close(result, full, rtol=0, atol=0.05)

    def test_is_fed_the_dtype_that_was_asked_for(self):
        seen = []
        Sampler(lambda x, t: seen.append(x.dtype) or x * 0.1, LINEAR, steps=2, dtype=torch.bfloat16).sample(1, (3,))
        assert seen == [torch.bfloat16] * 2

    def test_is_told_t_as_int64_for_every_sample(self):
        seen = []
        Sampler(lambda x, t: seen.append(t.clone()) or x * 0.1, LINEAR, steps=[40, 3]).sample(3, (3,))
        assert [t.tolist() for t in seen] == [[40] * 3, [3] * 3]
        assert {t.dtype for t in seen} == {torch.int64}

    def test_is_told_a_rescaled_t(self):
        seen = []
        model = lambda x, t: seen.append(t.clone()) or x * 0.1  # noqa: E731
        Sampler(model, LINEAR, steps=[40, 3], time_scale="rescaled").sample(1, (3,))
        assert torch.cat(seen).tolist() == [800.0, 60.0]
        assert {t.dtype for t in seen} == {torch.float32}

    @pytest.mark.no_poison
    def test_a_compiled_model(self, net):
        compiled = torch.compile(net, backend="aot_eager")
        ours = Sampler(compiled, LINEAR, steps=5).sample(2, SHAPE, seed=0)
        torch.testing.assert_close(ours, Sampler(net, LINEAR, steps=5).sample(2, SHAPE, seed=0), rtol=0, atol=1e-5)
        assert net.training

    def test_torchs_default_dtype_does_not_matter(self, net):
        expected = Sampler(net, LINEAR, steps=3, thresholding=True).sample(2, SHAPE, seed=0)
        torch.set_default_dtype(torch.float64)
        try:
            result = Sampler(net, LINEAR, steps=3, thresholding=True).sample(2, SHAPE, seed=0)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(result, expected)

    def test_new_weights_are_seen(self, net):
        sampler = Sampler(net, LINEAR, steps=3)
        before = sampler.sample(1, SHAPE, seed=0)
        with torch.no_grad():
            net.last.bias += 1.0
        assert not torch.equal(before, sampler.sample(1, SHAPE, seed=0))


class TestShape:
    def test_comes_from_the_call_the_sampler_x_or_the_model(self, net):
        run = {"seed": 0}
        assert Sampler(net, LINEAR, steps=1).sample(2, SHAPE, **run).shape == (2, *SHAPE)
        assert Sampler(net, LINEAR, steps=1).sample(2, 8, **run).shape == (2, *SHAPE)
        assert Sampler(net, LINEAR, steps=1, shape=SHAPE).sample(2, **run).shape == (2, *SHAPE)
        assert Sampler(net, LINEAR, steps=1, shape=SHAPE).sample(2, (3, 4, 4), **run).shape == (2, 3, 4, 4)
        assert Sampler(net, LINEAR, steps=1).sample(2, x=torch.zeros(2, *SHAPE), **run).shape == (2, *SHAPE)
        assert Sampler(Mlp(), LINEAR, steps=1).sample(2, 2, **run).shape == (2, 2)

    @pytest.mark.parametrize(("size", "shape"), [(8, (3, 8, 8)), ((4, 8), (3, 4, 8))])
    def test_of_a_diffusers_style_config(self, net, size, shape):
        net.config = types.SimpleNamespace(in_channels=3, sample_size=size)
        assert Sampler(net, LINEAR, steps=1).sample(2, seed=0).shape == (2, *shape)

    def test_unknown(self, net):
        for model in (net, identity):
            with pytest.raises(ValueError, match=r"pass the shape of one sample, shape=\(C, H, W\)"):
                Sampler(model, LINEAR).sample(2, seed=0)


def bad_arguments():
    x = torch.zeros(2, *SHAPE)
    nan = x.clone()
    nan[0, 0, 0, 0] = float("nan")
    yield {"n": -1}, ValueError, "n must be at least 0, got -1"
    yield {"n": 2.0}, TypeError, "n must be an int, got float"
    yield {"shape": (3, 0, 8)}, ValueError, r"shape must be made of sizes of at least 1, got \(3, 0, 8\)"
    yield {"shape": ()}, TypeError, "shape must be one sample's sizes"
    yield {"shape": (3, 8.0)}, TypeError, "shape must be one sample's sizes"
    yield {"shape": 8.5}, TypeError, "shape must be one sample's sizes"
    yield {"seed": -1}, ValueError, r"seed must be in 0..18446744073709551615, got -1"
    yield {"seed": 2**64}, ValueError, "seed must be in"
    yield {"seed": "a"}, TypeError, "seed must be an int, got str"
    yield {"first_sample": -5}, ValueError, "first_sample must be in 0"
    yield {"start": 51, "x": x}, ValueError, r"start must be in 0\.\.50, got 51"
    yield {"start": 3}, ValueError, "needs x, the state after 3 rows"
    yield {"x": x[:1]}, ValueError, r"x must have shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"
    yield {"x": x.long()}, TypeError, "x must be a floating tensor, got torch.int64"
    yield {"x": [0.0]}, TypeError, "x must be a tensor, got list"
    yield {"x": x.to("meta")}, ValueError, "x must be on cpu, where the sampler runs, got meta"
    yield {"x": nan}, ValueError, "x must be finite"
    yield {"noise": x}, ValueError, r"noise must have shape \(50, 2, 3, 8, 8\).* one entry per row, got \(2, 3, 8, 8\)"
    yield {"noise": torch.zeros(49, *x.shape)}, ValueError, "one entry per row"
    yield {"noise": torch.zeros(50, *x.shape).long()}, TypeError, "noise must be a floating tensor"
    yield {"noise": torch.zeros(50, *x.shape, device="meta")}, ValueError, "noise must be on cpu"
    yield {"noise": 3}, TypeError, r"noise must be a tensor or a function \(row, t\) -> tensor, got int"
    yield {"labels": [1]}, ValueError, r"labels must have 2 rows, one per sample, got shape \(1,\)"
    yield {"labels": [0, 5]}, ValueError, r"labels must lie in 0\.\.4 \(4 = no label\), got 0\.\.5"
    yield {"labels": -1}, ValueError, r"labels must lie in 0\.\.4"
    yield {"labels": [0.5, 1.0]}, TypeError, "labels must be whole numbers"
    yield {"labels": [True, False]}, TypeError, "labels must be whole numbers, got torch.bool"
    yield {"labels": torch.zeros(2, 1, dtype=torch.long)}, ValueError, r"labels must have shape \(2,\), got \(2, 1\)"
    yield {"labels": "cat"}, TypeError, "labels must be an int, a list of ints or a tensor, got 'cat'"
    yield {"labels": object()}, TypeError, "labels must be an int"
    yield {"guidance": 2.0}, ValueError, "needs labels to guide towards"
    yield {"guidance": float("nan"), "labels": 1}, ValueError, "guidance must be finite, got nan"
    yield {"guidance": "2", "labels": 1}, TypeError, "guidance must be a number, got str"
    yield {"output": "png"}, ValueError, "output must be one of model, unit, .*got 'png'"
    yield (
        {"output": "pil", "shape": (2, 8, 8)},
        ValueError,
        r"needs samples of shape \(1 or 3 or 4, H, W\), got \(2, 8, 8\)",
    )
    yield {"output": "pil", "shape": (8,)}, ValueError, "needs samples of shape"


class TestBadInput:
    @pytest.mark.parametrize(("arguments", "error", "message"), list(bad_arguments()))
    def test_of_a_call_raises_before_anything_runs(self, arguments, error, message):
        net = Net(num_classes=4)
        net.register_forward_hook(lambda *_: pytest.fail("the network ran"))
        sampler = Sampler(net, LINEAR)
        arguments = {"n": 2, "shape": SHAPE, "seed": 0, **arguments}
        with pytest.raises(error, match=message):
            sampler.sample(**arguments)
        if "output" not in arguments:
            with pytest.raises(error, match=message):
                sampler.stream(**arguments)  # at once, not at the first row

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": 3}, TypeError, r"callable as model\(x, t\), got int"),
            ({"schedule": [0.1]}, TypeError, "schedule must be a ddpm_fast.Schedule, got list"),
            ({"dtype": torch.int8}, ValueError, "dtype must be one of torch.float32, .*got torch.int8"),
            ({"like": "k-diffusion"}, ValueError, "like must be one of tutorial, diffusers, lucidrains, openai"),
            ({"method": "dpm++"}, ValueError, "method must be one of ddpm, ddim"),
            ({"steps": 51}, ValueError, r"steps must be in 1\.\.50"),
            ({"eta": 0.5}, ValueError, 'belongs to method="ddim"'),
            ({"eta": "0", "method": "ddim"}, TypeError, "eta must be a number, got str"),
            ({"steps_offset": 1}, ValueError, 'belongs to spacing="leading"'),
            ({"clip": 1.0, "thresholding": True}, ValueError, "exclude each other"),
            ({"thresholding": 1.5}, ValueError, r"ratio must lie in \(0, 1\], got 1.5"),
            ({"thresholding": (0.9, 0.5)}, ValueError, "max_value must be finite and at least 1, got 0.5"),
            ({"thresholding": "on"}, TypeError, "thresholding must be a bool, a ratio or"),
            ({"time_scale": "log"}, ValueError, "time_scale must be one of index, rescaled"),
            ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
            ({"chunk": 2.5}, TypeError, "chunk must be an int"),
        ],
    )
    def test_of_the_constructor(self, net, arguments, error, message):
        with pytest.raises(error, match=message):
            Sampler(**{"model": net, "schedule": LINEAR, **arguments})

    def test_eps_on_a_zero_snr_schedule(self, net):
        with pytest.raises(ValueError, match='prediction="v" or prediction="x0"'):
            Sampler(net, LINEAR.rescale_zero_terminal_snr())

    def test_guidance_without_a_null_label(self):
        with pytest.raises(ValueError, match="pass null_label= to Sampler"):
            Sampler(lambda x, t, labels: x, LINEAR).sample(2, (3,), labels=1, guidance=2.0)
        with pytest.raises(ValueError, match=r"null_label must have shape \(\), got \(2,\)"):
            Sampler(identity, LINEAR, null_label=torch.tensor([1, 2])).sample(2, (3,), labels=1, guidance=2.0)

    def test_device_that_is_not_the_models(self, net):
        with pytest.raises(ValueError, match=r"device=meta, but the model is on cpu; move it there with model.to\(\)"):
            Sampler(net, LINEAR, device="meta").sample(1, SHAPE)

    @pytest.mark.parametrize(
        ("returned", "error", "message"),
        [
            (
                lambda x: x[:, :, :7],
                ValueError,
                r"must return shape \(2, 3, 8, 8\), like its input, got \(2, 3, 7, 8\)",
            ),
            (lambda x: torch.cat([x, x], 1), ValueError, 'learned variance: pass the Sampler variance="learned'),
            (lambda x: x.to("meta"), ValueError, "must return a tensor on cpu, like its input, got one on meta"),
            (lambda x: x.long(), TypeError, "must return a floating tensor, got torch.int64"),
            (lambda x: None, TypeError, "must return a tensor, .*got NoneType"),
            (lambda x: {"out": x}, TypeError, "must return a tensor, .*got dict"),
            (lambda x: (), TypeError, "must return a tensor, .*got tuple"),
        ],
    )
    def test_of_the_model(self, returned, error, message):
        with pytest.raises(error, match=message):
            Sampler(lambda x, t: returned(x), LINEAR).sample(2, SHAPE, seed=0)

    def test_noise_that_a_function_gives(self):
        sampler = Sampler(identity, LINEAR)
        for given, error, message in (
            (torch.zeros(1, 3), ValueError, r"noise of one row must have shape \(2, 3\), got \(1, 3\)"),
            (None, TypeError, r"noise\(row, t\) must return a tensor, got NoneType"),
        ):
            with pytest.raises(error, match=message):
                sampler.sample(2, (3,), noise=lambda row, t, given=given: given)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite_name_the_row(self, value):
        class Breaks(nn.Module):
            def forward(self, x, t):
                return torch.where(t[:, None] == 29, value, x * 0.1)

        sampler = Sampler(Breaks(), LINEAR, steps=10, spacing="trailing")
        where = r"in row 4 \(t = 29\): the model's output was NaN or infinite"
        with pytest.raises(RuntimeError, match=where):
            sampler.sample(2, (3,), seed=0)
        stream = sampler.stream(2, (3,), seed=0)
        assert [next(stream).row for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(RuntimeError, match=where):
            next(stream)

    def test_large_values_are_not_taken_for_broken_ones(self):
        large = Sampler(lambda x, t: torch.full_like(x, 1e37), LINEAR, steps=5, prediction="x0")
        assert (large.sample(2, (3,), seed=0) > 1e36).all()


class TestProgress:
    @pytest.fixture
    def bars(self, monkeypatch):
        import tqdm

        made = []

        class Bar:
            def __init__(self, total, **_):
                self.total, self.done, self.closed = total, 0, False
                made.append(self)

            def update(self, count):
                self.done += count

            def close(self):
                self.closed = True

        monkeypatch.setattr(tqdm, "tqdm", Bar)
        return made

    def test_counts_every_row(self, net, bars):
        Sampler(net, LINEAR, steps=9).sample(1, SHAPE, seed=0, progress=True)
        Sampler(net, LINEAR, steps=9).sample(1, x=torch.zeros(1, *SHAPE), start=4, progress=True)
        assert [(bar.total, bar.done, bar.closed) for bar in bars] == [(9, 9, True), (5, 5, True)]

    @pytest.mark.parametrize("terminal", [True, False])
    def test_by_default_only_in_a_terminal(self, net, bars, monkeypatch, terminal):
        monkeypatch.setattr(progress_module.sys, "stderr", types.SimpleNamespace(isatty=lambda: terminal))
        Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0)
        Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0, progress=False)
        assert len(bars) == terminal

    def test_a_refresh_finds_a_nan_before_the_end(self, bars, monkeypatch):
        monkeypatch.setattr(progress_module, "REFRESH_SECONDS", 0.0)
        rows = []
        with pytest.raises(RuntimeError, match="in row 0"):
            Sampler(lambda x, t: rows.append(t) or x * float("nan"), LINEAR).sample(1, (3,), progress=True)
        assert len(rows) == 1
        assert bars[0].closed

    def test_without_tqdm(self, net, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
        with pytest.raises(ImportError, match="pip install tqdm"):
            Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0, progress=True)
        monkeypatch.setattr(progress_module.sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
        assert Sampler(net, LINEAR, steps=2).sample(1, SHAPE, seed=0).shape == (1, *SHAPE)


def test_repr_says_what_was_chosen(net):
    assert repr(Sampler(net, LINEAR, steps=10, clip=1.0)) == (
        "Sampler(Net, Schedule.linear(T=50, beta_start=0.0001, beta_end=0.02, scale_betas=False), "
        "steps=10, method='ddpm', prediction='eps', variance='fixed_large', clip=1.0)"
    )
    assert "eta=0.0, clip=1.0, like='lucidrains'" in repr(Sampler(net, LINEAR, steps=10, like="lucidrains"))
    assert len(Sampler(net, LINEAR, steps=10)) == 10
