"""normal and random_bits: the noise is what the specification says, on every backend, for every split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import DTYPES, SHAPES, Guarded, assert_same, in_memory

import ddpm_fast
from ddpm_fast import noise as spec
from ddpm_fast import ops

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_normal.json").read_text())


def bits(z: torch.Tensor) -> np.ndarray:
    return z.detach().cpu().contiguous().numpy().view(np.uint32)


@pytest.mark.parametrize("case", GOLDEN[:-1], ids=lambda case: f"seed={case['seed']}-stream={case['stream']}")
def test_golden_values(device, case):
    z = ddpm_fast.normal(
        1,
        (len(case["bits"]),),
        seed=case["seed"],
        first_sample=case["sample"],
        stream=case["stream"],
        device=device,
    )
    assert [f"{int(word):08x}" for word in bits(z)[0]] == case["bits"]


def test_golden_checksum_of_200_000_values(device):
    case = GOLDEN[-1]
    z = ddpm_fast.normal(64, (case["elements"],), seed=case["seed"], stream=case["stream"], device=device)
    assert f"{int(np.bitwise_xor.reduce(bits(z).ravel())):08x}" == case["xor_of_bits"]
    assert z.double().mean().item() == pytest.approx(case["mean"], abs=1e-12)
    assert z.double().std(correction=0).item() == pytest.approx(case["std"], abs=1e-12)


def test_numpy_equals_published_philox_answers():
    """Random123's known answers for Philox4x32-10."""

    def words(seed, *counter):
        return [
            f"{int(w[0]):08x}" for w in spec.philox4x32_10(seed, *(np.array([c], dtype=np.uint32) for c in counter))
        ]

    assert words(0, 0, 0, 0, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert words(2**64 - 1, ones, ones, ones, ones) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_numpy_is_standard_normal():
    z = spec.normal(7, 0, 64, 0, 4096).astype(np.float64).ravel()
    assert abs(z.mean()) < 5 / z.size**0.5
    assert abs(z.std() - 1) < 5 / (2 * z.size) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / z.size) ** 0.5
    neighbours = spec.normal(7, 0, 64, 1, 4096).astype(np.float64).ravel()
    assert abs((z * neighbours).mean()) < 5 / z.size**0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_awkward_inputs(device, shape):
    elements = int(np.prod(shape[1:]))
    expected = spec.normal(11, 5, shape[0], 3, elements).reshape(shape)
    guarded = Guarded(shape, torch.float32, device)
    ops.normal(shape[0], shape[1:], seed=11, first_sample=5, stream=3, out=guarded.view)
    assert_same(guarded.view, torch.from_numpy(expected.copy()))
    assert guarded.intact()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "sliced", "offset"])
def test_same_for_any_memory_format_and_dtype(device, dtype, kind):
    expected = torch.from_numpy(spec.normal(3, 9, 2, 1, 3 * 6 * 6).reshape(2, 3, 6, 6).copy()).to(dtype)
    out = in_memory(torch.zeros(2, 3, 6, 6, dtype=dtype), kind)
    out = torch.empty_strided(out.shape, out.stride(), dtype=dtype, device=device)
    returned = ops.normal(2, (3, 6, 6), seed=3, first_sample=9, stream=1, out=out)
    assert returned is out
    assert_same(out, expected)


def test_same_for_any_batch_split(device):
    whole = ddpm_fast.normal(5, (3, 7, 5), seed=1, first_sample=2**40, device=device)
    for start, stop in ((0, 1), (1, 3), (3, 5)):
        part = ddpm_fast.normal(stop - start, (3, 7, 5), seed=1, first_sample=2**40 + start, device=device)
        assert torch.equal(part, whole[start:stop])


def test_seed_from_a_device_tensor(device):
    rng = spec.make_rng(2**64 - 1, 3, device)
    from_rng = ddpm_fast.normal(2, (9,), rng=rng, stream=4)
    assert torch.equal(from_rng, ddpm_fast.normal(2, (9,), seed=2**64 - 1, first_sample=3, stream=4, device=device))


def test_last_stream(device):
    z = ddpm_fast.normal(1, (6,), seed=5, stream=2**32 - 1, device=device)
    assert_same(z, torch.from_numpy(spec.normal(5, 0, 1, 2**32 - 1, 6).copy()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_bits_matches_reference(device, shape):
    got = ops.random_bits(shape[0], shape[1:], seed=6, first_sample=2, stream=2**31 + 1, device=device)
    expected = spec.random_bits(6, 2, shape[0], 2**31 + 1, int(np.prod(shape[1:])))
    assert_same(got, torch.from_numpy(expected.astype(np.int64).reshape(shape)))


def test_random_bits_into_a_sliced_tensor(device):
    out = torch.zeros(3, 8, dtype=torch.int64, device=device)[:, ::2]
    ops.random_bits(3, (4,), seed=6, out=out)
    assert torch.equal(out, ops.random_bits(3, (4,), seed=6, device=device))


def test_opcheck(device):
    rng = spec.make_rng(1, 2, device)
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    for out in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.ddpm_fast.normal.default, (out.to(device), rng, 3), test_utils=utils)
    integers = torch.zeros(2, 5, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.ddpm_fast.random_bits.default, (integers, rng, 3), test_utils=utils)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "n must be an integer >= 0, got -1"),
        ({"shape": (3, -2)}, "shape must be integers >= 0"),
        ({"seed": None}, "exactly one of seed and rng, got neither"),
        ({"rng": torch.zeros(2, dtype=torch.int64)}, "exactly one of seed and rng, got both"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"first_sample": -4}, "first_sample must be an integer"),
        ({"stream": 2**32}, "stream must be in"),
        ({"out": torch.zeros(2, 4)}, r"out must have shape \(2, 3\), got \(2, 4\)"),
        ({"out": torch.zeros(1, 1).expand(2, 3)}, "out is an expanded tensor"),
        ({"seed": None, "rng": torch.zeros(3, dtype=torch.int64)}, r"rng must have shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.normal(**{"n": 2, "shape": (3,), "seed": 1, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [{"dtype": torch.int32}, {"out": torch.zeros(2, 3, dtype=torch.int32)}, {"seed": None, "rng": torch.zeros(2)}],
)
def test_bad_type(arguments):
    with pytest.raises(TypeError, match="must be"):
        ops.normal(**{"n": 2, "shape": (3,), "seed": 1, **arguments})
