"""benchmarks/gpu_check/tune.py: every implementation of a layer takes part, is counted right, and wrong ones fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ddpm_fast
from ddpm_fast.inference import network
from ddpm_fast.inference.candidate import Packs, Place
from ddpm_fast.inference.known import read
from ddpm_fast.inference.plan import frame_for, listed, places

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def times(module: Any) -> Any:
    return module("gpu_check.layer_times")


def row(times: Any, name: str, like: str = "", **us: list[float]) -> Any:
    """One layer of 1 GFLOP and 1 MB by (group)_(name)=[microseconds]."""
    named = {key.partition("_")[2]: value for key, value in us.items()}
    groups = {key.partition("_")[2]: key.partition("_")[0] for key in us}
    return times.Row(name, "Conv", (8, 8), 1e9, 1e6, named, groups, [], like or name)


def test_a_rehearsal_times_all_that_a_cpu_has(module: Any, tmp_path: Any, capsys: Any) -> None:
    out = tmp_path / "tune.json"
    assert module("gpu_check.tune").main(["--out", str(out), "--rehearse"]) == 0
    found = json.loads(out.read_text())
    assert (found["stage"], found["ok"], found["rehearsal"], found["failures"]) == ("tune", True, True, [])
    assert [(one["table"], one["network"], one["n"]) for one in found["layers"]] == [
        ("layers", "tutorial", 2), ("splits", "tutorial", 1),
        ("norms", "ddpm-cifar10-32", 1), ("norms", "lucidrains", 1),
    ]  # fmt: skip
    unet = module("gpu_check.subjects").Loops(CPU, module("gpu_check.subjects").TINY).network()
    layers = read(unet).layers
    spots = places(read(unet), 2, 8, 8, torch.bfloat16, CPU, Packs())
    for layer, place, one in zip(layers, spots, found["layers"][0]["rows"], strict=True):
        assert one["layer"] == layer.name
        assert {candidate.name for candidate in listed(layer, place)} <= {*one["times"], *one["left_out"]}
        assert all(us > 0 for trials in one["times"].values() for us in trials)
    sums = found["layers"][0]["sums"]
    assert sums["best of all"]["us"] <= min(group["us"] for group in sums.values())
    assert set(found["strides"][0]["step_seconds"]) == {"1", "10", "50"}
    assert all(set(one["ops"]) == {"ddpm_step", "q_sample", "normal"} for one in found["ops"])
    said = capsys.readouterr().out
    assert said.count("a model's estimate, not measured") == len(found["layers"]) + len(found["strides"]) + len(
        found["ops"]
    )
    assert found["predicted_by_a_model"]["layers"]
    assert "fp8: not built" in said
    assert "kernels that overlap: only a GPU" in said


def test_what_a_gpu_is_asked_to_do_is_known(module: Any) -> None:
    tune, loop, names = module("gpu_check.tune"), module("gpu_check.loop"), module("networks").NETWORKS
    assert {name for _, name, _, _ in tune.FULL.networks} <= set(names)
    assert {table for table, *_ in tune.FULL.networks} == {table for table, *_ in tune.SMALL.networks}
    assert {(name, n) for _, name, n, _ in tune.FULL.networks} >= {("tutorial", n) for n in (1, 16, 64, 256, 512)}
    assert set(module("gpu_check.subjects").REAL.timed) == set(loop.GOALS)
    assert set(module("gpu_check.op_blocks").OPS) <= {case.name for case in module("cases").CASES}


def test_a_candidate_that_computes_something_else_fails_the_run(
    module: Any, times: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune, original = module("gpu_check.tune"), times.listed

    class Odd:
        name = "odd"

        def prepare(self, layer: Any, place: Place) -> Callable[[Any], None]:
            target = place.target
            assert target is not None

            def run(frame: Any) -> None:
                target.fill_(0.125)

            return run

    def with_odd(layer: Any, place: Place) -> list[Any]:
        found = original(layer, place)
        return [*found, Odd()] if layer.name == "bottleneck.conv1" else found

    few = tune.dataclasses.replace(
        tune.SMALL, networks=(("layers", "tutorial", 1, with_odd),), strided=(), elements=(), edge=16, copied=2**16
    )
    monkeypatch.setattr(tune, "SMALL", few)
    assert tune.main(["--out", str(tmp_path / "x.json"), "--rehearse"]) == 1
    found = json.loads((tmp_path / "x.json").read_text())
    (line,) = found["failures"]
    assert "odd computes layer bottleneck.conv1 with a relative error" in line
    (odd,) = (one for one in found["layers"][0]["rows"] if one["left_out"])
    assert (odd["layer"], odd["left_out"]) == ("bottleneck.conv1", ["odd"])


def spied(method: Callable[..., Any], look: Callable[[], None]) -> Callable[..., Any]:
    def instead(*arguments: Any) -> Any:
        look()
        return method(*arguments)

    return instead


def test_overlapping_kernels_are_timed_beside_others(
    module: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch is as the variant says whenever that one prepares or runs, and as it was afterwards."""
    tune, ours, switch = module("gpu_check.tune"), module("ours").Ours, SimpleNamespace(OVERLAP="as it was")
    seen = []
    for name in ("prepare", "seconds"):
        monkeypatch.setattr(ours, name, spied(getattr(ours, name), lambda: seen.append(switch.OVERLAP)))
    few = tune.dataclasses.replace(tune.SMALL, networks=(), elements=(), edge=16, copied=2**16)
    monkeypatch.setattr(tune, "SMALL", few)
    monkeypatch.setattr(tune, "STRIDES", (1,))
    monkeypatch.setattr(tune, "overlapping", lambda _: True)
    monkeypatch.setattr(tune, "triton_launch", lambda: switch)
    assert tune.main(["--out", str(tmp_path / "x.json"), "--rehearse"]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert [(one["n"], set(one["step_seconds"])) for one in found["overlap"]] == [(1, {"0", "1"})]
    assert set(seen) == {"as it was", 0, 1}  # that of steps per graph, too
    assert switch.OVERLAP == "as it was"


def test_sums_and_shares(module: Any, times: Any) -> None:
    a = row(times, "a", library_conv2d=[20.0, 22.0], triton_64x64x64=[10.0, 12.0])
    b = row(times, "b", library_conv2d=[8.0], triton_32x32x32=[9.0], **{f"{times.BENCHMARK}_sought": [1.0]})
    c = row(times, "c", like="b", library_conv2d=[5.0])
    assert a.best() == ("64x64x64", 10.0)
    assert a.best("library") == ("conv2d", 20.0)
    assert b.best() == ("conv2d", 8.0)  # what no plan asks for is not the best of a plan
    assert c.best("triton") is None
    assert a.spread == pytest.approx(0.2)
    assert times.sums([a, b, c]) == {
        "best of all": {"us": 23.0, "without": 0.0},
        "library": {"us": 33.0, "without": 0.0},
        "triton": {"us": 24.0, "without": 1.0},
        times.BENCHMARK: {"us": 16.0, "without": 2.0},
    }
    head, _, first, second = module("gpu_check.tune").table([a, b, c], rate=1e15, bandwidth=1e12)
    cells = dict(zip(head.split(" | "), first.split(" | "), strict=True))
    assert (cells["fastest"], cells["us"], cells["next group"]) == ("64x64x64", "10.0", "2.00x")
    assert (cells["TFLOP/s"], cells["of product"]) == ("100.0", "10%")
    assert cells["library, us"] == "20.0 (conv2d)"
    assert "| b and 1 alike |" in second
    assert "| 125 | 12% |" in second


def test_products_and_bytes_of_layers_are_those_that_torch_counts(module: Any, times: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    subjects = module("gpu_check.subjects")
    loops = subjects.Loops(CPU, subjects.TINY)
    for name in (subjects.TUTORIAL, subjects.PAPER, subjects.LUCIDRAINS):
        model = loops.network(name)
        plan = read(model)
        spots = places(plan, 2, 8, 8, torch.float32, CPU, Packs())
        counted = sum(times.flop(layer, place) for layer, place in zip(plan.layers, spots, strict=True))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
        embeddings = 2.0 * 2 * sum(part.weight.numel() for part in model.modules() if is_time(part))
        assert counted == pytest.approx(counter.get_total_flops() - embeddings, rel=0.02), name
    conv, place = (
        read(loops.network()).layers[0],
        places(read(loops.network()), 2, 8, 8, torch.bfloat16, CPU, Packs())[0],
    )
    assert isinstance(conv, network.Conv)
    assert times.moved(conv, place) == 4 * 2 * 3 * 64 + 2 * 2 * 16 * 64 + 2 * (16 * 3 * 9 + 16)


def is_time(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear)


def test_every_cut_of_a_sum_and_every_block_is_listed_once(
    module: Any, times: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_layers = pytest.importorskip("ddpm_fast.inference.gpu_layers", reason="Triton is not installed")

    def on_an_h100(layer: Any, place: Any) -> list[Any]:
        return gpu_layers.listed(layer, place.n, place.h, place.w, torch.bfloat16, 132, 90)

    monkeypatch.setattr(times, "listed", on_an_h100)
    splits = set()
    for layer in read(ddpm_fast.UNet()).layers:
        if not isinstance(layer, network.Conv):
            continue
        side = 32 if layer.source is None else 32 >> layer.source.buffer.level
        place = SimpleNamespace(n=1, h=side, w=side)
        usual, more = on_an_h100(layer, place), times.all_splits(layer, place)
        names = [one.name for one in more]
        assert len(set(names)) == len(names)
        assert names[: len(usual)] == [one.name for one in usual]
        assert (len(more) > len(usual)) == (layer.source is not None)
        for one in more:
            terms = 9 * layer.weight.shape[1] if one.kind == "conv" else 4 * layer.weight.shape[1]
            assert one.tile.splits == 1 or one.kind == "first" or terms // one.tile.k >= 2 * one.tile.splits
            splits.add(one.tile.splits)
    assert splits == set(times.SPLITS)
    norms = 0
    for model in (ddpm_fast.nn.DDPMUNet(), ddpm_fast.nn.RMSNormUNet(64)):
        for layer in read(model).layers:
            if isinstance(layer, (network.Norm, network.RMSNorm)):
                place = SimpleNamespace(n=64, h=16, w=16)
                more = times.all_blocks(layer, place)
                assert len({one.name for one in more}) == len(more) > len(on_an_h100(layer, place))
                norms += 1
    assert norms > 50


def test_the_trial_of_a_plan_is_what_times_the_layers(times: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fastest(layers: Any, spots: Any, frame: Any, which: Any, marks: Any) -> list[Any]:
        seen.append(len(layers))
        return [times_of(layer, which(layer, place)) for layer, place in zip(layers, spots, strict=True)]

    def times_of(layer: Any, candidates: list[Any]) -> Any:
        return SimpleNamespace(times=[(one.name, float(len(seen))) for one in candidates[:1]])

    monkeypatch.setattr(times, "fastest", fastest)
    unet = ddpm_fast.UNet(width=16, depth=1, time_dim=32).eval()
    rows, wrong = times.timed(unet, 1, 4, 4, torch.float32)
    assert len(seen) == times.REPEATS + 1  # once more with cudnn.benchmark
    assert wrong == []
    assert [one.layer for one in rows] == [layer.name for layer in read(unet).layers]
    assert all(next(iter(one.times.values())) == [1.0, 2.0] for one in rows)
    assert all(one.left_out for one in rows if one.kind == "Conv")
    assert frame_for(read(unet), 1, 4, 4, CPU).x.shape == (1, 3, 4, 4)
