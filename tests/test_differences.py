"""docs/differences.md says what was measured; and the measuring: exact networks, figures, tables, the picture."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast import Schedule, metrics

pytest.importorskip("sklearn", reason="pip install 'ddpm_fast[demo]'")
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "differences.md"
RESULT = ROOT / "benchmarks" / "results" / "differences.json"


@pytest.fixture
def pages(module):
    return module("differences_page")


@pytest.fixture
def mixture(module):
    """Two unequal Gaussians in the plane, turned against the axes."""
    means, covariance = torch.tensor([[0.4, -0.2], [-0.5, 0.3]]), torch.tensor([[0.05, 0.02], [0.02, 0.03]])
    return module("mixture").Mixture(torch.tensor([0.3, 0.7]), means, covariance)


class TestPage:
    def test_its_tables_are_the_result_files(self, pages) -> None:
        page, result = PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text(encoding="utf-8"))
        assert pages.filled(page, result) == page
        assert sorted(match[2] for match in pages.MARKED.finditer(page)) == sorted(["real", *pages.TABLES])
        assert all(match[3].count("\n") > 2 for match in pages.MARKED.finditer(page))

    def test_a_figure_that_is_changed_is_noticed(self, pages) -> None:
        page, result = PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text(encoding="utf-8"))
        for name, rows in result["groups"].items():
            changed = json.loads(json.dumps(result))
            row = changed["groups"][name][-1]
            row["energy" if "energy" in row else "largest"] = 12345.0
            assert "12345" in pages.filled(page, changed) or "1.2e+04" in pages.filled(page, changed), name
            assert rows
        for data in result["real"]:
            changed = json.loads(json.dumps(result))
            changed["real"][data]["energy"][0] = -1.0
            assert "-1.00" in pages.filled(page, changed)

    def test_the_result_is_of_today(self, module) -> None:
        """Measured by the script as it is: its groups, its size."""
        differences, result = module("differences"), json.loads(RESULT.read_text(encoding="utf-8"))
        assert list(result["groups"]) == list(differences.GROUPS)
        assert result["size"] == json.loads(json.dumps(dataclasses.asdict(differences.Size())))
        assert RESULT.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    def test_every_preset_and_defect_is_on_it(self) -> None:
        from ddpm_fast.presets import PRESETS

        page = PAGE.read_text(encoding="utf-8")
        assert all(f'`like="{name}"' in page for name in PRESETS)
        tests = (ROOT / "tests" / "test_peer_defects.py").read_text(encoding="utf-8")
        tested = {int(number) for number in re.findall(r"def test_(\d+)_", tests)}
        listed = {int(number) for number in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
        assert tested == listed == set(range(1, 11))


class TestMixture:
    def test_the_exact_network_is_the_mean_of_what_x0_may_be(self, mixture) -> None:
        """Against a sum over a fine grid of x0: mean and variance given x, and the density itself."""
        side = torch.linspace(-3, 3, 601, dtype=torch.float64)
        grid = torch.cartesian_prod(side, side)
        density = mixture.log_density(grid).exp()
        assert abs(float(density.sum()) * 0.01**2 - 1) < 1e-6
        a, s = 0.8, 0.6
        for x in torch.tensor([[0.3, -0.1], [-0.9, 0.4]], dtype=torch.float64):
            weights = density * torch.exp(-((x - a * grid) ** 2).sum(1) / (2 * s * s))
            weights /= weights.sum()
            mean = weights @ grid
            got, variance = mixture.x0_given(x[None], a, s)
            torch.testing.assert_close(got[0], mean, rtol=0, atol=1e-6)
            torch.testing.assert_close(variance()[0], weights @ grid**2 - mean**2, rtol=0, atol=1e-6)

    def test_draws_have_its_density(self, mixture) -> None:
        x = mixture.draw(20000, 0)
        mean = mixture.weights @ mixture.means @ mixture.basis.T
        torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.02)
        other, far = mixture.draw(20000, 1), mixture.draw(2000, 2) + 0.05
        assert abs(float(mixture.log_density(x).mean() - mixture.log_density(other).mean())) < 0.02
        assert mixture.log_density(far).mean() < mixture.log_density(x).mean() - 0.02

    def test_networks_say_one_thing_in_three_ways(self, module, mixture) -> None:
        problem, schedule = module("mixture"), Schedule.linear(50)
        x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5,), 20)
        eps, x0, v = (problem.exact(mixture, schedule, says)(x, t) for says in ("eps", "x0", "v"))
        a, s = schedule.sqrt_alphas_cumprod[20], schedule.sqrt_one_minus_alphas_cumprod[20]
        torch.testing.assert_close(a * x0 + s * eps, x.double())
        torch.testing.assert_close(a * eps - s * x0, v)
        both = problem.exact_with_variance(mixture, schedule)(x, t)
        torch.testing.assert_close(both[:, :2], eps)
        assert (both[:, 2:].abs() <= 1).all()
        float32 = problem.trained_in(mixture, schedule, torch.float32)(x, t)
        torch.testing.assert_close(float32, eps, rtol=1e-4, atol=1e-4)
        first = torch.zeros(5, dtype=torch.int64)
        assert (problem.trained_in(mixture, schedule, torch.bfloat16)(x, first) == 0).all()

    def test_all_steps_with_the_best_network_give_the_data(self, module, mixture) -> None:
        from ddpm_fast import Sampler

        schedule = Schedule.cosine(200)
        net, real = module("mixture").exact(mixture, schedule), mixture.draw(1000, 1)
        sampler = Sampler(net, schedule, dtype=torch.float64, device="cpu", like="openai", time_scale="index")
        x = sampler.sample(1000, (2,), seed=0)
        assert metrics.energy_distance(x, real) < 3 * metrics.energy_distance(mixture.draw(1000, 2), real)


def test_the_whole_of_it_small(module, tmp_path, pages) -> None:
    """Every group has figures, and they make a page and a picture."""
    differences = module("differences")
    size = differences.Size(
        n=16, held_out=16, T=25, few=(2, 3, 5), short=30, long=40, train_steps=5, components=3, draws=2
    )
    said: list[str] = []
    result, pictures = differences.measure(size, said.append)
    assert len(said) == len(differences.GROUPS)
    assert result == json.loads(json.dumps(result, allow_nan=False))
    missing = {name for name, rows in result["groups"].items() if not rows}
    assert missing <= {"tables", "ddim_stride"}  # of diffusers, which need not be installed
    for rows in result["groups"].values():
        assert all(np.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    page = pages.filled(PAGE.read_text(encoding="utf-8"), result)
    assert page != PAGE.read_text(encoding="utf-8")
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    pages.picture(result, pictures, tmp_path / "differences.png")
    assert (tmp_path / "differences.png").stat().st_size > 10000
