"""ddpm_step: the whole reverse update, exact on every backend, with every option."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import DTYPES, IMAGE, MEMORY, SHAPES, Guarded, assert_same, in_memory, rand, reference, to

import ddpm_fast
from ddpm_fast import noise as spec
from ddpm_fast import ops

INF = float("inf")
# a, b, c1, c2, c3, c4, s, clip: direct form, clipped with noise, multistep, last step
TABLE = torch.tensor(
    [
        [1.25, 0.75, 0.0, 1.01, -0.02, 0.0, 0.3, INF],
        [1.1, 0.46, 0.6, 0.38, 0.0, 0.0, 0.21, 1.0],
        [1.05, 0.3, 0.7, 0.2, 0.05, -0.1, 0.125, 0.8],
        [1.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    ]
)
T_OF_ROW = torch.tensor([900, 600, 300, 0], dtype=torch.int32)
RNG = spec.make_rng(31, 6)
# log of the smallest and of the largest variance of each row
LOGVAR_RANGE = torch.tensor([[-4.0, -2.5], [-6.0, -3.0], [-9.2, -4.1], [-9.2, -4.6]])


def row(index: int) -> torch.Tensor:
    return torch.tensor([index])


def step(device, x, m, index, **options):
    """Runs on the device; returns every output by name."""
    x, options = to(device, x).clone(memory_format=torch.preserve_format), to(device, options)
    options.setdefault("rng", to(device, RNG) if "noise" not in options else None)
    returned = ops.ddpm_step(
        x, to(device, m), to(device, TABLE), to(device, T_OF_ROW), to(device, row(index)), **options
    )
    assert returned is x
    return {"x": x, **{name: options[name] for name in ("x0_out", "copy_out", "bad_row") if name in options}}


def check(device, x, m, index, **options):
    def outputs():
        """Fresh outputs for each run."""
        return {k: v.clone() if k in ("x0_out", "copy_out", "bad_row") else v for k, v in options.items()}

    expected = reference(step, torch.device("cpu"), x, m, index, **outputs())
    got = step(device, x, m, index, **outputs())
    for name, value in expected.items():
        assert_same(got[name], value)
    return got


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, kind, index):
    check(device, rand(IMAGE, kind=kind), rand(IMAGE, dtype, seed=1, kind=kind), index)


OPTIONS = {
    "noise": lambda: rand(IMAGE, seed=2),
    "guidance": lambda: torch.tensor([2.5]),
    "x0_prev": lambda: rand(IMAGE, seed=4),
    "logvar": lambda: rand(IMAGE, seed=5) - 2,
    "logvar_range": lambda: LOGVAR_RANGE,
    "threshold": lambda: torch.tensor([0.5, 1.5]),
    "x0_out": lambda: torch.zeros(IMAGE),
    "copy_out": lambda: torch.zeros(IMAGE, dtype=torch.bfloat16),
    "bad_row": lambda: torch.tensor([-1], dtype=torch.int32),
}


@pytest.mark.parametrize(
    "names", [(), *itertools.combinations(OPTIONS, 1), *itertools.combinations(OPTIONS, 2), tuple(OPTIONS)]
)
def test_every_option_alone_in_pairs_and_together(device, names):
    options = {name: OPTIONS[name]() for name in names}
    if "guidance" in options:
        options["m_uncond"] = rand(IMAGE, seed=6)
    if "logvar_range" in options:
        options["logvar"] = rand(IMAGE, seed=5).clamp(-1, 1)
    for kind in ("contiguous", "channels_last"):
        check(device, rand(IMAGE, kind=kind), rand(IMAGE, seed=1, kind=kind), 2, **options)


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learned_range_matches_reference(device, dtype, kind):
    for index in range(4):
        v = rand(IMAGE, dtype, seed=5, kind=kind).clamp(-1, 1)
        options = {"logvar": v, "logvar_range": LOGVAR_RANGE, "noise": rand(IMAGE, seed=2, kind=kind)}
        check(device, rand(IMAGE, kind=kind), rand(IMAGE, dtype, seed=1, kind=kind), index, **options)


def test_learned_range_lies_between_its_ends(device):
    """v = -1 is the smallest variance, 1 the largest, 0 the geometric mean: f max + (1 - f) min, f = (v + 1) / 2."""
    x, m, z = torch.zeros(IMAGE), torch.zeros(IMAGE), rand(IMAGE, seed=2)
    low, high = LOGVAR_RANGE[1].double()
    for v, log_variance in ((-1.0, low), (1.0, high), (0.0, (low + high) / 2), (0.5, 0.75 * high + 0.25 * low)):
        got = step(device, x, m, 1, noise=z, logvar=torch.full(IMAGE, v), logvar_range=LOGVAR_RANGE)["x"].cpu()
        exact = torch.exp(log_variance / 2) * z.double()
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)  # the polynomial's exp, and a few roundings


@pytest.mark.parametrize("outside", [-1, 4, 2**40])
def test_learned_range_outside_the_table_gives_nan(device, outside):
    got = step(device, rand(IMAGE), rand(IMAGE, seed=1), outside, logvar=torch.zeros(IMAGE), logvar_range=LOGVAR_RANGE)
    assert bool(got["x"].isnan().all())


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("x_kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [IMAGE, (2, 3, 5, 7), (1, 3, 33, 32)], ids=str)
def test_history_may_be_kept_in_place(device, shape, x_kind, kind):
    """One tensor as x0_prev and x0_out: each element is read before it is written."""
    x, m, before = rand(shape, kind=x_kind), rand(shape, seed=1), rand(shape, seed=4)
    expected = reference(step, torch.device("cpu"), x, m, 2, x0_prev=before, x0_out=torch.zeros(shape))
    history = in_memory(to(device, before), kind)
    got = step(device, x, m, 2, x0_prev=history, x0_out=history)
    assert got["x0_out"] is history
    assert_same(got["x"], expected["x"])
    assert_same(history, expected["x0_out"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_awkward_inputs(device, shape):
    for dtype, kind in ((torch.float32, "contiguous"), (torch.float16, "offset")):
        m = rand(shape, dtype, seed=1, kind=kind)
        options = {"x0_out": torch.zeros(shape), "copy_out": torch.zeros(shape, dtype=torch.float16)}
        check(device, rand(shape, kind=kind), m, 1, **options)


def test_writes_nothing_beside_its_outputs(device):
    for shape in ((2, 3, 5, 7), (1, 1, 3, 3), (2, 4, 4, 4)):
        for last in (False, True):
            guarded = [
                Guarded(shape, d, device, last) for d in (torch.float32, torch.float32, torch.bfloat16, torch.uint8)
            ]
            x, x0_out, copies = guarded[0].view, guarded[1].view, guarded[2:]
            for copy in copies:
                x.copy_(rand(shape))
                ops.ddpm_step(
                    x,
                    to(device, rand(shape, seed=1)),
                    to(device, TABLE),
                    to(device, T_OF_ROW),
                    to(device, row(1)),
                    to(device, RNG),
                    x0_out=x0_out,
                    copy_out=copy.view,
                )
            expected = reference(step, torch.device("cpu"), rand(shape), rand(shape, seed=1), 1)["x"]
            assert_same(x, expected)
            assert_same(copies[0].view, expected.bfloat16())
            assert all(buffer.intact() for buffer in guarded)


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_copy_in_another_dtype_and_memory_format(device, dtype, kind):
    for x_kind in ("contiguous", "channels_last"):
        copy = in_memory(torch.zeros(IMAGE, dtype=dtype), kind)
        check(device, rand(IMAGE, kind=x_kind), rand(IMAGE, seed=1), 1, copy_out=copy)


def test_bytes_are_rounded_half_to_even_and_saturated(device):
    """A row that leaves x as it is: 0.5, 1.5, ... and the ends of the range."""
    identity = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, INF]])
    x = torch.cat([torch.arange(0, 256) / 127.5 - 1, (torch.arange(0, 255) + 0.5) / 127.5 - 1])
    x = torch.cat([x, torch.tensor([-1.5, 1.5, 1e30, -1e30, float("nan"), -1.0, 1.0])])[None]
    out = torch.zeros(x.shape, dtype=torch.uint8, device=device)
    t_of_row = to(device, torch.zeros(1, dtype=torch.int32))
    m = torch.zeros(x.shape, device=device)
    ops.ddpm_step(to(device, x.clone()), m, to(device, identity), t_of_row, to(device, row(0)), copy_out=out)
    expected = torch.round(((x + 1) * 127.5).clamp(0, 255)).nan_to_num(0).to(torch.uint8)
    assert_same(out, expected)


def test_equals_eager_pytorch_bit_for_bit(device):
    """The line a user would write, operation by operation."""
    x, m, z = rand(IMAGE), rand(IMAGE, seed=1), rand(IMAGE, seed=2)
    a, b, c1, c2, c3, _, s, bound = TABLE[1]
    x0 = (a * x - b * m).clamp(-bound, bound)
    expected = c1 * x0 + c2 * x + c3 * m + s * z
    got = step(device, x, m, 1, noise=z, x0_out=torch.zeros(IMAGE))
    assert_same(got["x"], expected)
    assert_same(got["x0_out"], x0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drawn_noise_equals_given_noise(device, dtype):
    x, m = rand((3, 2, 5, 3)), rand((3, 2, 5, 3), dtype, seed=1)
    z = ddpm_fast.normal(3, (2, 5, 3), rng=to(device, RNG), stream=1 + 600).cpu()
    assert_same(step(device, x, m, 1)["x"], step(device, x, m, 1, noise=z)["x"].cpu())


def test_noise_is_neither_drawn_nor_read_where_s_is_zero(device):
    poison = torch.full(IMAGE, float("nan"))
    got = step(device, rand(IMAGE), rand(IMAGE, seed=1), 3, noise=poison)["x"]
    assert bool(got.isfinite().all())
    without = step(device, rand(IMAGE), rand(IMAGE, seed=1), 3, rng=None)["x"]
    assert torch.equal(got, without)


@pytest.mark.parametrize("outside", [-1, 4, 2**40])
def test_row_outside_the_table_gives_nan_and_says_so(device, outside):
    bad = torch.tensor([-1], dtype=torch.int32)
    got = step(device, rand(IMAGE), rand(IMAGE, seed=1), outside, bad_row=bad)
    assert bool(got["x"].isnan().all())
    assert got["bad_row"].item() >= 0


def test_bad_row_is_the_first_that_wrote_a_non_finite_value(device):
    x, bad = to(device, rand(IMAGE)), to(device, torch.tensor([-1], dtype=torch.int32))
    fine, broken = to(device, rand(IMAGE, seed=1)), to(device, rand(IMAGE, seed=1))
    broken[1, 2, 5, 5] = INF
    seen = []
    for index, m in enumerate((fine, broken, broken)):
        ops.ddpm_step(
            x, m, to(device, TABLE), to(device, T_OF_ROW), to(device, row(index)), to(device, RNG), bad_row=bad
        )
        seen.append(bad.item())
    assert seen == [-1, 1, 1]


def test_nan_is_kept_by_the_clip(device):
    m = rand(IMAGE, seed=1)
    m[0, 0, 0, 0] = float("nan")
    got = step(device, rand(IMAGE), m, 1)["x"].cpu()
    assert got.isnan().nonzero().tolist() == [[0, 0, 0, 0]]


def test_model_output_that_requires_grad_is_used_without_its_history(device):
    m = to(device, rand(IMAGE, seed=1)).requires_grad_()
    x = to(device, rand(IMAGE))
    ops.ddpm_step(x, m * 1, to(device, TABLE), to(device, T_OF_ROW), to(device, row(1)), to(device, RNG))
    assert not x.requires_grad


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "sliced"])
def test_opcheck(device, kind):
    x, m = to(device, rand(IMAGE, kind=kind)), to(device, rand(IMAGE, torch.bfloat16, seed=1, kind=kind))
    tail = (
        *(None, None, None, None),
        torch.zeros_like(m),
        to(device, LOGVAR_RANGE),
        None,
        torch.zeros_like(x),
        torch.zeros_like(m),
        to(device, OPTIONS["bad_row"]()),
    )
    arguments = (x, m, to(device, TABLE), to(device, T_OF_ROW), to(device, row(1)), to(device, RNG), *tail)
    torch.library.opcheck(torch.ops.ddpm_fast.ddpm_step.default, arguments)


X, M, STORE = rand(IMAGE), rand(IMAGE, seed=1), torch.zeros(220)
GOOD = {"table": TABLE, "t_of_row": T_OF_ROW, "row": row(1), "rng": RNG}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"m": M[..., :5]}, ValueError, r"m must have shape \(2, 3, 6, 6\), got \(2, 3, 6, 5\)"),
        ({"m": M.long()}, TypeError, "m must be float32, bfloat16 or float16, got int64"),
        ({"m": None}, TypeError, "m must be a torch.Tensor, got None"),
        ({"m": M.to("meta")}, ValueError, "m must be on cpu like x, got meta"),
        ({"x": X.half()}, TypeError, "x must be float32 or float64, got float16"),
        ({"x": X.clone().requires_grad_()}, ValueError, "x is overwritten and must not require grad"),
        ({"x": X[:1].expand(IMAGE)}, ValueError, "x is an expanded tensor whose elements share memory"),
        ({"m": X}, ValueError, r"x is written while m is read, so they must not share memory; pass m.clone\(\)"),
        ({"x0_out": X}, ValueError, "x is written while x0_out is read"),
        ({"x0_out": M}, ValueError, "x0_out is written while m is read"),
        ({"copy_out": M}, ValueError, "copy_out is written while m is read"),
        (
            {"table": TABLE[:, :5]},
            ValueError,
            r"table must have shape \(steps, 8\) \(see Schedule.step_table\), got \(4, 5\)",
        ),
        ({"t_of_row": T_OF_ROW[:2]}, ValueError, r"t_of_row must have shape \(4,\), got \(2,\)"),
        ({"t_of_row": T_OF_ROW.long()}, TypeError, "t_of_row must be int32, got int64"),
        ({"row": torch.tensor(1)}, ValueError, r"row must have shape \(1,\), got \(\)"),
        ({"row": 1}, TypeError, "row must be a torch.Tensor, got int"),
        ({"rng": RNG.int()}, TypeError, "rng must be int64, got int32"),
        ({"noise": M.bfloat16()}, TypeError, "noise must be float32, got bfloat16"),
        ({"guidance": torch.ones(1)}, ValueError, "m_uncond and guidance belong together"),
        ({"m_uncond": M}, ValueError, "m_uncond and guidance belong together"),
        ({"m_uncond": M, "guidance": torch.ones(2)}, ValueError, r"guidance must have shape \(1,\), got \(2,\)"),
        ({"logvar_range": LOGVAR_RANGE}, ValueError, r"logvar_range needs logvar: the network's v in \[-1, 1\]"),
        (
            {"logvar": M, "logvar_range": LOGVAR_RANGE[:3]},
            ValueError,
            r"logvar_range must have shape \(4, 2\), got \(3, 2\)",
        ),
        ({"logvar": M, "logvar_range": LOGVAR_RANGE.double()}, TypeError, "logvar_range must be float32, got float64"),
        (
            {"x0_prev": X.view(-1).view(IMAGE)},
            ValueError,
            "x is written while x0_prev is read, so they must not share memory",
        ),
        (
            {"x0_prev": STORE[:216].view(IMAGE), "x0_out": STORE[4:220].view(IMAGE)},
            ValueError,
            "x0_out is written while x0_prev is read",
        ),
        ({"threshold": torch.ones(3)}, ValueError, r"threshold must have shape \(2,\), got \(3,\)"),
        ({"copy_out": M.long()}, TypeError, "copy_out must be float32, bfloat16, float16 or uint8, got int64"),
        ({"bad_row": torch.zeros(1)}, TypeError, "bad_row must be int32, got float32"),
    ],
)
def test_bad_input(changed, error, message):
    before = X.clone()
    with pytest.raises(error, match=message):
        ops.ddpm_step(**{"x": X, "m": M, **GOOD, **changed})
    assert torch.equal(X, before), "nothing is written before the error"
