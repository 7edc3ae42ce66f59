"""Which elements a program of a noise kernel works on, and where they lie in memory.

A program takes BLOCK_N samples x BLOCK_Q quads. Quads run over a sample either in contiguous (C, H, W) order or,
where an array is channels_last, in pixel order (``PIXELS``): channel fastest, so that neighbouring threads touch
neighbouring addresses. The noise does not depend on the choice: a quad keeps its number.
"""

import triton
import triton.language as tl


@triton.jit
def program_on_long_axis():
    """The program's number on the axis that ``launch.long_axis`` splits into grid axes 1 and 2, int64."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def rows_of_program(n, BLOCK_N: tl.constexpr):
    """Sample numbers int64 [BLOCK_N, 1] and whether each exists."""
    row = (program_on_long_axis() * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    return row, row < n


@triton.jit
def quads_of_program(channels, inner, BLOCK_Q: tl.constexpr, PIXELS: tl.constexpr):
    """The numbers, int32 [1, BLOCK_Q], of the program's quads within a sample; some may lie behind its end."""
    j = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if PIXELS:
        j = (j % channels) * (inner // 4) + j // channels
    return j[None, :]


@triton.jit
def elements_of_program(channels, inner, BLOCK_Q: tl.constexpr, PIXELS: tl.constexpr):
    """Element, channel and pixel, int32 [1, 4 BLOCK_Q] each, and whether the element exists."""
    i = tl.arange(0, 4 * BLOCK_Q)
    if PIXELS:
        j = tl.program_id(0) * BLOCK_Q + i // 4
        channel = j % channels
        pixel = (j // channels) * 4 + i % 4
        element = channel * inner + pixel
        inside = pixel < inner
    else:
        element = tl.program_id(0) * (4 * BLOCK_Q) + i
        channel = element // inner
        pixel = element - channel * inner
        inside = element < channels * inner
    return element[None, :], channel[None, :], pixel[None, :], inside[None, :]


@triton.jit
def place(element, channel, pixel, channels, CHANNELS_LAST: tl.constexpr):
    """Offset of an element within its sample."""
    return pixel * channels + channel if CHANNELS_LAST else element


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Before its first access to memory an overlapping kernel lets the next one start, and waits until the one before
    has ended and its stores are seen. Every kernel has to, for none waits for those before the one before it."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.u32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
