"""The Triton convolutions compiled for GPUs that are not there: tensor cores, asynchronous copies, no spills.

The interpreter shows that they compute the right thing (test_triton_conv.py); whether a compiler turned them into what
they are for, only the machine code does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

CHILD = Path(__file__).with_name("aot_conv_child.py")

# SASS instructions of a whole kernel, loop body once, and registers of a thread: seen, and a tenth more allowed.
SEEN = {
    ("down1.conv1", 90): (3079, 172),
    ("down2.conv1", 90): (2697, 255),
    ("down2.conv2", 90): (3254, 255),
    ("conv_up3.conv1", 90): (3062, 255),
    ("conv_up1.conv1", 90): (1893, 169),
    ("bottleneck.conv1", 90): (700, 64),
    ("up1", 90): (1019, 128),
    ("down4.conv1 of one image", 90): (608, 56),
    ("down4.conv1 of one image, the parts added", 90): (455, 38),
    ("down2.conv1 in float32", 90): (3202, 157),
    ("down2.conv1", 80): (1503, 162),
    ("down2.conv2", 80): (2156, 150),
    ("down_blocks.0.resnets.0.conv2", 90): (2292, 246),
    ("down_blocks.3.resnets.0.conv2 of one image", 90): (545, 48),
    ("down_blocks.3.resnets.0.conv2 of one image, the parts added", 90): (356, 56),
    ("up_blocks.2.upsamplers.0.conv", 90): (2310, 228),
    ("mid_block.attentions.0.to_qkv", 90): (740, 118),
    ("down_blocks.1.attentions.0.to_out", 90): (1492, 242),
    ("down_blocks.0.resnets.0.conv2 in float32", 90): (1519, 152),
    ("down_blocks.0.resnets.0.conv2", 80): (1835, 246),
    ("up_blocks.2.upsamplers.0.conv", 80): (1320, 142),
    ("output", 90): (846, 96),
    ("output with the step", 90): (1259, 96),
    ("conv_out", 90): (970, 89),
    ("norm", 90): (1321, 79),
    ("norm of groups of twelve, modulated", 90): (1407, 83),
    ("norm in float32", 90): (1735, 118),
    ("rms norm", 90): (538, 48),
    ("rms norm in programs of 8 warps", 90): (538, 48),
    ("rms norm and residual", 90): (539, 40),
    ("rms norm of many channels and residual", 90): (498, 48),
    ("rms norm in float32", 90): (1358, 93),
}
# Bytes of stack and spill instructions. The one exception: seven numbers, once, after the loop, beside sums that take
# half of all registers and embeddings of several images.
SPILLS = {("conv_up3.conv1", 90): 46}
SHARED = {90: 227 * 1024, 80: 163 * 1024}


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(CHILD)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def convolutions(kernels: list[dict]) -> list[dict]:
    return [k for k in kernels if k["kernel"] == "_conv_kernel"]


def label(kernel: dict) -> str:
    return f"{kernel['name']} ({kernel['chosen']}) sm_{kernel['capability']}"


def test_every_case_is_there(kernels):
    assert {(k["name"], k["capability"]) for k in kernels} == set(SEEN)


def test_products_are_made_by_tensor_cores(kernels):
    for k in convolutions(kernels):
        # Hopper's own instruction multiplies 64 rows at least; programs of fewer use the older one.
        expected = "wgmma" if k["capability"] == 90 and k["rows"] >= 64 else "mma"
        assert k[expected] > 0, label(k)
        assert k["wgmma" if expected == "mma" else "mma"] == 0, label(k)
        assert k["warps"] == 4, label(k)


def test_operands_come_asynchronously_and_128_bits_at_a_time(kernels):
    for k in convolutions(kernels):
        if k["kind"] == "first":  # gathers single pixels of an image; its weights are wide
            assert k["memory"].get("LDG.E.128", 0) > 0, label(k)
            continue
        assert k["async"] > 0, label(k)
        narrow = {word for word in k["memory"] if word.startswith("LDGSTS") and not word.endswith(".128")}
        assert not narrow, label(k)


def test_results_go_128_bits_at_a_time(kernels):
    for k in kernels:
        if k["kernel"] in ("_conv_kernel", "_reduce_kernel", "_norm_kernel", "_rms_norm_kernel"):
            stores = {word for word in k["memory"] if word.startswith("STG")}
            assert stores == {"STG.E.128"}, label(k)


def test_parts_are_read_128_bits_at_a_time(kernels):
    for k in kernels:
        if k["kernel"] == "_reduce_kernel":
            assert k["memory"]["LDG.E.128"] >= 2, label(k)
    for k in kernels:
        if k["kernel"] in ("_output_kernel", "_norm_kernel"):
            assert k["memory"]["LDG.E.128"] >= 8, label(k)
        if k["kernel"] == "_rms_norm_kernel":  # every number once, with those of the channels; none alone
            assert k["memory"]["LDG.E.128"] >= 4, label(k)
            assert not {word for word in k["memory"] if "16" in word.replace(".128", "")}, label(k)


def test_residuals_are_read_once_and_128_bits_at_a_time(kernels):
    """As many accesses as it takes to store the result: a thread of a program adds what it writes."""
    added = [k for k in convolutions(kernels) if k["residual"]]
    assert len(added) == 4
    for k in added:
        assert k["memory"]["LDG.E.128"] == k["memory"]["STG.E.128"], label(k)


def test_nothing_spills_and_everything_fits(kernels):
    assert not {label(k): k["spills"] for k in kernels if k["spills"] > SPILLS.get((k["name"], k["capability"]), 0)}
    assert not {label(k): k["shared"] for k in kernels if k["shared"] > SHARED[k["capability"]]}
    over = {
        label(k): k["registers"] for k in kernels if k["registers"] > 1.1 * SEEN[(k["name"], k["capability"])][1] + 8
    }
    assert not over


def test_instruction_budget(kernels):
    over = {
        label(k): k["instructions"] for k in kernels if k["instructions"] > 1.1 * SEEN[(k["name"], k["capability"])][0]
    }
    assert not over


def test_float32_is_exact_and_so_is_the_last_layer_with_its_step(kernels):
    """Approximate functions are for results in half precision; nothing anywhere is fused or in float64."""
    for k in kernels:
        exact = not k["half"] or k["kernel"].startswith("_output")
        approximate = k["ptx"][r"\.approx"] + k["ptx"][r"\.ftz"] + k["ptx"]["div\\.full"]
        assert not (exact and approximate), label(k)
        assert k["ptx"][r"\bfma\."] == k["ptx"][r"\.f64"] == 0, label(k)
    assert any(k["ptx"][r"\.approx"] for k in kernels)
