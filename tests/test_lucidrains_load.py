"""`load_diffusion`: the package's checkpoints with their schedule and objective, and what is refused."""

from __future__ import annotations

import pytest
import torch
from lucidrains_pairs import class_of, images, make_unet, plain_models, seeded

from ddpm_fast.interop.lucidrains import (
    LearnedGaussianDiffusion,
    Unet,
    WeightedObjectiveGaussianDiffusion,
    load_diffusion,
)
from ddpm_fast.schedule import Schedule


@pytest.fixture(autouse=True)
def one_thread():
    with plain_models():
        yield


def saved(lucidrains, **options):
    """The package's GaussianDiffusion, and what its Trainer would save of it; the average has other weights."""
    options = {"timesteps": 40, "beta_schedule": "linear", "objective": "pred_noise", **options}
    of_unet = options.pop("of_unet", {})
    name = options.pop("name", "GaussianDiffusion")
    theirs = class_of(lucidrains, name)(make_unet(lucidrains, **of_unet), image_size=8, **options)
    average = class_of(lucidrains, name)(make_unet(lucidrains, seed=1, **of_unet), image_size=8, **options)
    ema = {"initted": torch.tensor(True), "step": torch.tensor(3)}
    ema |= {f"online_model.{key}": value for key, value in theirs.state_dict().items()}
    ema |= {f"ema_model.{key}": value for key, value in average.state_dict().items()}
    found = {"step": 3, "model": theirs.state_dict(), "opt": {}, "ema": ema, "scaler": None, "version": "2.3.4"}
    return theirs, average, found


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_a_trainers_file(lucidrains, tmp_path, ema, schedule) -> None:
    theirs, average, found = saved(lucidrains, beta_schedule=schedule)
    torch.save(found, tmp_path / "model-1.pt")
    diffusion = load_diffusion(tmp_path / "model-1.pt", image_size=8, ema=ema, sampling_timesteps=7)
    expected = average if ema else theirs
    for key, value in expected.state_dict().items():
        assert torch.equal(diffusion.state_dict()[key], value), key
    assert isinstance(diffusion.model, Unet)
    assert (diffusion.objective, diffusion.num_timesteps, diffusion.sampling_timesteps) == ("pred_noise", 40, 7)
    assert not diffusion.training
    torch.testing.assert_close(torch.tensor(diffusion.schedule.betas), expected.betas.double(), rtol=1e-6, atol=0)
    if schedule == "linear":
        assert diffusion.schedule == Schedule.linear(40, scale_betas=True)
    got, loss = (seeded(lambda d=d: d(images())) for d in (diffusion, expected))
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("min_snr", [None, 2.0, 5.0])
@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
def test_the_objective_is_what_the_weights_say(lucidrains, objective, min_snr, schedule) -> None:
    options = {} if min_snr is None else {"min_snr_loss_weight": True, "min_snr_gamma": min_snr}
    theirs, _, _ = saved(lucidrains, objective=objective, beta_schedule=schedule, **options)
    state = theirs.state_dict()
    assert load_diffusion(state, image_size=8).objective == objective
    other = "pred_x0" if objective == "pred_v" else "pred_v"
    with pytest.raises(ValueError, match=f"was trained with objective '{objective}', as its loss_weight says, got"):
        load_diffusion(state, image_size=8, objective=other)
    state["loss_weight"] = torch.linspace(1, 2, 40)
    with pytest.raises(ValueError, match="loss_weight is that of no objective; say which it is, objective="):
        load_diffusion(state, image_size=8)
    assert load_diffusion(state, image_size=8, objective=other).objective == other


def test_variants_by_their_channels(lucidrains) -> None:
    for kind, of_unet in (
        (LearnedGaussianDiffusion, {"learned_variance": True}),
        (WeightedObjectiveGaussianDiffusion, {"out_dim": 8}),
    ):
        theirs, _, _ = saved(lucidrains, name=kind.__name__, of_unet=of_unet, objective="pred_v")
        arguments = {"self_condition": False} if kind is LearnedGaussianDiffusion else {}
        diffusion = load_diffusion(theirs.state_dict(), image_size=8, **arguments)
        assert type(diffusion) is kind
        assert diffusion.sample(1, seed=0).isfinite().all()
    state = saved(lucidrains)[0].state_dict()
    state["model.final_conv.weight"], state["model.final_conv.bias"] = torch.zeros(5, 8, 1, 1), torch.zeros(5)
    with pytest.raises(ValueError, match="no class is for a Unet of 3 channels and out_dim 5"):
        load_diffusion(state, image_size=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("objective", "schedule"),
    [("pred_noise", "linear"), ("pred_x0", "cosine"), ("pred_x0", "sigmoid"), ("pred_v", "sigmoid")],
)
def test_half_precision_tells_which_schedule_it_is(lucidrains, dtype, objective, schedule) -> None:
    theirs, _, _ = saved(lucidrains, timesteps=1000, beta_schedule=schedule, objective=objective)
    exact = {key: value.clone() for key, value in theirs.state_dict().items() if not key.startswith("model.")}
    diffusion = load_diffusion(theirs.to(dtype).state_dict(), image_size=8)
    assert diffusion.objective == objective
    assert diffusion.model.dtype == dtype
    torch.testing.assert_close(diffusion.betas, exact["betas"], rtol=2e-5, atol=0)
    torch.testing.assert_close(diffusion.loss_weight, exact["loss_weight"], rtol=1e-3, atol=1e-7)


def test_half_precision_of_another_schedule(lucidrains) -> None:
    options = {"schedule_fn_kwargs": {"s": 0.02}, "beta_schedule": "cosine", "min_snr_loss_weight": True}
    theirs, _, _ = saved(lucidrains, timesteps=100, **options)
    state = theirs.half().state_dict()
    with pytest.raises(
        ValueError, match=r"holds its schedule in torch\.float16, too coarse to go by.*pass the beta_sch"
    ):
        load_diffusion(state, image_size=8)
    named = {name: options[name] for name in ("schedule_fn_kwargs", "beta_schedule")}
    diffusion = load_diffusion(state, image_size=8, **named)
    assert diffusion.schedule == Schedule.cosine(100, s=0.02)
    assert diffusion.loss_weight.max() <= 1  # min-SNR of eps, as it was


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off(lucidrains, wrapper) -> None:
    _, average, found = saved(lucidrains)
    inner = {key.replace("model.", f"model.{wrapper}", 1): v for key, v in average.state_dict().items()}
    outer = {f"{wrapper}{key}": value for key, value in average.state_dict().items()}
    for state in (inner, outer, {**found, "ema": {f"ema_model.{key}": value for key, value in outer.items()}}):
        loaded = load_diffusion(state, image_size=8).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in average.state_dict().items())


def test_messages_name_the_file(lucidrains, tmp_path) -> None:
    _, average, _ = saved(lucidrains)
    path = tmp_path / "model-1.pt"
    for key, value in (("betas", None), ("loss_weight", 3), ("betas", torch.tensor(1.0)), ("extra", torch.ones(1))):
        torch.save({**average.state_dict(), key: value}, path)
        with pytest.raises(ValueError, match=rf"model-1\.pt.* (under )?'?{key}") as error:
            load_diffusion(path, image_size=8)
        assert "\n" not in str(error.value)


def test_what_is_no_diffusion(lucidrains, tmp_path) -> None:
    theirs, _, found = saved(lucidrains)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_diffusion(tmp_path / "model-9.pt", image_size=8)
    with pytest.raises(ValueError, match="holds a network and no GaussianDiffusion; load_unet loads it"):
        load_diffusion(theirs.model.state_dict(), image_size=8)
    older = {key: value for key, value in theirs.state_dict().items() if key != "loss_weight"}
    with pytest.raises(ValueError, match="holds no GaussianDiffusion of version 2: loss_weight is missing"):
        load_diffusion(older, image_size=8)
    with pytest.raises(ValueError, match=r"posterior_variance must have shape \(40,\), got \(3,\)"):
        load_diffusion({**theirs.state_dict(), "posterior_variance": torch.ones(3)}, image_size=8)
    with pytest.raises(ValueError, match="has 40 timesteps, got timesteps=1000"):
        load_diffusion(found, image_size=8, timesteps=1000)
    with pytest.raises(ValueError, match="image_size must be made of multiples of 2"):
        load_diffusion(found, image_size=9)
    torch.save(found, tmp_path / "model-1.pt")
    with pytest.raises(ValueError, match=r"model-1\.pt has 40 timesteps"):
        load_diffusion(tmp_path / "model-1.pt", image_size=8, timesteps=10)
    with pytest.raises(ValueError, match="lucidrains Unet"):
        load_diffusion({"conv_in.weight": torch.zeros(1)}, image_size=8)
