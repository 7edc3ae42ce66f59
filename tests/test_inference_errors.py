"""Bad input of fused plans, what is reported, and CPUs with lesser instruction sets."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inference_models import inputs, make_unet, measured_anew, one_thread

from ddpm_fast import __main__, inference
from ddpm_fast.inference import check, native

pytestmark = pytest.mark.usefixtures(one_thread.__name__, measured_anew.__name__)


class TestBadInput:
    def test_of_compile(self) -> None:
        net = make_unet()
        for dtype in (torch.float64, torch.int8):
            with pytest.raises(ValueError, match=f"dtype must be one of torch.float32.*got {dtype}"):
                inference.compile(net, dtype=dtype)
        with pytest.raises(ValueError, match=r"got torch\.float64"):
            inference.compile(copy.deepcopy(net).double())
        for timesteps in (torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool)):
            with pytest.raises(ValueError, match="timesteps must be a tensor"):
                inference.compile(net, timesteps=timesteps)
        with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
            inference.compile(make_unet().train())

    def test_training_mode_afterwards(self) -> None:
        net = make_unet()
        fused = inference.compile(net)
        x, t = inputs(1, (3, 8, 8))
        fused(x, t)
        net.down1.norm2.train()
        with pytest.raises(ValueError, match="training mode"):
            fused(x, t)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(2, 1, 8, 8)}, r"x must have shape \(N, 3, H, W\), got \(2, 1, 8, 8\)"),
            ({"x": torch.zeros(3, 8, 8)}, "x must have shape"),
            ({"x": torch.zeros(2, 3, 8, 10)}, r"multiples of 4.*got \(8, 10\).*next valid size \(8, 12\)"),
            ({"x": torch.zeros(2, 3, 0, 8)}, "multiples of 4"),
            ({"x": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, "x must be a floating tensor"),
            ({"x": torch.zeros(2, 3, 8, 8, device="meta")}, "x must be on cpu, where the model is, got meta"),
            ({"x": torch.zeros(2, 3, 8, 8, requires_grad=True)}, "requires a gradient"),
            ({"t": torch.zeros(3)}, r"t must have shape \(2,\), one per image, got \(3,\)"),
            ({"t": torch.zeros(2, dtype=torch.bool)}, r"t must be an integer or floating tensor, got torch\.bool"),
            ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must have shape \(2,\)"),
            ({"labels": torch.zeros(2)}, "labels must be int64 or int32"),
            ({"labels": torch.tensor([0, 4])}, r"labels must be in 0\.\.3 \(3 = no label\), got 0\.\.4"),
            ({"labels": torch.tensor([-1, 0])}, r"labels must be in 0\.\.3"),
        ],
    )
    def test_of_a_call(self, change, message) -> None:
        fused = inference.compile(make_unet(num_classes=3), deterministic=True)
        arguments = {"x": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2), "labels": None} | change
        with pytest.raises(ValueError, match=message):
            fused(**arguments)

    def test_labels_for_an_unconditional_model(self) -> None:
        with pytest.raises(ValueError, match="unconditional"):
            inference.compile(make_unet())(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


class TestReport:
    def test_names_the_instruction_sets(self, monkeypatch) -> None:
        if native.available():
            assert ", ".join(native.isas()) in __main__.inference_line()
            monkeypatch.setenv(native.ISA_VARIABLE, "plain")
            assert "plain (the first is the best); DDPM_FAST_CPU_ISA=plain leaves out" in __main__.inference_line()
            monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
            assert "must be one of" in __main__.inference_line()
        assert __main__.inference_line() in "\n".join(__main__.build_lines())

    def test_says_what_is_missing(self, monkeypatch) -> None:
        monkeypatch.setattr(native.extension, "_C", None)
        assert "by PyTorch's own operators" in __main__.inference_line()


MASKED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from inference_models import exact, inputs, make_unet, relative_error
from ddpm_fast import __main__, inference
from ddpm_fast.inference import module, native, trial
torch.set_num_threads(1)
trial.ROUNDS = 1
module.Module.beats = lambda *_: None
net = make_unet(width=16)
x, t = inputs(2, (3, 8, 8))
fused = inference.compile(net, dtype=torch.bfloat16)
error = relative_error(fused(x, t), exact(net, x, t))
print(",".join(native.isas()), fused.plan(2, 8, 8).dtype, error)
print(fused.describe(2, 8, 8), file=sys.stderr)
"""


@pytest.mark.skipif(not native.available(), reason="the extension has no inference layers here")
@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_lesser_instruction_sets_compute_the_same(isa: str) -> None:
    """In a process of its own with better ones masked, as on a CPU that does not have them: float32, and right."""
    environment = os.environ | {native.ISA_VARIABLE: isa}
    child = subprocess.run(
        [sys.executable, "-c", MASKED, str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    names, dtype, error = child.stdout.split()
    assert "avx512" not in names
    assert "plain" in names.split(",")
    assert dtype == "torch.float32"
    assert float(error) < 1e-5


def test_tf32_told_differently_to_convolutions_and_recurrent_layers(monkeypatch) -> None:
    """torch 2.9 and later then refuse to answer for both at once."""

    class Cudnn:
        @property
        def allow_tf32(self):
            raise RuntimeError("PyTorch is checking whether allow_tf32 is enabled for cuDNN")

        class conv:
            fp32_precision = "ieee"

    monkeypatch.setattr(torch.backends, "cudnn", Cudnn())
    assert not check.tf32_allowed()
    Cudnn.conv.fp32_precision = "tf32"
    assert check.tf32_allowed()
