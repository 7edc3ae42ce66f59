"""benchmarks/gpu_check/static.py: no kernel is left out, every rule can fail, nothing modelled looks measured."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import inspected
import pytest
from gpu_check import budgets, cuda_kernels, rules, sources
from gpu_check.kernels import Kernel, resident_warps

ROOT = Path(__file__).parent.parent
TRITON = pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("planted_faults.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def kernels_in(folder: str, pattern: str) -> set[str]:
    files = [path for path in sorted((ROOT / folder).iterdir()) if path.suffix in (".py", ".cu", ".cuh")]
    return {name for path in files for name in re.findall(pattern, path.read_text())}


def test_the_sources_are_read_right() -> None:
    jitted = kernels_in("ddpm_fast/backends/triton", r"@triton\.jit[^\n]*\ndef (\w+)\(")
    assert len(jitted) > 60
    assert sources.triton_kernels() == {name for name in jitted if name.endswith("_kernel")}
    named = kernels_in("csrc/cuda", r"\b(\w+_kernel)\(")
    assert len(named) > 25
    assert sources.cuda_kernels() == named


def test_every_triton_kernel_is_inspected_for_both_architectures(planted: dict[str, Any]) -> None:
    launches = {(name, capability) for name, capability in planted["launches"]}
    assert launches == {(name, capability) for name in sources.triton_kernels() for capability in (80, 90)}


def test_what_was_not_inspected_is_said() -> None:
    seen = [kernel("ops", function=name, capability=c) for name in sources.triton_kernels() for c in (80, 90)]
    assert sources.missing(seen, cuda=False) == []
    assert sources.missing(seen[1:], cuda=False) == [
        f"Triton kernel {seen[0].function} was not inspected for sm_{seen[0].capability}"
    ]
    assert "CUDA kernel normal_kernel was not inspected for sm_90" in sources.missing(seen, triton=False)


def test_plans_have_every_kind_of_layer_and_batch(planted: dict[str, Any]) -> None:
    uses = {use for _, used in planted["plans"] for use in used}
    batches = ("N=1 bf16", "N=16 bf16", "N=64 bf16", "N=512 bf16", "N=64 f32")
    assert uses == {f"{network} {batch}" for network in ("tutorial", "paper", "lucidrains") for batch in batches}
    names = " ".join(name for name, _ in planted["plans"])
    for kind in ("split", "joined", "window", "doubled", "(with the step)", "pixels x"):
        assert kind in names
    assert len(planted["plans"]) > 1000


def test_planted_faults_are_found(planted: dict[str, Any]) -> None:
    found = {name: "; ".join(problems) for name, problems in planted["problems"].items()}
    assert found.pop("nothing") == ""
    assert "accesses to local memory in a loop" in found.pop("spills")
    assert r"\bfma\." in found.pop("fused")
    assert "asynchronous copies of 128 bits" in found.pop("narrow operands")
    assert "narrow access: 0 STG of 128 bits, 1 promised" in found.pop("narrow stores")
    assert "products not by HMMA: 0 HGMMA, 0 HMMA" in found.pop("no tensor cores")
    assert r"\.approx" in found.pop("approximate")
    assert "bytes of shared memory" in found.pop("too much shared memory")
    assert not found


def kernel(part: str, **facts: Any) -> Kernel:
    """A kernel that breaks no rule, but for these facts."""
    fine: dict[str, dict[str, Any]] = {
        "ops": {"name": "normal", "function": "_normal_kernel", "elements": 16, "instructions": 800,
                "wide_stores": [4], "memory": {"STG.E.128": 4}},
        "layers": {"name": "down2.conv1", "function": "_conv_kernel", "hgmma": 8, "instructions": 2697,
                   "memory": {"LDGSTS.E.BYPASS.128": 48, "STG.E.128": 16}, "kind": "conv", "tile": [128, 128],
                   "stored": [2], "copies": 48, "registers": 255},
        "cuda": {"name": "normal_kernel<float, Run>", "function": "normal_kernel", "memory": {"STG.E.128": 1},
                 "main_path": 248, "elements": 4, "contracted": 0, "threads": 256},
    }  # fmt: skip
    usual = {"part": part, "dtype": "f32", "capability": 90, "threads": 128, "registers": 32, "shared": 0}
    return Kernel(**copy.deepcopy({**usual, **fine[part], **facts}))


@pytest.mark.parametrize("part", ["ops", "layers", "cuda"])
def test_a_good_kernel_has_no_problems(part: str) -> None:
    assert rules.problems(kernel(part)) == []


@pytest.mark.parametrize(
    ("part", "facts", "problem"),
    [
        ("ops", {"spills": 2}, "spills: 2 accesses to local memory, 0 bytes of stack"),
        ("ops", {"stack": 8}, "spills: 0 accesses to local memory, 8 bytes of stack"),
        ("cuda", {"spills": 1, "spills_in_loops": 1}, "1 accesses to local memory in a loop"),
        ("layers", {"name": "conv_up3.conv1", "dtype": "bf16", "spills": 15, "stack": 32}, "spills: 15 accesses"),
        ("ops", {"instructions": 1000}, "62.5 instructions per element, 62 allowed"),
        ("ops", {"registers": 136}, "136 registers, 128 allowed"),
        ("ops", {"name": "ddpm_step_history", "layouts": 2}, "shared out among threads in 2 ways"),
        ("ops", {"inexact": {"div\\.full": 1}}, "inexact arithmetic: 1 x div"),
        ("layers", {"inexact": {"\\bfma\\.": 1}, "exact": False}, "inexact arithmetic: 1 x"),
        ("layers", {"hgmma": 0, "hmma": 64}, "products not by HGMMA: 0 HGMMA, 64 HMMA"),
        ("layers", {"capability": 80, "name": "down2.conv2"}, "products not by HMMA: 8 HGMMA, 0 HMMA"),
        ("layers", {"threads": 256}, "8 warps, 4 expected"),
        ("layers", {"shared": 120000}, "4 warps fit on a multiprocessor, of two programs 8"),
        ("layers", {"memory": {"LDGSTS.E.BYPASS.128": 48, "STG.E.64": 32}}, "narrow access: stores of [64] bits"),
        ("layers", {"memory": {"LDGSTS.E.64": 96, "STG.E.128": 16}}, "operands copied to shared memory [64] bits"),
        ("layers", {"residual": True}, "the residual is not loaded 128 bits at a time"),
        ("layers", {"instructions": 3000}, "3000 instructions, 2697 seen before"),
        ("layers", {"name": "new"}, "no budget: add what is seen to budgets.LAYERS"),
        ("cuda", {"registers": 65}, "65 registers, 64 allowed"),
        ("cuda", {"registers": 33}, "48 warps fit on a multiprocessor, 64 promised"),
        ("cuda", {"contracted": 2}, "2 fused multiply-adds besides those of square roots and divisions"),
        ("cuda", {"memory": {"STG.E": 4}}, "narrow access: 0 loads and 0 stores of 128 bits"),
        ("cuda", {"memory": {"STG.E.128": 1, "STG.E": 1}}, "2 stores, 1 of 128 bits promised and no others"),
        ("cuda", {"main_path": 265}, "66.25 instructions per element on the main path, 66 allowed"),
        ("cuda", {"main_path": None}, "no path through"),
    ],
)
def test_every_rule_can_fail(part: str, facts: dict[str, Any], problem: str) -> None:
    assert [found for found in rules.problems(kernel(part, **facts)) if problem in found]


def test_known_spills_are_small_and_in_no_loop() -> None:
    known = kernel("layers", name="conv_up3.conv1", dtype="bf16", spills=14, stack=32, instructions=3062)
    assert rules.problems(known) == []
    known.spills_in_loops = 1
    assert rules.problems(known) == ["1 accesses to local memory in a loop"]
    assert max(budgets.SPILLS.values()) < 16


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "warps"),
    [
        (90, 256, 32, 0, 64),
        (90, 256, 33, 0, 48),  # registers go in eights
        (90, 128, 255, 0, 8),
        (90, 128, 64, 98304, 8),
        (80, 128, 64, 98304, 4),
        (80, 128, 64, 160 * 1024, 4),
        (80, 128, 64, 164 * 1024, 0),  # more than a block can have
        (90, 32, 16, 0, 32),  # not more than 32 blocks
        (90, 1024, 255, 0, 0),
    ],
)
def test_resident_warps(capability: int, threads: int, registers: int, shared: int, warps: int) -> None:
    assert resident_warps(capability, threads, registers, shared) == warps


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    return inspected.run(tmp_path_factory.mktemp("static") / "deeper" / "static.json", "--rehearse")


def test_the_stage_writes_what_it_found(rehearsal: tuple[Any, dict[str, Any]]) -> None:
    done, found = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    assert (found["stage"], found["ok"], found["rehearsal"], found["failures"]) == ("static", True, True, [])
    assert found["machine"]["device"] == "cpu"
    parts = {record["part"] for record in found["kernels"]}
    assert parts == {"ops", "layers", "plans", *(["cuda"] if cuda_kernels.find_nvcc() else [])}
    for record in found["kernels"]:
        assert Kernel.load(record).resident_warps == record["resident_warps"] > 0
    assert re.search(r"^\d+ kernels, 0 problems", done.stdout.splitlines()[-1])


def test_nothing_modelled_looks_measured(rehearsal: tuple[Any, dict[str, Any]]) -> None:
    """Rates and times occur in the paragraph that says what is a model, and the columns made from them say so too."""
    text = rehearsal[0].stdout
    assert text.count("Modelled, NOT MEASURED:") == 1
    before, model = text.split("Modelled, NOT MEASURED:")
    paragraph, head, *rows = model.splitlines()
    rate = re.compile(r"\b(?:[GT]B/s|FLOP|ms|us|seconds|measured|bandwidth)\b")
    assert rate.search(paragraph)
    assert not rate.search("\n".join([before, head, *rows]))
    assert head.count("(model)") == 2
    assert "goal" in head
    assert "goal" not in before
    assert "%" not in before


def test_out_of_time_is_said(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static, layers, plans = (module(f"gpu_check.{name}") for name in ("static", "triton_layers", "triton_plans"))
    job = module("gpu_check.triton_jobs").Job
    monkeypatch.setattr(layers, "jobs", lambda: [job("layers", "one", "bf16", 90, None)] * 34)
    used = [["paper N=1 bf16"], ["paper N=1 bf16", "tutorial N=1 bf16"]]
    monkeypatch.setattr(plans, "jobs", lambda wanted: [job("plans", "one", "bf16", 90, None, used=u) for u in used])
    findings = static.Findings(tmp_path / "static.json", False)
    given = static.parser().parse_args(["--out", str(tmp_path / "static.json"), "--jobs", "1"])
    for part in ("layers", "plans"):
        static.triton_part(part, given, 0.0, findings)
    findings.save(finished=False)
    found = json.loads((tmp_path / "static.json").read_text())
    assert found["ok"] is False
    assert found["not_done"] == [
        "layers: 34 of 34 kernels, no time left",
        "plans: 2 of 2 kernels, no time left: of paper N=1 bf16, tutorial N=1 bf16",
        "the run did not come to its end",
    ]
