"""The fused plan against the model in float64, over sizes, dtypes and labels; what is kept, shared and printed."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from inference_models import exact, inputs, make_unet, measured_anew, one_thread, relative_error
from torch import Tensor

from ddpm_fast import inference, nn
from ddpm_fast.inference import compiled as compiled_module
from ddpm_fast.inference import module, planner, trial

pytestmark = pytest.mark.usefixtures(one_thread.__name__, measured_anew.__name__)

NETS = [
    # n, shape, architecture
    (1, (3, 16, 16), {"width": 16, "depth": 3}),
    (2, (3, 8, 8), {"width": 32, "depth": 2}),
    (5, (1, 16, 16), {"width": 16, "depth": 1, "in_channels": 1}),
    (2, (3, 8, 8), {"width": 48, "depth": 2}),
    (3, (3, 12, 8), {"width": 33, "depth": 1}),  # no native convolution has such channels
    (2, (3, 4, 4), {"width": 8, "depth": 2}),  # nor 8; deeper down they have
    (1, (3, 48, 32), {"width": 16, "depth": 3}),
    (2, (3, 24, 40), {"width": 16, "depth": 3}),  # 3 x 5 pixels at the bottom
    (3, (3, 8, 8), {"width": 16, "depth": 2, "num_classes": 4}),
]


@torch.no_grad()
def eager_error(net: torch.nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> float:
    """What PyTorch's own modules make of it in this dtype."""
    labelled = () if labels is None else (labels,)
    half = copy.deepcopy(net).to(dtype)
    return relative_error(half(x.to(dtype), t, *labelled), exact(net, x, t, *labelled))


@pytest.mark.parametrize("deterministic", [False, True], ids=["trial", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "shape", "architecture"), NETS)
def test_matches_the_model(n, shape, architecture, dtype, deterministic, monkeypatch) -> None:
    monkeypatch.setattr(module.Module, "beats", lambda *_: None)  # the plan itself, however fast it is
    monkeypatch.setattr(trial, "ROUNDS", 1)
    net = make_unet(**architecture)
    x, t = inputs(n, shape)
    labels = torch.arange(n) % 5 if "num_classes" in architecture else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = inference.compile(net, dtype=dtype, deterministic=deterministic)
        got = fused(x, t, labels)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert not got.requires_grad
    wrong = relative_error(got, exact(net, x, t, labels))
    if fused.plan(n, *shape[1:]).dtype == torch.float32:
        assert wrong < 1e-5
    else:
        assert dtype == torch.bfloat16, "float16 is computed in float32 on a CPU"
        assert wrong < eager_error(net, x, t, labels, dtype)


def test_bfloat16_is_no_further_from_float64_than_eager(monkeypatch) -> None:
    monkeypatch.setattr(module.Module, "beats", lambda *_: None)
    errors = []
    for seed in range(4):
        net = make_unet(seed=seed, width=32, depth=2, time_dim=64)
        x, t = inputs(4, (3, 16, 16), seed=seed)
        got = inference.compile(net, dtype=torch.bfloat16)(x, t)
        wrong, eager = relative_error(got, exact(net, x, t)), eager_error(net, x, t, None, torch.bfloat16)
        errors.append((wrong, eager))
    assert all(wrong <= eager for wrong, eager in errors), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_is_read_as_it_is(dtype) -> None:
    net = make_unet().to(dtype)
    fused = inference.compile(net)
    assert fused.dtype == dtype
    x, t = inputs(2, (3, 8, 8))
    assert relative_error(fused(x, t), exact(net, x, t)) < 1e-2


@pytest.mark.parametrize("form", ["bfloat16", "float64", "channels_last", "sliced", "inference"])
def test_the_image_may_come_in_any_form(form) -> None:
    net = make_unet()
    x, t = inputs(2, (3, 8, 8))
    x = x.bfloat16().float()
    expected = inference.compile(net)(x, t)
    given = {
        "bfloat16": x.bfloat16(),
        "float64": x.double(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], dim=3)[..., :8],
    }
    with torch.inference_mode():
        given["inference"] = x.clone()
    assert torch.equal(inference.compile(net)(given[form], t.to(torch.int32)), expected)


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([0, 999, 7]),
        torch.tensor([1000, 3999, 3], dtype=torch.int32),
        torch.tensor([4000, 10**6, 0]),
        torch.tensor([-1, 5, 2]),
        torch.tensor([0.25, 998.5, 1234.0]),
    ],
    ids=["tabulated", "table grown", "beyond the table", "negative", "floating"],
)
def test_any_timestep_is_embedded_as_by_the_model(t, one_thread) -> None:
    net = make_unet(width=16, depth=1)
    compiled = inference.compile(net, deterministic=True)
    x, _ = inputs(3, (3, 4, 4))
    for _ in range(2):  # the second call finds what the first one kept
        assert relative_error(compiled(x, t), exact(net, x, t)) < 1e-5
        with torch.no_grad():
            net.down1.time_mlp.weight.mul_(1.5)
        assert relative_error(compiled(x, t), exact(net, x, t)) < 1e-5


def test_no_images_are_none() -> None:
    assert inference.compile(make_unet())(torch.zeros(0, 3, 8, 8), torch.zeros(0)).shape == (0, 3, 8, 8)


class TestRows:
    def test_are_the_timesteps_given_beforehand(self) -> None:
        net = make_unet(num_classes=3)
        timesteps = torch.tensor([900.0, 450.5, 0.0])
        fused = inference.compile(net, timesteps=timesteps)
        x, _ = inputs(3, (3, 8, 8))
        labels = torch.tensor([2, 0, 3])
        one = fused.at_rows(x, torch.tensor([1]), labels)
        assert relative_error(one, exact(net, x, timesteps[[1, 1, 1]], labels)) < 1e-5
        out = torch.full_like(x, float("nan"))
        each = fused.at_rows(x, torch.tensor([2, 0, 1]), out=out)
        assert each is out
        assert relative_error(out, exact(net, x, timesteps[[2, 0, 1]])) < 1e-5

    def test_bad_ones_are_refused_before_anything_is_written(self) -> None:
        fused = inference.compile(make_unet(), timesteps=torch.arange(3))
        x, _ = inputs(2, (3, 8, 8))
        row = torch.tensor([0])
        with pytest.raises(ValueError, match=r"rows must be in 0\.\.2 .* got 3\.\.3"):
            fused.at_rows(x, torch.tensor([3]))
        with pytest.raises(ValueError, match=r"rows must be int64 of shape \(1,\) or \(2,\)"):
            fused.at_rows(x, torch.zeros(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="rows must be int64"):
            fused.at_rows(x, row.int())
        for out in (x, x.double(), torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 16)[..., ::2]):
            with pytest.raises(ValueError, match="out must be float32"):
                fused.at_rows(x, row, out=out)
        with pytest.raises(ValueError, match=r"compile\(model, timesteps=\.\.\.\)"):
            inference.compile(make_unet()).at_rows(x, row)


class TestPlans:
    def test_are_made_per_size_and_the_last_few_kept(self) -> None:
        net = make_unet(depth=1)
        fused = inference.compile(net, deterministic=True)
        for n in range(1, compiled_module.KEPT_PLANS + 3):
            x, t = inputs(n, (3, 4, 4))
            assert relative_error(fused(x, t), exact(net, x, t)) < 1e-5
        assert len(fused._plans) == compiled_module.KEPT_PLANS
        kept = fused.plan(n, 4, 4)
        assert fused.plan(n, 4, 4) is kept

    def test_that_are_dropped_free_their_buffers(self) -> None:
        fused = inference.compile(make_unet(depth=1), deterministic=True)
        dropped = weakref.ref(fused.plan(1, 4, 4))
        held = fused.plan(2, 4, 4)
        for n in range(3, compiled_module.KEPT_PLANS + 3):
            fused.plan(n, 4, 4)
        gc.collect()
        assert dropped() is None
        assert set(fused._living) == {held, *fused._plans.values()}

    def test_share_packed_weights_and_keep_only_those_of_the_chosen(self) -> None:
        fused = inference.compile(make_unet(width=32))
        first = fused.plan(1, 8, 8)
        assert len(fused._packs) == len(first.uses)
        second = fused.plan(2, 8, 8)
        assert len(fused._packs) == len(first.uses | second.uses)

    def test_are_measured_once_per_process(self, monkeypatch) -> None:
        net = make_unet()
        x, t = inputs(2, (3, 8, 8))
        expected = inference.compile(net)(x, t)

        def not_again(*_):
            raise AssertionError("measured again")

        monkeypatch.setattr(planner, "fastest", not_again)
        assert torch.equal(inference.compile(net)(x, t), expected)
        with pytest.raises(AssertionError, match="measured again"):
            inference.compile(net, dtype=torch.bfloat16)(x, t)

    def test_a_large_batch_takes_the_choices_of_a_smaller_one(self, monkeypatch) -> None:
        monkeypatch.setattr(planner, "TRIED_PIXELS", 3 * 8 * 8)
        net = make_unet()
        fused = inference.compile(net)
        x, t = inputs(7, (3, 8, 8))
        assert relative_error(fused(x, t), exact(net, x, t)) < 1e-5
        assert "measured with 3 images" in fused.describe(7, 8, 8)
        assert "measured with" not in fused.describe(3, 8, 8)
        chosen = [[ranking.chosen for ranking in fused.plan(n, 8, 8).choices] for n in (7, 3)]
        assert chosen[0] == chosen[1]

    def test_measurements_are_bounded(self, monkeypatch) -> None:
        monkeypatch.setattr(planner, "KEPT_MEASUREMENTS", 2)
        monkeypatch.setattr(trial, "ROUNDS", 1)
        fused = inference.compile(make_unet(depth=1))
        for n in range(1, 5):
            fused.plan(n, 4, 4)
        assert len(planner._measured) == 2

    def test_print_nothing_unless_asked(self, capfd) -> None:
        net = make_unet(depth=1)
        x, t = inputs(1, (3, 4, 4))
        inference.compile(net)(x, t)
        assert capfd.readouterr() == ("", "")
        inference.compile(net, verbose=True)(x, t)
        printed = capfd.readouterr().out
        assert "fused plan made in" in printed
        for layer in ("down1.conv1", "bottleneck.conv2", "up1", "conv_up1.conv2", "output"):
            assert f"\n  {layer} " in printed

    def test_describe_says_what_was_chosen_and_how_long_it_took(self) -> None:
        fused = inference.compile(make_unet(width=32))
        text = fused.describe(2, 8, 8)
        assert text.startswith("2 images of 8 x 8, activations in torch.float32")
        assert text.count(" us") > 13
        fixed = inference.compile(make_unet(width=32), deterministic=True).describe(2, 8, 8)
        assert " us" not in fixed

    def test_one_is_used_by_one_thread_at_a_time(self) -> None:
        net = make_unet()
        fused = inference.compile(net, deterministic=True)
        batches = [inputs(2, (3, 8, 8), seed=seed) for seed in range(4)]
        expected = [fused(*batch) for batch in batches]
        wrong = []

        def work(i: int) -> None:
            for _ in range(10):
                if not torch.equal(fused(*batches[i]), expected[i]):
                    wrong.append(i)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong


def test_the_callers_autocast_changes_nothing() -> None:
    """Neither in making a plan nor in running it: library layers would multiply in another dtype than they say."""
    options = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    net = nn.DDPMUNet(**options, **blocks).eval()
    x, t = inputs(2, (3, 8, 8))
    made_outside = inference.compile(net, deterministic=True)
    expected = made_outside(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made_outside(x, t), expected)
        made_inside = inference.compile(net, deterministic=True, timesteps=torch.arange(1000))
        assert torch.equal(made_inside(x, t), expected)
        torch.testing.assert_close(made_inside.at_rows(x, t), expected)
