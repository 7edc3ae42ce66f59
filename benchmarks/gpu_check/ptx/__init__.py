"""Runs PTX on the CPU, bit for bit where PTX says what the bits are, and watches over every access.

Triton's interpreter computes with NumPy, so it proves the source of a kernel, not what the compiler made of it. Here
the compiled code runs: `launches` takes what the ops would launch on a GPU, compiles it for one, and executes the PTX.

    with launches(90) as done:
        ops.normal(out, rng, 0)      # CPU tensors
    done[0].approximate              # instructions whose result a GPU may round otherwise

parse.py reads PTX, machine.h and the C++ files are the machine, build.py compiles it, launch.py puts kernels on it.
What it finds besides wrong results (`Fault`): accesses outside arrays or between their elements, misaligned ones, races
in shared and global memory, shared memory read before it is written or while an asynchronous copy is on its way,
missing proxy fences before wgmma, barriers in parts of warps, instructions that it does not know. What it cannot show:
what NVIDIA's assembler makes of the PTX, how tensor cores round what they add up, and how fast anything is.
"""

from .launch import Fault, Launched, launches
from .parse import Unknown

__all__ = ["Fault", "Launched", "Unknown", "launches"]
