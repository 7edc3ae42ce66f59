"""The Python of README and docs runs as printed, in a folder that has the checkpoint that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_models import pictures

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CHECKPOINT = "ddpm-cifar10-32"
# What makes a page's numbers those of a network for children.
SMALLER = {
    "lucidrains.md": {
        r"dim=64, dim_mults=\(1, 2, 4, 8\)": "dim=8, dim_mults=(1, 2)",
        r"image_size=128": "image_size=8",
        r"timesteps=1000, sampling_timesteps=250": "timesteps=50, sampling_timesteps=5",
        r"sampling_timesteps=250": "sampling_timesteps=5",
        r"train_num_steps=10000": "train_num_steps=2, save_and_sample_every=1, num_samples=4",
        r"t=500": "t=25",
    },
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which diffusers has saved a pipeline by that name, with a network and a schedule for children."""
    diffusers = pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")
    folder = tmp_path_factory.mktemp("docs")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = small_unet(diffusers)
    pictures(folder / "images", 100)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, variance_type="fixed_large")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder / CHECKPOINT)
    return folder


def small_unet(diffusers: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def test_there_are_examples():
    assert len(blocks(README)) >= 2


@pytest.mark.parametrize("code", blocks(README), ids=lambda code: code.splitlines()[-1][:40])
def test_example_runs(code, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    exec(compile(code, str(README), "exec"), {})


@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page)], ids=lambda page: page.name)
def test_page_runs_from_top_to_bottom(page, checkpoint, monkeypatch):
    import diffusers

    import ddpm_fast

    monkeypatch.chdir(checkpoint)
    known: dict[str, Any] = {"unet": small_unet(diffusers), "schedule": ddpm_fast.Schedule.linear(100)}
    smaller = SMALLER.get(page.name, {})
    for pattern in smaller:
        assert any(re.search(pattern, code) for code in blocks(page)), pattern
    for code in blocks(page):
        for pattern, replacement in smaller.items():
            code = re.sub(pattern, replacement, code)
        exec(compile(code, str(page), "exec"), known)


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=lambda page: page.name)
def test_pictures_and_links_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
