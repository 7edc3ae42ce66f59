"""A Triton kernel that writes behind a tensor: run under compute-sanitizer, it must be found (see sanitize.py).

python -m gpu_check.planted bounds | none
"""

import sys

import torch
import triton
import triton.language as tl

ELEMENTS = 128


@triton.jit
def planted_triton(out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, i.to(tl.float32))


def main(fault: str) -> int:
    """With "bounds" the tensor has half of what is written to it."""
    out = torch.empty(ELEMENTS // 2 if fault == "bounds" else ELEMENTS, device="cuda")
    result = "no error"
    try:
        planted_triton[(1,)](out, BLOCK=ELEMENTS)
        torch.cuda.synchronize()
    except RuntimeError as error:  # the tool ends the context of a kernel that failed
        result = str(error).splitlines()[0]
    print(f"planted fault: {fault}, {result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
