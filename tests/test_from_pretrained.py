"""`Sampler.from_pretrained` on folders that diffusers saved: its pipelines' images, its choices, and clear errors."""

import inspect
import json
import math

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from unet_configs import SMALL

import ddpm_fast
from ddpm_fast import inference
from ddpm_fast.interop import from_diffusers
from ddpm_fast.interop._choices import choices_of

pytestmark = pytest.mark.usefixtures("one_thread")

T = 100
N = 3
STEPS = 10
FP32 = 2e-3  # of images in [-1, 1]; diffusers' tables are float32


def unet(**changes):
    """A network whose output is about as large as its input, as a trained one's is."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        model.conv_out.weight *= 3
    return model


def saved(folder, scheduler, flat=False, pipeline=DDPMPipeline, **changes):
    """A pipeline saved in `folder`, whole, or as the first ones were: everything in one place."""
    pipe = pipeline(unet(**changes), scheduler)
    if flat:
        pipe.unet.save_pretrained(folder)
        pipe.scheduler.save_pretrained(folder)
    else:
        pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_of(seed, shape):
    """What a pipeline draws from a generator, in its order: x_T, then each step's noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, *shape, generator=generator)
    return {"x": x, "noise": lambda row, t: torch.randn(N, *shape, generator=generator)}


DDPM = {
    "default": {},
    "fixed_large": {"variance_type": "fixed_large"},
    "fixed_small_log": {"variance_type": "fixed_small_log"},
    "wide_clip": {"clip_sample_range": 1.5},
    "no_clip": {"clip_sample": False},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
    "v": {"prediction_type": "v_prediction"},
    "x0": {"prediction_type": "sample"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "offset": {"steps_offset": 1},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": [0.0001 + 0.0002 * t for t in range(T)]},
}
DDIM = {
    "default": {},
    "no_clip": {"clip_sample": False},
    "v": {"prediction_type": "v_prediction"},
    "x0": {"prediction_type": "sample"},
    "thresholding": {"thresholding": True},
    "trailing": {"timestep_spacing": "trailing"},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
}
CASES = [(DDPMScheduler, name, options) for name, options in DDPM.items()]
CASES += [(DDIMScheduler, name, options) for name, options in DDIM.items()]


@pytest.mark.parametrize(("scheduler", "name", "options"), CASES, ids=[f"{c.__name__[:4]}-{n}" for c, n, _ in CASES])
def test_gives_the_pipelines_images(scheduler, name, options, tmp_path):
    pipeline = saved(tmp_path, scheduler(num_train_timesteps=T, **options))
    expected = pipeline(N, torch.Generator().manual_seed(3), STEPS, output_type="pt").images
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, steps=STEPS, fused=False)
    got = sampler.sample(N, **noise_of(3, (2, 8, 8)))
    assert sampler.timesteps == pipeline.scheduler.timesteps.tolist()
    assert got.shape == expected.shape == (N, 2, 8, 8)
    assert float((got - expected).abs().max()) < FP32 / 2  # they are halved on the way to [0, 1]
    assert float(expected.std()) > 0.02  # there is something to compare
    got_bytes = sampler.sample(N, **noise_of(3, (2, 8, 8)), output="uint8")
    difference = got_bytes.int() - (expected * 255).round().int()
    assert int(difference.abs().max()) <= 1


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_as_it_comes_it_runs_a_plan_and_gives_the_pipelines_images(scheduler, tmp_path):
    """Nothing asked for: fused, in float32, and a torch generator means what it means there."""
    pipeline = saved(tmp_path, scheduler(num_train_timesteps=T), block_out_channels=(16, 32), norm_num_groups=4)
    expected = pipeline(N, torch.Generator().manual_seed(3), T, output_type="pt").images
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path)
    got = sampler.sample(N, generator=torch.Generator().manual_seed(3))
    assert sampler.fused
    assert sampler.timesteps == pipeline.scheduler.timesteps.tolist()
    assert float((got - expected).abs().max()) < FP32 / 2
    got_bytes = sampler.sample(N, generator=torch.Generator().manual_seed(3), output="uint8")
    assert int((got_bytes.int() - (expected * 255).round().int()).abs().max()) <= 1


def test_all_steps_and_a_folder_of_the_first_releases(tmp_path):
    """Everything in one folder and a config that is silent about what came later; all T steps by default."""
    pipeline = saved(tmp_path, DDPMScheduler(num_train_timesteps=40, variance_type="fixed_large"), flat=True)
    path = tmp_path / "scheduler_config.json"
    kept = ("_class_name", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "variance_type")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**{name: config[name] for name in kept}, "tensor_format": "pt"}))
    sampler = ddpm_fast.Sampler.from_pretrained(str(tmp_path), fused=False)
    expected = pipeline(N, torch.Generator().manual_seed(1), 40, output_type="pt").images
    assert len(sampler) == 40
    assert float((sampler.sample(N, **noise_of(1, (2, 8, 8))) - expected).abs().max()) < FP32 / 2


def test_takes_the_network_as_it_is(tmp_path):
    pipeline = saved(tmp_path, DDPMScheduler(), sample_size=(8, 16))
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path)
    expected = from_diffusers(pipeline.unet).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in sampler.model.state_dict().items())
    assert not sampler.model.training
    assert len(sampler) == 1000
    assert sampler.choices.output == "unit"
    assert sampler.fused == (inference.unknown_reason(sampler.model) is None)
    plain = ddpm_fast.Sampler.from_pretrained(tmp_path, fused=False, steps=2)
    assert not plain.fused
    assert plain.sample(2, seed=0).shape == (2, 2, 8, 16)


def test_dtype_and_device(tmp_path):
    saved(tmp_path, DDIMScheduler(num_train_timesteps=T))
    for dtype in (torch.bfloat16, torch.float64):
        sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, dtype=dtype, device="cpu", fused=False, steps=3)
        assert sampler.model.dtype == dtype
        assert sampler.sample(1, seed=0).dtype == torch.float32
    assert not ddpm_fast.Sampler.from_pretrained(tmp_path, dtype=torch.float64).fused
    half = saved(tmp_path / "half", DDIMScheduler(num_train_timesteps=T)).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    loaded = ddpm_fast.Sampler.from_pretrained(tmp_path / "half", variant="fp16").model
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.conv_in.weight, half.unet.conv_in.weight.float())


def test_explicit_arguments_win(tmp_path):
    saved(tmp_path, DDPMScheduler(num_train_timesteps=T, thresholding=True, steps_offset=1))

    def choices(**overrides):
        return ddpm_fast.Sampler.from_pretrained(tmp_path, fused=False, **{"steps": 10, **overrides}).choices

    assert (choices().thresholding, choices().steps.timesteps[-1]) == ((0.995, 1.0), 1)
    assert (choices(clip=0.5).clip, choices(clip=0.5).thresholding) == (0.5, None)
    assert (choices(thresholding=False).clip, choices(thresholding=False).thresholding) == (1.0, None)
    assert choices(thresholding=0.9).thresholding == (0.9, 1.0)
    assert choices(prediction="v", variance="fixed_large").prediction == "v"
    assert choices(variance="fixed_large").variance == "fixed_large"
    assert list(choices(steps=[50, 20, 3]).steps.timesteps) == [50, 20, 3]
    assert list(choices(spacing="trailing").steps.timesteps) == list(range(99, 0, -10))
    assert choices(method="ddim", eta=0.5).eta == 0.5
    assert choices(like="tutorial").output == "unit"
    assert choices(steps_offset=0).steps.timesteps[-1] == 0
    with pytest.raises(TypeError, match="stesp"):
        choices(stesp=3)


def test_another_method_reads_the_config_as_its_scheduler_would(tmp_path):
    """As `DDIMScheduler.from_config(pipeline.scheduler.config)`, which is how a pipeline is given another one."""
    pipeline = saved(tmp_path, DDPMScheduler(num_train_timesteps=T, clip_sample_range=0.8))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(N, torch.Generator().manual_seed(3), STEPS, output_type="pt").images
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, method="ddim", steps=STEPS, fused=False)
    assert float((sampler.sample(N, x=noise_of(3, (2, 8, 8))["x"]) - expected).abs().max()) < FP32 / 2


def test_a_ddim_pipeline_takes_fifty_steps(tmp_path):
    saved(tmp_path, DDIMScheduler(), pipeline=DDIMPipeline)
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, fused=False)
    assert sampler.timesteps == list(range(980, -1, -20))
    assert inspect.signature(DDIMPipeline.__call__).parameters["num_inference_steps"].default == 50


# -- choices alone --------------------------------------------------------------------------------------------------


def of(scheduler, **overrides):
    return choices_of(json.loads(scheduler.to_json_string()), **overrides)


def test_choices():
    assert of(DDPMScheduler()) == {
        "method": "ddpm",
        "prediction": "eps",
        "variance": "fixed_small",
        "clip": 1.0,
        "spacing": "leading",
    }
    assert of(DDIMScheduler(set_alpha_to_one=False, clip_sample=False)) == {
        "method": "ddim",
        "prediction": "eps",
        "clip": False,
        "spacing": "leading",
        "eta": 0.0,
        "rederive_eps": False,
        "set_alpha_to_one": False,
    }
    solver = {"method": "dpmsolver++", "prediction": "eps", "clip": False, "spacing": "linspace_open"}
    assert of(DPMSolverMultistepScheduler()) == solver
    assert of(DPMSolverMultistepScheduler(solver_order=1)) == {**solver, "solver_order": 1}
    assert of(DPMSolverMultistepScheduler(timestep_spacing="trailing"))["spacing"] == "trailing"
    assert of(DPMSolverMultistepScheduler(variance_type="learned")) == {**solver, "variance": "learned"}
    assert of(DDPMScheduler(steps_offset=1), method="dpmsolver++") == {
        **solver,
        "spacing": "leading_open",
        "steps_offset": 1,
    }
    assert of(DDPMScheduler(variance_type="learned_range"))["variance"] == "learned_range"
    assert of(DDPMScheduler(variance_type="learned"), variance="learned")["variance"] == "learned"
    assert of(DDPMScheduler(variance_type="fixed_large_log"))["variance"] == "fixed_large"


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.PNDMScheduler(), "config of a PNDMScheduler, which is not covered; covered are DDPMScheduler, DDIM"),
        (DDPMScheduler(variance_type="learned"), 'variance_type "learned" means .* variance itself'),
        (DPMSolverMultistepScheduler(solver_order=3), "solver_order 3 is not covered by dpmsolver"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "algorithm_type 'sde-dpmsolver"),
        (DPMSolverMultistepScheduler(solver_type="heun"), "solver_type 'heun' is not covered"),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), "use_karras_sigmas True is not covered"),
        (DPMSolverMultistepScheduler(lambda_min_clipped=-5.1), "lambda_min_clipped -5.1 is not covered"),
        (DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), "final_sigmas_type 'sigma_min' is not covered"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "prediction_type 'flow_prediction' is not"),
    ],
)
def test_choices_that_are_not_covered(scheduler, message):
    with pytest.raises(ValueError, match=message):
        of(scheduler)


def test_other_choices_that_are_not_covered():
    for entry in ({"timestep_spacing": "cubic"}, {"prediction_type": "score"}, {"variance_type": "huge"}):
        (name, value), *_ = entry.items()
        with pytest.raises(ValueError, match=f"scheduler.json: {name} '{value}' is not covered; covered are"):
            choices_of({"_class_name": "DDPMScheduler", **entry}, "scheduler.json")
    with pytest.raises(ValueError, match="config of a None"):
        choices_of({})
    assert choices_of({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf})


# -- folders that cannot be served ----------------------------------------------------------------------------------


def test_folders_that_cannot_be_served(tmp_path):
    load = ddpm_fast.Sampler.from_pretrained
    with pytest.raises(FileNotFoundError, match=r"no folder google/ddpm-cifar10-32; .*download it first \(huggingface"):
        load("google/ddpm-cifar10-32")
    with pytest.raises(FileNotFoundError, match=r"no folder \S+nowhere$"):
        load(tmp_path / "nowhere")
    saved(tmp_path, DDPMScheduler())
    config, network = tmp_path / "scheduler" / "scheduler_config.json", tmp_path / "unet" / "config.json"

    def entry(path, **entries):
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    entry(config, beta_schedule="spiral")
    with pytest.raises(ValueError, match=r"scheduler_config\.json: beta_schedule must be one of .* got 'spiral'"):
        load(tmp_path)
    entry(config, beta_schedule="linear", beta_end=7.0)
    with pytest.raises(ValueError, match=r"scheduler_config\.json: beta"):
        load(tmp_path)
    entry(config, beta_end=0.02, _class_name="EulerDiscreteScheduler")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is the config of a EulerDiscreteScheduler"):
        load(tmp_path)
    entry(config, _class_name="DDPMScheduler")
    entry(network, up_block_types=["KUpBlock2D", "UpBlock2D"])
    with pytest.raises(ValueError, match=r"unet/config\.json: up_block_types\[0\] is 'KUpBlock2D', which is not cov"):
        load(tmp_path)
    network.unlink()
    with pytest.raises(FileNotFoundError, match=r"no unet/config\.json and no config\.json in "):
        load(tmp_path)
    entry(tmp_path / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    with pytest.raises(ValueError, match=r"model_index\.json names the unet .*UNet2DConditionModel.* not covered"):
        load(tmp_path)
