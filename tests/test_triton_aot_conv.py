"""The Triton convolutions compiled for GPUs that are not there: tensor cores, asynchronous copies, no spills.

The interpreter shows that they compute the right thing (test_triton_conv.py); whether a compiler turned them into what
they are for, only the machine code does. The rules are in benchmarks/gpu_check/rules.py, and test_gpu_check_static.py
shows that each of them can fail.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

import inspected
from gpu_check import budgets, rules
from gpu_check.kernels import Kernel


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    return inspected.kernels(tmp_path_factory.mktemp("layers") / "static.json", "layers")


def test_every_case_is_there(kernels):
    assert {(k.name, k.capability) for k in kernels} == set(budgets.LAYERS)


def test_no_kernel_breaks_a_rule(kernels):
    """Tensor cores, operands copied asynchronously 128 bits at a time, wide stores, no spills, what was seen before."""
    assert not {str(k): rules.problems(k) for k in kernels if rules.problems(k)}


def test_all_kinds_of_kernels_are_among_them(kernels):
    """So that no rule holds for want of anything to judge."""
    products = [k for k in kernels if k.function == "_conv_kernel"]
    assert {k.kind for k in products} >= {"conv", "first", "up", "doubled", "window"}
    assert any(k.hgmma for k in products)
    assert any(k.hmma for k in products)
    assert len([k for k in products if k.residual and not k.joined]) == 4
    assert any(k.residual and k.joined for k in products)
    assert any(k.pooled for k in products)
    assert any(k.function == "_reduce_kernel" for k in kernels)
    # Approximate functions are for results in half precision; float32 and the last layer with its step are exact.
    assert any(r"\.approx" in k.inexact for k in kernels)
    assert all(k.exact for k in kernels if k.dtype == "f32")
    assert {k.dtype for k in kernels if k.function.startswith("_output")} == {"f32"}


def test_results_go_128_bits_at_a_time(kernels):
    for k in kernels:
        if k.function in rules.LAYERS and not k.joined:
            assert k.widths("STG") == {128}, str(k)
