"""What nvcc makes of csrc/cuda, judged without a GPU: exact arithmetic, wide accesses, no spills, few instructions."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_sass import CUDA, FLAGS, Kernel, find_cuobjdump, find_nvcc, output_of, read_kernels

ARCHITECTURES = ["sm_80", "sm_90"]
OPS = [
    "normal",
    "q_sample",
    "ddpm_step",
    "noise_mse",
    "add_bias_temb",
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "group_norm_silu",
    "group_norm_silu_backward",
    "rms_norm_silu",
    "rms_norm_silu_backward",
]

pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc: install the CUDA toolkit and put it on PATH"),
    pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump: from the CUDA toolkit or the triton package"),
]


def built_extension() -> Path | None:
    """The installed extension, if it has the kernels for both architectures and no source has changed since."""
    from ddpm_fast.backends import native

    if native._C is None or native._C.build_info()["cuda_architectures"] != "80-real 90":
        return None
    extension = Path(native._C.__file__)
    sources = [*CUDA.parent.rglob("*.*"), CUDA.parents[1] / "CMakeLists.txt"]
    return extension if extension.stat().st_mtime > max(path.stat().st_mtime for path in sources) else None


def compile_op(op: str, folder: Path) -> dict[str, Path]:
    """The PTX of an op, no warnings allowed, and its machine code with approximate square roots and divisions."""
    nvcc = find_nvcc()
    assert nvcc is not None
    ptx, approximate = folder / f"{op}.ptx", folder / f"{op}.approximate.ptx"
    source = str(CUDA / f"{op}_cuda.cu")
    output_of(nvcc, *FLAGS, "-Werror", "all-warnings", "-arch=compute_90", "-ptx", source, "-o", str(ptx))
    approximate.write_text(re.sub(r"\b(sqrt|div|rcp)\.rn\.f32", r"\1.approx.f32", ptx.read_text()))
    files = {"ptx": ptx, "approximate": approximate.with_suffix(".cubin")}
    output_of(nvcc, "-arch=sm_90", "-cubin", str(approximate), "-o", str(files["approximate"]))
    if built_extension() is None:
        for arch in ARCHITECTURES:
            files[arch] = folder / f"{op}.{arch}.cubin"
            start = [*FLAGS, source] if arch != "sm_90" else [str(ptx)]
            output_of(nvcc, *start, f"-arch={arch}", "-cubin", "-o", str(files[arch]))
    return files


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Op -> "ptx" or "approximate", and "sm_80" and "sm_90" where the extension does not have them -> file."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(OPS, pool.map(lambda op: compile_op(op, folder), OPS), strict=True))


@pytest.fixture(scope="module")
def kernels(built: dict[str, dict[str, Path]]) -> dict[str, dict[str, Kernel]]:
    """Architecture -> kernel name -> kernel: those of the extension, which need not be compiled a second time."""

    def those_of(arch: str) -> dict[str, Kernel]:
        extension = built_extension()
        if extension is not None and arch in ARCHITECTURES:
            return read_kernels(extension, arch)
        return {name: kernel for op in OPS for name, kernel in read_kernels(built[op][arch]).items()}

    return {arch: those_of(arch) for arch in [*ARCHITECTURES, "approximate"]}


@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_rounded_by_itself(op: str, built: dict[str, dict[str, Path]]) -> None:
    """In PTX each + - x / sqrt names its rounding, which forbids ptxas to contract it, and nothing is approximate."""
    ptx = built[op]["ptx"].read_text()
    arithmetic = set(
        re.findall(r"\b((?:add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)\.[\w.]*f(?:16|32|64)\w*)", ptx)
    )
    assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "rcp.rn.f32", "sqrt.rn.f32"}
    assert "mul.rn.f32" in arithmetic
    assert ".ftz" not in ptx
    assert ".f64" not in ptx


def test_fused_multiply_add_occurs_in_square_root_and_division_only(kernels: dict[str, dict[str, Kernel]]) -> None:
    """Correctly rounded sqrt and division are made with FFMA; with those two approximated not a single one is left."""
    assert {name: k.count(r"FFMA") for name, k in kernels["approximate"].items() if k.count(r"FFMA")} == {}
    for arch in ARCHITECTURES:
        assert kernels[arch]["normal_kernel<float, Run>"].count(r"FFMA") > 0, "the square root is no longer exact"
        assert kernels[arch]["q_sample_backward_kernel<float, Run>"].count(r"FFMA") == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_is_kept_in_local_memory(arch: str, kernels: dict[str, dict[str, Kernel]]) -> None:
    assert len(kernels[arch]) > 50
    for kernel in kernels[arch].values():
        assert kernel.count(r"(LDL|STL)\b") == 0, kernel.name
        assert kernel.resources["STACK"] == 0, kernel.name
        assert kernel.resources["LOCAL"] == 0, kernel.name
        assert kernel.resources["REG"] <= 64, kernel.name


FULL_OCCUPANCY = [
    *(f"normal_kernel<{t}, Run>" for t in ("float", "__half", "__nv_bfloat16")),
    *(f"q_sample_kernel<{x0}, {out}, Run>" for x0 in ("float", "unsigned char") for out in ("float", "__nv_bfloat16")),
    *(f"ddpm_step_kernel<true, {t}, Run>" for t in ("float", "__half", "__nv_bfloat16")),
    *(f"add_bias_temb_kernel<float, 4, {across}>" for across in ("false", "true")),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FULL_OCCUPANCY)
def test_registers_allow_all_threads_of_a_multiprocessor(
    arch: str, name: str, kernels: dict[str, dict[str, Kernel]]
) -> None:
    assert kernels[arch][name].resources["REG"] <= 65536 // 2048


# kernel: (wide loads at least, wide stores, width)
WIDTHS = {
    "normal_kernel<float, Run>": (0, 1, 128),
    "normal_kernel<__nv_bfloat16, Run>": (0, 1, 64),
    "q_sample_kernel<float, float, Run>": (2, 2, 128),  # x0 and noise; x_t and target
    "q_sample_kernel<__half, __half, Run>": (1, 2, 64),
    "add_bias_temb_kernel<float, 4, false>": (1, 1, 128),
    "add_bias_temb_kernel<float, 4, true>": (1, 1, 128),
    "add_bias_temb_kernel<__nv_bfloat16, 8, false>": (1, 1, 128),
    "add_bias_temb_kernel<__nv_bfloat16, 8, true>": (1, 1, 128),
    "noise_mse_backward_kernel<float, Run>": (1, 1, 128),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", WIDTHS)
def test_contiguous_kernels_move_packs(arch: str, name: str, kernels: dict[str, dict[str, Kernel]]) -> None:
    loads, stores, width = WIDTHS[name]
    kernel = kernels[arch][name]
    assert kernel.count(rf"LDG\.E\.{width}\b") >= loads
    assert kernel.count(rf"STG\.E\.{width}\b") == stores
    assert kernel.count(r"STG\b") == stores, "no store of single elements beside them"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("plain", ["true", "false"])
def test_ddpm_step_moves_packs(arch: str, plain: str, kernels: dict[str, dict[str, Kernel]]) -> None:
    kernel = kernels[arch][f"ddpm_step_kernel<{plain}, float, Run>"]
    assert kernel.count(r"LDG\.E\.128\b") >= 4  # x, m and a table row of 32 bytes
    assert kernel.count(r"STG\.E\.128\b") >= 2  # x and a float32 copy; the other stores are copies in other formats


# kernel: wide loads at least and wide stores; beside them are sums and coefficients of channels
NORM_WIDTHS = {
    # Read once for a value near the mean and once for the sums; then once for y.
    "batch_norm_silu_sums_kernel<32, float, 4>": (2, 0, 128),
    "batch_norm_silu_sums_across_kernel<__nv_bfloat16, 8>": (2, 0, 128),
    **{f"batch_norm_silu{across}_kernel<__nv_bfloat16, 8>": (1, 1, 128) for across in ("", "_across")},
    "batch_norm_silu_backward_sums_kernel<4, __half, 8>": (2, 0, 128),
    "batch_norm_silu_backward_kernel<__nv_bfloat16, 8>": (2, 1, 128),
    "batch_norm_silu_backward_sums_across_kernel<float, 4>": (2, 0, 128),
    "batch_norm_silu_backward_across_kernel<__nv_bfloat16, 4>": (2, 1, 64),
    **{f"group_norm_silu_kernel<{t}>": (3, 1, 128) for t in ("float, 4", "__nv_bfloat16, 8", "__half, 8")},
    **{f"group_norm_silu_backward_kernel<{k}, float, 4>": (4, 1, 128) for k in (32, 256)},
    "group_norm_silu_backward_kernel<32, __nv_bfloat16, 8>": (4, 1, 128),
    "group_norm_silu_across_kernel<float, 4>": (4, 1, 128),
    "group_norm_silu_across_kernel<__nv_bfloat16, 4>": (4, 1, 64),
    "group_norm_silu_backward_across_kernel<float, 2>": (4, 1, 64),
    **{f"rms_norm_silu_kernel<{t}>": (6, 1, 128) for t in ("float, 4", "__nv_bfloat16, 8", "__half, 8")},
    **{f"rms_norm_silu_across_kernel<{k}, __nv_bfloat16, 8>": (3, 1, 128) for k in (8, 32)},
    "rms_norm_silu_across_kernel<32, float, 4>": (3, 1, 128),
    "rms_norm_silu_backward_kernel<float, 4>": (8, 1, 128),
    "rms_norm_silu_backward_kernel<__nv_bfloat16, 4>": (8, 1, 64),
    **{f"rms_norm_silu_backward_across_kernel<{k}, float, 4>": (5, 1, 128) for k in (8, 32)},
    "rms_norm_silu_backward_across_kernel<32, __nv_bfloat16, 4>": (5, 1, 64),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", NORM_WIDTHS)
def test_norms_move_packs(arch: str, name: str, kernels: dict[str, dict[str, Kernel]]) -> None:
    loads, stores, width = NORM_WIDTHS[name]
    kernel = kernels[arch][name]
    assert kernel.count(rf"LDG\.E\.{width}\b") >= loads
    assert kernel.count(rf"STG\.E\.{width}\b") >= stores


SQUARE_ROOT = r"MUFU\.RSQ R\d+, R\d+"  # the two of Box-Muller: a path through them draws the noise

# kernel: instructions per element on the shortest way through the named instructions
BUDGETS = {
    "normal_kernel<float, Run>": (66, SQUARE_ROOT),
    "normal_kernel<__nv_bfloat16, Run>": (66, SQUARE_ROOT),
    "q_sample_kernel<float, float, Run>": (77, SQUARE_ROOT),
    "q_sample_kernel<unsigned char, __nv_bfloat16, Run>": (92, SQUARE_ROOT),
    "ddpm_step_kernel<true, float, Run>": (92, rf"({SQUARE_ROOT}|ATOMG)"),  # bad_row and its write included
    "ddpm_step_kernel<true, __nv_bfloat16, Run>": (93, rf"({SQUARE_ROOT}|ATOMG)"),
    "ddpm_step_kernel<false, float, Run>": (106, SQUARE_ROOT),
    "add_bias_temb_kernel<float, 4, false>": (15, r"STG\.E\.128"),  # without the activation
    "add_bias_temb_kernel<__nv_bfloat16, 8, true>": (11, r"STG\.E\.128"),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", BUDGETS)
def test_the_main_path_stays_within_its_budget(arch: str, name: str, kernels: dict[str, dict[str, Kernel]]) -> None:
    budget, required = BUDGETS[name]
    elements = 8 if ", 8, " in name else 4
    assert kernels[arch][name].shortest_path(required) / elements <= budget


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
    kernel = Kernel("example", code)
    assert kernel.shortest_path("S2R") == 2
    assert kernel.shortest_path(SQUARE_ROOT) == 6
    assert kernel.count("MUFU") == 1
    with pytest.raises(AssertionError, match="no path"):
        kernel.shortest_path("MUFU|NOT")


@pytest.fixture(scope="module")
def extension() -> Path:
    """The installed extension, if its CUDA half was built."""
    from ddpm_fast import _C

    if not _C.build_info()["cuda"]:
        pytest.skip("the extension was installed without its CUDA half: with nvcc on PATH, run pip install -e . again")
    return Path(_C.__file__)


def test_the_installed_extension_has_both_architectures_and_no_other_library(extension: Path) -> None:
    tool = find_cuobjdump()
    assert tool is not None
    listed = output_of(tool, "--list-elf", str(extension))
    assert all(arch in listed for arch in ARCHITECTURES), listed
    needed = re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", str(extension)))
    assert not [name for name in needed if re.search("cuda|cudart|torch|c10", name)], needed


def test_the_installed_extension_was_built_without_contraction(extension: Path) -> None:
    """The flags in CMakeLists.txt: a kernel that neither divides nor takes a root has no fused multiply-add."""
    kernel = read_kernels(extension, "sm_90")["q_sample_backward_kernel<float, Run>"]
    assert kernel.count(r"FMUL\b") > 0
    assert kernel.count(r"FFMA\b") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the error for its absence cannot be seen")
def test_without_a_gpu_a_call_says_why(extension: Path) -> None:
    from ddpm_fast import _C

    with pytest.raises(RuntimeError, match=r"CUDA|driver|device"):
        _C.normal(0, 0, 1, 1, 4, False, 0, 0, 0, 0)
    assert _C.build_info()["cuda_error"]
    assert _C.build_info()["cuda_runtime"]
