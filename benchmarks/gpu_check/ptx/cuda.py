"""The CUDA half of the extension as nvcc compiles it, executed on the CPU.

`build` makes a module of the bindings and csrc/cuda with nvcc, its CUDA runtime one that hands launches to `launched`
here. Its functions are those of the real extension, given addresses of CPU tensors; `watch` says which tensors those
are, and each launch may touch nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .build import BUILD, compiler
from .launch import Arrays, Launched, execute_at
from .parse import Program, parse

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
MODULE = "_C_shim"
KEPT = 256  # tensors whose addresses were taken last

_ptx: dict[str, str] = {}  # kernel -> the text that has it
_taken: dict[int, Tensor] = {}
done: list[Launched] = []


def _run(*command: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stdout}{finished.stderr}")


def build(capability: int, out: Path = BUILD) -> Path:
    """The module, compiled for a capability (80, 90) unless it is there for these sources; PTX files lie beside it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the PATH: it comes with the CUDA toolkit")
    if importlib.util.find_spec("pybind11") is None:
        raise RuntimeError("pybind11 is not installed: pip install pybind11")
    import pybind11

    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    host = ("-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-DDDPM_FAST_HAS_CUDA", "-DDDPM_FAST_NO_CLONES")
    host = (*host, f"-DDDPM_FAST_MODULE_NAME={MODULE}", *includes)
    device = ("-std=c++17", "--fmad=false", "-Xcompiler=-fPIC,-ffp-contract=off", "-DDDPM_FAST_HAS_CUDA", "--keep")
    device = (*device, f"-gencode=arch=compute_{capability},code=compute_{capability}")
    kernels, others = sorted(CSRC.glob("cuda/*.cu")), [CSRC / "bindings.cpp", CSRC / "bindings_norms.cpp"]
    others += [*sorted(CSRC.glob("cpu/*.cpp")), HERE / "cuda_runtime" / "cuda_runtime.cpp"]
    digest = hashlib.sha256("\0".join([nvcc, compiler(), *host, *device]).encode())
    for path in sorted([*kernels, *others, *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = out / f"cuda_{digest.hexdigest()[:16]}"
    module = folder / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))
    if module.exists():
        return module

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}_{source.parent.name}.o"
        if source.suffix == ".cu":
            kept = folder / source.stem
            kept.mkdir(parents=True, exist_ok=True)
            _run(nvcc, *device, f"--keep-dir={kept}", "-c", str(source), "-o", str(target))
        else:
            _run(compiler(), *host, "-c", str(source), "-o", str(target))
        return str(target)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*kernels, *others]))
    part = module.with_suffix(".part")
    _run(compiler(), "-shared", "-pthread", *objects, "-o", str(part))
    part.replace(module)
    return module


def load_ptx(module: Path) -> None:
    """Makes the kernels of a built module known."""
    for path in sorted(module.parent.glob("*/*.ptx")):
        text = path.read_text()
        _ptx.update(dict.fromkeys(_kernels(text), text))


def _kernels(text: str) -> list[str]:
    return [line.split("(")[0].split()[-1] for line in text.splitlines() if ".entry" in line]


@functools.cache
def _program(name: str) -> Program:
    return parse(_ptx[name], name)


@contextmanager
def watch() -> Iterator[list[Launched]]:
    """Within it the tensors whose addresses are asked for are the arrays of launches; the list fills with those."""
    before = torch.Tensor.data_ptr

    def data_ptr(self: Tensor) -> int:
        _taken.pop(self.untyped_storage().data_ptr(), None)
        _taken[self.untyped_storage().data_ptr()] = self
        while len(_taken) > KEPT:
            del _taken[next(iter(_taken))]
        return before(self)

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
    done.clear()
    try:
        yield done
    finally:
        torch.Tensor.data_ptr = before  # type: ignore[method-assign]
        _taken.clear()


@contextmanager
def as_native(capability: int) -> Iterator[list[Launched]]:
    """Within it the native backend serves CPU tensors with the CUDA kernels, compiled for a capability. One module per
    process: it keeps the capability of the first call."""
    from ddpm_fast.backends import native

    module = sys.modules.get(MODULE)
    if module is None:
        path = build(capability)
        load_ptx(path)
        spec = importlib.util.spec_from_file_location(MODULE, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[MODULE] = module
    before = native._C, native._target
    native._C, native._target = module, lambda x: (0, 0)
    try:
        with watch() as launches:
            yield launches
    finally:
        native._C, native._target = before


def launched(name: str, grid: tuple[int, int, int], threads: int, shared: int, arguments: int) -> None:
    """A launch of the module: called by its CUDA runtime with the addresses of the kernel's arguments."""
    program = _program(name)
    end = max((at + size for at, size in program.parameters), default=0)
    block = bytearray(end)
    places = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
    for k, (at, size) in enumerate(program.parameters):
        block[at : at + size] = ctypes.string_at(places[k], size)
    arrays = Arrays.at_their_places(list(_taken.values()))
    count, hazards = execute_at(program, arrays, bytes(block), grid, threads, shared + program.shared)
    done.append(Launched(name, program, None, grid, count, hazards))
