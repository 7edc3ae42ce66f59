"""What nvcc makes of csrc/cuda, judged without a GPU: exact arithmetic, wide accesses, no spills, few instructions.

The rules are in benchmarks/gpu_check/rules.py, and test_gpu_check_static.py shows that each of them can fail.
"""

from __future__ import annotations

import re
from pathlib import Path

import inspected
import pytest
import torch
from gpu_check import budgets, cuda_kernels, rules
from gpu_check.kernels import Kernel
from gpu_check.sass import Code

pytestmark = [
    pytest.mark.skipif(
        cuda_kernels.find_nvcc() is None, reason="needs nvcc: install the CUDA toolkit and put it on PATH"
    ),
    pytest.mark.skipif(
        cuda_kernels.find_cuobjdump() is None, reason="needs cuobjdump: from the CUDA toolkit or the triton package"
    ),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Kernel]:
    """By name and capability."""
    found = inspected.kernels(tmp_path_factory.mktemp("cuda") / "static.json", "cuda")
    return {(kernel.name, kernel.capability): kernel for kernel in found}


def test_no_kernel_breaks_a_rule(kernels: dict[tuple[str, int], Kernel]) -> None:
    """Every operation rounded by itself, nothing in local memory, few registers, wide access, the main path short."""
    assert not {str(k): rules.problems(k) for k in kernels.values() if rules.problems(k)}


def test_fused_multiply_add_occurs_in_square_root_and_division_only(kernels: dict[tuple[str, int], Kernel]) -> None:
    """Correctly rounded sqrt and division are made with FFMA; with those two approximated not a single one is left."""
    assert {str(k): k.contracted for k in kernels.values() if k.contracted != 0} == {}
    for capability in cuda_kernels.ARCHITECTURES:
        assert kernels["normal_kernel<float, Run>", capability].fused > 0, "the square root is no longer exact"
        assert kernels["q_sample_backward_kernel<float, Run>", capability].fused == 0


def test_arithmetic_that_is_not_rounded_by_itself_is_found() -> None:
    rounded = "add.rn.f32 %f1, %f2, %f3;\nsqrt.rn.f32 %f4, %f5;\nadd.s32 %r1, %r2, 1;\n"
    assert cuda_kernels.inexact(rounded) == {}
    for line in ("fma.rn.f32 %f1, %f2, %f3, %f4;", "add.f32 %f1, %f2, %f3;", "ex2.approx.f32 %f1, %f2;"):
        assert cuda_kernels.inexact(rounded + line) == {line.split()[0]: 1}
    assert ".f64" in cuda_kernels.inexact("cvt.f64.f32 %fd1, %f1;")
    assert ".ftz" in cuda_kernels.inexact("cvt.ftz.f32.f16 %f1, %h1;")


def test_every_promise_is_of_a_kernel_that_exists(kernels: dict[tuple[str, int], Kernel]) -> None:
    named = {*budgets.CUDA_FULL, *budgets.CUDA_PACKS, *budgets.CUDA_AMONG, *budgets.CUDA_PATHS}
    for capability in cuda_kernels.ARCHITECTURES:
        names = {name for name, of in kernels if of == capability}
        assert named <= names
        assert len(names) > 50


def test_the_path_finder_counts_what_it_should() -> None:
    code = {
        0: "S2R R0",
        16: "@P0 EXIT",
        32: "@P1 BRA 0x50",
        48: "MUFU.RSQ R1, R2",
        64: "BRA 0x60",
        80: "NOT.REACHED",
        96: "EXIT",
    }
    kernel = Code("example", code)
    assert kernel.shortest_path("S2R") == 2
    assert kernel.shortest_path(budgets.SQUARE_ROOT) == 6
    assert kernel.count("MUFU") == 1
    with pytest.raises(ValueError, match="no path"):
        kernel.shortest_path("MUFU|NOT")


def test_what_is_in_a_loop_is_known() -> None:
    code = {
        0: "STL [R1], R2",
        16: "LDL R3, [R1]",
        32: "@P0 BRA 0x60",
        48: "IADD3 R2, R2, 0x1, RZ",
        64: "BRA.DIV UR4, 0x70",
        80: "@!P1 BRA 0x10",
        96: "LDL R2, [R1]",
        112: "EXIT",
        128: "BRA 0x80",
    }
    kernel = Code("example", code)
    assert kernel.count("(LDL|STL)") == 3
    assert kernel.repeated("(LDL|STL)") == 1
    assert kernel.repeated("IADD3") == 1
    assert kernel.repeated("EXIT") == 0


@pytest.fixture(scope="module")
def extension() -> Path:
    """The installed extension, if its CUDA half was built."""
    from ddpm_fast import _C

    if not _C.build_info()["cuda"]:
        pytest.skip("the extension was installed without its CUDA half: with nvcc on PATH, run pip install -e . again")
    return Path(_C.__file__)


def test_the_installed_extension_has_both_architectures_and_no_other_library(extension: Path) -> None:
    tool = cuda_kernels.find_cuobjdump()
    assert tool is not None
    listed = cuda_kernels.output_of(tool, "--list-elf", str(extension))
    assert all(arch in listed for arch in cuda_kernels.ARCHITECTURES.values()), listed
    needed = re.findall(r"NEEDED.*\[(.*)\]", cuda_kernels.output_of("readelf", "-d", str(extension)))
    assert not [name for name in needed if re.search("cuda|cudart|torch|c10", name)], needed


def test_the_installed_extension_was_built_without_contraction(
    extension: Path, kernels: dict[tuple[str, int], Kernel]
) -> None:
    """The flags in CMakeLists.txt: a kernel that neither divides nor takes a root has no fused multiply-add."""
    name = "q_sample_backward_kernel<float, Run>"
    if cuda_kernels.built_extension() == extension:
        assert kernels[name, 90].fused == 0  # those are its kernels
    else:
        assert cuda_kernels.read_kernels(extension, "sm_90")[name].count("FFMA") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the error for its absence cannot be seen")
def test_without_a_gpu_a_call_says_why(extension: Path) -> None:
    from ddpm_fast import _C

    with pytest.raises(RuntimeError, match=r"CUDA|driver|device"):
        _C.normal(0, 0, 1, 1, 4, False, 0, 0, 0, 0)
    assert _C.build_info()["cuda_error"]
    assert _C.build_info()["cuda_runtime"]
