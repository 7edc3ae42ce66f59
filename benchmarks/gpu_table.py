"""README's GPU figures: made from the result files of GPUs in benchmarks/results, between two marks; nothing else is.

    python benchmarks/gpu_table.py            # writes README
    python benchmarks/gpu_table.py --check    # exit code 1 where README is not what would be written

Without a result file of a GPU it writes that there are no figures yet. Every figure stands beside its baseline of the
same run, with date, GPU, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import results
import targets
from report import by_name, markdown

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made by benchmarks/gpu_table.py -->", "<!-- end of what benchmarks/gpu_table.py made -->"
NONE = (
    "No GPU figure stands here yet, because none has been measured. `benchmarks/gpu_check.sh` measures them on a "
    "machine that has one,\nand this section is then made from its result file."
)
BASELINES = {
    "E32": "eager PyTorch, float32",
    "E16": "eager PyTorch, bfloat16, channels_last",
    "G16": "the same in a CUDA graph, BatchNorm folded where there is one",
    "C16": "`torch.compile` of the whole step, max-autotune, bfloat16",
    "D32": "diffusers' `DDPMPipeline`, float32",
    "D16": "diffusers' `DDPMPipeline`, bfloat16, channels_last",
    "L32": "the package's `GaussianDiffusion.sample`, float32",
    "L16": "the package's `GaussianDiffusion.sample`, autocast to bfloat16",
}
OURS = {
    "F16": "**`Sampler(fused=True, dtype=torch.bfloat16)`**",
    "F32": "`Sampler(fused=True)`, float32",
    "S16": "`Sampler` of the network as it is, bfloat16",
    "S32": "`Sampler` of the network as it is, float32",
}


def gpu_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, result) of every result file of a GPU; ValueError for one that is not as it should be."""
    found = []
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        machine = told.get("machine") if isinstance(told, dict) else None
        if isinstance(machine, dict) and machine.get("device") == "cuda":
            found.append((path.stem, results.load(path)))
    return found


def head(name: str, result: dict[str, Any], folder: str) -> str:
    """Where, when and with what it was measured."""
    facts = result["machine"]
    versions = f"torch {facts['versions']['torch']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}, Triton "
    versions += f"{facts['versions']['triton']}, driver {facts.get('driver', 'unknown')}"
    return (
        f"#### {facts['gpu']}\n\nMeasured on {facts.get('date', 'an unknown day')} at commit {facts['commit']}; "
        f"{versions}. Every candidate was checked\nagainst float64 first; candidates took turns; medians. "
        f"[All figures, flags, percentiles]({folder}/{name}.md)."
    )


def steps(name: str, group: list[dict[str, Any]]) -> str:
    """Seconds of 1000 steps of every candidate, and how many times as long as ours it takes."""
    sizes = [case["n"] for case in group]
    rows = [["images at a time", *(f"{n}: s" for n in sizes), *(f"{n}: against ours" for n in sizes)]]
    for candidate, words in {**OURS, **BASELINES}.items():
        found = [results.timed(case).get(candidate) for case in group]
        if not any(found):
            continue
        times, factors = [], []
        for case, record in zip(group, found, strict=True):
            bold = "**" if candidate == "F16" else ""
            mark = " (inaccurate)" if record is not None and record["status"] == "inaccurate" else ""
            times.append("" if record is None else f"{bold}{targets.thousand_steps(record).median:.3f}{mark}{bold}")
            ratio = None if candidate in OURS else results.speed_up(case, candidate, "F16")
            factors.append("" if ratio is None else f"{ratio.median:.2f}x")
        rows.append([words, *times, *factors])
    return f"1000 steps of sampling, {name}, seconds:\n\n{markdown(rows)}"


def ops(figures: dict[str, Any]) -> str:
    """The ops beside their baselines."""
    copy = figures["copy_bytes_per_second"]
    rows = [["op", "ms", "of the rate of a copy", "eager: ms", "against ours", "`torch.compile`: ms", "against ours"]]
    for row in figures["cases"]:
        seconds = {who: row["seconds"][who]["median"] for who in ("ddpm_fast", "eager", "torch.compile")}
        cells = [f"`{row['op']}`", f"{seconds['ddpm_fast'] * 1e3:.3f}"]
        cells.append(f"{row['bytes'] / seconds['ddpm_fast'] / copy:.0%}")
        for who in ("eager", "torch.compile"):
            cells += [f"{seconds[who] * 1e3:.3f}", f"{row['ratios'][who]['median']:.2f}x"]
        rows.append(cells)
    size = f"{figures['elements'] / 2**20:g} Mi elements, {figures['dtype']}"
    return f"Ops, {size}; a copy moves {copy / 1e9:.0f} GB/s:\n\n{markdown(rows)}"


def marks(result: dict[str, Any]) -> str:
    """How many of the goals were reached, and which were missed."""
    rows = targets.targets(result)
    judged = [row for row in rows if row.judged]
    if not judged:
        return "The project's goals are for other GPUs: no verdict here." if rows else ""
    missed = [row for row in judged if not row.reached]
    text = f"{len(judged) - len(missed)} of {len(judged)} goals reached."
    lines = [f"- {r.case}, n = {r.n}, {r.of()}: {r.shown()}, wanted {r.wanted()}" for r in missed]
    return "\n".join([f"{text} Missed:\n", *lines]) if lines else text


def section(found: list[tuple[str, dict[str, Any]]], folder: str = "benchmarks/results") -> str:
    """What stands between the marks."""
    if not found:
        return NONE
    parts = []
    for name, result in found:
        parts.append(head(name, result, folder))
        parts += [steps(case, group) for case, group in by_name(result).items()]
        parts += [ops(figures) for figures in result["ops"] if figures["cases"]]
        parts.append(marks(result))
    return "\n\n".join(filter(None, parts))


def rewritten(readme: str, text: str) -> str:
    """README with the text between the marks. ValueError where it has not exactly one pair of them."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README must have the line {BEGIN} once and {END} once after it")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def main(argv: list[str] | None = None) -> int:
    """Write README or compare; exit code 1 where --check finds a difference, 2 for a README without marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README is another")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    options = parser.parse_args(argv)
    try:
        readme = options.readme.read_text(encoding="utf-8")
        wanted = rewritten(readme, section(gpu_results(options.results)))
    except (OSError, ValueError) as error:
        print(f"gpu_table.py: error: {error}", file=sys.stderr)
        return 2
    if options.check:
        if wanted != readme:
            print(
                "README's GPU figures are not those of the result files; run benchmarks/gpu_table.py", file=sys.stderr
            )
        return int(wanted != readme)
    options.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
