"""`Sampler(fused=True)`: the same images as without it within rounding, through every way of sampling."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from inference_models import make_unet, measured_anew, one_thread, relative_error
from sampler_models import Net

import ddpm_fast
from ddpm_fast import Sampler, Schedule, inference, ops
from ddpm_fast.inference import Compiled, ending, library, module, native
from ddpm_fast.inference.candidate import Frame
from ddpm_fast.inference.trial import timer_for
from ddpm_fast.noise import make_rng

pytestmark = pytest.mark.usefixtures(one_thread.__name__, measured_anew.__name__)

LINEAR = Schedule.linear(40)
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def plans_are_used(monkeypatch) -> None:
    """Networks this small are sometimes no slower as they are; what is tested is the plan."""
    monkeypatch.setattr(module.Module, "beats", lambda *_: None)


def both(net: torch.nn.Module, schedule: Schedule = LINEAR, **arguments) -> tuple[Sampler, Sampler]:
    return Sampler(net, schedule, clip=1.0, **arguments), Sampler(net, schedule, clip=1.0, fused=True, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"steps": 8},
        {"method": "ddim", "steps": 5, "eta": 0.5},
        {"method": "dpmsolver++", "steps": 8},
        {"prediction": "v"},
        {"prediction": "x0"},
        {"time_scale": "rescaled", "steps": 6},
        {"chunk": 2},
        {"deterministic": True, "chunk": 4},
    ],
    ids=str,
)
def test_images_are_those_of_the_model(arguments) -> None:
    plain, fused = both(make_unet(), **arguments)
    assert fused.fused
    assert fused.not_fused_because is None
    expected = plain.sample(5, SHAPE, seed=3)
    got = fused.sample(5, SHAPE, seed=3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert fused.last_seed == 3


def test_thresholding_sees_the_plans_output() -> None:
    net = make_unet()
    expected = Sampler(net, LINEAR, thresholding=0.9).sample(3, SHAPE, seed=0)
    got = Sampler(net, LINEAR, thresholding=0.9, fused=True).sample(3, SHAPE, seed=0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_multistep_run_resumes_and_streams() -> None:
    plain, fused = both(make_unet(), method="dpmsolver++", steps=6)
    whole = fused.sample(2, SHAPE, seed=0)
    for step, expected in zip(fused.stream(2, SHAPE, seed=0), plain.stream(2, SHAPE, seed=0), strict=True):
        torch.testing.assert_close(step.x, expected.x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(step.x0, expected.x0, rtol=1e-3, atol=1e-3)
        assert torch.equal(fused.sample(2, SHAPE, **step.state()), whole)


def test_generators_draw_in_the_dtype_of_the_model() -> None:
    plain, fused = both(make_unet(), steps=4)
    half = Sampler(plain.model, LINEAR, clip=1.0, steps=4, dtype=torch.bfloat16, fused=True)
    expected = plain.sample(2, SHAPE, generator=torch.Generator().manual_seed(0))
    got = fused.sample(2, SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    got = half.sample(2, SHAPE, generator=torch.Generator().manual_seed(0))
    assert relative_error(got, expected) < 0.05


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [None, 2])
def test_labels_and_guidance(guidance, chunk) -> None:
    plain, fused = both(make_unet(num_classes=4), chunk=chunk)
    arguments = {"seed": 1, "labels": [0, 3, 1], "guidance": guidance}
    expected = plain.sample(3, SHAPE, **arguments)
    got = fused.sample(3, SHAPE, **arguments)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    other = fused.sample(3, SHAPE, **arguments | {"labels": [1, 0, 3]})
    assert relative_error(other, got) > 1e-2


def test_given_noise() -> None:
    plain, fused = both(make_unet(), steps=6)
    noise = torch.randn(6, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    arguments = {"seed": 1, "noise": noise}
    torch.testing.assert_close(
        fused.sample(2, SHAPE, **arguments), plain.sample(2, SHAPE, **arguments), rtol=1e-3, atol=1e-3
    )


def test_stream_and_resume_give_the_same_bits() -> None:
    _, fused = both(make_unet(), steps=9)
    whole = fused.sample(3, SHAPE, seed=5)
    steps = list(fused.stream(3, SHAPE, seed=5))
    assert torch.equal(steps[-1].x, whole)
    assert torch.equal(fused.sample(3, **steps[4].state()), whole)


def test_two_streams_read_in_turn_do_not_disturb_each_other() -> None:
    _, fused = both(make_unet(), steps=6)
    expected = [fused.sample(2, SHAPE, seed=seed) for seed in (1, 2)]
    last = [None, None]
    for steps in zip(*(fused.stream(2, SHAPE, seed=seed) for seed in (1, 2)), strict=True):
        last = [step.x for step in steps]
    assert torch.equal(last[0], expected[0])
    assert torch.equal(last[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_images_have_the_same_bits_however_they_are_split(dtype) -> None:
    net = make_unet(width=32)
    _, fused = both(net, steps=5, deterministic=True, chunk=4, dtype=dtype)
    whole = fused.sample(11, SHAPE, seed=7)
    assert torch.equal(fused.sample(4, SHAPE, seed=7), whole[:4])
    assert torch.equal(fused.sample(5, SHAPE, seed=7, first_sample=6), whole[6:])
    _, again = both(make_unet(width=32), steps=5, deterministic=True, chunk=4, dtype=dtype)
    torch.set_num_threads(2)
    assert torch.equal(again.sample(11, SHAPE, seed=7), whole)


def test_the_dtype_is_the_plans() -> None:
    net = make_unet(width=32)
    plain, _ = both(net, steps=10)
    half = Sampler(net, LINEAR, clip=1.0, steps=10, fused=True, dtype=torch.bfloat16)
    expected, got = plain.sample(4, SHAPE, seed=0), half.sample(4, SHAPE, seed=0)
    assert isinstance(half.compiled, Compiled)
    assert half.compiled.dtype == torch.bfloat16
    assert 0 < relative_error(got, expected) < 0.1
    assert net.output.weight.dtype == torch.float32


def test_a_half_precision_model_keeps_a_float32_state() -> None:
    net = make_unet().bfloat16()
    fused = Sampler(net, LINEAR, clip=1.0, steps=10, fused=True)
    expected = Sampler(make_unet(), LINEAR, clip=1.0, steps=10).sample(2, SHAPE, seed=0)
    assert relative_error(fused.sample(2, SHAPE, seed=0), expected) < 0.1
    assert fused.compiled is not None
    assert fused.compiled.dtype == torch.bfloat16


class TestWeights:
    def test_that_changed_between_runs_are_read_again(self) -> None:
        net = make_unet()
        plain, fused = both(net, steps=6)
        before = fused.sample(2, SHAPE, seed=0)
        for parameter in net.parameters():
            parameter.data.mul_(1.01)
        net.bottleneck.conv2.weight.data.view(-1)[1234] += 1.0
        after = fused.sample(2, SHAPE, seed=0)
        assert relative_error(after, before) > 1e-3
        torch.testing.assert_close(after, plain.sample(2, SHAPE, seed=0), rtol=1e-3, atol=1e-3)

    def test_that_changed_between_two_steps_are_read_again(self) -> None:
        results = []
        for fused in (False, True):
            net = make_unet()
            steps = Sampler(net, LINEAR, clip=1.0, steps=4, fused=fused).stream(2, SHAPE, seed=0)
            next(steps)
            with torch.no_grad():
                net.output.weight.mul_(0.5)
            results.append(list(steps)[-1].x)
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)

    def test_a_model_in_training_mode_runs_in_eval_and_is_given_back(self) -> None:
        net = make_unet()
        plain, fused = both(net, steps=4)
        expected = plain.sample(2, SHAPE, seed=0)
        net.train()
        net.down1.norm1.eval()
        for _ in range(2):
            torch.testing.assert_close(fused.sample(2, SHAPE, seed=0), expected, rtol=1e-3, atol=1e-3)
        assert net.training
        assert net.up1.training
        assert not net.down1.norm1.training


class TestOnePass:
    """The last layer and the reverse step as one, which only GPUs have: here a stand-in made of the two."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[str]:
        calls: list[str] = []

        def offered(layer, place):
            output = library.candidates(layer, place.n, place.h, place.w, place.dtype, place.device)[0]
            bound = output.prepare(layer, place)

            def step(x, table, t_of_row, row, rng, bad_row, x0_out):
                calls.append("step")
                m = torch.zeros_like(x)
                bound(Frame(x, m, torch.zeros(1, place.columns), torch.zeros(place.n, dtype=torch.int64)))
                if "wrong" in calls:
                    m += 0.01
                if "slow" in calls:
                    time.sleep(0.02)
                ops.ddpm_step(x, m, table, t_of_row, row, rng, x0_out=x0_out, bad_row=bad_row)

            return step

        monkeypatch.setattr(ending, "one_pass_step", offered)
        monkeypatch.setattr(ending, "timer_for", lambda _: lambda bounds, _: [2.0, 1.0])
        return calls

    @pytest.mark.parametrize("classes", [None, 3])
    def test_gives_the_same_images(self, calls, classes) -> None:
        labels = {} if classes is None else {"labels": [2, 0, 1]}
        plain, fused = both(make_unet(num_classes=classes), steps=6)
        expected = plain.sample(3, SHAPE, seed=1, **labels)
        torch.testing.assert_close(fused.sample(3, SHAPE, seed=1, **labels), expected, rtol=1e-3, atol=1e-3)
        assert calls.count("step") >= 6
        assert "last layer and reverse step in one" in fused.compiled.describe(3, 8, 8)
        assert not fused.compiled.plan(3, 8, 8).rows.any()  # the run's own are read, not copied: a launch less
        calls.clear()
        steps = zip(fused.stream(3, SHAPE, seed=1, **labels), plain.stream(3, SHAPE, seed=1, **labels), strict=True)
        for got, wanted in steps:
            torch.testing.assert_close(got.x, wanted.x, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(got.x0, wanted.x0, rtol=1e-3, atol=1e-3)
        assert calls.count("step") == 6

    def test_reads_one_row_or_that_of_every_image(self, calls) -> None:
        net = make_unet()
        compiled = inference.compile(net, timesteps=torch.tensor([900, 500, 100]))
        steps = (LINEAR.step_table().table[:3], torch.tensor([900, 500, 100], dtype=torch.int32))
        x, given = torch.randn(2, *SHAPE), []
        for rows in (torch.tensor([1]), torch.tensor([1, 1])):
            given.append(x.clone())
            bad_row = torch.full((1,), -1, dtype=torch.int32)
            compiled.step_at_rows(given[-1], rows, None, steps, make_rng(0, 0), bad_row)
        assert torch.equal(*given)
        assert not torch.equal(given[0], x)

    @pytest.mark.parametrize("case", ["noise", "thresholding", "chunk", "guidance", "deterministic", "wrong", "slow"])
    def test_is_left_alone_where_it_cannot_or_should_not_serve(self, calls, case, monkeypatch) -> None:
        net = make_unet(num_classes=2)
        arguments = {"thresholding": {"thresholding": True, "clip": None}, "chunk": {"chunk": 1}}.get(case, {})
        if case == "deterministic":
            arguments = {"deterministic": True, "chunk": 2}
        call = {"seed": 0, "labels": [1, 0]}
        call |= {"noise": {"noise": torch.zeros(4, 2, *SHAPE)}, "guidance": {"guidance": 2.0}}.get(case, {})
        if case == "slow":
            monkeypatch.setattr(ending, "timer_for", timer_for)
        if case in ("wrong", "slow"):
            calls.append(case)
        arguments = {"steps": 4, "clip": 1.0} | arguments
        expected = Sampler(net, LINEAR, **arguments).sample(2, SHAPE, **call)
        fused = Sampler(net, LINEAR, fused=True, **arguments)
        with pytest.warns(RuntimeWarning, match="they run separately") if case == "wrong" else nullcontext():
            fused.sample(2, SHAPE, **call)
        tried = calls.count("step")
        torch.testing.assert_close(fused.sample(2, SHAPE, **call), expected, rtol=1e-3, atol=1e-3)
        assert calls.count("step") == tried


class TestModelsThatAreNotKnown:
    def test_run_as_they_are_and_the_sampler_says_so(self) -> None:
        net = Net()
        plain, fused = both(net)
        assert not fused.fused
        assert "no fused plan is known for Net" in fused.not_fused_because
        assert fused.compiled is None
        assert torch.equal(fused.sample(2, SHAPE, seed=0), plain.sample(2, SHAPE, seed=0))
        assert not plain.fused
        assert plain.not_fused_because == "fused=True was not asked for"

    def test_an_altered_unet_too(self) -> None:
        net = make_unet()
        seen = []
        net.bottleneck.register_forward_hook(lambda *_: seen.append(1))
        plain, fused = both(net, steps=3)
        assert "bottleneck has forward hooks" in fused.not_fused_because
        assert torch.equal(fused.sample(1, SHAPE, seed=0), plain.sample(1, SHAPE, seed=0))
        assert len(seen) == 6

    def test_a_network_without_a_variance_where_one_is_asked_for(self) -> None:
        fused = Sampler(make_unet(), LINEAR, variance="learned_range", fused=True)
        with pytest.raises(ValueError, match=r"must return shape \(1, 6, 16, 16\).*this one predicts no variance"):
            fused.sample(1, (3, 16, 16), seed=0)


@pytest.mark.skipif(not native.available(), reason="the extension has no inference layers here")
class TestOneCall:
    """On a CPU a plan of our own layers runs network, reverse step and the next row as one call of the extension."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[str]:
        """What runs a step in pieces, as often as it is called."""
        calls: list[str] = []

        def watched(self, *arguments, **more):
            calls.append("at_rows")
            return at_rows(self, *arguments, **more)

        at_rows = Compiled.at_rows
        monkeypatch.setattr(Compiled, "at_rows", watched)
        return calls

    @pytest.mark.parametrize("classes", [None, 3])
    def test_has_the_bits_of_the_pieces(self, calls, classes) -> None:
        labels = {} if classes is None else {"labels": [2, 0, 1]}
        _, fused = both(make_unet(num_classes=classes), deterministic=True, chunk=3, steps=6)
        images = fused.sample(3, SHAPE, seed=1, **labels)
        last = list(fused.stream(3, SHAPE, seed=1, **labels))[-1]
        assert not calls
        with ddpm_fast.use_backend("reference"):
            assert torch.equal(fused.sample(3, SHAPE, seed=1, **labels), images)
        assert len(calls) == 6
        calls.clear()
        pieces = list(fused.stream(4, SHAPE, seed=1, **({} if classes is None else {"labels": [2, 0, 1, 3]})))
        assert len(calls) == 12  # two chunks
        assert torch.equal(last.x, images)
        assert torch.equal(pieces[-1].x[:3], images)
        assert torch.equal(pieces[-1].x0[:3], last.x0)

    def test_says_which_row_went_wrong(self) -> None:
        net = make_unet()
        _, fused = both(net, deterministic=True, chunk=2, steps=5)
        fused.sample(2, SHAPE, seed=0)
        net.output.bias.data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match=r"row 0 \(t = 39\)"):
            fused.sample(2, SHAPE, seed=0)
        _, new = both(net, deterministic=True, chunk=2, steps=5)
        with pytest.raises(RuntimeError, match=r"layer output gives values that are not finite .* NaN or infinity"):
            new.sample(2, SHAPE, seed=0)

    def test_ends_when_the_weights_move(self, calls) -> None:
        net = make_unet()
        plain, fused = both(net, deterministic=True, chunk=2, steps=4)
        expected = [step.x for step in plain.stream(2, SHAPE, seed=0)]
        for row, step in enumerate(fused.stream(2, SHAPE, seed=0)):
            torch.testing.assert_close(step.x, expected[row], rtol=1e-3, atol=1e-3)
            if row == 1:
                for parameter in net.parameters():
                    parameter.data = parameter.data.clone()


def test_a_compiled_plan_is_a_model_for_a_sampler() -> None:
    net = make_unet(num_classes=3)
    sampler = Sampler(ddpm_fast.inference.compile(net), LINEAR, clip=1.0, steps=5)
    with pytest.raises(ValueError, match="device=meta, but the model is on cpu"):
        Sampler(ddpm_fast.inference.compile(net), LINEAR, device="meta").sample(1, 8)
    expected = Sampler(net, LINEAR, clip=1.0, steps=5)
    arguments = {"seed": 0, "labels": [1, 2], "guidance": 2.0}
    torch.testing.assert_close(
        sampler.sample(2, 8, **arguments), expected.sample(2, 8, **arguments), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({"dtype": torch.float64}, SHAPE, r"fused=True computes in torch\.float32.*got dtype torch\.float64"),
        ({}, (3, 8, 6), r"multiples of 4.*got \(8, 6\)"),
        ({}, (1, 8, 8), r"x must have shape \(N, 3, H, W\)"),
        ({}, (3,), "x must have shape"),
    ],
)
def test_bad_input(arguments, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(make_unet(), LINEAR, fused=True, **arguments).sample(2, shape, seed=0)


def test_nothing_is_printed(capfd) -> None:
    _, fused = both(make_unet(), steps=2)
    fused.sample(1, SHAPE, seed=0, progress=False)
    assert capfd.readouterr() == ("", "")
