"""The benchmark's section of lucidrains' network: its own package is what the baselines run, and runs by itself."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch

from ddpm_fast import Schedule

CPU = torch.device("cpu")
OPTIONS = {"dim": 16, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case(module, lucidrains):
    """Two 8x8 images of a small network."""
    return module("candidate").Case("tiny", 2, (3, 8, 8), "lucidrains", OPTIONS)


@pytest.fixture
def problem(module, case):
    return module("candidate").Problem(case, CPU)


def test_the_network_is_the_examples_and_is_measured_against_what_its_targets_name(module):
    sampler = module("sampler")
    case = sampler.lucidrains(16)
    assert (case.n, case.shape, case.network, case.options) == (16, (3, 32, 32), "lucidrains", {})
    wanted = module("targets").ON_CPU[case.name]
    for n in (1, 4, 16, 64):
        names = sampler.for_lucidrains(n, CPU)
        assert set(names) <= set(sampler.CANDIDATES)
        assert {"F16", *(baseline for baseline, at in wanted if at in (None, n))} <= set(names)
    assert wanted["C16", 16] == 1.3
    assert wanted["C16", None] == 1.0
    assert not any(name.startswith("C") for name in sampler.for_lucidrains(1, CPU, quick=True))
    assert {"G16", "C16", "L16"} <= set(sampler.for_lucidrains(16, torch.device("cuda")))


def test_the_baselines_run_the_real_one_with_our_weights(problem, lucidrains):
    unet, t = problem.unet, torch.tensor([3, 999])
    plain = problem.plain()
    assert type(plain.net) is lucidrains.Unet
    assert plain.folded() is plain
    theirs = plain.net.state_dict()
    assert list(theirs) == list(unet.state_dict())
    assert all(torch.equal(theirs[key], value) for key, value in unet.state_dict().items())
    with torch.no_grad():
        m = unet(problem.x, t)
        got = plain(problem.x, t)
        assert (got - m).norm() / m.norm() < 1e-5
        assert torch.equal(plain.at(problem.x, plain.sinusoids(t)), got)
        assert (plain.at(problem.x, plain.sinusoids(t + 5)) - got).abs().max() > 1e-4
        assert torch.equal(plain(problem.x, t), got)  # as it was
        half = plain.to(torch.bfloat16)(problem.x.bfloat16(), t).float()
    assert (half - m).norm() / m.norm() < 0.03


def test_the_network_is_deterministic_and_has_learned_something(module):
    networks = module("networks")
    shape = (3, 16, 16)
    unet, other = (networks.lucidrains_network(shape, **OPTIONS) for _ in "ab")
    assert not unet.training
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    gains = [value for key, value in state.items() if key.endswith(".g")]
    assert all((g - 1).abs().max() > 0.05 for g in gains)
    signal = Schedule.linear(1000).alphas_cumprod[500]
    eps = torch.randn(8, *shape, generator=torch.Generator().manual_seed(5))
    x = math.sqrt(signal) * networks.pictures(8, shape, seed=3) + math.sqrt(1 - signal) * eps
    with torch.no_grad():
        m = unet(x, torch.full((8,), 500))
    assert (m - eps).square().mean() < 0.85 * eps.square().mean()


@pytest.mark.parametrize("name", ["F16", "F32", "S16", "S32", "E32", "E16", "L32", "L16"])
def test_every_candidate_computes_the_step(name, module, problem):
    record = module("sampler").prepare(module("sampler").CANDIDATES[name](), problem)
    assert (record["status"], record["reason"]) == ("ok", "")


def test_the_packages_own_loop_runs_as_many_steps_as_asked(module, problem, lucidrains):
    candidate = module("sampler").CANDIDATES["L32"]()
    candidate.prepare(problem)
    assert type(candidate.diffusion) is lucidrains.GaussianDiffusion
    told = []
    candidate.diffusion.model.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1].tolist()))
    candidate.run(3)
    assert told == [[2, 2], [1, 1], [0, 0]]
    candidate.run(1)
    assert told[3:] == [[0, 0]]


def test_it_runs_its_own_network_only(module, tiny, lucidrains):
    record = module("sampler").prepare(module("sampler").CANDIDATES["L32"](), tiny())
    assert (record["status"], record["reason"]) == ("missing", "runs lucidrains' own Unet only")


def test_run_measures_the_section(module, case, tmp_path, capsys, monkeypatch):
    sampler, results = module("sampler"), module("results")
    named = dataclasses.replace(case, name=results.LUCIDRAINS)
    monkeypatch.setattr(sampler, "lucidrains", lambda n: dataclasses.replace(named, n=n))
    rates = {"bfloat16": 2e11, "float32": 1e11, "read": 1e10}
    monkeypatch.setattr(module("machine"), "peaks", lambda device, budget: rates)
    out = tmp_path / "result.json"
    arguments = ["--only", "lucidrains", "--n", "2", "--candidates", "S16,L32,L16", "--seconds", "0.02"]
    assert module("run").main([*arguments, "--out", str(out)]) == 0
    assert "lucidrains 3x32x32, n = 2; a step" in capsys.readouterr().out
    result = results.load(out)
    assert [(found["network"], found["n"]) for found in result["cases"]] == [("lucidrains", 2)]
    assert [record["status"] for record in result["cases"][0]["candidates"]] == ["ok"] * 3


def test_without_the_package_there_are_rows_that_say_so(module, case, monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    found = module("sampler").run_case(case, CPU, ["S32", "E32", "L32"], budget=0.02, turn=0.005)
    for record in found["candidates"]:
        assert (record["status"], record["rounds_s"]) == ("missing", [])
        assert "pip install denoising_diffusion_pytorch" in record["reason"]
