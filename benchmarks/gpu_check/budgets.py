"""What kernels are allowed and what they promise, by name: instructions, registers, width of access. See rules.py."""

from __future__ import annotations

SQUARE_ROOT = r"MUFU\.RSQ R\d+, R\d+"
"""The two of Box-Muller: a path through them draws the noise."""

OPS = {
    "normal": 62,  # 56, 59
    "q_sample": 70,  # 63, 67
    "q_sample_backward": 14,  # 10, 12
    "ddpm_step": 86,  # 80, 81
    "ddpm_step_no_noise": 26,  # 23, 24
    "noise_mse": 80,  # 72, 74
    "noise_mse_backward": 79,  # 69, 73
    "add_bias_temb_none": 15,  # 12, 13
    "add_bias_temb_silu": 82,  # 77, 78
    "add_bias_temb_backward_none": 26,  # 22, 22
    "add_bias_temb_backward_silu": 130,  # 120, 122: two divisions
    "batch_norm_silu_sums": 48,  # 43, 43
    "batch_norm_silu": 97,  # 85, 88
    "batch_norm_silu_backward_sums": 117,  # 106, 106
    "batch_norm_silu_backward": 105,  # 95, 94
    "group_norm_silu": 185,  # 167, 176: three passes, unrolled
    "group_norm_silu_backward": 215,  # 201, 204: two passes
    "rms_norm_silu": 109,  # 87, 99
    "rms_norm_silu_backward": 189,  # 142, 172
    "random_bits": 22,  # 19
}
"""Instructions per element of the Triton ops, for sm_90: the whole kernel divided by the elements of a thread, so the
set-up of a thread and the slow paths of sqrt and division that are seldom taken are included. Noise costs 56 of them
(Philox 10, Box-Muller 25 in multiplications and additions alone), the update of ddpm_step 15 in arithmetic, SiLU about
50 with its division. float32 was at the first number of each comment, bfloat16 at the second, whose conversions and
exchanges between threads the budget allows for."""

LAYERS = {
    ("down1.conv1", 90): (3079, 172),
    ("down2.conv1", 90): (2697, 255),
    ("down2.conv2", 90): (3254, 255),
    ("conv_up3.conv1", 90): (3062, 255),
    ("conv_up1.conv1", 90): (1893, 169),
    ("bottleneck.conv1", 90): (700, 64),
    ("up1", 90): (1019, 128),
    ("down4.conv1 of one image", 90): (608, 56),
    ("down4.conv1 of one image, joined", 90): (1064, 62),
    ("down4.conv1 of one image, the parts added", 90): (455, 38),
    ("down2.conv1 in float32", 90): (3202, 157),
    ("down2.conv1", 80): (1503, 162),
    ("down2.conv2", 80): (2156, 150),
    ("down_blocks.0.resnets.0.conv2", 90): (2292, 246),
    ("down_blocks.3.resnets.0.conv2 of one image", 90): (545, 48),
    ("down_blocks.3.resnets.0.conv2 of one image, joined", 90): (735, 54),
    ("down_blocks.3.resnets.0.conv2 of one image, the parts added", 90): (356, 56),
    ("up_blocks.2.upsamplers.0.conv", 90): (2310, 228),
    ("mid_block.attentions.0.to_qkv", 90): (740, 118),
    ("down_blocks.1.attentions.0.to_out", 90): (1492, 242),
    ("down_blocks.0.resnets.0.conv2 in float32", 90): (1519, 152),
    ("down_blocks.0.resnets.0.conv2", 80): (1835, 246),
    ("up_blocks.2.upsamplers.0.conv", 80): (1320, 142),
    ("output", 90): (846, 96),
    ("output with the step", 90): (1259, 96),
    ("conv_out", 90): (970, 89),
    ("norm", 90): (1321, 79),
    ("norm of groups of twelve, modulated", 90): (1407, 83),
    ("norm in float32", 90): (1735, 118),
    ("rms norm", 90): (538, 48),
    ("rms norm in programs of 8 warps", 90): (538, 48),
    ("rms norm and residual", 90): (539, 40),
    ("rms norm of many channels and residual", 90): (498, 48),
    ("rms norm in float32", 90): (1358, 93),
}
"""SASS instructions of a whole layer, loop body once, and registers of a thread: seen, and a tenth more allowed."""

HALVES = ("bf16", "f16")

SPILLS = {
    # Seven numbers, once, after the loop, beside sums that take half of all registers and embeddings of several images.
    ("conv_up3.conv1", "bf16", 90): 14,
    **{("tutorial down3.conv1 (triton 128x128x64)", half, 90): 14 for half in HALVES},
    **{("tutorial down3.conv1 (triton 128x128x32)", half, 80): 10 for half in HALVES},
    **{("tutorial bottleneck.conv1 (triton window 64x32x64)", half, 80): 3 for half in HALVES},
    # An A100's of one or two numbers, at the start.
    **{("paper down_blocks.1.attentions.0.group_norm (triton 32 x 16 warps)", half, 80): 4 for half in HALVES},
    ("paper down_blocks.1.attentions.0.group_norm (triton 32 x 16 warps)", "f32", 80): 2,
    ("paper conv_in (triton 32x64x32)", "f32", 80): 2,
}
"""Accesses to local memory, none of them in a loop, of the kernels that have any."""

WIDE_LOADS = {
    "_reduce_kernel": 2,
    "_epilogue_kernel": 2,
    "_output_kernel": 8,
    "_output_step_kernel": 8,
    "_norm_kernel": 7,
}
"""128-bit loads that a layer's kernel has at least: parts, activations. (Of a convolution they go past registers.)"""

CUDA_REGISTERS = 64
"""Of a thread, at most: four blocks of 256 threads on a multiprocessor."""

CUDA_FULL = (
    *(f"normal_kernel<{t}, Run>" for t in ("float", "__half", "__nv_bfloat16")),
    *(f"q_sample_kernel<{x0}, {out}, Run>" for x0 in ("float", "unsigned char") for out in ("float", "__nv_bfloat16")),
    *(f"ddpm_step_kernel<true, {t}, Run>" for t in ("float", "__half", "__nv_bfloat16")),
    *(f"add_bias_temb_kernel<float, 4, {across}>" for across in ("false", "true")),
)
"""CUDA kernels of which all 64 warps fit on a multiprocessor."""

CUDA_PACKS = {
    "normal_kernel<float, Run>": (0, 1, 128),
    "normal_kernel<__nv_bfloat16, Run>": (0, 1, 64),
    "q_sample_kernel<float, float, Run>": (2, 2, 128),  # x0 and noise; x_t and target
    "q_sample_kernel<__half, __half, Run>": (1, 2, 64),
    "add_bias_temb_kernel<float, 4, false>": (1, 1, 128),
    "add_bias_temb_kernel<float, 4, true>": (1, 1, 128),
    "add_bias_temb_kernel<__nv_bfloat16, 8, false>": (1, 1, 128),
    "add_bias_temb_kernel<__nv_bfloat16, 8, true>": (1, 1, 128),
    "noise_mse_backward_kernel<float, Run>": (1, 1, 128),
}
"""Wide loads at least, wide stores, width: there are no other stores."""

CUDA_AMONG = {
    # x, m and a table row of 32 bytes; x and a float32 copy. The other stores are copies in other formats.
    **{f"ddpm_step_kernel<{plain}, float, Run>": (4, 2, 128) for plain in ("true", "false")},
    # Read once for a value near the mean and once for the sums; then once for y.
    "batch_norm_silu_sums_kernel<32, float, 4>": (2, 0, 128),
    "batch_norm_silu_sums_across_kernel<__nv_bfloat16, 8>": (2, 0, 128),
    **{f"batch_norm_silu{across}_kernel<__nv_bfloat16, 8>": (1, 1, 128) for across in ("", "_across")},
    "batch_norm_silu_backward_sums_kernel<4, __half, 8>": (2, 0, 128),
    "batch_norm_silu_backward_kernel<__nv_bfloat16, 8>": (2, 1, 128),
    "batch_norm_silu_backward_sums_across_kernel<float, 4>": (2, 0, 128),
    "batch_norm_silu_backward_across_kernel<__nv_bfloat16, 4>": (2, 1, 64),
    **{f"group_norm_silu_kernel<{t}>": (3, 1, 128) for t in ("float, 4", "__nv_bfloat16, 8", "__half, 8")},
    **{f"group_norm_silu_backward_kernel<{k}, float, 4>": (4, 1, 128) for k in (32, 256)},
    "group_norm_silu_backward_kernel<32, __nv_bfloat16, 8>": (4, 1, 128),
    "group_norm_silu_across_kernel<float, 4>": (4, 1, 128),
    "group_norm_silu_across_kernel<__nv_bfloat16, 4>": (4, 1, 64),
    "group_norm_silu_backward_across_kernel<float, 2>": (4, 1, 64),
    **{f"rms_norm_silu_kernel<{t}>": (6, 1, 128) for t in ("float, 4", "__nv_bfloat16, 8", "__half, 8")},
    **{f"rms_norm_silu_across_kernel<{k}, __nv_bfloat16, 8>": (3, 1, 128) for k in (8, 32)},
    "rms_norm_silu_across_kernel<32, float, 4>": (3, 1, 128),
    "rms_norm_silu_backward_kernel<float, 4>": (8, 1, 128),
    "rms_norm_silu_backward_kernel<__nv_bfloat16, 4>": (8, 1, 64),
    **{f"rms_norm_silu_backward_across_kernel<{k}, float, 4>": (5, 1, 128) for k in (8, 32)},
    "rms_norm_silu_backward_across_kernel<32, __nv_bfloat16, 4>": (5, 1, 64),
}
"""The same, both at least, of kernels with other accesses beside: sums and coefficients of channels, copies."""

CUDA_PATHS = {
    "normal_kernel<float, Run>": (66, SQUARE_ROOT, 4),
    "normal_kernel<__nv_bfloat16, Run>": (66, SQUARE_ROOT, 2),
    "q_sample_kernel<float, float, Run>": (77, SQUARE_ROOT, 8),
    "q_sample_kernel<unsigned char, __nv_bfloat16, Run>": (92, SQUARE_ROOT, 3),
    "ddpm_step_kernel<true, float, Run>": (92, rf"({SQUARE_ROOT}|ATOMG)", 12),  # bad_row and its write included
    "ddpm_step_kernel<true, __nv_bfloat16, Run>": (93, rf"({SQUARE_ROOT}|ATOMG)", 10),
    "ddpm_step_kernel<false, float, Run>": (106, SQUARE_ROOT, 12),
    "add_bias_temb_kernel<float, 4, false>": (15, r"STG\.E\.128", 8),  # without the activation
    "add_bias_temb_kernel<__nv_bfloat16, 8, true>": (11, r"STG\.E\.128", 4),
}
"""Instructions per element on the shortest way through the named instructions; bytes per element that it moves (of
q_sample with the noise not kept)."""
