"""What makes a compiled kernel wrong or slow, as far as that can be read from it: one function, `problems`."""

from __future__ import annotations

from . import budgets
from .kernels import MOST_REGISTERS, SHARED, Kernel

MORE = 1.1
"""Times the instructions and registers that a layer's kernel was seen to have."""

NEVER = (r"\.f64", r"\bfma\.")
"""Words of PTX that no kernel of ours has, approximate or not."""

LAYERS = ("_conv_kernel", "_reduce_kernel", "_epilogue_kernel", "_norm_kernel", "_rms_norm_kernel")
"""Kernels of a plan that store activations and nothing else."""


def problems(kernel: Kernel) -> list[str]:
    """A line for each rule that the kernel breaks."""
    found = [*_resources(kernel), *_arithmetic(kernel)]
    if kernel.part == "cuda":
        return [*found, *_cuda(kernel)]
    return [*found, *(_op(kernel) if kernel.part == "ops" else _layer(kernel))]


def _resources(kernel: Kernel) -> list[str]:
    """Registers, shared and local memory."""
    found = []
    allowed = budgets.SPILLS.get((kernel.name, kernel.dtype, kernel.capability), 0)
    if kernel.spills_in_loops:
        found.append(f"{kernel.spills_in_loops} accesses to local memory in a loop")
    if kernel.spills > allowed or (kernel.stack and not allowed):
        found.append(f"spills: {kernel.spills} accesses to local memory, {kernel.stack} bytes of stack")
    if kernel.shared > SHARED[kernel.capability]:
        found.append(f"{kernel.shared} bytes of shared memory, {SHARED[kernel.capability]} fit")
    if kernel.registers > MOST_REGISTERS or not kernel.resident_warps:
        found.append(f"no block fits on a multiprocessor: {kernel.registers} registers, {kernel.threads} threads")
    return found


def _arithmetic(kernel: Kernel) -> list[str]:
    """Every operation rounded by itself where that is promised, nothing fused and no float64 anywhere."""
    wrong = {word: n for word, n in kernel.inexact.items() if kernel.exact or word in NEVER}
    found = ["inexact arithmetic: " + ", ".join(f"{n} x {word}" for word, n in wrong.items())] if wrong else []
    if kernel.contracted:
        found.append(f"{kernel.contracted} fused multiply-adds besides those of square roots and divisions")
    return found


def _op(kernel: Kernel) -> list[str]:
    """Triton kernels of the ops: width of access, instructions per element, registers."""
    found = []
    for name, sizes in (("LDG", kernel.wide_loads), ("STG", kernel.wide_stores)):
        # Small arrays may add wide loads, such as two timesteps at once.
        expected = sum(size * (kernel.elements or 0) // 16 for size in sizes)
        if kernel.accesses(name, 128) < expected:
            found.append(f"narrow access: {kernel.accesses(name, 128)} {name} of 128 bits, {expected} promised")
    budget = budgets.OPS.get(kernel.name) if kernel.capability == 90 else None
    if budget is not None and (kernel.per_element is None or kernel.per_element > budget):
        found.append(f"{kernel.per_element} instructions per element, {budget} allowed")
    # Above 128 registers fewer than 16 warps fit on a processor, too few to hide the memory's latency.
    # Each array of a channels_last step takes the addresses of 16 places; a history is the sampler's, which is not.
    if kernel.registers > 128 and kernel.name != "ddpm_step_history_channels_last":
        found.append(f"{kernel.registers} registers, 128 allowed")
    # x0_prev and x0_out may be one tensor, and nothing but a thread's own order makes it read before it writes.
    if "history" in kernel.name and kernel.layouts != 1:
        found.append(f"float32 images shared out among threads in {kernel.layouts} ways, so not by the same threads")
    return found


def _layer(kernel: Kernel) -> list[str]:
    """Triton kernels of a plan: tensor cores, asynchronous and wide access, what was seen."""
    found = _product(kernel) if kernel.function == "_conv_kernel" else []
    if kernel.function in LAYERS:
        stored = kernel.widths("STG")
        if stored != _promised_widths(kernel):
            found.append(f"narrow access: stores of {sorted(stored)} bits, {sorted(_promised_widths(kernel))} promised")
    least = budgets.WIDE_LOADS.get(kernel.function, 0)
    if kernel.function == "_rms_norm_kernel":
        # Every number once, with those of the channels; none alone.
        least = 4 if kernel.part == "layers" else 1
        if 16 in kernel.widths("LDG"):
            found.append("narrow access: numbers loaded one at a time")
    if kernel.accesses("LDG", 128) < least:
        found.append(f"narrow access: {kernel.accesses('LDG', 128)} LDG of 128 bits, {least} promised")
    seen = budgets.LAYERS.get((kernel.name, kernel.capability)) if kernel.part == "layers" else None
    if kernel.part == "layers" and seen is None:
        found.append("no budget: add what is seen to budgets.LAYERS")
    if seen is not None:
        if kernel.instructions > MORE * seen[0]:
            found.append(f"{kernel.instructions} instructions, {seen[0]} seen before")
        if kernel.registers > MORE * seen[1] + 8:
            found.append(f"{kernel.registers} registers, {seen[1]} seen before")
    return found


def _bits(kernel: Kernel, size: int, part: int = 1) -> int:
    """Of an access to an array of the tile, or of a part of it: 128, or what a thread has of a small one."""
    rows, columns = kernel.tile
    return min(128, 8 * size * rows * columns // part // kernel.threads)


def _promised_widths(kernel: Kernel) -> set[int]:
    """Bits of the stores of a layer's kernel."""
    if not kernel.tile:
        return {128}
    found = {_bits(kernel, size) for size in kernel.stored}
    if kernel.pooled:
        found.add(_bits(kernel, kernel.stored[-1], 4))
    return found | ({32} if kernel.joined else set())  # how many programs are through


def _product(kernel: Kernel) -> list[str]:
    """A convolution: products by tensor cores, operands straight into shared memory, a residual read once."""
    found = []
    rows = kernel.tile[0] if kernel.tile else 0
    # Hopper's own instruction multiplies 64 rows at least; programs of fewer use the older one.
    hopper = kernel.capability == 90 and rows >= 64
    right, wrong = (kernel.hgmma, kernel.hmma) if hopper else (kernel.hmma, kernel.hgmma)
    if not right or wrong:
        name = "HGMMA" if hopper else "HMMA"
        found.append(f"products not by {name}: {kernel.hgmma} HGMMA, {kernel.hmma} HMMA")
    if kernel.threads != 128:
        found.append(f"{kernel.threads // 32} warps, 4 expected: more miscompile (see conv.py)")
    if kernel.resident_warps < 8:
        found.append(f"{kernel.resident_warps} warps fit on a multiprocessor, of two programs 8")
    if kernel.kind == "first":  # gathers single pixels of an image; its weights are wide
        if not kernel.accesses("LDG", 128):
            found.append("narrow access: no LDG of 128 bits")
    elif kernel.widths("LDGSTS") != {128}:
        found.append(f"operands copied to shared memory {sorted(kernel.widths('LDGSTS'))} bits at a time, 128 promised")
    if kernel.accesses("LDGSTS", 128) < kernel.copies or 16 in kernel.widths("LDG"):
        found.append(f"{kernel.accesses('LDGSTS', 128)} asynchronous copies of 128 bits, {kernel.copies} promised")
    if kernel.residual:
        width = _bits(kernel, kernel.stored[-1])
        loaded, stored = kernel.accesses("LDG", width), kernel.accesses("STG", width)
        if loaded < stored:
            found.append(f"narrow access: the residual is not loaded {width} bits at a time")
        if loaded > stored and width == 128 and not kernel.joined:  # which loads parts, too
            found.append("the residual is read more than once")
    return found


def _cuda(kernel: Kernel) -> list[str]:
    """Kernels of csrc/cuda: registers, width of access, the main path."""
    found = []
    if kernel.registers > budgets.CUDA_REGISTERS:
        found.append(f"{kernel.registers} registers, {budgets.CUDA_REGISTERS} allowed")
    if kernel.name in budgets.CUDA_FULL and kernel.resident_warps < 64:
        found.append(f"{kernel.resident_warps} warps fit on a multiprocessor, 64 promised")
    for table in (budgets.CUDA_PACKS, budgets.CUDA_AMONG):
        if kernel.name in table:
            loads, stores, width = table[kernel.name]
            loaded, stored = kernel.accesses("LDG", width), kernel.accesses("STG", width)
            if loaded < loads or stored < stores:
                found.append(
                    f"narrow access: {loaded} loads and {stored} stores of {width} bits, {loads} and {stores} promised"
                )
            if table is budgets.CUDA_PACKS and kernel.accesses("STG") != stores:
                found.append(f"{kernel.accesses('STG')} stores, {stores} of {width} bits promised and no others")
    if kernel.name in budgets.CUDA_PATHS:
        budget = budgets.CUDA_PATHS[kernel.name][0]
        if kernel.main_path is None or kernel.per_element is None:
            found.append(f"no path through {budgets.CUDA_PATHS[kernel.name][1]}")
        elif kernel.per_element > budget:
            found.append(f"{kernel.per_element} instructions per element on the main path, {budget} allowed")
    return found
