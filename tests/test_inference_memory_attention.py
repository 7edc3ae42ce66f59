"""Linear attention, and attention with memory tokens, of the CPU layers against float64, for every instruction set that
can be used here.

Layers run through `_C.Program` as in a plan, on slices of wider buffers with guard values around what they write.
"""

from __future__ import annotations

import pytest
import torch
from inference_models import relative_error
from inference_programs import COLUMNS, DTYPES, Tables, guards_hold, random, slice_of
from torch import Tensor

from ddpm_fast.backends import native as extension
from ddpm_fast.inference import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension has no inference layers here")

# A bfloat16 is off by 2^-9 at most, half of that on average; the probabilities are rounded, too.
ATTENTION_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3.5e-3}


def output_of(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


class Attend:
    """An attention layer with memory tokens; qkv: [n, tokens, 3 c] slice, memory: [2, heads, tokens, c / heads]."""

    def __init__(self, heads: int, memory: Tensor) -> None:
        self.heads, self.memory, self.scale = heads, memory, memory.shape[-1] ** -0.5

    def add(self, program, isa: str, qkv: Tensor, y: Tensor) -> None:
        n, tokens, c = y.shape
        keys, values = self.memory
        what = (n, tokens, c, self.heads, self.scale, keys.data_ptr(), values.data_ptr(), keys.shape[1])
        program.attention(isa, *what, qkv.data_ptr(), qkv.stride(1), y.data_ptr(), y.stride(1))

    def run(self, isa: str, qkv: Tensor, y: Tensor, threads: int = 1) -> Tensor:
        program = extension._C.Program(COLUMNS)
        self.add(program, isa, qkv, y)
        Tables(len(y), labels=False).run(program, threads)
        return y

    def exact(self, qkv: Tensor) -> Tensor:
        n, tokens, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.double().reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keys, values = (part.to(qkv.dtype).double().expand(n, *part.shape) for part in self.memory)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        scores = q @ k.transpose(2, 3) * self.scale
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, c)


@pytest.mark.parametrize("isa", DTYPES)
class TestAttentionWithMemory:
    @pytest.mark.parametrize(
        ("n", "tokens", "c", "heads", "memory"),
        [
            (1, 1, 16, 1, 4),
            (2, 16, 128, 4, 4),
            (3, 37, 48, 2, 5),  # 24 channels a head
            (1, 256, 64, 2, 4),  # one block of keys
            (1, 270, 64, 2, 4),  # two
            (2, 3, 32, 1, 300),  # the memory alone is more than a block
            (1, 40, 16, 2, 1),
        ],
    )
    def test_matches_float64(self, isa, n, tokens, c, heads, memory) -> None:
        attend = Attend(heads, random(2, heads, memory, c // heads, seed=6))
        source, qkv = slice_of(random(n, tokens, 3 * c, seed=4, dtype=DTYPES[isa]), before=2, after=0)
        target, y = slice_of(torch.zeros(n, tokens, c, dtype=DTYPES[isa]), before=6, after=2)
        exact = attend.exact(qkv)
        attend.run(isa, qkv, y)
        assert relative_error(y, exact) < ATTENTION_TOLERANCE[DTYPES[isa]]
        assert guards_hold(target, y)
        assert guards_hold(source, qkv)
        for threads in (2, 3):
            assert torch.equal(attend.run(isa, qkv, torch.empty_like(y), threads), y)
        assert torch.equal(attend.run(isa, qkv[:1], torch.empty_like(y[:1])), y[:1])

    def test_scores_far_beyond_what_exponentials_hold(self, isa) -> None:
        attend = Attend(2, random(2, 2, 4, 16, seed=6) * 100)
        qkv = random(1, 20, 96, seed=4, dtype=DTYPES[isa]) * 100
        got = attend.run(isa, qkv, output_of(qkv))
        assert relative_error(got, attend.exact(qkv)) < 2 * ATTENTION_TOLERANCE[DTYPES[isa]]

    def test_new_values_in_the_memory_are_used(self, isa) -> None:
        """Weights are rewritten in place."""
        attend, tables = Attend(1, random(2, 1, 4, 16, seed=6)), Tables(1, labels=False)
        qkv = random(1, 5, 48, seed=4, dtype=DTYPES[isa])
        program, y = extension._C.Program(COLUMNS), output_of(qkv)
        attend.add(program, isa, qkv, y)
        for seed in (6, 7):
            attend.memory.copy_(random(2, 1, 4, 16, seed=seed))
            tables.run(program, 1)
            assert relative_error(y, attend.exact(qkv)) < ATTENTION_TOLERANCE[DTYPES[isa]]


class LinearAttend(Attend):
    """A linear attention layer; memory: [2, heads, c / heads, tokens]."""

    def __init__(self, heads: int, memory: Tensor) -> None:
        self.heads, self.memory, self.scale = heads, memory, memory.shape[-2] ** -0.5

    def add(self, program, isa: str, qkv: Tensor, y: Tensor) -> None:
        n, tokens, c = y.shape
        keys, values = self.memory
        count = keys.shape[-1]
        memory = (keys.data_ptr(), values.data_ptr(), count) if count else (0, 0, 0)
        what = (n, tokens, c, self.heads, self.scale, *memory)
        program.linear_attention(isa, *what, qkv.data_ptr(), qkv.stride(1), y.data_ptr(), y.stride(1))

    def exact(self, qkv: Tensor) -> Tensor:
        n, tokens, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.double().reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        keys, values = (part.to(qkv.dtype).double().expand(n, *part.shape) for part in self.memory)
        k, v = torch.cat([keys, k], 3).softmax(3), torch.cat([values, v], 3)
        out = (k @ v.transpose(2, 3)).transpose(2, 3) @ (q.softmax(2) * self.scale)
        return out.reshape(n, c, tokens).transpose(1, 2)


@pytest.mark.parametrize("isa", DTYPES)
class TestLinearAttention:
    @pytest.mark.parametrize(
        ("n", "tokens", "c", "heads", "memory"),
        [
            (1, 1, 16, 1, 4),
            (2, 5, 64, 4, 4),
            (1, 64, 128, 4, 4),
            (3, 257, 64, 2, 3),  # two parts
            (1, 700, 48, 1, 4),  # three; 48 channels a head
            (2, 33, 160, 2, 5),  # 80: two groups of columns
            (1, 20, 32, 2, 270),  # a memory of two parts
            (2, 40, 64, 2, 0),
        ],
    )
    def test_matches_float64(self, isa, n, tokens, c, heads, memory) -> None:
        attend = LinearAttend(heads, random(2, heads, c // heads, memory, seed=6))
        source, qkv = slice_of(random(n, tokens, 3 * c, seed=4, dtype=DTYPES[isa]) * 2, before=16, after=2)
        target, y = slice_of(torch.zeros(n, tokens, c, dtype=DTYPES[isa]), before=16, after=8)
        exact = attend.exact(qkv)
        attend.run(isa, qkv, y)
        assert relative_error(y, exact) < ATTENTION_TOLERANCE[DTYPES[isa]]
        assert guards_hold(target, y)
        assert guards_hold(source, qkv)
        for threads in (2, 3):
            assert torch.equal(attend.run(isa, qkv, torch.empty_like(y), threads), y)
        assert torch.equal(attend.run(isa, qkv[:1], torch.empty_like(y[:1])), y[:1])

    @pytest.mark.parametrize("order", [1, -1])
    def test_keys_that_grow_or_fall_from_part_to_part(self, isa, order) -> None:
        """Each part has its own largest key, and exponentials of all are far beyond a float."""
        tokens, c = 800, 32
        qkv = random(1, tokens, 3 * c, seed=5)
        qkv[..., c : 2 * c] += torch.arange(tokens)[None, :, None] * (order * 0.5)
        qkv[..., :c] *= 100
        qkv, attend = qkv.to(DTYPES[isa]), LinearAttend(2, random(2, 2, 16, 4, seed=6))
        got = attend.run(isa, qkv, output_of(qkv))
        assert relative_error(got, attend.exact(qkv)) < 2 * ATTENTION_TOLERANCE[DTYPES[isa]]

    def test_a_memory_far_above_the_image_rules(self, isa) -> None:
        attend = LinearAttend(1, random(2, 1, 16, 4, seed=6))
        attend.memory[0] += 200
        qkv = random(2, 30, 48, seed=5, dtype=DTYPES[isa])
        got = attend.run(isa, qkv, output_of(qkv))
        assert relative_error(got, attend.exact(qkv)) < ATTENTION_TOLERANCE[DTYPES[isa]]

    def test_equal_keys_average_the_values(self, isa) -> None:
        qkv = random(2, 4096, 48, seed=6, dtype=DTYPES[isa])
        qkv[..., :32] = 3
        got = LinearAttend(1, torch.empty(2, 1, 16, 0)).run(isa, qkv, output_of(qkv), threads=2).double()
        mean = qkv[..., 32:].double().mean(1, keepdim=True) * 16**-0.5
        assert relative_error(got, mean.expand_as(got)) < ATTENTION_TOLERANCE[DTYPES[isa]]

    def test_nan_stays_in_its_image_and_head(self, isa) -> None:
        qkv = random(2, 20, 96, seed=8, dtype=DTYPES[isa])
        qkv[1, 3, 17] = float("nan")  # a query of the second head: of its pixel alone
        qkv[0, 4, 33] = float("nan")  # a key of the first: of all pixels
        got = LinearAttend(2, random(2, 2, 16, 4, seed=6)).run(isa, qkv, output_of(qkv))
        assert got[1, 3, 16:].isnan().all()
        assert got[0, :, :16].isnan().all()
        assert got.isnan().sum() == 16 + 20 * 16

    def test_new_values_in_the_memory_are_used(self, isa) -> None:
        attend, tables = LinearAttend(1, random(2, 1, 16, 4, seed=6)), Tables(1, labels=False)
        qkv = random(1, 5, 48, seed=4, dtype=DTYPES[isa])
        program, y = extension._C.Program(COLUMNS), output_of(qkv)
        attend.add(program, isa, qkv, y)
        for seed in (6, 7):
            attend.memory.copy_(random(2, 1, 16, 4, seed=seed))
            tables.run(program, 1)
            assert relative_error(y, attend.exact(qkv)) < ATTENTION_TOLERANCE[DTYPES[isa]]


class TestBadInput:
    @pytest.mark.parametrize("which", ["attention", "linear_attention"])
    def test_memory_needs_its_tokens(self, which) -> None:
        layer = getattr(extension._C.Program(0), which)
        for keys, values, tokens in ((0, 8, 4), (8, 0, 4), (8, 8, -1)):
            with pytest.raises(ValueError, match=f"memory needs keys, values and a number of tokens, got {tokens} tok"):
                layer(next(iter(DTYPES)), 1, 4, 32, 2, 1.0, keys, values, tokens, 0, 96, 0, 32)

    @pytest.mark.parametrize(
        ("n", "tokens", "c", "heads", "scale", "message"),
        [
            (0, 4, 32, 2, 1.0, "n and tokens must be at least 1, got 0 and 4"),
            (1, 0, 32, 2, 1.0, "n and tokens must be at least 1, got 1 and 0"),
            (1, 4, 48, 2, 1.0, "channels must be a multiple of 16 times the heads, got 48 channels and 2 heads"),
            (1, 4, 32, 0, 1.0, "channels must be a multiple of 16 times the heads, got 32 channels and 0 heads"),
            (1, 4, 32, 2, 0.0, "scale must be positive, got 0"),
        ],
    )
    def test_linear_attention(self, n, tokens, c, heads, scale, message) -> None:
        with pytest.raises(ValueError, match=message):
            extension._C.Program(0).linear_attention(
                next(iter(DTYPES)), n, tokens, c, heads, scale, 0, 0, 0, 0, 3 * c, 0, c
            )
