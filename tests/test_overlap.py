"""Kernels of a fused plan that start while the one before ends (DDPM_FAST_OVERLAP=1): nothing is touched too early.

Without a GPU the compiled code is read, in a child process: kernels decorated for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from inference_models import make_unet

from ddpm_fast import Sampler, Schedule
from ddpm_fast.backends.triton import launch

CHILD = """
import json, torch
from ddpm_fast.backends.triton import aot
from ddpm_fast.backends.triton.conv_call import Conv, Tile, pack
from ddpm_fast.backends.triton.conv_output import Output
from ddpm_fast.backends.triton.norm import Norm
from ddpm_fast.backends.triton.rms_norm import RMSNorm

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

half = {"dtype": torch.bfloat16}
source, weight, bias = meta(1, 8, 8, 64, **half), meta(64, 64, 3, 3), meta(64)
integers = meta(1, dtype=torch.int64)
with aot.recorded() as found:
    for tile in (Tile(16, 32, 64, splits=4), Tile(16, 32, 64, splits=4, joined=True)):
        Conv("conv", source, pack("conv", weight, torch.bfloat16), bias, meta(1, 8, 8, 64, **half), tile)(None)
    Norm(source, bias, bias, meta(1, 8, 8, 64, **half), 8, 1e-5, 64, 4)()
    RMSNorm(source, bias, meta(1, 8, 8, 64, **half), 1e-5, 8, 4)()
    last = Output(source, meta(3, 64, 1, 1).to(memory_format=torch.channels_last), meta(3))
    last(meta(1, 3, 8, 8))
    table = (meta(9, 8), meta(9, dtype=torch.int32), integers)
    last.step(meta(1, 3, 8, 8), *table, meta(2, dtype=torch.int64), meta(1, dtype=torch.int32))
made = [(launch.kernel.fn.__name__, launch.compile(90)) for launch in found]
print(json.dumps([[name, kernel.metadata.launch_pdl, kernel.asm["ptx"]] for name, kernel in made]))
"""
ACCESS = re.compile(
    r"\b(?:ld|st)\.(?:global|volatile|relaxed|acquire)|\bcp\.async\.c[ag]\b|\b(?:atom|red)\.|\bprefetch\b"
)


def compiled(overlap: str) -> list[tuple[str, bool, str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"DDPM_FAST_OVERLAP": overlap}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [(name, pdl, ptx[ptx.index(".entry") :]) for name, pdl, ptx in json.loads(done.stdout.splitlines()[-1])]


def test_every_kernel_waits_before_it_touches_memory() -> None:
    found = compiled("1")
    assert {name for name, _, _ in found} == {
        "_conv_kernel",
        "_reduce_kernel",
        "_norm_kernel",
        "_rms_norm_kernel",
        "_output_kernel",
        "_output_step_kernel",
    }
    for name, overlapping, ptx in found:
        assert overlapping, name
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1, name
        first = ACCESS.search(ptx)
        assert first is not None, name
        assert ptx.index("griddepcontrol.wait") < first.start(), name
        # Nor does a branch lead around the wait.
        assert not re.search(r"\bbra\b", ptx[: ptx.index("griddepcontrol.wait")]), name


def test_unless_asked_for_nothing_overlaps() -> None:
    for name, overlapping, ptx in compiled("0"):
        assert not overlapping, name
        assert "griddepcontrol" not in ptx, name


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 3])
def test_images_have_the_same_bits(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for overlap in (False, True):
        monkeypatch.setattr(launch, "OVERLAP", overlap)
        sampler = Sampler(
            make_unet().cuda(),
            Schedule.linear(1000),
            steps=200,
            fused=True,
            dtype=torch.bfloat16,
            deterministic=True,
            chunk=n,
        )
        images += [sampler.sample(n, (3, 8, 8), seed=1) for _ in range(5)]
    assert all(torch.equal(image, images[0]) for image in images)
