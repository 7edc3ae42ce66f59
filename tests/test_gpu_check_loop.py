"""benchmarks/gpu_check/loop.py: what a profile shows, whether bits stay, and that what goes wrong is found."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm_fast import Sampler
from ddpm_fast.sampling import graphs

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 25
LAUNCHES = 2 + 5  # two graphs of ten steps, five of one


@pytest.fixture
def trace(module: Any) -> Any:
    return module("gpu_check.trace")


def profile(trace: Any, steps: int = STEPS, stride: int = 10, between: tuple[str, ...] = ()) -> list[Any]:
    """The events of a run as CUDA's tracing names them: buffers loaded, steps replayed, the flag read, images copied.

    between: calls of the host after the third launch.
    """
    Event, events = trace.Event, []

    def host(name: str, start: float, length: float = 1.0) -> None:
        events.append(Event(name, start, start + length))

    def device(name: str, start: float, length: float) -> None:
        events.append(Event(name, start, start + length, on_device=True))

    host("cudaMemcpyAsync", 0.0)
    device("Memcpy HtoD (Pageable -> Device)", 1.0, 2.0)
    host("cudaStreamSynchronize", 2.0, 3.0)
    device("normal_kernel", 6.0, 4.0)
    host("cudaDeviceSynchronize", 10.0, 5.0)
    now, works = 100.0, 105.0
    rows = [stride] * (steps // stride) + [1] * (steps % stride)
    for i, count in enumerate(rows):
        host(trace.MARK, now, 4.0)
        host("aten::something", now, 2.0)
        host("cudaGraphLaunch_v10000", now + 1, 2.0)
        now += 5.0
        if i == 2:
            for name in between:
                host(name, now - 0.5, 0.1)
        for _ in range(count):
            device("_conv_kernel", works, 3.0)
            device("_output_step_kernel", works + 2.0, 2.0)  # begins before the one before has ended
            device("Memcpy DtoD (Device -> Device)", works + 6.0, 1.0)
            works += 10.0
    device(trace.MARK, 100.0, works - 100.0)  # the profiler repeats marks on the device
    host(trace.DONE, now, works + 1000.0 - now)
    host("cudaDeviceSynchronize", now + 1, works - now)
    after = works + 1001.0
    host("cudaMemcpyAsync", after)
    device("Memcpy DtoH (Device -> Pageable)", after + 1, 1.0)
    host("cudaStreamSynchronize", after + 1, 2.0)
    device("Memcpy DtoD (Device -> Device)", after + 5, 1.0)
    return events


def test_a_run_without_waits_is_counted(trace: Any) -> None:
    found = trace.counted(profile(trace), STEPS)
    assert (found.waits, found.to_host, found.from_host) == ({}, 0, 0)
    assert found.calls == {"cudaGraphLaunch": LAUNCHES}
    assert found.marked == LAUNCHES
    by_name = {kernel["name"]: kernel for kernel in found.kernels}
    assert by_name["_conv_kernel"] == {"name": "_conv_kernel", "per_step": 1.0, "us_per_step": 3.0}
    assert set(by_name) == {"_conv_kernel", "_output_step_kernel", "Memcpy DtoD (Device -> Device)"}
    assert found.works_per_step == 3.0
    length = 10.0 * STEPS - 3.0  # the last step's last work ends 7 us after it began
    assert found.device_us == pytest.approx(length / STEPS)
    assert found.busy == pytest.approx(5.0 * STEPS / length)  # 4 us of overlapping kernels and a copy of 1 us
    assert trace.problems(found, LAUNCHES, on_gpu=True) == []


@pytest.mark.parametrize(
    "name",
    [
        *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree"),
        *("cuStreamSynchronize", "cudaStreamSynchronize_v3020", "cuMemcpyDtoH_v2"),
    ],
)
def test_a_wait_between_two_steps_is_found(trace: Any, name: str) -> None:
    found = trace.counted(profile(trace, between=(name, name)), STEPS)
    (line,) = trace.problems(found, LAUNCHES, on_gpu=True)
    assert line.startswith(f"2 x {name.split('_')[0]} ")
    assert trace.problems(found, 0, on_gpu=False) == [line]


@pytest.mark.parametrize("name", ["cudaMemcpyAsync", "cudaEventRecord", "cudaStreamIsCapturing", "cuLaunchKernelEx"])
def test_what_does_not_wait_is_none(trace: Any, name: str) -> None:
    found = trace.counted(profile(trace, between=(name,)), STEPS)
    assert trace.problems(found, LAUNCHES, on_gpu=True) == []
    assert found.calls[name] == 1


@pytest.mark.parametrize(("name", "line"), [("Memcpy DtoH", "from the device"), ("Memcpy HtoD", "from the host")])
def test_a_copy_to_or_from_the_host_among_the_steps_is_found(trace: Any, name: str, line: str) -> None:
    copy = trace.Event(f"{name} (Device -> Pinned)", 150.0, 151.0, True)
    (found,) = trace.problems(trace.counted([*profile(trace), copy], STEPS), LAUNCHES, on_gpu=True)
    assert found.startswith(f"1 copies {line}")


def test_launches_must_be_those_of_the_graphs(trace: Any) -> None:
    one_by_one = trace.counted(profile(trace, stride=1), STEPS)
    assert trace.problems(one_by_one, LAUNCHES, on_gpu=True) == [f"25 graph launches for 25 steps, expected {LAUNCHES}"]
    blind = trace.counted([event for event in profile(trace) if not event.name.startswith("cu")], STEPS)
    assert any("recorded no launch" in line for line in trace.problems(blind, 0, on_gpu=True))
    unmarked = [event for event in profile(trace) if event.name != trace.MARK]
    with pytest.raises(ValueError, match="no whole run of steps"):
        trace.counted(unmarked, STEPS)


def test_a_profile_marks_every_call_that_launches_steps(trace: Any, module: Any) -> None:
    subjects = module("gpu_check.subjects")
    loops = subjects.Loops(torch.device("cpu"), subjects.TINY)
    sampler = loops.usual(fused=False, graphed=True)
    found = trace.counted(trace.profiled(lambda: sampler.sample(**loops.start(1, 3)), loops.device), 3)
    assert found.marked == 3
    assert found.device_us is None
    modes = []
    with pytest.MonkeyPatch.context() as patch:  # strictness is set within a step and taken back after it
        patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        patch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        with trace.marked(strict=True):
            sampler.sample(**loops.start(1, 3))
    assert modes == ["error", 0] * 3


def test_a_rehearsal_proves_what_a_cpu_can(module: Any, tmp_path: Any, capsys: Any) -> None:
    out = tmp_path / "loop.json"
    assert module("gpu_check.loop").main(["--out", str(out), "--rehearse"]) == 0
    found = json.loads(out.read_text())
    assert (found["stage"], found["ok"], found["rehearsal"], found["failures"]) == ("loop", True, True, [])
    assert [(row["fused"], row["graph"], row["n"]) for row in found["profiles"]] == [
        (True, True, 2), (True, False, 2), (False, True, 2), (False, False, 2), (True, True, 1),
    ]  # fmt: skip
    assert all(row["marked"] == row["steps"] for row in found["profiles"])  # no graphs here: a call each
    bits = found["same_bits"]
    assert set(bits) == {"deterministic, fused", "deterministic, no plan", "graph against eager"}
    assert len(bits["deterministic, fused"]) == 10
    assert all(all(cases.values()) for cases in bits.values())
    assert {(row["network"], row["n"]) for row in found["seconds"]} == {("tutorial", 2), ("ddpm-cifar10-32", 1)}
    assert all(row["seconds"]["median"] > 0 and "sum" in row["plan"] for row in found["seconds"])
    errors = found["distances"]["relative_error"]
    assert errors["fused, float32"] < 1e-5 < errors["fused, bfloat16"] < 0.1
    assert any("only a GPU" in line for line in found["not_done"])
    assert capsys.readouterr().out.rstrip().endswith("loop: ok")


def test_bits_that_depend_on_the_call_are_found(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects, same_bits = module("gpu_check.subjects"), module("gpu_check.same_bits")
    loops, calls = subjects.Loops(torch.device("cpu"), subjects.TINY), []

    def moody(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x * (1 + 1e-3 * (len(calls) > 20))

    def crowded(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-2 * x.mean())

    def found(model: Any) -> dict[str, bool]:
        monkeypatch.setattr(
            loops,
            "sampler",
            lambda network, fused, **choices: Sampler(model, subjects.Schedule.linear(1000), **choices),
        )
        return same_bits.determinism(loops, False)

    honest = found(lambda x, t: 0.5 * x)
    assert all(honest.values())
    later = found(moody)
    assert later["the same call again"]
    assert not later["restarted in the middle"]
    assert not found(crowded)["image 0 alone"]


def test_each_failed_proof_fails_the_run(
    module: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loop, trace = module("gpu_check.loop"), module("gpu_check.trace")
    sizes = SimpleNamespace(profiled=(1, STEPS), eager=STEPS, timed=(("tutorial", 2),), timed_steps=4, distance=4)
    monkeypatch.setattr(loop, "TINY", sizes)
    quiet = SimpleNamespace(sample=lambda **call: None)
    monkeypatch.setattr(loop.Loops, "usual", lambda self, **which: quiet)
    monkeypatch.setattr(loop.Loops, "start", lambda self, n, steps: {})
    waits = profile(trace, between=("cudaStreamSynchronize",))
    monkeypatch.setattr(loop, "profiled", lambda run, device: waits)
    monkeypatch.setattr(loop, "strict", lambda *arguments: None)
    monkeypatch.setattr(loop, "determinism", lambda loops, fused: {"image 0 alone": not fused})
    monkeypatch.setattr(loop, "replays", lambda loops: {"as eager": True})
    far = {"fused, float32": 1.0, "fused, bfloat16": 0.1, "no plan, bfloat16": 0.1}
    monkeypatch.setattr(loop, "distances", lambda loops: far)

    def no_plan(*arguments: Any) -> None:
        raise RuntimeError("no fused plan for the network: it is odd")

    monkeypatch.setattr(loop, "duration", no_plan)
    assert loop.main(["--out", str(tmp_path / "x.json"), "--rehearse"]) == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert not found["ok"]
    assert len(found["failures"]) == 5 + 1 + 1 + 1  # profiles, seconds, bits, distances
    for words in ("1 x cudaStreamSynchronize", "no fused plan", "image 0 alone: not so", "the float32 plan is 1"):
        assert any(words in line for line in found["failures"])
    assert capsys.readouterr().out.count("FAILED") == 8


def test_a_sampler_without_graphs_shares_the_plans(module: Any) -> None:
    subjects = module("gpu_check.subjects")
    loops = subjects.Loops(torch.device("cpu"), subjects.TINY)
    sampler = loops.usual(fused=True, graphed=True)
    twin = loops.usual(fused=True, graphed=False)
    sampler.sample(**loops.start(1, 2))
    assert twin.compiled is sampler.compiled is not None
    assert twin._loops._wanted is False
    assert sampler._loops._wanted is None
    assert subjects.REAL.profiled[1] % graphs.STRIDE  # so that single steps follow the graphs of several
