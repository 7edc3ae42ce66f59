"""The article's snippet runs as printed, but for the import, the data folder, and `.cuda()` where there is no GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from trainer_models import pictures

import ddpm_fast.interop.lucidrains as interop

pytest.importorskip("PIL.Image", reason="pip install 'ddpm_fast[images]'")

SNIPPET = """
from denoising_diffusion_pytorch import Unet, GaussianDiffusion, Trainer

model = Unet(
dim = 64,
dim_mults = (1, 2, 4, 8)
).cuda()

diffusion = GaussianDiffusion(
model,
image_size = 128,
timesteps = 1000,
sampling_timesteps = 250,
loss_type = 'l1'
).cuda()

trainer = Trainer(
diffusion,
'/content/train',
train_batch_size = 8,
train_lr = 8e-5,
train_num_steps = 10000, # total training steps
gradient_accumulate_every = 2,
ema_decay = 0.995,
amp = False # turn on for mixed precision, I've found it better to keep it off
)

trainer.train()
"""
IMPORT = {r"from denoising_diffusion_pytorch import": "from ddpm_fast.interop.lucidrains import"}
FEWER = {
    r"\bdim = 64": "dim = 8",
    r"image_size = 128": "image_size = 16",
    r"timesteps = 1000": "timesteps = 20",
    r"sampling_timesteps = 250": "sampling_timesteps = 5",
    r"train_num_steps = 10000": "train_num_steps = 4",
    r"ema_decay = 0.995,": "ema_decay = 0.995, save_and_sample_every = 2, num_samples = 4,",
}


def run(folder: str, substitutions: dict[str, str], *, training: bool = True) -> dict[str, Any]:
    """The names that the snippet leaves behind."""
    code = SNIPPET
    changes = {**IMPORT, "/content/train": folder, **substitutions}
    for pattern, replacement in changes.items():
        code, count = re.subn(pattern, lambda match, text=replacement: text, code)
        assert count == 1, pattern
    if not torch.cuda.is_available():
        code = code.replace(".cuda()", "")
    if not training:
        code, count = re.subn(r"trainer\.train\(\)", "", code)
        assert count == 1
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    return names


@pytest.mark.usefixtures("one_thread")
def test_it_trains_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = pictures(tmp_path / "train", 120, size=20)
    torch.manual_seed(0)
    names = run(str(folder), FEWER)
    trainer = names["trainer"]
    assert trainer.step == 4
    assert "training complete" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "model-1.pt", "model-2.pt", "sample-1.png", "sample-2.png",
    ]  # fmt: skip
    images = names["diffusion"].sample(batch_size=3)
    assert images.shape == (3, 3, 16, 16)
    assert images.isfinite().all()
    again = interop.load_diffusion("results/model-2.pt", image_size=16, sampling_timesteps=5)
    average = trainer.ema.ema_model.sample(batch_size=2, seed=1)
    torch.testing.assert_close(again.sample(batch_size=2, seed=1), average, rtol=1e-4, atol=1e-4)


def test_everything_is_made_as_printed(tmp_path, monkeypatch):
    """All of it but the training: dim 64, 128 pixels, T = 1000, 250 steps, l1, 10,000 steps."""
    monkeypatch.chdir(tmp_path)
    names = run(str(pictures(tmp_path / "train", 100, size=130)), {}, training=False)
    diffusion, trainer = names["diffusion"], names["trainer"]
    assert sum(parameter.numel() for parameter in names["model"].parameters()) == 35_711_491
    assert (diffusion.image_size, diffusion.loss_type) == ((128, 128), "l1")
    assert (diffusion.num_timesteps, diffusion.sampling_timesteps, diffusion.is_ddim_sampling) == (1000, 250, True)
    assert (trainer.batch_size, trainer.gradient_accumulate_every, trainer.train_num_steps) == (8, 2, 10000)
    assert trainer.opt.param_groups[0]["lr"] == 8e-5
    assert trainer.ema.beta == 0.995
    assert trainer.calculate_fid is False
    batch = next(trainer.dl)
    assert batch.shape == (8, 3, 128, 128)
    assert batch.dtype == torch.float32
