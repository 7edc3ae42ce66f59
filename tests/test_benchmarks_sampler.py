"""The sampling benchmark: candidates compute the same step, a wrong one gets no speed, a missing one says so."""

from __future__ import annotations

import math
import sys
import time

import pytest
import torch

from ddpm_fast import Schedule
from ddpm_fast.nn import DDPMUNet

CPU = torch.device("cpu")


def after_last_step(problem):
    """x after the last reverse step, which adds no noise, in float64: (x - beta / sigma m) / sqrt(alpha)."""
    schedule = Schedule.linear(1000)
    m = problem.expected(0)
    sigma = schedule.sqrt_one_minus_alphas_cumprod[0]
    return (problem.x.double() - schedule.betas[0] / sigma * m) / math.sqrt(schedule.alphas[0])


def test_every_baseline_of_the_issue_is_registered_under_its_own_name(module):
    sampler = module("sampler")
    for name, make in sampler.CANDIDATES.items():
        candidate = make()
        assert candidate.id == name
        assert candidate.what
    assert {"F16", "F32", "S16", "E32", "E16", "C16", "OV16", "D32"} <= set(sampler.ON_CPU)
    assert {"F16", "F32", "S16", "E32", "E16", "C16", "G16", "D32", "D16"} <= set(sampler.ON_GPU)
    listed = {*sampler.ON_CPU, *sampler.ON_GPU, *sampler.FOR_VARIANTS, *module("run").DRIFT_CANDIDATES}
    assert listed <= set(sampler.CANDIDATES)


def test_the_paper_is_measured_against_what_its_targets_name(module):
    sampler, results = module("sampler"), module("results")
    wanted = module("targets").ON_CPU[results.PAPER]
    for n in (1, 4, 16, 64):
        names = sampler.for_paper(n, CPU)
        assert set(names) <= set(sampler.CANDIDATES)
        assert {"F16", *(baseline for baseline, at in wanted if at in (None, n))} <= set(names)
    assert not any(name.startswith("C") for name in sampler.for_paper(1, CPU, quick=True))
    assert {"G16", "C16", "D16"} <= set(sampler.for_paper(16, torch.device("cuda")))


def test_the_paper_network_is_the_published_one(module):
    case = module("sampler").paper(16)
    assert (case.n, case.shape, case.network, case.options) == (16, (3, 32, 32), "ddpm-cifar10-32", {})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DDPMUNet(**case.options).parameters())
    assert parameters == 35_746_307  # of google/ddpm-cifar10-32


def test_variants_cover_what_the_plan_must_win_at(module):
    names = {case.name for case in module("sampler").variants(16)}
    assert names == {
        "width 32", "width 48", "width 96", "depth 3", "1 channel", "3x16x16", "3x48x32", "10 classes",
    }  # fmt: skip


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_plain_network_is_the_unet_folded_or_not(module, tiny, num_classes):
    problem = tiny(num_classes)
    unet, x = problem.unet.double(), problem.x.double()
    t = torch.tensor([3, 999])
    plain = module("plain").PlainUNet(unet).eval().double()
    plain.frequencies = plain.frequencies.double()
    with torch.no_grad():
        m = unet(x, t, problem.labels)
        assert (plain(x, t, problem.labels) - m).norm() / m.norm() < 1e-5  # the UNet's sinusoids are float32
        before = plain(x, t, problem.labels)
        after = plain.folded()(x, t, problem.labels)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in plain.modules())


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_peer_is_the_real_one_with_our_weights(module, tiny_paper, num_classes):
    diffusers = pytest.importorskip("diffusers")
    problem = tiny_paper(num_classes)
    unet, t = problem.unet, torch.tensor([3, 999])
    peer = problem.plain()
    assert type(peer.net) is diffusers.UNet2DModel
    assert peer.folded() is peer
    theirs = peer.net.state_dict()
    assert list(theirs) == list(unet.state_dict())
    assert all(torch.equal(theirs[key], value) for key, value in unet.state_dict().items())
    with torch.no_grad():
        m = unet(problem.x, t, problem.labels)
        plain = peer(problem.x, t, problem.labels)
        assert (plain - m).norm() / m.norm() < 1e-5
        assert torch.equal(peer.at(problem.x, peer.sinusoids(t), problem.labels), plain)
        assert (peer.at(problem.x, peer.sinusoids(t + 5), problem.labels) - plain).abs().max() > 1e-4
    assert type(peer.net.time_proj).__name__ == "Timesteps"  # as it was


def test_networks_are_deterministic(module):
    networks = module("networks")
    first, second = (
        networks.paper_network((1, 8, 8), block_out_channels=(8, 8, 8, 8), norm_num_groups=4) for _ in "ab"
    )
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    assert all((norm.weight - 1).abs().max() > 0.05 for norm in first.modules() if isinstance(norm, torch.nn.GroupNorm))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tutorial", {"width": 16, "depth": 2}),
        ("ddpm-cifar10-32", {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4}),
    ],
)
def test_the_benchmark_network_has_learned_something(module, name, options):
    """Its last layer was fitted: what it says of new pictures has to do with the noise in them."""
    plain = module("networks")
    shape = (3, 16, 16)
    unet = plain.NETWORKS[name].make(shape, **options)
    assert not unet.training
    signal = Schedule.linear(1000).alphas_cumprod[500]
    eps = torch.randn(8, *shape, generator=torch.Generator().manual_seed(5))
    x = math.sqrt(signal) * plain.pictures(8, shape, seed=3) + math.sqrt(1 - signal) * eps
    with torch.no_grad():
        m = unet(x, torch.full((8,), 500))
    assert (m - eps).square().mean() < 0.85 * eps.square().mean()


@pytest.mark.parametrize(
    ("network", "name", "num_classes"),
    [
        (network, name, classes)
        for network in ("tiny", "tiny_paper")
        for name in ("F16", "F32", "S16", "S32", "E32", "E16")
        for classes in (None, 3)
    ]
    + [("tiny", "OV16", 3), ("tiny", "OV32", None), ("tiny_paper", "OV32", None)],
)
def test_candidates_compute_the_same_network(module, request, network, name, num_classes):
    if name.startswith("OV"):
        pytest.importorskip("openvino")
    if network == "tiny_paper":
        pytest.importorskip("diffusers")
    problem = request.getfixturevalue(network)(num_classes)
    candidate = module("sampler").CANDIDATES[name]()
    record = module("sampler").prepare(candidate, problem)
    assert record["reason"] == ""
    assert record["status"] == "ok"
    assert record["error"] < (1e-5 if name.endswith("32") else 3e-2)
    assert candidate.flags
    # A step of so small a network is shorter than what disturbs a call on a busy machine.
    assert any(candidate.seconds(10) > 0 for _ in range(5))


@pytest.mark.parametrize("name", ["E32", "E16"])
def test_baselines_do_the_reverse_step(module, tiny, name):
    problem = tiny()
    candidate = module("sampler").CANDIDATES[name]()
    candidate.prepare(problem)
    with torch.inference_mode():
        x = candidate.step(problem.x, problem.rows[problem.T - 1 : problem.T])
        noisy = candidate.step(problem.x, problem.rows[:1]) - candidate.step(problem.x, problem.rows[:1])
    torch.testing.assert_close(x.double(), after_last_step(problem), rtol=1e-4, atol=1e-3)
    spread = math.sqrt(2 * Schedule.linear(1000).betas[999])  # of the difference of two draws
    assert 0.8 * spread < float(noisy.std()) < 1.25 * spread


def test_openvino_does_the_reverse_step(module, tiny):
    pytest.importorskip("openvino")
    problem = tiny()
    candidate = module("sampler").CANDIDATES["OV32"]()
    candidate.prepare(problem)
    candidate.run(1)  # the last row
    torch.testing.assert_close(candidate.inputs[0].double(), after_last_step(problem), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("network", "num_classes"), [("tiny", None), ("tiny_paper", None), ("tiny_paper", 3)])
def test_diffusers_runs_as_many_steps_as_asked(module, request, network, num_classes):
    diffusers = pytest.importorskip("diffusers")
    candidate = module("sampler").CANDIDATES["D32"]()
    problem = request.getfixturevalue(network)(num_classes)
    assert module("sampler").prepare(candidate, problem)["status"] == "ok"
    # nothing of ours around the paper's network; labels, which the pipeline cannot pass on, need a wrapper
    own = network == "tiny_paper" and num_classes is None
    assert isinstance(candidate.pipeline.unet, diffusers.UNet2DModel) == own
    assert ("behind UNet2DModel's interface" in candidate.flags) != own
    calls = []
    candidate.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    candidate.run(4)
    assert len(calls) == 4


@pytest.mark.no_poison
def test_compiled_step_is_the_same_step_and_is_not_compiled_again(module, monkeypatch):
    candidate, inductor = module("candidate"), module("inductor")
    problem = candidate.Problem(candidate.Case("tiny", 1, (1, 4, 4), options={"width": 8, "depth": 1}), CPU)
    options = [{"no such option": True}, {"freezing": True, "fallback_random": True}]
    monkeypatch.setattr(inductor.Compiled, "options", lambda self: options)
    made = inductor.Compiled(torch.float32)
    made.prepare(problem)
    assert "freezing=True" in made.flags
    assert "no such option" in made.notes
    error, verdict = candidate.check(made, problem)
    assert verdict == "ok"
    assert error < 1e-5
    with made.guard():
        x = made.step(problem.x, problem.rows[problem.T - 1 : problem.T])
        with pytest.raises(RuntimeError, match="recompile"):
            made.step(torch.zeros(3, 1, 4, 4), problem.rows[:1])
    torch.testing.assert_close(x.double(), after_last_step(problem), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("spoil", "status"), [(1.5, "wrong"), (math.nan, "wrong"), (1.01, "inaccurate")])
def test_no_speed_for_a_wrong_candidate(module, tiny, monkeypatch, spoil, status):
    sampler, baselines = module("sampler"), module("baselines")

    class Spoilt(baselines.Eager32):
        def predict(self, t, x=None):
            return super().predict(t, x) * spoil

        def run(self, steps):
            assert status == "inaccurate", "timed although its check failed"
            super().run(steps)

    monkeypatch.setitem(sampler.CANDIDATES, "E32", Spoilt)
    case = sampler.run_case(tiny().case, CPU, ["S32", "E32"], budget=0.02, turn=0.005)
    record = case["candidates"][1]
    assert record["status"] == status
    assert bool(record["rounds_s"]) == (status == "inaccurate")
    line = next(line for line in sampler.lines(case) if line.strip().startswith("E32"))
    assert ("wrong: relative error" in line) == (status == "wrong")
    assert line.endswith("INACCURATE") == (status == "inaccurate")
    module("results").validate({"schema": 1, "machine": {}, "settings": {}, "peaks": {}, "ops": [], "cases": [case]})


def test_a_missing_package_is_a_row_that_says_how_to_get_it(module, tiny, monkeypatch):
    sampler = module("sampler")

    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    case = sampler.run_case(tiny().case, CPU, ["E32", "OV16", "D32", "G16"], budget=0.02, turn=0.005)
    text = "\n".join(sampler.lines(case))
    assert "OV16  missing: not installed; pip install openvino" in text
    assert "D32   missing: not installed; pip install diffusers" in text
    assert "G16   missing: needs an NVIDIA GPU" in text
    assert [bool(record["rounds_s"]) for record in case["candidates"]] == [True, False, False, False]


def test_a_candidate_that_breaks_leaves_the_others_alone(module, tiny, monkeypatch):
    sampler, baselines = module("sampler"), module("baselines")

    class Broken(baselines.Eager32):
        def prepare(self, problem):
            raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(sampler.CANDIDATES, "E16", Broken)
    case = sampler.run_case(tiny().case, CPU, ["E16", "E32"], budget=0.02, turn=0.005)
    assert case["candidates"][0]["reason"] == "failed: RuntimeError: out of luck"
    assert case["candidates"][1]["rounds_s"]


def test_multiply_adds_are_counted(module, tiny):
    """Of width 16, depth 2, 8x8, by hand: 3x3 convolutions, transposed ones, the last one, time MLPs."""
    pairs = [(3, 16, 8), (16, 16, 8), (16, 32, 4), (32, 32, 4), (32, 64, 2), (64, 64, 2)]
    pairs += [(64, 32, 4), (32, 32, 4), (32, 16, 8), (16, 16, 8)]
    convolutions = sum(9 * a * b * edge * edge for a, b, edge in pairs)
    others = 4 * 64 * 32 * 2 * 2 + 4 * 32 * 16 * 4 * 4 + 16 * 3 * 8 * 8 + 256 * (16 + 32 + 64 + 32 + 16)
    assert module("sampler").multiply_adds(tiny()) == convolutions + others


def test_multiply_adds_of_attention_are_counted(module, tiny_paper):
    """The tiny one by hand: 3x3 convolutions, 1x1 shortcuts, attention, the time embedding and its projections."""
    pairs = [(3, 16, 8), (16, 16, 8), (16, 16, 8), (16, 16, 4), (16, 32, 4), (32, 32, 4)]  # down
    pairs += [(32, 32, 4)] * 4  # the mid block
    pairs += [(64, 32, 4), (32, 32, 4), (48, 32, 4), (32, 32, 4), (32, 32, 8)]  # up
    pairs += [(48, 16, 8), (16, 16, 8), (32, 16, 8), (16, 16, 8), (16, 3, 8)]
    convolutions = sum(9 * a * b * edge * edge for a, b, edge in pairs)
    shortcuts = 16 * 32 * 16 + (64 + 48) * 32 * 16 + (48 + 32) * 16 * 64
    attention = sum(4 * c * c * p + 2 * p * p * c for c, p in [(16, 64), (32, 16), (16, 64), (16, 64)])
    time_ = 16 * 64 + 64 * 64 + 64 * (16 + 32 + 32 + 32 + 32 + 32 + 16 + 16)
    assert module("sampler").multiply_adds(tiny_paper()) == convolutions + shortcuts + attention + time_


def test_turns_are_taken_by_all_and_begun_by_each(module):
    calls = []

    def take(name, once):
        def seconds(steps):
            calls.append((name, steps))
            return once

        return seconds

    step_rounds = module("timing").step_rounds
    rounds = step_rounds({"a": take("a", 1e-3), "b": take("b", 0.1), "c": take("c", 1.0)}, budget=3.0, turn=0.3)
    assert {name: len(values) for name, values in rounds.items()} == {"a": 5, "b": 5, "c": 5}  # five at the least
    assert [steps for _, steps in calls[:7]] == [1, 2, 2, 1, 2, 2, 1]  # warm-up: as long as it takes, but no longer
    turns = calls[7:]
    assert [name for name, _ in turns] == list("abcbcacababcbca")
    assert dict(turns) == {"a": 200, "b": 3, "c": 1}  # 0.3 s of steps, at most 200, at least one
    quick = step_rounds({"a": take("a", 1e-3), "b": take("b", 0.1)}, budget=3.0, turn=0.25)
    assert len(quick["a"]) == 12


def test_ratios_are_paired(module):
    """A machine that is up to five times as slow in some rounds changes medians, but no ratio."""
    ratios, timing = module("timing").ratios, module("timing").Timing
    slow = [1.0, 5.0, 1.2, 3.0, 1.1, 4.0, 1.0]
    ratio = ratios([2.0 * s for s in slow], slow)
    assert (ratio.median, ratio.p20, ratio.p80, ratio.rounds) == (2.0, 2.0, 2.0, 7)
    assert ratios([2, 2, 9, 2, 2], [1, 2, 1, 1, 1]) == timing(2.0, 2.0, 2.0, 5)
    assert timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == timing(2.5, 1.0, 4.0, 6)
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_what_a_call_costs_beside_its_steps_is_taken_off(module, monkeypatch):
    ours = module("ours")
    candidate = ours.Ours(torch.float32, fused=False)
    monkeypatch.setattr(candidate, "_sample", lambda steps: time.sleep(0.03 + 0.01 * steps))
    assert 0.009 < candidate.seconds(5) < 0.02
    assert 0.03 <= candidate.fixed[0] < 0.06
    candidate.fixed = [0.02, 9.0]  # the second of these calls was held up by something else
    assert 0.011 < candidate.seconds(5) < 0.022


def test_drift_compares_final_images(module, tiny):
    drift = module("drift")
    images = torch.zeros(2, 3, 4, 4)
    assert drift.psnr(images + 0.1, images) == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-4)
    assert drift.psnr(images, images) == math.inf
    found = drift.run_drift(tiny(3).case, CPU, ["S16", "E32", "G16"], steps=6)
    half, single, missing = found["rows"]
    assert 20 < half["psnr_db"] < 80
    assert single["psnr_db"] is None or single["psnr_db"] > 100
    assert missing["psnr_db"] is None
    text = drift.lines(found)
    assert "6 steps" in text[0]
    assert "needs an NVIDIA GPU" in text[-1]
