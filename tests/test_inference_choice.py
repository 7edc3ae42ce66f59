"""How a plan chooses: by the clock among what is right, or by rule; and the model itself where that is faster."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from inference_models import exact, inputs, make_unet, measured_anew, one_thread, relative_error

from ddpm_fast import inference
from ddpm_fast.inference import library, module, native, plan, planner, trial
from ddpm_fast.inference.candidate import Frame, Place
from ddpm_fast.inference.network import Conv, Layer

pytestmark = pytest.mark.usefixtures(one_thread.__name__, measured_anew.__name__)


class TestChoice:
    def test_the_faster_of_two_is_taken(self, monkeypatch) -> None:
        """Slow candidates beside each real one, listed first."""
        real = plan.listed

        class Slow:
            name = "slow"

            def __init__(self, inner):
                self.inner = inner

            def prepare(self, layer: Layer, place: Place):
                bound = self.inner.prepare(layer, place)

                def run(frame: Frame) -> None:
                    for _ in range(8):
                        bound(frame)

                return run

        monkeypatch.setattr(
            planner, "listed", lambda layer, place: [Slow((real(layer, place))[0]), *real(layer, place)]
        )
        fused = inference.compile(make_unet(width=32))
        assert all(ranking.chosen != "slow" for ranking in fused.plan(8, 16, 16).choices)

    @pytest.mark.parametrize("fault", ["value", "unwritten", "pooled"])
    def test_a_wrong_candidate_is_left_out_with_a_warning(self, monkeypatch, fault) -> None:
        net = make_unet(depth=1)
        x, t = inputs(2, (3, 4, 4))
        real = planner.listed

        class Wrong:
            name = "wrong"

            def prepare(self, layer: Layer, place: Place):
                bound = library._conv2d(layer, place)

                def run(frame: Frame) -> None:
                    if fault != "unwritten":
                        bound(frame)
                    if fault == "value":
                        place.target[0, 0, 0, 0] += 3
                    if fault == "pooled":
                        place.pooled.zero_()

                return run

        def listed(layer: Layer, place: Place):
            wrong = [Wrong()] if isinstance(layer, Conv) and layer.pooled is not None else []
            return [*wrong, *real(layer, place)]

        monkeypatch.setattr(planner, "listed", listed)
        for deterministic in (False, True):
            with pytest.warns(RuntimeWarning, match="wrong computes layer down1.conv2 with a relative error"):
                got = inference.compile(net, deterministic=deterministic)(x, t)
            assert relative_error(got, exact(net, x, t)) < 1e-5

    def test_one_that_is_wrong_at_one_of_several_like_layers_is_not_used_there(self, monkeypatch) -> None:
        """down1.conv2 and conv_up1.conv2 differ in their weights only and are timed together."""
        net = make_unet(depth=1)
        x, t = inputs(2, (3, 4, 4))
        real = planner.listed

        class Partial:
            name = "partial"

            def prepare(self, layer: Layer, place: Place):
                bound = library._conv2d(layer, place)

                def run(frame: Frame) -> None:
                    bound(frame)
                    if layer.name == "conv_up1.conv2":
                        place.target[0, 0, 0, 0] += 3

                return run

        def listed(layer: Layer, place: Place):
            alike = layer.name in ("down1.conv2", "conv_up1.conv2")
            return [*([Partial()] if alike else []), *real(layer, place)]

        monkeypatch.setattr(planner, "listed", listed)
        for name, value in {"HOPELESS": 1e9, "SLOWER": 1e9, "CLOSE": 1e9, "APART": 0.0}.items():
            monkeypatch.setattr(trial, name, value)  # whatever the times, what is listed first
        monkeypatch.setattr(planner, "signature", lambda layer, place: str(layer.weight.shape))
        fused = inference.compile(net)
        with pytest.warns(RuntimeWarning, match=r"partial computes layer conv_up1\.conv2 with a relative error"):
            fused.plan(2, 4, 4)
        assert relative_error(fused(x, t), exact(net, x, t)) < 1e-5
        chosen = {ranking.layer: ranking.chosen for ranking in fused.plan(2, 4, 4).choices}
        assert chosen["down1.conv2"] == "partial"
        assert chosen["conv_up1.conv2"] != "partial"

    def test_one_that_cannot_serve_is_left_out_and_none_at_all_is_an_error(self, monkeypatch) -> None:
        real = planner.listed

        class Refuses:
            name = "refuses"

            def prepare(self, layer: Layer, place: Place):
                raise RuntimeError("out of shared memory")

        monkeypatch.setattr(planner, "listed", lambda *arguments: [Refuses(), *real(*arguments)])
        net = make_unet(depth=1)
        x, t = inputs(1, (3, 4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert relative_error(inference.compile(net)(x, t), exact(net, x, t)) < 1e-5
        monkeypatch.setattr(planner, "listed", lambda *_: [Refuses()])
        with pytest.raises(RuntimeError, match=r"no implementation serves layer down1\.conv1: refuses: out of shared"):
            inference.compile(net, deterministic=True)(x, t)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_model_that_is_faster_runs_itself(self, monkeypatch, dtype) -> None:
        net = make_unet(num_classes=2)
        x, t = inputs(2, (3, 8, 8))
        labels = torch.tensor([1, 2])
        monkeypatch.setattr(module.Module, "beats", lambda *_: 1.0)
        fused = inference.compile(net, dtype=dtype, timesteps=torch.arange(1000))
        assert "the model as it is was faster" in fused.describe(2, 8, 8)
        with torch.no_grad():
            expected = copy.deepcopy(net).to(dtype)(x.to(dtype), t, labels).float()
        torch.testing.assert_close(fused(x, t, labels), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(fused.at_rows(x, t, labels), expected, rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            net.output.weight.mul_(2)
            changed = copy.deepcopy(net).to(dtype)(x.to(dtype), t, labels).float()
        torch.testing.assert_close(fused(x, t, labels), changed, rtol=1e-2, atol=1e-2)

    def test_a_model_in_float32_may_be_the_faster_one_where_no_half_dtype_is(self, monkeypatch) -> None:
        monkeypatch.setattr(module.Module, "beats", lambda self, *_: 1.0 if self.dtype == torch.float32 else 2.0)
        net = make_unet()
        x, t = inputs(2, (3, 8, 8))
        for _ in range(2):  # measured, and remembered
            fused = inference.compile(net, dtype=torch.float16)
            assert "not used: the model as it is was faster, in torch.float32" in fused.describe(2, 8, 8)
            assert relative_error(fused(x, t), exact(net, x, t)) < 1e-5
            assert list(fused._modules) == [torch.float32]

    def test_is_made_by_the_clock(self) -> None:
        """`beats` compares what it is given: an idle plan with the model, and one that takes its time."""
        other = module.Module(make_unet(width=32), torch.float32)
        x, t = inputs(4, (3, 16, 16))
        assert other.beats(lambda: None, x) is None

        def twice() -> None:
            with torch.no_grad():
                for _ in range(4):
                    other(x, t, None)

        with torch.no_grad():
            assert other.beats(twice, x) is not None

    def test_deterministic_gives_the_same_bits_every_time(self) -> None:
        net = make_unet(width=32)
        x, t = inputs(3, (3, 8, 8))
        first = inference.compile(net, deterministic=True)
        planner.forget_measurements()
        second = inference.compile(copy.deepcopy(net), deterministic=True)
        assert torch.equal(first(x, t), second(x, t))
        names = [[ranking.times for ranking in one.plan(3, 8, 8).choices] for one in (first, second)]
        assert names[0] == names[1]

    @pytest.mark.skipif(not native.available(), reason="the extension has no inference layers here")
    def test_neighbouring_native_layers_are_one_call(self) -> None:
        fused = inference.compile(make_unet(width=32), deterministic=True)
        assert "1 calls a step" in fused.describe(2, 8, 8)

    def test_library_layers_between_native_ones_cut_the_call(self, monkeypatch) -> None:
        class Layer:
            pass

        a, b, c, library_layer = Layer(), Layer(), Layer(), object()
        monkeypatch.setattr(native, "NativeLayer", Layer)
        monkeypatch.setattr(native, "Run", tuple)
        assert plan.joined([a, b, library_layer, c]) == [(a, b), library_layer, (c,)]
        assert plan.joined([library_layer, a]) == [library_layer, (a,)]

    def test_without_the_extension_the_library_serves(self, monkeypatch) -> None:
        monkeypatch.setattr(native.extension, "_C", None)
        net = make_unet(width=32)
        x, t = inputs(2, (3, 8, 8))
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            fused = inference.compile(net, dtype=dtype)
            assert relative_error(fused(x, t), exact(net, x, t)) < bound
            assert "avx" not in fused.describe(2, 8, 8)
