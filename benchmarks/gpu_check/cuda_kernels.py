"""What nvcc made of csrc/cuda, read without a GPU: machine code and resources of every kernel, and its arithmetic."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from . import budgets
from .kernels import RESERVED, Kernel
from .sass import Code, lines

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Werror", "all-warnings")
ARCHITECTURES = {90: "sm_90", 80: "sm_80"}
THREADS = 256
"""Of every block: kThreads of launch.cuh."""

ROUNDED = frozenset(f"{word}.rn.f32" for word in ("add", "sub", "mul", "div", "rcp", "sqrt"))
"""In PTX each + - x / sqrt names its rounding, which forbids ptxas to contract it. Nothing else is allowed."""

ARITHMETIC = re.compile(r"\b((?:add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)\.[\w.]*f(?:16|32|64)\w*)")


def find_nvcc() -> str | None:
    """nvcc from $CUDACXX or PATH."""
    candidates = [os.environ.get("CUDACXX", ""), shutil.which("nvcc") or ""]
    return next((c for c in candidates if c and Path(c).exists()), None)


def find_cuobjdump() -> str | None:
    """cuobjdump from the CUDA toolkit or from Triton's wheel, which ships one."""
    nvcc = find_nvcc()
    candidates = [shutil.which("cuobjdump") or ""]
    if nvcc is not None:
        candidates.append(str(Path(nvcc).resolve().with_name("cuobjdump")))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((c for c in candidates if c and Path(c).exists()), None)


def output_of(*command: str) -> str:
    """Standard output of a command that has to succeed; RuntimeError with its messages otherwise."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def readable(text: str) -> str:
    """The same with C++ names."""
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short_name(function: str) -> str:
    """`normal_kernel<float, Run>` from a demangled function."""
    name = function.replace("(anonymous namespace)::", "").replace("ddpm_fast::", "")
    return name.removeprefix("void ").split("(")[0]


def listing(binary: Path, *options: str) -> str:
    """What cuobjdump prints, with C++ names."""
    tool = find_cuobjdump()
    assert tool is not None
    return readable(output_of(tool, *options, str(binary)))


@cache
def read_kernels(binary: Path, arch: str | None = None) -> dict[str, Code]:
    """All kernels in a cubin, or those of one architecture in a library."""
    only = [] if arch is None else ["-arch", arch]
    kernels: dict[str, Code] = {}
    _, *parts = re.split(r"Function : (.+)", listing(binary, "-sass", *only))
    for function, text in zip(parts[::2], parts[1::2], strict=True):
        name = short_name(function)
        kernels[name] = Code(name, dict(lines(text)))
    usage = listing(binary, "--dump-resource-usage", *only)
    for function, resources in re.findall(r"Function (.+):\s*\n\s*(REG.*)", usage):
        pairs = re.findall(r"(\w+):(\d+)", resources)
        kernels[short_name(function)].resources = {name: int(value) for name, value in pairs}
    return kernels


def ops() -> list[str]:
    """The source files with kernels, by op."""
    return sorted(path.stem.removesuffix("_cuda") for path in CUDA.glob("*.cu") if "__global__" in path.read_text())


def built_extension() -> Path | None:
    """The installed extension, if it has the kernels for both architectures and no source has changed since."""
    from ddpm_fast.backends import native

    if native._C is None or native._C.build_info().get("cuda_architectures") != "80-real 90":
        return None
    extension = Path(native._C.__file__)
    sources = [*CUDA.parent.rglob("*.*"), CUDA.parents[1] / "CMakeLists.txt"]
    return extension if extension.stat().st_mtime > max(path.stat().st_mtime for path in sources) else None


def compile_op(op: str, folder: Path, binaries: bool) -> dict[str, Path]:
    """The PTX of an op, no warnings allowed, and its machine code with approximate square roots and divisions; with
    `binaries` the machine code for every architecture, too. RuntimeError where nvcc fails."""
    nvcc = find_nvcc()
    assert nvcc is not None
    ptx, approximate = folder / f"{op}.ptx", folder / f"{op}.approximate.ptx"
    source = str(CUDA / f"{op}_cuda.cu")
    output_of(nvcc, *FLAGS, "-arch=compute_90", "-ptx", source, "-o", str(ptx))
    approximate.write_text(re.sub(r"\b(sqrt|div|rcp)\.rn\.f32", r"\1.approx.f32", ptx.read_text()))
    files = {"ptx": ptx, "approximate": approximate.with_suffix(".cubin")}
    output_of(nvcc, "-arch=sm_90", "-cubin", str(approximate), "-o", str(files["approximate"]))
    for arch in ARCHITECTURES.values() if binaries else ():
        files[arch] = folder / f"{op}.{arch}.cubin"
        start = [*FLAGS, source] if arch != "sm_90" else [str(ptx)]
        output_of(nvcc, *start, f"-arch={arch}", "-cubin", "-o", str(files[arch]))
    return files


def inexact(ptx: str) -> dict[str, int]:
    """What in this PTX is not one correctly rounded operation of float32, and how often."""
    counts = collections.Counter(word for word in ARITHMETIC.findall(ptx) if word not in ROUNDED)
    counts.update(re.findall(r"\.ftz|\.f64", ptx))
    return dict(counts)


def dtype_of(name: str) -> str:
    """Of the images, by a kernel's template arguments: the last type among them."""
    types = {"float": "f32", "__half": "f16", "__nv_bfloat16": "bf16"}
    found = re.findall(r"\b(?:float|__half|__nv_bfloat16)\b", name.partition("<")[2])
    return types[found[-1]] if found else "mixed"


def kernel_of(code: Code, capability: int) -> Kernel:
    """Everything that is judged, of one compiled kernel."""
    main_path = elements = moved = None
    shared = code.resources["SHARED"]
    if capability >= 90 and shared:
        shared -= RESERVED  # which cuobjdump counts there
    if code.name in budgets.CUDA_PATHS:
        _, required, moved = budgets.CUDA_PATHS[code.name]
        elements = 8 if ", 8, " in code.name else 4
        with contextlib.suppress(ValueError):  # rules.py finds that there is none
            main_path = code.shortest_path(required)
    return Kernel(
        part="cuda",
        name=code.name,
        function=code.name.partition("<")[0],
        dtype=dtype_of(code.name),
        capability=capability,
        threads=THREADS,
        registers=code.resources["REG"],
        shared=shared,
        stack=code.resources["STACK"] + code.resources["LOCAL"],
        spills=code.count("(LDL|STL)"),
        spills_in_loops=code.repeated("(LDL|STL)"),
        memory={word: n for word, n in code.opcodes.items() if word.startswith(("LDG", "STG"))},
        instructions=sum(code.opcodes.values()),
        fused=code.count("FFMA"),
        main_path=main_path,
        elements=elements,
        narrow=[] if moved is None else [moved],
    )


def kernels(folder: Path, processes: int, wanted: Sequence[str] = ()) -> Iterator[Kernel]:
    """Every kernel for every architecture: of the extension if it is up to date, else compiled into `folder`.

    Where nvcc is there, with what its PTX has of arithmetic that is not exact. RuntimeError where it fails, and where
    there is neither nvcc nor such an extension, or no cuobjdump. wanted: only these ops, by nvcc.
    """
    extension = None if wanted else built_extension()
    if find_cuobjdump() is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit or the triton package")
    if find_nvcc() is None and extension is None:
        raise RuntimeError("no nvcc and no up-to-date extension with kernels for sm_80 and sm_90: install nvcc")
    built: dict[str, dict[str, Path]] = {}
    if find_nvcc() is not None:
        with ThreadPoolExecutor(processes) as pool:
            made = pool.map(lambda op: compile_op(op, folder, extension is None), wanted or ops())
            built = dict(zip(wanted or ops(), made, strict=True))
    wrong: dict[str, dict[str, int]] = {}
    contracted: dict[str, int] = {}
    for files in built.values():
        ptx = inexact(files["ptx"].read_text())
        for name, code in read_kernels(files["approximate"]).items():
            wrong[name], contracted[name] = ptx, code.count("FFMA")
    for capability, arch in ARCHITECTURES.items():
        binaries = [(extension, arch)] if extension is not None else [(files[arch], None) for files in built.values()]
        for binary, only in binaries:
            for name, code in read_kernels(binary, only).items():
                kernel = kernel_of(code, capability)
                kernel.inexact, kernel.contracted = wrong.get(name, {}), contracted.get(name)
                yield kernel
