"""From result files to a Markdown report and PNG plots.

    python benchmarks/report.py RESULT.json... [--out DIR] [--no-plots] [--merge FILE.json]

Writes DIR/<name of the result>.md and beside it <name>-<case>.png, one for every network and image size. DIR: where the
result file is. --merge makes one result of several runs of the same machine and commit, a later one replacing what an
earlier one has of the same case, and reports on that.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import results
import targets
from timing import Timing

Table = list[list[str]]


def markdown(rows: Table) -> str:
    """Rows, the first of them the header, as a table."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def by_name(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cases of each network and image size, by falling interest: the order in the file."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        groups.setdefault(case["name"], []).append(case)
    return {name: sorted(group, key=lambda case: int(case["n"])) for name, group in groups.items()}


def candidates(group: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every candidate of the cases by id, as its first case has it."""
    found: dict[str, dict[str, Any]] = {}
    for case in group:
        for record in case["candidates"]:
            found.setdefault(record["id"], record)
    return found


def _factor(value: Timing | None) -> str:
    return "" if value is None else f"{value.median:.2f}x ({value.p20:.2f}-{value.p80:.2f})"


def speeds(group: list[dict[str, Any]], peaks: dict[str, float]) -> str:
    """ms per image and step of every candidate, and how many times as long as ours it takes."""
    rows = [["", *(f"n = {case['n']}: ms/image" for case in group), *(f"n = {c['n']}: against ours" for c in group)]]
    for name, record in candidates(group).items():
        times, factors = [], []
        for case in group:
            found = results.timed(case).get(name)
            if found is None:
                here = next((c for c in case["candidates"] if c["id"] == name), None)
                times.append("-" if here is None else f"{here['status']}: {here['reason']}")
                factors.append("")
                continue
            mark = " (inaccurate)" if found["status"] == "inaccurate" else ""
            times.append(f"{results.speed(found).median * 1e3 / case['n']:.3f}{mark}")
            factors.append("1" if name == results.ours(case) else _factor(results.speed_up(case, name)))
        rows.append([f"`{name}` {record['what']}", *times, *factors])
    for dtype in ("bfloat16", "float32"):
        floors = [results.floor(case, peaks, dtype) for case in group]
        cells = ["" if f is None else f"{f * 1e3 / case['n']:.3f}" for f, case in zip(floors, group, strict=True)]
        rows.append([f"roofline of this machine, {dtype}", *cells, *("" for _ in group)])
    return markdown(rows)


def accuracy(group: list[dict[str, Any]]) -> str:
    """Relative error against float64 and seconds to build, per candidate and batch."""
    rows = [["", *(f"n = {case['n']}: error" for case in group), *(f"n = {c['n']}: built in s" for c in group)]]
    for name in candidates(group):
        records = [next((c for c in case["candidates"] if c["id"] == name), None) for case in group]
        errors = ["-" if r is None or r["error"] is None else f"{r['error']:.1e}" for r in records]
        built = ["-" if r is None or not r["rounds_s"] else f"{r['prepare_s']:.1f}" for r in records]
        rows.append([f"`{name}`", *errors, *built])
    return markdown(rows)


def shares(group: list[dict[str, Any]]) -> str:
    """What of our step is the network, and what the reverse update; what a call of `sample` costs beside its steps."""
    rows = [["n", "candidate", "step, ms", "reverse update alone, ms", "share of it", "once per call of sample, ms"]]
    for case in group:
        for name, record in results.timed(case).items():
            if name in results.OURS and "update_s" in case:
                step, update = results.speed(record).median, case["update_s"]["median"]
                fixed = record.get("fixed_s", {}).get("median")
                cells = [
                    str(case["n"]),
                    f"`{name}`",
                    f"{step * 1e3:.3f}",
                    f"{update * 1e3:.3f}",
                    f"{update / step:.1%}",
                ]
                rows.append([*cells, "" if fixed is None else f"{fixed * 1e3:.2f}"])
    return markdown(rows)


def target_table(result: dict[str, Any]) -> str:
    """What was wanted, and what was measured; empty where the result says nothing of it."""
    rows = [["of", "n", "baseline", "wanted", "measured (20-80 %)", ""]]
    for row in targets.targets(result):
        verdict = "**missed**" if row.verdict == "missed" else row.verdict
        rows.append([row.case, str(row.n), f"`{row.baseline}`", row.wanted(), row.shown(), verdict])
    return markdown(rows) if len(rows) > 1 else ""


def host_table(rows: list[dict[str, Any]]) -> str:
    """Microseconds of `scheduler.step`."""
    table = [["", "ours, us", "diffusers, us", "diffusers / ours"]]
    for row in rows:
        if row["status"] != "ok":
            table.append([row["what"], f"{row['status']}: {row['reason']}", "", ""])
            continue
        times = [f"{Timing.of(row['rounds_s'][who]).median * 1e6:.1f}" for who in ("ours", "diffusers")]
        table.append([row["what"], *times, _factor(results.host_ratio(row))])
    return markdown(table)


def training_table(figures: dict[str, Any]) -> str:
    """Seconds, memory and accuracy of a training step."""
    table = [["", "ms", "MiB at the most", "gradient off by", "against ours"]]
    for record in figures["candidates"]:
        name = f"`{record['id']}` {record['what']}"
        if not record["rounds_s"]:
            table.append([name, f"{record['status']}: {record['reason']}", "", "", ""])
            continue
        peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.0f}"
        mark = " (inaccurate)" if record["status"] == "inaccurate" else ""
        ratio = _factor(results.training_ratio(figures, record["id"])) or "1"
        cells = [f"{results.speed(record).median * 1e3:.0f}", peak, f"{record['gradient_error']:.1e}{mark}", ratio]
        table.append([name, *cells])
    return markdown(table)


def op_table(figures: dict[str, Any]) -> str:
    """The ops against eager PyTorch and torch.compile; both backends where both were measured, the one taken first."""
    copy = figures["copy_bytes_per_second"]
    rows = [["op", "ms", "GB/s", "of copy", "against eager", "against `torch.compile`"]]
    for case in figures["cases"]:
        for backend, ratios in (case.get("backends") or {"": case["ratios"]}).items():
            median, moved = case["seconds"][backend or "ddpm_fast"]["median"], case["bytes"]
            against = [_factor(Timing(**ratios[name])) for name in ("eager", "torch.compile")]
            rate = [f"{median * 1e3:.3f}", f"{moved / median / 1e9:.1f}", f"{moved / median / copy:.0%}"]
            rows.append([f"`{case['op']}`{f' {backend}' if backend else ''}", *rate, *against])
    rows += [[f"`{name}`", f"check failed: {why}", "", "", "", ""] for name, why in figures["failed"].items()]
    return markdown(rows)


def drift_table(drift: dict[str, Any]) -> str:
    """PSNR of final images."""
    rows = [["", "PSNR, dB", "largest difference"]]
    for row in drift["rows"]:
        if row["max_abs"] is None:
            rows.append([f"`{row['id']}`", row["reason"], ""])
        else:
            quality = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
            rows.append([f"`{row['id']}` {row['what']}", quality, f"{row['max_abs']:.1e}"])
    return markdown(rows)


def exactly(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every candidate with its flags, once, and again for a network with which it has others."""
    found, said = [], set()
    for group_name, group in groups.items():
        for name, record in candidates(group).items():
            flags = record["flags"] or record["reason"]
            if (name, flags) in said:
                continue
            where = f", {group_name}" if any(name == other for other, _ in said) else ""
            notes = f" Tried: {record['notes']}." if record["notes"] else ""
            found.append(f"- `{name}`{where} {record['what']}: {flags}.{notes}")
            said.add((name, flags))
    return found


def machine_lines(result: dict[str, Any]) -> list[str]:
    """What it was measured on."""
    facts, peaks = result["machine"], result["peaks"]
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads of {facts['cpus']} CPUs"
    isas = ", ".join(isa for isa, _ in facts["inference_isas"]) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    cpu = f"CPU features {', '.join(facts['cpu_features'])}; own kernels for {isas}"
    if facts["device"] == "cuda":
        cpu = f"CUDA {facts['cuda']}, cuDNN {facts['cudnn']}, driver {facts.get('driver', 'unknown')}; {facts['cpu']}"
    day = f"; {facts['date']}" if "date" in facts else ""
    found = [
        f"- Machine: {where}; {cpu}{day}",
        f"- Versions: ddpm_fast {facts['ddpm_fast']}, commit {facts['commit']}; Python {facts['python']}; {versions}",
    ]
    rates = [f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items() if name != "read"]
    found.append(f"- Measured limits: matrix product {', '.join(rates)}; reading {peaks.get('read', 0) / 1e9:.1f} GB/s")
    settings = result["settings"]
    found.append(f"- Run: {' '.join(settings['argv']) or 'default'}; {settings['took_s'] / 60:.1f} minutes")
    if facts["omp_wait_policy"] or facts["isa_mask"]:
        found.append(
            f"- Environment: OMP_WAIT_POLICY={facts['omp_wait_policy']!r}, DDPM_FAST_CPU_ISA={facts['isa_mask']!r}"
        )
    return found


def report(result: dict[str, Any], plots: dict[str, Path]) -> str:
    """The whole report as Markdown. plots: file of each network and image size."""
    parts = ["# Benchmark\n", "\n".join(machine_lines(result)), ""]
    parts.append(
        "Times are medians of rounds in which the candidates take turns; a ratio is the median of the rounds' own "
        "ratios, with their 20th and 80th percentile. Every candidate's output was checked against float64 before."
    )
    groups = by_name(result)
    wanted = target_table(result)
    if wanted:
        parts += ["\n## Targets\n", wanted]
    for name, group in groups.items():
        parts.append(f"\n## Sampling step: {name}\n")
        if name in plots:
            parts.append(f"![ms per image against baselines]({plots[name].name})\n")
        parts += [
            speeds(group, result["peaks"]),
            "\nError: of the network's output in the step, relative, largest of two t.\n",
        ]
        parts += [accuracy(group), "\n### Where the time goes\n", shares(group)]
        for case in group:
            if case["layers"]:
                parts.append(
                    f"\nLayers at n = {case['n']}, as the plan's own trial timed them:\n\n```\n{case['layers']}\n```"
                )
    drift = result.get("drift")
    if drift:
        head = (
            f"{drift['n']} images, {drift['steps']} steps, the same noise, x0 clipped, against `{drift['reference']}`"
        )
        parts += [f"\n## Drift: {head}\n", drift_table(drift)]
    for figures in result.get("training") or []:
        head = f"Training step: {figures['case']}, n = {figures['n']}, bfloat16 autocast"
        parts += [f"\n## {head}\n", training_table(figures)]
    if result.get("host"):
        parts += ["\n## Host time of `scheduler.step`\n", host_table(result["host"])]
    for figures in result["ops"]:
        parts += [f"\n## Ops: {figures['elements']} elements, {figures['dtype']}\n", op_table(figures)]
        parts.append(f"\nA copy moves {figures['copy_bytes_per_second'] / 1e9:.1f} GB/s.")
    if groups:
        parts.append("\n## The candidates, exactly\n")
        parts += exactly(groups)
    return "\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the reports; exit code 2 for a file that is no result, or without matplotlib."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--no-plots", action="store_true", help="Markdown only; needs no matplotlib")
    parser.add_argument("--merge", type=Path, metavar="FILE.json", help="one result of all of them, written there")
    options = parser.parse_args(argv)
    if options.merge:
        try:
            results.save(results.merge([results.load(path) for path in options.results]), options.merge)
        except (OSError, ValueError) as error:
            print(f"report.py: error: {error}", file=sys.stderr)
            return 2
        options.results = [options.merge]
    for path in options.results:
        try:
            result = results.load(path)
            folder = options.out or path.parent
            folder.mkdir(parents=True, exist_ok=True)
            files: dict[str, Path] = {}
            if not options.no_plots:
                import plots

                for name, group in by_name(result).items():
                    file = folder / f"{path.stem}-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.png"
                    if plots.bars(name, group, result, file):
                        files[name] = file
            out = folder / f"{path.stem}.md"
            out.write_text(report(result, files), encoding="utf-8")
        except (OSError, ValueError, ImportError) as error:
            print(f"report.py: error: {error}", file=sys.stderr)
            return 2
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
