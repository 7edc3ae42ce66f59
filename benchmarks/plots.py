"""The plot of a network: ms per image of every candidate, a panel per batch, the machine's limit as a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import results

try:
    import matplotlib
except ImportError as error:
    raise ImportError(
        "plots need matplotlib: pip install matplotlib, or leave them out with report.py --no-plots"
    ) from error

matplotlib.use("Agg")  # files only, no window

from matplotlib.figure import Figure

# Ours in green and blue, baselines in brown, grey and violet; a candidate has one colour in every plot.
COLOURS = {
    "F16": "#0b6e4f",
    "F32": "#6bbf99",
    "S16": "#a7d8f0",
    "S32": "#cde9f7",
    "E32": "#8c510a",
    "E16": "#bf812d",
    "G16": "#dfc27d",
    "C16": "#636363",
    "C32": "#969696",
    "OV16": "#7b6888",
    "OV16t": "#b8a9c9",
    "OV32": "#a05d8a",
    "D32": "#b5a08a",
    "D16": "#d6cbbd",
    "L32": "#4a4a68",
    "L16": "#9a9ab5",
}


def bars(name: str, group: list[dict[str, Any]], result: dict[str, Any], file: Path) -> bool:
    """Draw the cases of one network into a PNG; False, and no file, where nothing was timed."""
    group = [case for case in group if results.timed(case)]
    if not group:
        return False
    names = list(dict.fromkeys(i for case in group for i in results.timed(case)))
    # A panel each, with its own scale: at batch 1 an image takes several times as long as in a large batch.
    figure = Figure(figsize=(max(6.0, 0.8 + len(group) * (0.34 * len(names) + 0.7)), 5.2), layout="constrained")
    panels = figure.subplots(1, len(group), squeeze=False)[0]
    legend: dict[str, Any] = {}
    for axes, case in zip(panels, group, strict=True):
        for place, candidate in enumerate(names):
            record = results.timed(case).get(candidate)
            if record is None:
                axes.annotate("-", (place, 0), ha="center", fontsize=8)
                continue
            time = results.speed(record)
            ms, low, high = (value * 1e3 / case["n"] for value in (time.median, time.p20, time.p80))
            bar = axes.bar(
                place,
                ms,
                0.85,
                color=COLOURS.get(candidate, "#222222"),
                yerr=[[ms - low], [high - ms]],
                error_kw={"elinewidth": 1, "ecolor": "#333333"},
                hatch="///" if record["status"] == "inaccurate" else None,
            )
            legend.setdefault(f"{candidate}  {record['what']}", bar)
            text = f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"
            above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 7}
            axes.annotate(text, (place, high), **above)
        floor = results.floor(case, result["peaks"])
        if floor is not None:
            line = axes.axhline(floor * 1e3 / case["n"], color="#c1121f", linewidth=1.5)
            legend.setdefault("roofline in bfloat16, measured in this run", line)
        axes.set_title(f"n = {case['n']}", fontsize=10)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.tick_params(axis="y", labelsize=8)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("ms per image and step (less is better)")
    facts = result["machine"]
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    figure.suptitle(f"A reverse step of the U-Net, {name}: median, 20th to 80th percentile\n{where}", fontsize=10)
    handles, labels = list(legend.values()), list(legend)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(group)), fontsize=7, frameon=False)
    figure.savefig(file, dpi=150)
    return True
