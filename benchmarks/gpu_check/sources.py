"""Which kernels there are, by reading the sources: what was not inspected is found by comparison."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from .kernels import SHARED, Kernel

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / "ddpm_fast" / "backends" / "triton"
CUDA = ROOT / "csrc" / "cuda"


def _jitted(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def triton_kernels() -> set[str]:
    """Functions under @triton.jit that no other one calls."""
    functions = [
        node
        for path in TRITON.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and _jitted(node)
    ]
    called = set()
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called.add(node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func))
    return {function.name for function in functions} - called


def cuda_kernels() -> set[str]:
    """Functions declared __global__."""
    found = set()
    for path in CUDA.glob("*.cu*"):
        code = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        found |= set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", code))
    return found


def missing(kernels: Iterable[Kernel], triton: bool = True, cuda: bool = True) -> list[str]:
    """A line for every kernel of the sources that is not among these for each architecture."""
    seen = {(kernel.part == "cuda", kernel.function, kernel.capability) for kernel in kernels}
    wanted = [(False, name) for name in sorted(triton_kernels()) if triton]
    wanted += [(True, name) for name in sorted(cuda_kernels()) if cuda]
    return [
        f"{'CUDA' if is_cuda else 'Triton'} kernel {name} was not inspected for sm_{capability}"
        for is_cuda, name in wanted
        for capability in sorted(SHARED)
        if (is_cuda, name, capability) not in seen
    ]
