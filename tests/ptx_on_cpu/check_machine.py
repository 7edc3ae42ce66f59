"""The machine on PTX written by hand: arithmetic against NumPy and torch, lanes that part, memory, faults. Run by
test_ptx.py in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_check.ptx import Fault, Unknown
from gpu_check.ptx.launch import execute
from gpu_check.ptx.parse import parse

F32 = torch.float32


def kernel(body, parameters, shared=""):
    listed = ", ".join(f".param .u64 .ptr .global .align 1 p{k}" for k in range(parameters))
    return f"""
.version 8.7
.target sm_90a
{shared}
.visible .entry kernel({listed})
.reqntid 64
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<20>;
    .reg .b32 %r<100>;
    .reg .b64 %rd<50>;
    {body}
    ret;
}}
"""


ADDRESSES = """
    mov.u32 %r1, %tid.x;
    ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; ld.param.b64 %rd3, [p2]; ld.param.b64 %rd4, [p3];
    mad.wide.u32 %rd5, %r1, 4, %rd1; mad.wide.u32 %rd6, %r1, 4, %rd2;
    mad.wide.u32 %rd7, %r1, 4, %rd3; mad.wide.u32 %rd8, %r1, 4, %rd4;
    ld.global.b32 %r2, [%rd5]; ld.global.b32 %r3, [%rd6]; ld.global.b32 %r4, [%rd7];
"""
SPECIAL = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-40, 3.4e38, float("inf"), float("-inf"), float("nan"), 65519.9, 6e-8, 1 / 3]


def floats(seed):
    """64 numbers: special ones, and others of all sizes."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(64) * 2.0 ** generator.integers(-140, 60, 64)
    values[: len(SPECIAL)] = generator.permutation(SPECIAL)
    return values.astype(np.float32)


def apply(instruction, a, b=None, c=None, shared="", shared_size=0):
    """One value per thread, 64 of them, by instructions from %r2, %r3, %r4 to %r10."""
    arrays = [torch.from_numpy(np.ascontiguousarray(x).copy()) for x in (a, *(a if x is None else x for x in (b, c)))]
    out = torch.zeros(64, dtype=torch.int32)
    ptx = kernel(f"{ADDRESSES} {instruction} st.global.b32 [%rd8], %r10;", 4, shared)
    values = [(f"p{k}", x) for k, x in enumerate([*arrays, out])]
    execute(parse(ptx), (1,), values, shared_size)
    return out.numpy()


def same(bits, expected):
    got, expected = bits.view(np.float32), np.asarray(expected, np.float32)
    assert np.array_equal(got.view(np.int32)[~np.isnan(expected)], expected.view(np.int32)[~np.isnan(expected)])
    assert np.array_equal(np.isnan(got), np.isnan(expected))


def test_float_arithmetic_is_that_of_ieee():
    for seed in range(5):
        a, b, c = floats(seed), floats(seed + 100), floats(seed + 200)
        with np.errstate(all="ignore"):
            same(apply("add.rn.f32 %r10, %r2, %r3;", a, b), a + b)
            same(apply("sub.rn.f32 %r10, %r2, %r3;", a, b), a - b)
            same(apply("mul.rn.f32 %r10, %r2, %r3;", a, b), a * b)
            same(apply("div.rn.f32 %r10, %r2, %r3;", a, b), a / b)
            same(apply("sqrt.rn.f32 %r10, %r2;", a), np.sqrt(a))
            # A product of float32 is exact in float64; with c no larger than the product, so is their sum but for ties.
            near = (c % 1).astype(np.float32)
            exact = a.astype(np.longdouble) * b.astype(np.longdouble) + near.astype(np.longdouble)
            moderate = (np.abs(np.log2(np.abs(a * b))) < 20) & np.isfinite(near)
            got = apply("fma.rn.f32 %r10, %r2, %r3, %r4;", a, b, near).view(np.float32)
            assert np.array_equal(got[moderate], exact[moderate].astype(np.float32))


def test_the_larger_number_passes_over_nan():
    nan, a, b = float("nan"), np.zeros(64, np.float32), np.zeros(64, np.float32)
    a[:5], b[:5] = [nan, 1, nan, -0.0, -2], [1, nan, nan, 0.0, -3]
    got = apply("max.f32 %r10, %r2, %r3;", a, b).view(np.float32)
    assert got[:2].tolist() == [1, 1]
    assert np.isnan(got[2])
    assert not np.signbit(got[3])
    assert got[4] == -2
    assert apply("min.f32 %r10, %r2, %r3;", a, b).view(np.float32)[4] == -3


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_are_rounded_as_in_torch(name, dtype):
    for seed in range(5):
        a = floats(seed)
        if dtype == torch.float16 and seed % 2:
            a = np.where(np.abs(a) < 1e30, a, 0) * np.float32(2.0**20)
        expected = torch.from_numpy(a).to(dtype)
        instructions = f"cvt.rn.{name}.f32 %rs1, %r2; cvt.f32.{name} %r10, %rs1;"
        same(apply(instructions, a), expected.float().numpy())
        pair = apply(f"cvt.rn.{name}x2.f32 %r10, %r2, %r3;", a, a[::-1])
        high = (pair.view(np.uint32) >> 16).astype(np.uint16)
        low = (pair.view(np.uint32) & 0xFFFF).astype(np.uint16)
        finite = ~np.isnan(a)
        bits = expected.view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(high[finite], bits[finite])
        assert np.array_equal(low[finite[::-1]], bits[::-1][finite[::-1]])


def test_integers():
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-(2**31), 2**31, 64, dtype=np.int64).astype(np.int32) for _ in range(2))
    wide = a.astype(np.int64) * b
    assert np.array_equal(apply("mul.lo.s32 %r10, %r2, %r3;", a, b), wide.astype(np.int32))
    assert np.array_equal(apply("mul.hi.s32 %r10, %r2, %r3;", a, b), (wide >> 32).astype(np.int32))
    unsigned = a.view(np.uint32).astype(np.uint64) * b.view(np.uint32)
    assert np.array_equal(apply("mul.hi.u32 %r10, %r2, %r3;", a, b), (unsigned >> 32).astype(np.uint32).view(np.int32))
    through = "mul.wide.u32 %rd9, %r2, %r3; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r10, %rd9;"
    assert np.array_equal(apply(through, a, b), (unsigned >> 32).astype(np.uint32).view(np.int32))
    assert np.array_equal(apply("bfe.u32 %r10, %r2, 4, 9;", a), a.view(np.uint32) >> 4 & 511)
    assert np.array_equal(apply("bfe.s32 %r10, %r2, 28, 4;", a), a >> 28)
    assert np.array_equal(apply("shl.b32 %r10, %r2, 32;", a), np.zeros(64))
    assert np.array_equal(apply("shr.s32 %r10, %r2, 99;", a), a >> 31)
    small = np.where(b % 1000 == 0, 1, b % 1000).astype(np.int32)
    quotient = np.trunc(a.astype(np.float64) / small).astype(np.int32)
    assert np.array_equal(apply("div.s32 %r10, %r2, %r3;", a, small), quotient)
    assert np.array_equal(apply("rem.s32 %r10, %r2, %r3;", a, small), a - quotient * small)
    bytes_of = (a.view(np.uint32) & 0xFFFF) | (b.view(np.uint32) << 16)
    assert np.array_equal(apply("prmt.b32 %r10, %r2, %r3, 0x5410U;", a, b).view(np.uint32), bytes_of)
    signed = "cvt.s8.s32 %rs1, %r2; cvt.s32.s8 %r10, %rs1;"
    assert np.array_equal(apply(signed, a), a.astype(np.int8).astype(np.int32))
    assert np.array_equal(apply("mov.b32 {_, %rs2}, %r2; cvt.u32.u16 %r10, %rs2;", a), a.view(np.uint32) >> 16)


def test_lanes_part_and_meet_again():
    """Collatz steps of each lane, as many as it needs; then a shuffle, for which all are back."""
    loop = """
        mov.b32 %r10, 0; mov.b32 %r20, %r2;
    $again: setp.eq.b32 %p1, %r20, 1; @%p1 bra $out;
        and.b32 %r21, %r20, 1; setp.eq.b32 %p2, %r21, 0; @!%p2 bra $odd;
        shr.u32 %r20, %r20, 1; bra.uni $next;
    $odd: mad.lo.s32 %r20, %r20, 3, 1;
    $next: add.s32 %r10, %r10, 1; bra.uni $again;
    $out: shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;
    """

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    starts = np.arange(1, 65, dtype=np.int32)
    expected = np.array([steps(int(n)) for n in starts]).reshape(-1, 2)[:, ::-1].reshape(-1)
    assert np.array_equal(apply(loop, starts), expected)


SHARED = ".extern .shared .align 16 .b8 memory[];"
OWN = "shl.b32 %r20, %r1, 2; xor.b32 %r21, %r1, 32; shl.b32 %r21, %r21, 2; st.shared.b32 [%r20], %r2;"


def test_shared_memory_with_and_without_a_barrier():
    a = np.arange(64, dtype=np.int32)
    swapped = apply(f"{OWN} bar.sync 0; ld.shared.b32 %r10, [%r21];", a, shared=SHARED, shared_size=256)
    assert np.array_equal(swapped, a ^ 32)
    with pytest.raises(Fault, match=r"thread 0 of block \(0, 0, 0\): reads shared memory that nobody wrote"):
        apply(f"{OWN} ld.shared.b32 %r10, [%r21];", a, shared=SHARED, shared_size=256)
    again = f"{OWN} bar.sync 0; ld.shared.b32 %r10, [%r21]; st.shared.b32 [%r20], %r10;"
    with pytest.raises(Fault, match=r"race: (reads|writes) shared memory that thread .* with no barrier"):
        apply(again, a, shared=SHARED, shared_size=256)
    within = f"{OWN} xor.b32 %r22, %r20, 4; ld.shared.b32 %r10, [%r22];"
    with pytest.raises(Fault, match="race: reads shared memory that thread 1 wrote"):
        apply(within, a, shared=SHARED, shared_size=256)
    of_warp = within.replace("ld.shared", "bar.warp.sync -1; ld.shared")
    assert np.array_equal(apply(of_warp, a, shared=SHARED, shared_size=256), a ^ 1)
    with pytest.raises(Fault, match="of 4 bytes at byte 256 of shared memory, which has 256"):
        apply("ld.shared.b32 %r10, [memory+256];", a, shared=SHARED, shared_size=256)


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ("ld.global.b32 %r10, [%rd5+4];", r"thread 63 .* 4 bytes at byte 256 of p0 \(64,\), which has 256"),
        ("ld.global.b32 %r10, [%rd1+-4];", r"at byte -4 of p0"),
        ("ld.global.b32 %r10, [%rd1+2];", r"to p0 \(64,\) is misaligned"),
        ("ld.global.v2.b32 {%r10, %r11}, [%rd1+4];", "misaligned"),
        ("mov.b64 %rd9, 64; ld.global.b32 %r10, [%rd9];", "that is no array"),
        (
            "setp.lt.u32 %p1, %r1, 5; @%p1 bra $a; bar.sync 0; bra.uni $b; $a: bar.sync 0; $b:",
            r"bar\.sync in a part of a warp",
        ),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra $a; bar.sync 0; bra.uni $b; $a: bar.sync 1; $b:", "different barriers"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.idx.b32 %r10, %r1, 9, 31, -1;", "without all of its lanes"),
        ("cp.async.wait_group 0; $for: bra.uni $for;", "still running"),
    ],
)
def test_faults(instructions, message, monkeypatch):
    monkeypatch.setattr("gpu_check.ptx.launch.LIMIT", 100_000)
    with pytest.raises(Fault, match=message):
        apply(instructions, np.arange(64, dtype=np.int32))


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ("tanh.approx.f32 %r10, %r2;", "kernel: unknown instruction tanh.approx.f32, in 'tanh.approx.f32 %r10, %r2'"),
        ("add.s32 %r10, %rd1, %r2;", "register %rd1 has 8 bytes, the instruction takes 4"),
        ("add.s32 %r10, %r2;", "2 operands, expected 3"),
        ("add.s32 %r10, %r2, %r2000;", "operand '%r2000'"),
        (".const .b8 table[16];", "a directive"),
    ],
)
def test_what_is_unknown_is_an_error(instructions, message):
    with pytest.raises(Unknown) as caught:
        apply(instructions, np.arange(64, dtype=np.int32))
    assert message in str(caught.value)


def test_a_race_between_blocks_is_judged_by_the_opposite_order():
    """Which block comes last decides, or it does not matter."""

    def run(value):
        out = torch.zeros(1, dtype=torch.int32)
        store = f"mov.u32 %r2, %ctaid.x; {value} setp.eq.b32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], %r2;"
        ptx = kernel(f"mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; {store}", 1)
        return execute(parse(ptx), (3,), [("out", out)], 0)[1], int(out)

    assert run("mov.b32 %r2, 7;") == ([], 7)  # the same value
    with pytest.raises(Fault, match=r"depend on the order of blocks and warps; .* race: writes out"):
        run("")
