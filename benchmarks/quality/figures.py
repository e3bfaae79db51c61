"""The figures of REPORT.md."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from report import Results

SIZE = (6.4, 4.0)
DOTS_PER_INCH = 110
LEAST = 1e-9  # drawn on a logarithmic axis for zero
BUDGETS = {"rtol1": 1, "rtol2": 2, "rtol5": 5, "rtol10": 10}


def draw(results: "Results", folder: Path) -> dict[str, str]:
    """All figures as PNG files in `folder`; returns their links, relative to the folder's parent, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    links = {}
    for name, (title, paint) in FIGURES.items():
        figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
        paint(results, axes)
        axes.set_title(title, fontsize=10)
        figure.savefig(folder / f"{name}.png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        pyplot.close(figure)
        links[name] = f"![{title}]({folder.name}/{name}.png)"
    return links


def _bounds(results: "Results", axes: Axes) -> None:
    points = results.rows("tightness", "point")
    error = np.maximum([point["error"] for point in points], LEAST)
    for name, marker in (("paper", "x"), ("ours", ".")):
        axes.scatter(error, [min(point[name], 1e6) for point in points], s=9, marker=marker, alpha=0.6, linewidths=0.7, label=name)
    ends = [float(error.min()), float(error.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8, label="bound = error")
    axes.set(xscale="log", yscale="log", xlabel="true error / Vbar", ylabel="bound / Vbar (at most 1e6 shown)")
    axes.legend(fontsize=8)


def _quality(results: "Results", axes: Axes) -> None:
    rows = max((results.rows(part, "task") for part in results.of_all_types()), key=len)  # of the type that most was run in
    for tokens in sorted({row["tokens"] for row in rows}):
        chosen: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["tokens"] == tokens:
                chosen.setdefault(row["variant"], []).append(row)
        found = {name: float(np.mean([row["delta"] for row in group])) for name, group in chosen.items()}
        budgets = {BUDGETS[name]: delta for name, delta in found.items() if name in BUDGETS}
        (line,) = axes.plot(sorted(budgets), [budgets[x] for x in sorted(budgets)], marker="o", label=f"{tokens} tokens")
        if "naive" in found:
            axes.axhline(found["naive"], color=line.get_color(), linestyle=":", label=f"{tokens} tokens, naive")
    axes.set(xlabel="tolerance, % of Vbar", ylabel="mean score less dense", xscale="log")
    axes.set_xticks(list(BUDGETS.values()), [str(x) for x in BUDGETS.values()])
    axes.legend(fontsize=8)


def _traffic(results: "Results", axes: Axes) -> None:
    rows = results.rows("tightness", "cost")
    for policy in sorted({row["policy"] for row in rows}):
        points = sorted((100 * row["rtol"], max(row["host_bytes"], 1.0)) for row in rows if row["policy"] == policy)
        axes.plot(*zip(*points, strict=True), marker="o", label=policy)
    axes.set(xscale="log", yscale="log", xlabel="tolerance, % of Vbar", ylabel="host bytes a step, all layers")
    axes.set_xticks(list(BUDGETS.values()), [str(x) for x in BUDGETS.values()])
    axes.legend(fontsize=8)


def _memory(results: "Results", axes: Axes) -> None:
    rows = [row for row in results.rows("peers") if "missing" not in row]
    for row in rows:
        per_token = row["device_bytes"] / row["tokens"]
        axes.plot(per_token, row["variant_score"], "o", markersize=5, alpha=0.7, label=f"{row['peer']}, {row['tokens']} tokens")
    axes.set(xlabel="bytes on the device a token, all layers", ylabel="mean score")
    axes.legend(fontsize=7)


FIGURES = {
    "bounds": ("Bound against true error at rung 0, a sample of head-steps", _bounds),
    "quality": ("Quality against tolerance, mean over tasks", _quality),
    "traffic": ("Host bytes against tolerance", _traffic),
    "memory": ("Quality against bytes on the device", _memory),
}
