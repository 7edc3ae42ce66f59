"""Step tables: which timesteps, and every combination of choices against the papers' formulas in plain float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(1000)
LISTS = {
    "all": {"steps": None},
    "trailing": {"steps": 13, "spacing": "trailing"},
    "leading": {"steps": 20, "spacing": "leading", "steps_offset": 1},
    "linspace": {"steps": 7, "spacing": "linspace"},
    "sections": {"steps": "3,5,2"},
    "explicit": {"steps": [90, 37, 36, 4]},
    "one": {"steps": [99]},
}


class TestTimesteps:
    @pytest.mark.parametrize(
        ("spacing", "first", "last"),
        [
            ("leading", [980, 960, 940], [20, 0]),
            ("trailing", [999, 979, 959], [39, 19]),
            ("trailing_floor", [999, 979, 959], [39, 19]),
            ("linspace", [999, 979, 958], [20, 0]),
            ("linspace_open", [999, 979, 959], [40, 20]),
            ("leading_open", [950, 931, 912], [38, 19]),
            ("sections", [999, 979, 958], [20, 0]),
        ],
    )
    def test_fifty_of_a_thousand(self, spacing, first, last):
        timesteps = LINEAR.timesteps(50, spacing)
        assert len(timesteps) == 50
        assert list(timesteps[: len(first)]) == first
        assert list(timesteps[-2:]) == last

    def test_as_text(self):
        assert list(LINEAR.timesteps("ddim50")) == list(range(980, -1, -20))
        assert list(LINEAR.timesteps("50")) == list(LINEAR.timesteps(50, "sections"))
        ten, twenty = LINEAR.timesteps("10,10,20"), LINEAR.timesteps([10, 10, 20], "sections")
        assert list(ten) == list(twenty)
        assert len(ten) == 40
        # 1000 = 334 + 333 + 333; both ends of every section are taken.
        assert ten[-1] == 0
        assert ten[30] == 333
        assert ten[29] == 334
        assert ten[19] == 667
        assert ten[0] == 999

    def test_offset_trailing_floor_and_one_step(self):
        assert list(LINEAR.timesteps(4, "leading", steps_offset=1)) == [751, 501, 251, 1]
        assert list(LINEAR.timesteps(3, "trailing")) == [999, 666, 332]
        assert list(LINEAR.timesteps(3, "trailing_floor")) == [999, 665, 332]
        for spacing in ("trailing", "trailing_floor", "linspace", "linspace_open"):
            assert list(LINEAR.timesteps(1, spacing)) == [999]
        assert list(LINEAR.timesteps(3, "leading_open", steps_offset=1)) == [751, 501, 251]

    @pytest.mark.parametrize("spacing", ["leading", "trailing", "trailing_floor", "linspace", "sections"])
    def test_strictly_descending_inside_and_complete_for_every_count(self, spacing):
        schedule = Schedule.linear(97)
        for steps in range(1, 98):
            timesteps = schedule.timesteps(steps, spacing)
            assert len(timesteps) == steps
            assert timesteps[-1] >= 0
            assert timesteps[0] <= 96
            assert (np.diff(timesteps) < 0).all()
        assert list(schedule.timesteps(97, spacing)) == list(range(96, -1, -1))

    @pytest.mark.parametrize("spacing", ["linspace_open", "leading_open"])
    def test_open_spacings_leave_0_out(self, spacing):
        schedule = Schedule.linear(97)
        for steps in range(1, 97):
            timesteps = schedule.timesteps(steps, spacing)
            assert len(timesteps) == steps
            assert timesteps[-1] >= 1
            assert timesteps[0] <= 96
            assert (np.diff(timesteps) < 0).all()
        with pytest.raises(ValueError, match=rf"steps must be in 1\.\.96 for spacing='{spacing}', .* got 97"):
            schedule.timesteps(97, spacing)

    def test_a_number_of_solver_steps_is_spread_to_the_open_end(self):
        assert list(LINEAR.step_table(4, method="dpmsolver++").timesteps) == [999, 749, 500, 250]
        assert list(LINEAR.step_table(4, method="dpmsolver++", spacing="trailing").timesteps) == [999, 749, 499, 249]
        assert len(LINEAR.step_table(method="dpmsolver++")) == 1000
        assert list(LINEAR.step_table([7, 3], method="dpmsolver++").timesteps) == [7, 3]

    def test_explicit_list_from_any_container(self):
        for steps in ([9, 4, 0], (9, 4, 0), np.array([9, 4, 0]), torch.tensor([9, 4, 0]), range(9, 2, -3)):
            assert list(LINEAR.timesteps(steps)) == [int(t) for t in steps]

    @pytest.mark.parametrize(
        ("steps", "spacing", "error", "message"),
        [
            (1001, None, ValueError, r"1\.\.1000 .* got 1001"),
            (0, None, ValueError, r"1\.\.1000 .* got 0"),
            (-3, "linspace", ValueError, "got -3"),
            ([1, 2], None, ValueError, "strictly descending, got 2 after 1"),
            ([5, 5, 1], None, ValueError, "strictly descending, got 5 after 5"),
            ([1000, 3], None, ValueError, r"0\.\.999, got 1000"),
            ([3, -1], None, ValueError, r"0\.\.999, got -1"),
            ([], None, ValueError, "empty list"),
            ([], "sections", ValueError, "empty list"),
            ([3.5, 1], None, TypeError, "made of ints, got 3.5"),
            ([True, False], None, TypeError, "made of ints"),
            (True, None, TypeError, "made of ints"),
            (50.0, None, TypeError, "int, a list of ints or text"),
            (10, "karras", ValueError, "leading, leading_open, .*got 'karras'"),
            (10, "explicit", ValueError, "needs steps as a descending list"),
            ([9, 1], "leading", ValueError, "takes no spacing, got 'leading'"),
            ("10,x", None, ValueError, "must look like"),
            ("ddim5,5", None, ValueError, "must look like"),
            ("", None, ValueError, "must look like"),
            ("50", "leading", ValueError, 'only spacing="sections"'),
            ("ddim300", None, ValueError, 'use steps=300 with spacing="trailing"'),
            ([600, 600], "sections", ValueError, "section 0 of 2 holds 500"),
            ([10, 0], "sections", ValueError, "section 1 of 2 .* got 0"),
        ],
    )
    def test_bad_lists(self, steps, spacing, error, message):
        with pytest.raises(error, match=message):
            LINEAR.timesteps(steps, spacing)

    def test_offset_out_of_range(self):
        with pytest.raises(ValueError, match=r"reaches timestep 1000, outside 0\.\.999"):
            LINEAR.timesteps(1000, "leading", steps_offset=1)
        with pytest.raises(ValueError, match="reaches timestep -1"):
            LINEAR.timesteps(10, "leading", steps_offset=-1)


def predicted_x0(x, m, A, prediction):
    if prediction == "eps":
        return (x - math.sqrt(1 - A) * m) / math.sqrt(A)
    return m if prediction == "x0" else math.sqrt(A) * x - math.sqrt(1 - A) * m


def textbook_step(x, m, z, A, P, *, method, prediction, variance, eta, clip, rederive_eps):
    """One reverse step from signal level A to P, as the papers write it; returns x0 and x_prev."""
    x0 = predicted_x0(x, m, A, prediction)
    unclipped = x0
    if clip:
        x0 = max(-clip, min(clip, x0))
    if method == "ddpm":  # Ho et al. 2020, eq. 6 and 7
        beta = 1 - A / P
        mean = math.sqrt(P) * beta / (1 - A) * x0 + math.sqrt(A / P) * (1 - P) / (1 - A) * x
        sigma = math.sqrt((1 - P) / (1 - A) * beta if variance == "fixed_small" else beta)
        return x0, mean + (sigma * z if P < 1 else 0.0)
    # Song et al. 2021, eq. 12 and 16
    eps = (x - math.sqrt(A) * (x0 if rederive_eps else unclipped)) / math.sqrt(1 - A)
    sigma = eta * math.sqrt((1 - P) / (1 - A)) * math.sqrt(1 - A / P)
    return x0, math.sqrt(P) * x0 + math.sqrt(max(1 - P - sigma**2, 0.0)) * eps + sigma * z


def table_step(row, x, m, z):
    a, b, c1, c2, c3, _, s, clip = row
    x0 = max(-clip, min(clip, a * x - b * m))
    return x0, c1 * x0 + c2 * x + c3 * m + s * z


COMBINATIONS = [
    *itertools.product(["ddpm"], ["eps", "x0", "v"], ["fixed_small", "fixed_large"], [0.0], [None, 0.7], [True]),
    *itertools.product(["ddim"], ["eps", "x0", "v"], ["fixed_large"], [0.0, 0.5, 1.0], [None, 0.7], [True, False]),
]


@pytest.mark.parametrize("timesteps", LISTS)
@pytest.mark.parametrize("schedule", [Schedule.linear(100), Schedule.cosine(100)], ids=["linear", "cosine"])
def test_every_combination_is_the_textbook_step(schedule, timesteps):
    random = np.random.default_rng(0)
    for method, prediction, variance, eta, clip, rederive_eps in COMBINATIONS:
        choice = {
            "method": method,
            "prediction": prediction,
            "variance": variance,
            "eta": eta,
            "clip": clip,
            "rederive_eps": rederive_eps,
        }
        steps = schedule.step_table(**LISTS[timesteps], **choice)
        signal = [math.prod(1 - b for b in schedule.betas[: t + 1]) for t in steps.timesteps] + [1.0]
        for row, coefficients in enumerate(steps.coefficients):
            for x, m, z in random.normal(size=(4, 3)):
                expected = textbook_step(x, m, z, signal[row], signal[row + 1], **choice)
                # 1 / sqrt(A) reaches 2e4 at the end of the cosine schedule, which scales what round-off is worth.
                scale = 1.0 + abs(coefficients[:2]).max()
                np.testing.assert_allclose(
                    table_step(coefficients, x, m, z), expected, rtol=0, atol=1e-11 * scale, err_msg=str((row, choice))
                )


def textbook_2m(x, x0, x0_prev, levels, row):
    """Lu et al. 2022, Algorithm 2: lambda = log(alpha / sigma), D from the last two estimates of the data."""
    alpha, sigma = ([f(A) for A in levels] for f in (math.sqrt, lambda A: math.sqrt(1 - A)))
    if row + 1 == len(levels) - 1:
        return x0  # h is infinite: sigma = 0, alpha = 1, e^-h = 0
    lam = [math.log(a / s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
    h = lam[row + 1] - lam[row]
    D = x0
    if row:
        r = (lam[row] - lam[row - 1]) / h
        D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_prev
    return sigma[row + 1] / sigma[row] * x - alpha[row + 1] * (math.exp(-h) - 1) * D


@pytest.mark.parametrize("timesteps", LISTS)
@pytest.mark.parametrize("schedule", [Schedule.linear(100), Schedule.cosine(100)], ids=["linear", "cosine"])
def test_dpmsolver_is_the_textbook_step(schedule, timesteps):
    random = np.random.default_rng(0)
    for prediction, clip, order in itertools.product(["eps", "x0", "v"], [None, 0.7], [1, 2]):
        choice = {"method": "dpmsolver++", "prediction": prediction, "clip": clip}
        steps = schedule.step_table(**LISTS[timesteps], **choice, solver_order=order)
        levels = [math.prod(1 - b for b in schedule.betas[: t + 1]) for t in steps.timesteps] + [1.0]
        assert steps.needs_history == (order == 2 and len(steps) > 2)
        for row, coefficients in enumerate(steps.coefficients):
            for x, m, x0_prev in random.normal(size=(4, 3)):
                a, b, c1, c2, c3, c4, s, bound = coefficients
                unclipped = predicted_x0(x, m, levels[row], prediction)
                x0 = max(-clip, min(clip, unclipped)) if clip else unclipped
                got = c1 * max(-bound, min(bound, a * x - b * m)) + c2 * x + c3 * m + c4 * x0_prev
                if order == 2:
                    expected = textbook_2m(x, x0, x0_prev, levels, row)
                else:  # Song et al. 2021, eq. 12, with eps from the clipped x0
                    A, P = levels[row : row + 2]
                    expected = math.sqrt(P) * x0 + math.sqrt(1 - P) * (x - math.sqrt(A) * x0) / math.sqrt(1 - A)
                scale = 1.0 + abs(coefficients).max(initial=0, where=np.isfinite(coefficients))
                assert got == pytest.approx(expected, abs=1e-10 * scale), (row, choice)
                assert a * x - b * m == pytest.approx(unclipped, abs=1e-11 * scale)
                assert s == 0


def test_dpmsolver_starts_from_pure_noise():
    """Zero terminal SNR: lambda is -inf in row 0, so nothing is extrapolated from its x0, and all stays finite."""
    schedule = Schedule.linear(100).rescale_zero_terminal_snr()
    for steps in (2, 10):
        table = schedule.step_table(steps, spacing="trailing", method="dpmsolver++", prediction="v", clip=1.0)
        assert np.isfinite(table.coefficients).all()
        assert table.coefficients[0, 3] == pytest.approx(math.sqrt(1 - schedule.alphas_cumprod[table.timesteps[1]]))
        assert table.coefficients[1, 5] == 0
        assert table.needs_history == (steps > 2)


def test_learned_variances():
    schedule = Schedule.linear(100)
    for steps in (None, 10, [80, 30, 29]):
        large = schedule.step_table(steps, variance="fixed_large", clip=1.0)
        small = schedule.step_table(steps, variance="fixed_small", clip=1.0).coefficients[:-1, 6]
        for variance in ("learned", "learned_range"):
            learned = schedule.step_table(steps, variance=variance, clip=1.0)
            np.testing.assert_array_equal(learned.coefficients, large.coefficients)
        assert large.logvar_range is None
        assert schedule.step_table(steps, variance="learned").logvar_range is None
        assert schedule.step_table(steps, method="ddim", variance="learned_range").logvar_range is None
        limits = learned.logvar_range
        assert limits.dtype == torch.float32
        A = schedule.alphas_cumprod[learned.timesteps]
        beta = 1 - A / np.append(A[1:], 1.0)
        np.testing.assert_allclose(limits[:, 1], np.log(beta), rtol=1e-6)
        np.testing.assert_allclose(limits[:-1, 0], 2 * np.log(small), rtol=1e-6)
        assert limits[-1, 0] == limits[-2, 0]  # the posterior's variance is 0 there, and nothing is drawn
        assert learned.to("meta").logvar_range.is_meta
    one = schedule.step_table([50], variance="learned_range").logvar_range
    assert one.shape == (1, 2)
    assert torch.isfinite(one).all()


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_last_row_of_ddim_may_arrive_at_the_first_timestep(eta):
    schedule, random = Schedule.linear(100), np.random.default_rng(0)
    steps = schedule.step_table([70, 30, 9], method="ddim", eta=eta, clip=0.7, set_alpha_to_one=False)
    plain = schedule.step_table([70, 30, 9], method="ddim", eta=eta, clip=0.7)
    np.testing.assert_array_equal(steps.coefficients[:-1], plain.coefficients[:-1])
    A, P = schedule.alphas_cumprod[[9, 0]]
    choice = {"method": "ddim", "prediction": "eps", "variance": "", "eta": eta, "clip": 0.7, "rederive_eps": True}
    for x, m, z in random.normal(size=(4, 3)):
        np.testing.assert_allclose(
            table_step(steps.coefficients[-1], x, m, z), textbook_step(x, m, z, A, P, **choice), rtol=0, atol=1e-12
        )
    assert (steps.coefficients[-1, 6] != 0) == (eta != 0)


@pytest.mark.parametrize("timesteps", LISTS)
def test_layout_of_the_table(timesteps):
    schedule = Schedule.linear(100)
    steps = schedule.step_table(**LISTS[timesteps], clip=2.5)
    assert steps.table.dtype == torch.float32
    assert steps.table.shape == (len(steps), 8)
    assert steps.t_of_row.dtype == torch.int32
    assert steps.t_of_row.tolist() == list(steps.timesteps)
    assert steps.coefficients.dtype == np.float64
    assert not steps.coefficients.flags.writeable
    np.testing.assert_array_equal(steps.table.numpy(), steps.coefficients.astype(np.float32))
    assert (steps.table[:, 5] == 0).all()
    assert (steps.table[:, 7] == 2.5).all()
    assert steps.to("cpu").table.equal(steps.table)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_without_a_clip_the_update_is_the_direct_form(method, prediction):
    table = Schedule.linear(100).step_table(method=method, prediction=prediction, eta=0.3).coefficients
    assert (table[:, 2] == 0).all()
    assert np.isinf(table[:, 7]).all()
    clipped = Schedule.linear(100).step_table(method=method, prediction=prediction, eta=0.3, clip=True).coefficients
    assert (clipped[:, 2] != 0).all()
    assert (clipped[:, 7] == 1).all()
    np.testing.assert_array_equal(table[:, :2], clipped[:, :2])  # a and b give the true x0 either way
    dynamic = Schedule.linear(100).step_table(method=method, prediction=prediction, eta=0.3, thresholding=True)
    np.testing.assert_array_equal(dynamic.coefficients[:, 2:7], clipped[:, 2:7])
    assert np.isinf(dynamic.coefficients[:, 7]).all()


def test_tutorial_coefficients():
    """x_prev = (x - beta / sqrt(1 - ab) eps) / sqrt(alpha) + sqrt(beta) z, without the noise in the last row."""
    table = LINEAR.step_table().coefficients[::-1]
    np.testing.assert_allclose(table[:, 3], 1 / np.sqrt(LINEAR.alphas), rtol=1e-9)
    by_hand = LINEAR.betas / np.sqrt((1 - LINEAR.alphas_cumprod) * LINEAR.alphas)
    np.testing.assert_allclose(table[:, 4], -by_hand, rtol=1e-9)
    np.testing.assert_allclose(table[1:, 6], np.sqrt(LINEAR.betas[1:]), rtol=1e-9)
    assert table[0, 6] == 0


@pytest.mark.parametrize("steps", [None, 10, [80, 30, 29]])
def test_last_row_lands_on_x0_without_noise(steps):
    schedule = Schedule.linear(100)
    for method, variance, eta in (("ddpm", "fixed_large", 0), ("ddpm", "fixed_small", 0), ("ddim", "fixed_large", 1.0)):
        last = schedule.step_table(steps, method=method, variance=variance, eta=eta, clip=1.0).coefficients[-1]
        np.testing.assert_allclose(last[2:7], [1, 0, 0, 0, 0], atol=1e-12)
        assert last[6] == 0


def test_ddim_at_eta_1_is_ddpm_with_the_small_variance():
    schedule = Schedule.cosine(60)
    ddim = schedule.step_table(17, method="ddim", eta=1.0, prediction="v", clip=1.0).coefficients
    ddpm = schedule.step_table(17, method="ddpm", variance="fixed_small", prediction="v", clip=1.0).coefficients
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-12)


def test_previous_timestep_is_the_next_of_the_list():
    """Linspace goes from 979 to 958; a uniform stride of 20 would take the noise level of 959."""
    steps = LINEAR.step_table(50, spacing="linspace", method="ddim", clip=1.0)
    row = 1
    assert list(steps.timesteps[row : row + 2]) == [979, 958]
    A, P = LINEAR.alphas_cumprod[979], LINEAR.alphas_cumprod[958]
    assert steps.coefficients[row, 3] == pytest.approx(math.sqrt((1 - P) / (1 - A)), rel=1e-9)


def test_coefficients_that_do_not_fit_float32():
    schedule = Schedule.from_betas([0.999] * 30)  # alphas_cumprod falls to 1e-90
    with pytest.raises(ValueError, match=r"t = 29 do not fit float32: .*use prediction=\"v\" or \"x0\""):
        schedule.step_table(prediction="eps")
    for prediction in ("v", "x0"):
        assert torch.isfinite(schedule.step_table(prediction=prediction).table[:, :7]).all()


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"method": "plms"}, ValueError, r"method must be one of ddpm, ddim, dpmsolver\+\+, got 'plms'"),
        ({"prediction": "epsilon"}, ValueError, "prediction must be one of eps, x0, v, got 'epsilon'"),
        ({"variance": "large"}, ValueError, "variance must be one of fixed_small, .*learned_range, got 'large'"),
        ({"method": "dpmsolver++", "eta": 0.1}, ValueError, 'eta=0.1 belongs to method="ddim"'),
        ({"method": "dpmsolver++", "solver_order": 3}, ValueError, "solver_order must be 1 or 2, got 3"),
        ({"method": "dpmsolver++", "solver_order": True}, ValueError, "solver_order must be 1 or 2, got True"),
        (
            {"set_alpha_to_one": False},
            ValueError,
            "set_alpha_to_one=False belongs to method=\"ddim\", got method='ddpm'",
        ),
        (
            {"method": "dpmsolver++", "prediction": "v", "set_alpha_to_one": False},
            ValueError,
            "set_alpha_to_one=False belongs to",
        ),
        ({"method": "dpmsolver++", "steps": 100}, ValueError, r"steps must be in 1\.\.99 for spacing='linspace_open'"),
        ({"eta": -0.1}, ValueError, "eta must be a finite number of at least 0, got -0.1"),
        ({"eta": float("nan")}, ValueError, "eta must be a finite number"),
        ({"method": "ddim", "eta": 50.0}, ValueError, r"eta=50.0 adds more noise in row \d+"),
        ({"clip": 0}, ValueError, "clip must be a positive bound"),
        ({"clip": -1.0}, ValueError, "clip must be a positive bound"),
        ({"clip": float("nan")}, ValueError, "clip must be a positive bound"),
        ({"clip": "on"}, TypeError, "clip must be a bool, a positive number or None, got str"),
    ],
)
def test_bad_choices(choice, error, message):
    with pytest.raises(error, match=message):
        Schedule.linear(100).step_table(**choice)
