"""Compiles the machine and gives its C interface."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[2] / "build" / "ptx_on_cpu"
# No contraction: a fused multiply-add is one only where PTX has one.
FLAGS = ("-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno",
         "-fno-strict-aliasing", "-fPIC", "-Wall")  # fmt: skip


class Region(ctypes.Structure):
    """PtxRegion of machine.cpp."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("allowed", ctypes.c_void_p),
        ("storage", ctypes.c_int64),
        ("offset", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    )


def compiler() -> str:
    """g++, or clang++; RuntimeError where there is neither."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise RuntimeError("running PTX on the CPU needs a C++ compiler; install g++ and put it on PATH")
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(out: Path = BUILD) -> Path:
    """The shared library, built below ``out`` unless it is there for these sources, this compiler and processor."""
    sources = sorted(HERE.glob("*.cpp"))
    digest = hashlib.sha256("\0".join([compiler(), *FLAGS]).encode())
    # What -march=native stands for, so that a folder taken to another machine is not used there.
    digest.update(_run(compiler(), "-march=native", "-dM", "-E", "-x", "c++", "/dev/null").encode())
    for path in [*sources, *sorted(HERE.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    library = out / digest.hexdigest()[:16] / "machine.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = library.with_name(f"{source.stem}.{os.getpid()}.o")
        _run(compiler(), *FLAGS, "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    part = library.with_suffix(f".{os.getpid()}.part")
    _run(compiler(), "-shared", *objects, "-o", str(part))
    part.replace(library)  # in one step: another process may be building the same
    for name in objects:
        Path(name).unlink()
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, built if need be."""
    lib = ctypes.CDLL(str(build()))
    lib.ptx_name.restype = lib.ptx_signature.restype = ctypes.c_char_p
    lib.ptx_program.restype = ctypes.c_void_p
    lib.ptx_program.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_uint64,
    )
    lib.ptx_free_program.argtypes = (ctypes.c_void_p,)
    lib.ptx_free_program.restype = None
    lib.ptx_run.restype = ctypes.c_int64
    lib.ptx_run.argtypes = (
        *(ctypes.c_void_p, ctypes.POINTER(Region), ctypes.c_int),
        *(ctypes.POINTER(ctypes.c_uint64), ctypes.c_int, ctypes.c_char_p, ctypes.c_int64),
        *(ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64),
        *(ctypes.c_int, ctypes.c_char_p, ctypes.c_int64),
    )
    return lib


@functools.cache
def entries() -> dict[str, tuple[int, str]]:
    """Every instruction that the machine knows: name -> (its number, its signature; see machine.h)."""
    lib = library()
    return {lib.ptx_name(k).decode(): (k, lib.ptx_signature(k).decode()) for k in range(lib.ptx_entries())}
