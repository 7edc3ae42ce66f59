"""The Triton kernels compiled for GPUs that are not there: what the machine code must and must not contain.

The interpreter computes with NumPy, so it cannot show a fused multiply-add, an approximate division, a spill or a
narrow access; these tests read the PTX and the SASS instead. The rules are in benchmarks/gpu_check/rules.py, and
test_gpu_check_static.py shows that each of them can fail.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

import inspected
from gpu_check import budgets, rules
from gpu_check.kernels import Kernel


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return inspected.kernels(tmp_path_factory.mktemp("ops") / "static.json", "ops")


def test_every_kernel_dtype_and_architecture_compiles(kernels):
    names = {k.function for k in kernels}
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
        seen = {(k.dtype, k.capability) for k in kernels if k.function == name and k.dtype != "mixed"}
        assert seen == {(d, c) for d in ("f32", "bf16", "f16") for c in (80, 90)}, name


def test_no_kernel_breaks_a_rule(kernels):
    """Exact arithmetic, no spills, 128-bit access of contiguous arrays, few registers and instructions."""
    assert not {str(k): rules.problems(k) for k in kernels if rules.problems(k)}


def test_contiguous_kernels_promise_wide_access(kernels):
    """The rule looks at what a case promises: every array of every op, but for a half-width m beside float32 state."""
    for k in kernels:
        if k.dtype != "mixed":
            assert k.exact
            assert k.wide_loads or k.name == "normal", str(k)
            assert k.wide_stores or "sums" in k.name or k.name == "noise_mse", str(k)
            assert not k.narrow or ("ddpm_step" in k.name and k.dtype != "f32"), str(k)


def test_history_in_place_is_inspected_in_both_formats(kernels):
    """x0_prev and x0_out may be one tensor, and nothing but a thread's own order makes it read before it writes."""
    assert {k.name: k.layouts for k in kernels if "history" in k.name} == {
        "ddpm_step_history": 1,
        "ddpm_step_history_channels_last": 1,
    }


def test_every_budget_is_used(kernels):
    assert set(budgets.OPS) <= {k.name for k in kernels if k.capability == 90}


def test_the_loss_is_summed_in_one_order_for_any_batch(kernels):
    blocks = {tuple(k.blocks) for k in kernels if k.function == "_noise_mse_kernel" and k.name != "noise_mse_backward"}
    assert len(blocks) == 1
