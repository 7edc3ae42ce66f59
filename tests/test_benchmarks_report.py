"""Result files and reports: checked on the way in and out, tables with the right figures, plots that are images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def record(name, ms, status="ok", **more):
    """A candidate of a result, timed in three rounds, the second one on a slow machine."""
    return {
        "id": name, "what": f"what {name} is", "flags": f"flags of {name}", "dtype": "bfloat16", "notes": "",
        "status": status, "reason": "", "error": 1e-2, "prepare_s": 1.5,
        "rounds_s": [] if ms is None else [ms / 1e3, 3 * ms / 1e3, ms / 1e3],
        **more,
    }  # fmt: skip


def case(n, *candidates, name="tutorial 3x32x32", network="tutorial"):
    return {
        "name": name, "n": n, "shape": [3, 32, 32], "network": network, "options": {},
        "macs": 750_000_000, "parameters": 32_000_000, "candidates": list(candidates),
        "update_s": {"median": 1e-4, "p20": 1e-4, "p80": 1e-4, "rounds": 5}, "layers": "down1.conv1  native 10 us",
    }  # fmt: skip


@pytest.fixture
def result():
    """As run.py writes one."""
    seconds = {"median": 2e-3, "p20": 2e-3, "p80": 3e-3, "rounds": 5}
    return {
        "schema": 1,
        "machine": {
            "device": "cpu", "cpu": "Some CPU (R) 3000", "cpus": 2, "threads": 2, "cpu_features": ["avx2"],
            "inference_isas": [["avx2", "f32"]], "isa_mask": "", "omp_wait_policy": "", "load_average": 0.1,
            "python": "3.11.7", "ddpm_fast": "0.1.0", "commit": "abc", "versions": {"torch": "2.13.0"},
        },
        "settings": {"argv": ["--quick"], "took_s": 120.0},
        "peaks": {"bfloat16": 1e12, "float32": 2e11, "read": 2e10},
        "ops": [
            {
                "dtype": "float32", "elements": 1000, "copy_bytes_per_second": 1e10,
                "cases": [
                    {
                        "op": "q_sample", "bytes": 1e7, "seconds": {"ddpm_fast": seconds},
                        "ratios": {"eager": {**seconds, "median": 2.5}, "torch.compile": {**seconds, "median": 0.5}},
                    }
                ],
                "failed": {"normal": "differs from the reference"},
            }
        ],
        "cases": [
            case(16, record("F16", 16.0, fixed_s=seconds), record("C16", 32.0), record("OV16", 16.0, "inaccurate"),
                 record("D32", None, "missing", reason="not installed; pip install diffusers", error=None)),
            case(1, record("F16", 4.0, fixed_s=seconds), record("C16", 5.0)),
            case(16, record("F16", 160.0), record("C16", 200.0, flags="flags of another C16"), record("D16", 150.0),
                 name="ddpm-cifar10-32", network="ddpm-cifar10-32"),
            case(64, record("F16", 700.0), record("C16", 1400.0), record("D16", 2100.0),
                 name="ddpm-cifar10-32", network="ddpm-cifar10-32"),
        ],
        "host": [
            {
                "scheduler": "DDPMScheduler", "what": "DDPMScheduler().step", "status": "ok", "reason": "",
                "rounds_s": {"ours": [2e-5, 4e-5, 2e-5], "diffusers": [1.2e-4, 2.4e-4, 1.3e-4]},
            },
            {"scheduler": "DDIMScheduler", "what": "DDIMScheduler().step", "status": "missing",
             "reason": "not installed; pip install diffusers", "rounds_s": {}},
        ],
        "drift": {
            "case": "tutorial 3x32x32", "n": 2, "steps": 1000, "seed": 7, "clip": 1.0, "reference": "S32",
            "rows": [
                {"id": "F16", "what": "plan", "psnr_db": 51.25, "max_abs": 0.03, "reason": ""},
                {"id": "C16", "what": "compiled", "psnr_db": None, "max_abs": None, "reason": "failed here"},
            ],
        },
    }  # fmt: skip


def test_results_survive_a_file(module, result, tmp_path):
    results = module("results")
    file = tmp_path / "a" / "r.json"
    results.save(result, file)
    assert results.load(file) == result
    assert [path.name for path in file.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.pop("machine"), "result.machine must be a dict, got None"),
        (lambda r: r.update(schema=0), "result.schema must be 1, got 0"),
        (lambda r: r["cases"][0].update(n="16"), r"cases\[0\].n must be a int, got '16'"),
        (lambda r: r["cases"][1]["candidates"][0].pop("flags"), r"cases\[1\].candidates\[0\].flags must be a str"),
        (lambda r: r["cases"][0]["candidates"][1].update(status="fine"), "status must be one of ok, inaccurate"),
        (lambda r: r["cases"][0]["candidates"][1].update(status="wrong"), "'wrong' with 3 rounds"),
        (lambda r: r["cases"][0]["candidates"][3].update(status="ok"), "'ok' with 0 rounds"),
        (lambda r: r["host"][0].pop("what"), r"host\[0\].what must be a str, got None"),
        (lambda r: r["host"][1].update(status="ok"), r"host\[1\]: 'ok' with rounds of \[\]"),
        (lambda r: r["host"][0].update(status="wrong"), r"host\[0\]: 'wrong' with rounds of \['diffusers', 'ours'\]"),
    ],
)
def test_a_bad_result_is_named(module, result, spoil, message, tmp_path):
    results = module("results")
    spoil(result)
    with pytest.raises(ValueError, match=message):
        results.save(result, tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"r.json: .*{message}"):
        results.load(tmp_path / "r.json")


def test_nan_is_not_written(module, result, tmp_path):
    result["peaks"]["read"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        module("results").save(result, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_figures_follow_from_the_rounds(module, result):
    results = module("results")
    wide, narrow, *_ = result["cases"]
    assert results.ours(wide) == "F16"
    assert results.best_baseline(wide) == "C16"  # OV16 is as fast as ours, but inaccurate
    assert results.speed_up(wide, "C16").median == 2.0
    assert results.speed_up(wide, "D32") is None
    assert results.floor(wide, result["peaks"]) == pytest.approx(2 * 0.75e9 * 16 / 1e12)  # bound by multiply-adds
    assert results.floor(narrow, result["peaks"]) == pytest.approx(2 * 32e6 / 2e10)  # by reading the weights
    assert results.floor(narrow, result["peaks"], "float32") == pytest.approx(2 * 0.75e9 / 2e11)
    assert results.floor(narrow, {"read": 1.0}) is None
    verdicts = {(row.case, row.baseline, row.n): row.reached for row in module("targets").targets(result)}
    tutorial, paper = "tutorial 3x32x32", "ddpm-cifar10-32"
    assert verdicts == {
        (tutorial, "C16", 16): True, (tutorial, "OV16", 16): False, (tutorial, "C16", 1): False,
        (paper, "C16", 16): False, (paper, "D16", 16): False, (paper, "D16", 64): True,
        ("DDPMScheduler.step", "diffusers", 1): True,
    }  # fmt: skip
    assert module("targets").targets(result)[-1].measured.median == pytest.approx(6.0)
    assert results.host_ratio(result["host"][1]) is None


def test_the_report_has_the_figures_and_the_plot(module, result, tmp_path):
    pytest.importorskip("matplotlib")
    results = module("results")
    results.save(result, tmp_path / "box.json")
    assert module("report").main([str(tmp_path / "box.json"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "box.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]

    def row(start):
        found = next(line for line in rows if line.startswith(f"| {start}"))
        return [cell.strip() for cell in found.strip("|").split("|")]

    assert rows[0].startswith("| of | n | baseline | wanted")
    assert row("tutorial 3x32x32 | 16 | `C16`")[3:] == ["1.5x", "2.00x (2.00-2.00)", "reached"]
    assert row("tutorial 3x32x32 | 16 | `OV16`")[3:] == ["1.3x", "1.00x (1.00-1.00)", "**missed**"]
    assert row("ddpm-cifar10-32 | 64 | `D16`")[3:] == ["1.0x", "3.00x (3.00-3.00)", "reached"]
    assert row("DDPMScheduler.step | 1 | `diffusers`")[3:] == ["5.0x", "6.00x (6.00-6.50)", "reached"]
    assert row("DDPMScheduler().step")[1:] == ["20.0", "130.0", "6.00x (6.00-6.50)"]
    assert row("DDIMScheduler().step")[1] == "missing: not installed; pip install diffusers"
    # n = 1 comes first: ms per image, then how many times as long as ours
    assert row("`F16` what")[1:] == ["4.000", "1.000", "1", "1"]
    assert row("`C16` what")[1:] == ["5.000", "2.000", "1.25x (1.25-1.25)", "2.00x (2.00-2.00)"]
    assert row("`OV16` what")[2] == "1.000 (inaccurate)"
    assert row("`D32` what")[2] == "missing: not installed; pip install diffusers"
    assert row("roofline of this machine, bfloat16")[1:3] == ["3.200", "1.500"]
    assert row("16 | `F16`")[2:] == ["16.000", "0.100", "0.6%", "2.00"]
    assert row("`q_sample`")[1:4] == ["2.000", "5.0", "50%"]
    assert row("`normal`")[1] == "check failed: differs from the reference"
    assert row("`F16` plan")[1:] == ["51.2", "3.0e-02"]
    assert "down1.conv1  native 10 us" in text
    listed = [line for line in text.splitlines() if line.startswith("- `C16`")]
    assert listed == [
        "- `C16` what C16 is: flags of C16.", "- `C16`, ddpm-cifar10-32 what C16 is: flags of another C16."
    ]  # fmt: skip
    assert text.count("- `F16`") == 1  # the same in both networks
    assert (tmp_path / "out" / "box-ddpm-cifar10-32.png").is_file()
    picture = tmp_path / "out" / "box-tutorial-3x32x32.png"
    assert f"({picture.name})" in text
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000


def test_without_matplotlib(module, result, tmp_path, monkeypatch, capsys):
    module("results").save(result, tmp_path / "r.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "plots", raising=False)
    report = module("report")
    assert report.main([str(tmp_path / "r.json")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert report.main([str(tmp_path / "r.json"), "--no-plots"]) == 0
    assert ".png" not in (tmp_path / "r.md").read_text()


def test_a_file_that_is_no_result(module, tmp_path, capsys):
    (tmp_path / "r.json").write_text("[]")
    assert module("report").main([str(tmp_path / "r.json")]) == 2
    assert "result must be an object, got list" in capsys.readouterr().err
    assert module("report").main([str(tmp_path / "none.json")]) == 2


def test_machines_have_names(module):
    slug = module("machine").slug
    assert slug({"device": "cpu", "cpu": "AMD EPYC(TM) 9B14", "threads": 2}) == "amd-epyc-tm-9b14-2-threads"
    assert slug({"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_stored_results_are_readable(module):
    for path in sorted((FOLDER / "results").glob("*.json")):
        if path.stem == "differences" or path.stem.endswith("-fashion-mnist"):  # not of run.py
            continue
        result = module("results").load(path)
        assert module("report").report(result, {})
