"""The Triton kernels compiled for GPUs that are not there: what the machine code must and must not contain.

The interpreter computes with NumPy, so it cannot show a fused multiply-add, an approximate division, a spill or a
narrow access; these tests read the PTX and the SASS instead. They compile in a child process (aot_child.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

CHILD = Path(__file__).with_name("aot_child.py")

# SASS instructions per element, for sm_90: the whole kernel divided by the elements of a thread, so the set-up of a
# thread and the slow paths of sqrt and division that are seldom taken are included. Noise costs 56 of them (Philox
# 10, Box-Muller 25 in multiplications and additions alone), the update of ddpm_step 15 in arithmetic, SiLU about 50
# with its division. float32 was at the first number of each comment, bfloat16 at the second, whose conversions and
# exchanges between threads the budget allows for.
BUDGET = {
    "normal": 62,  # 56, 59
    "q_sample": 70,  # 63, 67
    "q_sample_backward": 14,  # 10, 12
    "ddpm_step": 86,  # 80, 81
    "ddpm_step_no_noise": 26,  # 23, 24
    "noise_mse": 80,  # 72, 74
    "noise_mse_backward": 79,  # 69, 73
    "add_bias_temb_none": 15,  # 12, 13
    "add_bias_temb_silu": 82,  # 77, 78
    "add_bias_temb_backward_none": 26,  # 22, 22
    "add_bias_temb_backward_silu": 130,  # 120, 122: two divisions
    "batch_norm_silu_sums": 48,  # 43, 43
    "batch_norm_silu": 97,  # 85, 88
    "batch_norm_silu_backward_sums": 117,  # 106, 106
    "batch_norm_silu_backward": 105,  # 95, 94
    "group_norm_silu": 185,  # 167, 176: three passes, unrolled
    "group_norm_silu_backward": 215,  # 201, 204: two passes
    "rms_norm_silu": 109,  # 87, 99
    "rms_norm_silu_backward": 189,  # 142, 172
    "random_bits": 22,  # 19
}


@pytest.fixture(scope="module")
def compiled() -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(CHILD)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kernels(compiled: dict) -> list[dict]:
    return compiled["kernels"]


def label(kernel: dict) -> str:
    return f"{kernel['name']} {kernel['dtype']} sm_{kernel['capability']}"


def test_every_kernel_dtype_and_architecture_compiles(kernels):
    names = {k["kernel"] for k in kernels}
    assert names == {
        "_add_bias_temb_backward_kernel",
        "_add_bias_temb_kernel",
        "_batch_norm_silu_backward_kernel",
        "_batch_norm_silu_backward_sums_kernel",
        "_batch_norm_silu_kernel",
        "_batch_norm_silu_sums_kernel",
        "_ddpm_step_kernel",
        "_group_norm_silu_backward_kernel",
        "_group_norm_silu_kernel",
        "_noise_mse_kernel",
        "_normal_kernel",
        "_q_sample_backward_kernel",
        "_q_sample_kernel",
        "_rms_norm_silu_backward_kernel",
        "_rms_norm_silu_kernel",
    }
    for name in names:
        seen = {(k["dtype"], k["capability"]) for k in kernels if k["kernel"] == name and k["dtype"] != "mixed"}
        assert seen == {(d, c) for d in ("f32", "bf16", "f16") for c in (80, 90)}, name


def test_arithmetic_is_exact(kernels):
    """No float64, no fused multiply-add, no approximate division or function, no flushing of subnormals."""
    wrong = {label(k): {word: n for word, n in k["ptx"].items() if n} for k in kernels}
    assert not {name: words for name, words in wrong.items() if words}


def test_nothing_spills(kernels):
    spilled = [label(k) for k in kernels if k["stack"] or k["local"]]
    assert not spilled
    # Above 128 registers fewer than 16 warps fit on a processor, too few to hide the memory's latency.
    # Each array of a channels_last step takes the addresses of 16 places; a history is the sampler's, which is not.
    bounded = [k for k in kernels if k["name"] != "ddpm_step_history_channels_last"]
    assert not {label(k): k["registers"] for k in bounded if k["registers"] > 128}


def test_contiguous_access_is_128_bits_wide(kernels):
    for k in kernels:
        if k["dtype"] == "mixed":
            continue
        for kind, sizes in (("LDG", k["wide_loads"]), ("STG", k["wide_stores"])):
            expected = sum(size * k["elements"] // 16 for size in sizes)
            # Small arrays may add wide loads, such as two timesteps at once.
            assert k["memory"].get(f"{kind}.E.128", 0) >= expected, (label(k), k["memory"])


def test_history_in_place_is_read_and_written_by_the_same_threads(kernels):
    """x0_prev and x0_out may be one tensor, and nothing but a thread's own order makes it read before it writes."""
    layouts = {k["name"]: k["layouts"] for k in kernels if "history" in k["name"]}
    assert {name: len(found) for name, found in layouts.items()} == {
        "ddpm_step_history": 1,
        "ddpm_step_history_channels_last": 1,
    }


def test_instruction_budget(kernels):
    over = {
        label(k): k["instructions"]
        for k in kernels
        if k["capability"] == 90 and k["name"] in BUDGET and k["instructions"] > BUDGET[k["name"]]
    }
    assert not over
    assert set(BUDGET) <= {k["name"] for k in kernels}


def test_the_loss_is_summed_in_one_order_for_any_batch(kernels):
    blocks = {
        tuple(k["blocks"]) for k in kernels if k["kernel"] == "_noise_mse_kernel" and k["name"] != "noise_mse_backward"
    }
    assert len(blocks) == 1


def test_the_check_for_fused_arithmetic_can_fail(compiled):
    """One kernel with Triton's default, fusion on: the test above has to see it."""
    assert compiled["fused"][r"\bfma\."] > 0
