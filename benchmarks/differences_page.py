"""The figures of docs/differences.md: tables from results/differences.json, put between markers, and the picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Cell = Callable[[Row], str]

MARKED = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def number(value: float) -> str:
    """Two decimals, or three digits of what is large or small."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 else f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) < 10 else f"{value:+.0f}"


def far(row: Row) -> str:
    """Energy distance, and where the density is known how much too smooth or too noisy."""
    return number(row["energy"]) + (f" ({signed(row['nats'])})" if "nats" in row else "")


def apart(row: Row) -> str:
    return f"{number(row['mean'])}, {number(row['largest'])}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def pivot(corner: str, rows: list[Row], cell: Cell = far, column: Cell = lambda row: f"{row['steps']} steps") -> str:
    """A line for each name, a column for each number of steps."""
    columns = list(dict.fromkeys(column(row) for row in rows))
    found = {(row["name"], column(row)): cell(row) for row in rows}
    names = dict.fromkeys(row["name"] for row in rows)
    return table([corner, *columns], ([name, *(found.get((name, c), "") for c in columns)] for name in names))


def split(rows: list[Row], kind: str, by: str) -> list[Row]:
    """The rows of one kind, without it in their names."""
    return [{**row, "name": row["name"].split(by, 1)[1]} for row in rows if row["name"].startswith(kind + by)]


def presets(rows: list[Row]) -> str:
    """Both networks, one after the other."""
    parts = []
    for kind in ("exact", "trained"):
        mine = split(rows, kind, ": ")
        counts = list(dict.fromkeys(row["steps"] for row in mine))
        head = [f"{kind} network"]
        for count in counts:
            head += [f"{count} steps", "from the first: mean, largest"]
        lines = []
        for name in dict.fromkeys(row["name"] for row in mine):
            line = [f'`like="{name}"`']
            for row in (row for row in mine if row["name"] == name):
                line += [far(row), "" if row["largest"] == 0 else apart(row)]
            lines.append(line)
        parts.append(table(head, lines))
    return "\n".join(parts)


def clip(rows: list[Row]) -> str:
    kinds = list(dict.fromkeys(row["name"].split(": ")[0] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        name = row["name"].split(": ")[1] + f", {row['steps']} steps"
        lines.setdefault(name, [name]).append(f"{far(row)}, {100 * row['outside']:.2f} %")
    return table(["", *(f"network: {kind}" for kind in kinds)], lines.values())


def prediction(rows: list[Row]) -> str:
    found = {tuple(row["name"].split(" read as ")): number(row["energy"]) for row in rows}
    read = list(dict.fromkeys(name[1] for name in found))
    head = ["the network gives", *(f"read as {r}" for r in read)]
    return table(head, ([says, *(found[says, r] for r in read)] for says in dict.fromkeys(name[0] for name in found)))


def with_signal(rows: list[Row]) -> str:
    rows = [{**row, "name": f"{row['name']} | {row['signal_left']:.2g}"} for row in rows]
    return pivot("schedule | alphas_cumprod at the end", rows).replace("| --- |", "| --- | --- |", 1)


def other_T(rows: list[Row]) -> str:
    lines = ([row["name"], f"{row['signal_left']:.2g}", str(row["steps"]), far(row)] for row in rows)
    return table(["linear betas", "alphas_cumprod at the end", "steps", "energy (nats)"], lines)


def interpolate(rows: list[Row]) -> str:
    rows = [
        {**row, "name": row["name"].split(", ", 1)[1], "at": row["name"].split(", ", 1)[0]}
        for row in rows
    ]  # fmt: skip
    return pivot("", rows, column=lambda row: str(row["at"]))


def output(rows: list[Row]) -> str:
    lines = ([row["name"], signed(row["mean"]), number(row["largest"])] for row in rows)
    return table(["pixels are", "mean error, levels", "largest"], lines)


def tables_of(rows: list[Row]) -> str:
    lines = ([row["name"], str(row["steps"]), f"{row['mean']:.1e}", f"{row['largest']:.1e}"] for row in rows)
    return table(["variance", "steps", "mean difference", "largest"], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "presets": presets,
    "variance": lambda rows: pivot("variance of a DDPM step", rows),
    "method": lambda rows: pivot("method", rows),
    "spacing": lambda rows: pivot("spacing, method", rows),
    "clip": clip,
    "prediction": prediction,
    "schedule": with_signal,
    "other_T": other_T,
    "time": lambda rows: pivot("process, what the network is told", rows),
    "tables": tables_of,
    "ddim_stride": lambda rows: pivot("spacing, scheduler", rows),
    "low_precision": lambda rows: pivot("images noised in, method", rows),
    "interpolate": interpolate,
    "output": output,
}


def real(result: dict[str, Any]) -> str:
    """What true draws measure: figures in this range say that nothing is wrong."""
    lines = []
    for data, found in result["real"].items():
        nats = "{:+.3f} to {:+.3f}".format(*found["nats"]) if "nats" in found else ""
        lines.append(
            [data, "{:.2f} to {:.2f}".format(*found["energy"]), nats, "{:.2f} to {:.2f}".format(*found["spread"])]
        )
    return table(["true draws of", "energy", "nats", "spread"], lines)


def filled(page: str, result: dict[str, Any]) -> str:
    """The page with every marked table made of the result."""

    def figures(match: re.Match[str]) -> str:
        name = match[2]
        text = real(result) if name == "real" else TABLES[name](result["groups"][name])
        return f"{match[1]}{text}{match[4]}"

    return MARKED.sub(figures, page)


def picture(result: dict[str, Any], pictures: dict[str, Any], file: Path) -> None:
    """Samples of the presets, the same noise in every column, and three differences as lines."""
    import matplotlib

    matplotlib.use("Agg")  # a file only, no window
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(len(pictures) * 0.55, 3.4))
    cells = upper.subplots(len(pictures), len(next(iter(pictures.values()))), squeeze=False)
    for line, (name, images) in zip(cells, pictures.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.view(8, 8).numpy(), cmap="gray_r", vmin=-1, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    upper.suptitle("One network, one noise a column, four presets", fontsize=10)
    panels = lower.subplots(1, 3)
    titles = {"variance": "DDPM: variance", "method": "Method", "spacing": "Spacing"}
    for axes, (group, title) in zip(panels, titles.items(), strict=True):
        rows = result["groups"][group]
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row["steps"], row["energy"]) for row in rows if row["name"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        counts = sorted({row["steps"] for row in rows})
        axes.set_xticks(counts, [str(count) for count in counts], fontsize=7)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=7)
        axes.legend(fontsize=6, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("energy distance, true draws 1", fontsize=8)
    figure.savefig(file, dpi=130)
