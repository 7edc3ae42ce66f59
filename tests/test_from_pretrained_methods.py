"""`Sampler.from_pretrained` with DPM-Solver++(2M), learned variance, alphas that do not end at one, and generators."""

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from test_from_pretrained import FP32, STEPS, N, T, saved

import ddpm_fast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # within diffusers' solver
]

CASES = {
    "ddpm": DDPMScheduler(num_train_timesteps=T),
    "ddim_not_to_one": DDIMScheduler(num_train_timesteps=T, set_alpha_to_one=False),
    "2m": DPMSolverMultistepScheduler(num_train_timesteps=T),
    "2m_leading": DPMSolverMultistepScheduler(num_train_timesteps=T, timestep_spacing="leading", steps_offset=1),
    "2m_trailing": DPMSolverMultistepScheduler(num_train_timesteps=T, timestep_spacing="trailing"),
    "2m_v": DPMSolverMultistepScheduler(num_train_timesteps=T, prediction_type="v_prediction"),
    "2m_thresholding": DPMSolverMultistepScheduler(num_train_timesteps=T, thresholding=True),
    "first_order": DPMSolverMultistepScheduler(num_train_timesteps=T, solver_order=1),
}


@pytest.mark.parametrize("name", CASES)
def test_gives_the_pipelines_images_from_its_generator(name, tmp_path):
    pipeline = saved(tmp_path, CASES[name])
    expected = pipeline(N, torch.Generator().manual_seed(3), STEPS, output_type="pt").images
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, steps=STEPS, fused=False)
    assert sampler.timesteps == pipeline.scheduler.timesteps.tolist()
    got = sampler.sample(N, generator=torch.Generator().manual_seed(3))
    assert float((got - expected).abs().max()) < FP32 / 2
    got_bytes = sampler.sample(N, generator=torch.Generator().manual_seed(3), output="uint8")
    assert int((got_bytes.int() - (expected * 255).round().int()).abs().max()) <= 1


def test_learned_range(tmp_path):
    pipeline = saved(tmp_path, DDPMScheduler(num_train_timesteps=T, variance_type="learned_range"), out_channels=4)
    expected = pipeline(N, torch.Generator().manual_seed(3), STEPS, output_type="pt").images
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, steps=STEPS, fused=False)
    got = sampler.sample(N, generator=torch.Generator().manual_seed(3))
    assert float((got - expected).abs().max()) < FP32 / 2


def test_the_solver_takes_twenty_steps_and_any_folder(tmp_path):
    """method="dpmsolver++" is what `DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)` is there."""
    saved(tmp_path, DDPMScheduler(num_train_timesteps=T))
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(N, torch.Generator().manual_seed(3), 20, output_type="pt").images
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, method="dpmsolver++", fused=False)
    assert len(sampler) == 20
    assert sampler.timesteps == pipeline.scheduler.timesteps.tolist()
    got = sampler.sample(N, generator=torch.Generator().manual_seed(3))
    assert float((got - expected).abs().max()) < FP32 / 2


def test_a_learned_variance_means_twice_the_channels_to_the_solver(tmp_path):
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=T, variance_type="learned_range")
    saved(tmp_path, scheduler, in_channels=3, out_channels=6)  # diffusers takes the first three channels, always
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(N, torch.Generator().manual_seed(3), STEPS, output_type="pt").images
    sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, steps=STEPS, fused=False)
    assert float((sampler.sample(N, generator=torch.Generator().manual_seed(3)) - expected).abs().max()) < FP32 / 2
