"""benchmarks/gpu_check/limits.py: its figures, its file, and the parts that only a GPU has on a pretended one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def read(path: Any) -> dict[str, Any]:
    return json.loads(path.read_text())


class Pretended:
    """A device whose clock moves when work runs on it: NODE for a launch, GAP between two replays of graphs."""

    NODE, GAP = 2e-6, 3e-6

    def __init__(self) -> None:
        self.now, self.launched, self.waits = 0.0, 0, 0

    def work(self) -> None:
        self.launched += 1
        self.now += self.NODE

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                device.waits += 1

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        class Graph:
            nodes = 0

            def replay(self) -> None:
                device.now += self.nodes * device.NODE + device.GAP

        @contextlib.contextmanager
        def graph(recorded: Graph):
            before = device.launched, device.now
            yield
            recorded.nodes, device.now = device.launched - before[0], before[1]

        for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": graph, "_sleep": lambda cycles: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def test_a_rehearsal_fills_every_figure_that_a_cpu_has(module: Any, tmp_path: Any, capsys: Any) -> None:
    out = tmp_path / "deep" / "limits.json"
    assert module("gpu_check.limits").main(["--out", str(out), "--rehearse"]) == 0
    found = read(out)
    assert (found["stage"], found["ok"], found["rehearsal"], found["failures"]) == ("limits", True, True, [])
    assert found["machine"]["device"] == "cpu"
    for row in found["copies"]:
        assert all(rate > 1e6 for rate in row["bytes_per_second"].values())
        copy = row["seconds"]["copy"]
        assert row["bytes_per_second"]["copy"] == pytest.approx(2 * row["bytes"] / copy["median"])
    assert found["copy_bytes_per_second"] >= found["copies"][-1]["bytes_per_second"]["copy"]
    assert set(found["product_flop_per_second"]) == {"bfloat16", "float16", "tf32", "float32"}
    assert all(row["flop_per_second"] > 1e6 for row in [*found["products"], found["convolution"]])
    assert any("CUDA graphs" in line for line in found["not_done"])
    assert {"torch, 1 element", "torch, 16384 elements", "ddpm_step native, 1 image"} <= set(
        found["eager_host_seconds"]
    )
    said = capsys.readouterr().out
    assert "no figure here says anything" in said
    assert said.rstrip().endswith("limits: ok")


def test_without_a_gpu_it_says_so_in_a_line_and_leaves_nothing(module: Any, tmp_path: Any, capsys: Any) -> None:
    for name in ("limits", "loop", "tune"):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert module(f"gpu_check.{name}").main(["--out", str(tmp_path / "x.json")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "no NVIDIA GPU" in line
        assert "--rehearse" in line
    assert not list(tmp_path.iterdir())


def test_a_wrong_product_fails(module: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    limits = module("gpu_check.limits")
    row = {"type": "bfloat16", "edge": 4, "flop_per_second": 1.0, "seconds": {}, "error": math.nan}
    monkeypatch.setattr(limits, "products", lambda clock, edge: [row])
    for part in ("copies", "convolution"):
        monkeypatch.setattr(limits, part, lambda *arguments: None)
    monkeypatch.setattr(limits, "launches", lambda *arguments: None)
    assert limits.main(["--out", str(tmp_path / "x.json"), "--rehearse"]) == 1
    found = read(tmp_path / "x.json")
    assert not found["ok"]
    assert len(found["failures"]) == 1
    assert "bfloat16 product" in found["failures"][0]
    assert found["products"][0]["error"] is None  # JSON has no NaN
    assert "FAILED: a bfloat16 product" in capsys.readouterr().out


def test_what_fails_or_has_no_time_or_memory_leaves_the_rest_alone(module: Any, tmp_path: Any) -> None:
    findings = module("gpu_check.findings")
    out = tmp_path / "x.json"
    one = findings.Findings("limits", out, torch.device("cpu"), rehearsal=True, minutes=None)

    def breaks() -> None:
        raise RuntimeError("the kernel\nwas wrong")

    def too_large() -> None:
        raise torch.cuda.OutOfMemoryError("no")

    assert one.attempt("first", breaks) is None
    assert one.attempt("second", too_large) is None
    assert one.attempt("third", lambda: 3) == 3
    found = read(out)
    assert found["failures"] == ["first: RuntimeError: the kernel"]
    assert found["not_done"] == ["second: not enough memory on the device"]
    over = findings.Findings("limits", out, torch.device("cpu"), rehearsal=True, minutes=0.0)
    assert over.attempt("late", lambda: 3) is None
    over.add(figure=[math.inf, {"nan": math.nan}])
    assert read(out)["not_done"] == ["late: no time left"]
    assert read(out)["figure"] == [None, {"nan": None}]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_costs_of_launches_are_told_apart(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended()
    device.install(monkeypatch)
    clock = module("gpu_check.clock").Clock(torch.device("cuda"))
    costs = module("gpu_check.launch_costs").graph_costs(clock, {"work": device.work})
    assert costs["node_seconds"]["work"]["median"] == pytest.approx(device.NODE, rel=0.01)
    assert costs["gap_seconds"]["work"] == pytest.approx(device.GAP, rel=0.01)
    assert costs["gap_seconds"]["work, graph of 10"] == pytest.approx(device.GAP, rel=0.02)
    assert costs["replay_host_seconds"]["work"]["median"] > 0
    assert device.waits > 0
    timing = module("gpu_check.clock").interleaved(clock, {"one": device.work, "two": lambda: (device.work(),) * 2})
    assert timing["one"].median == pytest.approx(device.NODE)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A GPU's answers, and an nvidia-smi that keeps what it was asked."""
    facts = {"name": "Pretended GPU", "major": 9, "minor": 0, "total_memory": 2**36, "multi_processor_count": 132}
    properties = SimpleNamespace(**facts, L2_cache_size=50 * 2**20, uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**35, 2**36))
    tool, asked = tmp_path / "bin" / "nvidia-smi", tmp_path / "asked"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\n'
        'case "$1" in *clocks_event*) echo "invalid field" >&2; exit 2;; *throttle*) echo 0x0000000000000001;;\n'
        '*) echo "580.1, 1755 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 99.0 W, 700.0 W, 40, 3 %";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return asked


def test_nvidia_smi_is_asked_and_never_told(module: Any, card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = module("gpu_check.limits")
    told = limits.clocks(torch.device("cuda"))
    assert told["clocks.current.sm"] == "1755 MHz"
    assert told["clocks_throttle_reasons.active"] == "0x0000000000000001"
    for line in card.read_text().splitlines():
        first, *others = line.split(" ")
        assert first.startswith("--query-gpu=")
        assert others == ["--format=csv,noheader", "-i", "GPU-1234"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert limits.clocks(torch.device("cuda")) == {}


def test_every_part_runs_on_a_pretended_gpu(
    module: Any, card: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Work runs on the CPU; the calls around it are those of a GPU."""
    device = Pretended()
    monkeypatch.setattr(Pretended, "NODE", 1e-6)
    device.install(monkeypatch)
    monkeypatch.setattr(Pretended, "now", property(lambda self: time.perf_counter(), lambda self, value: None), False)
    limits, clock = module("gpu_check.limits"), module("gpu_check.clock")
    monkeypatch.setattr(clock.Clock, "on_gpu", True)
    monkeypatch.setattr(clock, "MOST_CALLS", 3)
    monkeypatch.setattr(limits, "MOST_CALLS", 3)
    costs = module("gpu_check.launch_costs")
    for name, few in (("NODES", 3), ("REPLAYS", 3)):
        monkeypatch.setattr(costs, name, few)
    monkeypatch.setattr(limits.time, "sleep", lambda seconds: None)
    assert limits.main(["--out", str(tmp_path / "x.json"), "--rehearse"]) == 0
    found = read(tmp_path / "x.json")
    assert found["card"]["multi_processor_count"] == 132
    assert found["card"]["shared_memory_per_multiprocessor"] is None  # an attribute that this torch does not have
    assert found["clocks_at_rest"] == found["clocks_under_load"]
    assert set(found["graph"]["node_seconds"]) == set(found["eager_host_seconds"])
    said = capsys.readouterr().out
    for words in ("132 multiprocessors, L2 50 MiB", "a node of a graph", "between two replays", "1755 MHz"):
        assert words in said
