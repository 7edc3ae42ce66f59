"""Compile the Triton kernels for a GPU that is not there, exactly as the ops would launch them.

The ops run on meta tensors with a launcher that writes down instead of launching; what Triton would make of the
arguments (types, divisibility by 16, the integer 1, None) becomes the signature of an ahead-of-time compilation. So
there is no second list of signatures to keep in step with the ops.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")


@dataclass(frozen=True)
class Specialisation:
    """One kernel with everything that Triton compiles in."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]

    def compile(self, capability: int, **options: Any) -> Any:
        """The compiled kernel for an NVIDIA GPU of ``capability`` (80, 90, ...); ``.asm`` has its PTX and cubin."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**self.options, **options})


def specialisation(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Specialisation:
    """What Triton's JIT would compile for a launch with these arguments, with tensors aligned to 16 bytes."""
    names = list(inspect.signature(kernel.fn).parameters)
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k not in LAUNCH_OPTIONS}
    generic = set(kernel.do_not_specialize or ())
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(names):
        value = values[name]
        is_size = isinstance(value, int) and index < len(args)
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif is_size and (value != 1 or name in generic):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in generic:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    return Specialisation(
        kernel, signature, constants, attributes, {k: options[k] for k in LAUNCH_OPTIONS if k in options}
    )


@contextmanager
def recorded() -> Iterator[list[Specialisation]]:
    """Within it the ops launch nothing; the list fills with what they would have launched."""
    found: list[Specialisation] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(specialisation(kernel, args, options))

    before = launch._call
    launch._call = record
    try:
        yield found
    finally:
        launch._call = before
