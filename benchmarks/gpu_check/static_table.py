"""What static.py found, as tables. What was read from compiled code and what follows from data sheets stand apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from . import budgets
from .kernels import Kernel
from .triton_plans import Plan

ISSUED = 132 * 128 * 1.755e9
"""Instructions of a thread that an H100 or H200 starts in a second: 132 multiprocessors, 128 lanes, the boost clock."""

MEMORY = {"H100": 3.0e12, "H200": 4.3e12}
"""Bytes a second to and from memory that a copy is expected to reach. For the model below, not measured by it."""

MODEL = (
    "Modelled, NOT MEASURED: instructions per element that fit in the time of the element's bytes (issue rate of 132 x "
    "128 lanes at 1.755 GHz, memory at 3.0 TB/s on an H100, 4.3 TB/s on an H200), which of the two would be the limit, "
    "and the goal that a run on a GPU has to confirm, as a share of the copy rate measured there."
)

ELEMENTWISE = (
    "normal",
    "q_sample",
    "q_sample_backward",
    "ddpm_step",
    "ddpm_step_no_noise",
    "noise_mse",
    "noise_mse_backward",
    "add_bias_temb_none",
    "add_bias_temb_silu",
)
"""Triton cases of ops that read and write every element once, or read it only."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Aligned columns, the first to the left."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        lines.append("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]))
    return lines


def budget(name: str, moved: int) -> float:
    """Instructions per element for which arithmetic takes as long as memory, modelled."""
    return ISSUED * moved / MEMORY[name]


def goal(moved: int) -> str:
    """Shares of the copy rate on an H100 and an H200 that elementwise ops have to reach, by bytes per element."""
    if moved >= 12:
        return "90 % / 90 %"
    return "80 % / 65 %" if moved >= 8 else "-"


STATIC = ("regs", "spills", "shared", "warps", "LDG.128", "STG.128", "HGMMA", "HMMA", "instr", "per element")


def _static(kernels: list[Kernel]) -> list[object]:
    """The worst of several kernels, or one kernel's own."""

    def most(value: Callable[[Kernel], float]) -> int:
        return round(max(map(value, kernels)))

    per_element = [kernel.per_element for kernel in kernels if kernel.per_element is not None]
    return [
        most(lambda k: k.registers),
        most(lambda k: k.spills),
        most(lambda k: k.shared),
        min(kernel.resident_warps for kernel in kernels),
        most(lambda k: k.accesses("LDG", 128) + k.accesses("LDGSTS", 128)),
        most(lambda k: k.accesses("STG", 128)),
        most(lambda k: k.hgmma),
        most(lambda k: k.hmma),
        most(lambda k: k.instructions),
        f"{max(per_element):.0f}" if per_element else "-",
    ]


def grouped(kernels: list[Kernel], part: str, by: Callable[[Kernel], str]) -> list[str]:
    """A line per group, dtype and architecture: the worst of its kernels."""
    groups: dict[tuple[str, str, int], list[Kernel]] = {}
    for kernel in kernels:
        if kernel.part == part:
            groups.setdefault((by(kernel), kernel.dtype, kernel.capability), []).append(kernel)
    rows = [[f"{name} {dtype} sm_{arch}", len(of), *_static(of)] for (name, dtype, arch), of in groups.items()]
    return table([part, "kernels", *STATIC], rows) if rows else []


def limits(kernels: list[Kernel]) -> list[str]:
    """What the instruction budget says of the elementwise ops."""
    rows: list[list[object]] = []
    for kernel in kernels:
        elementwise = kernel.name in (ELEMENTWISE if kernel.part == "ops" else budgets.CUDA_PATHS)
        moved, spent = kernel.bytes_per_element, kernel.per_element
        if kernel.capability != 90 or kernel.dtype == "f16" or not elementwise or not moved or spent is None:
            continue
        name = f"{kernel.name} {kernel.dtype}" if kernel.part == "ops" else kernel.name
        fits = [budget(gpu, moved) for gpu in MEMORY]
        verdicts = [f"{limit:.0f} {'memory' if spent <= limit else 'instructions'}" for limit in fits]
        rows.append([name, moved, f"{spent:.0f}", *verdicts, goal(moved)])
    heads = [
        "sm_90",
        "bytes",
        "instr (counted)",
        *(f"{gpu} budget, limit (model)" for gpu in MEMORY),
        "goal H100 / H200",
    ]
    return [MODEL, *table(heads, rows)] if rows else []


def of_plans(kernels: list[Kernel], plans: Sequence[Plan]) -> list[str]:
    """A line per plan: all the kernels that its trial would make Triton compile."""
    rows: list[list[object]] = []
    for plan in plans:
        used = [k for k in kernels if k.part == "plans" and k.capability == plan.capability and str(plan) in k.used]
        if used:
            products = [kernel for kernel in used if kernel.function == "_conv_kernel"]
            rows.append(
                [
                    f"{plan} sm_{plan.capability}",
                    len(used),
                    len(products),
                    sum(kernel.hgmma > 0 for kernel in products),
                    sum(kernel.hmma > 0 for kernel in products),
                    sum(kernel.spills > 0 for kernel in used),
                    sum(kernel.spills_in_loops > 0 for kernel in used),
                    max(kernel.registers for kernel in used),
                    max(kernel.shared for kernel in used),
                    min(kernel.resident_warps for kernel in used),
                ]
            )
    heads = ("kernels", "products", "HGMMA", "HMMA", "spill", "in loops", "most regs", "most shared", "fewest warps")
    return table(["plan", *heads], rows) if rows else []


def worst(kernels: list[Kernel], count: int = 8) -> list[str]:
    """The plans' kernels that spill or leave room for the fewest warps."""
    of = [kernel for kernel in kernels if kernel.part == "plans"]
    of.sort(key=lambda k: (-k.spills, k.resident_warps, -k.instructions))
    rows = [[f"{k.name} {k.dtype} sm_{k.capability}", *_static([k])] for k in of[:count]]
    return table(["plans, worst kernels", *STATIC], rows) if rows else []


def text(kernels: list[Kernel], plans: Sequence[Plan]) -> str:
    """All tables, the longest first: of a long output one sees the end."""
    parts = [
        grouped(kernels, "ops", lambda kernel: kernel.name),
        grouped(kernels, "layers", lambda kernel: kernel.name),
        grouped(kernels, "cuda", lambda kernel: kernel.function),
        worst(kernels),
        of_plans(kernels, plans),
        limits(kernels),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)
