"""`python -m benchmarks.tradeoffs`: quality against size and against cost, from the committed results.

Writes benchmarks/results/quality/size.png, a panel for each task of `benchmarks.quality`, and cost.png, a line for each
method: the difference to LoRA r=8, a dot for each task and a bar for the median, its size, and a training step's time and
memory, of `hyperadapt bench`.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.runs import Seeds, chosen, differences, trained


RESULTS = Path(__file__).parent / "results"
# a method of `benchmarks.quality` -> its row of `hyperadapt bench`
ROWS = {
    "HyperAdapt": "hyperadapt", "LoRA r=1": "lora-r1", "LoRA r=8": "lora-r8", "IA3": "ia3", "full fine-tuning": "full",
    "VeRA": "vera-r256", "RoAd": "road", "C3A": "c3a", "SURM circulant": "surm-circulant", "SURM Kronecker": "surm-kronecker",
}  # fmt: skip
TEXT = "film-reviews"  # a task on which all methods ran, with MiniLM
COLOURS = {
    "HyperAdapt": "#d9552b", "LoRA r=1": "#3b6fb6", "LoRA r=2": "#5c8fd0", "LoRA r=8": "#1c3f70", "IA3": "#4a9d5b",
    "full fine-tuning": "#444444", "SURM circulant": "#b08900", "SURM Kronecker": "#6d5400",
    "HyperAdapt and Kronecker": "#8a4fa3", "MiSS r=1": "#7b6f64", "VeRA": "#c06c9b", "RoAd": "#2fa3a3", "C3A": "#9aa53b",
}  # fmt: skip


def methods_of(task: dict[str, Any]) -> dict[str, Seeds]:
    """Method -> its runs at its best rate by seed, of methods that have a colour and more than one run."""
    runs = chosen(task["runs"])
    return {method: runs[method] for method in COLOURS if len(runs.get(method, ())) > 1}


def draw_size(tasks: dict[str, dict[str, Seeds]]) -> Figure:
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(8, 2.5 * lines + 0.6), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (task, methods) in zip(panels, tasks.items(), strict=False):
        for method, runs in methods.items():
            scores = [100 * run["test"] for run in runs.values()]
            error = statistics.stdev(scores) / len(scores) ** 0.5
            size = trained(runs)
            if method == "LoRA r=1":  # of HyperAdapt's size: beside it, not under it
                size *= 1.2
            axes.errorbar(
                size, statistics.mean(scores), error, fmt="o", capsize=3, color=COLOURS[method], label=method
            )
        axes.set(xscale="log")
        axes.set_xlim(axes.get_xlim()[0] / 2, axes.get_xlim()[1] * 2)  # two powers of ten at least have a label
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(task, fontsize=10)
        axes.grid(alpha=0.25)
        axes.margins(0.12)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    figure.supxlabel("trained parameters outside the head", fontsize=10)
    figure.supylabel("test, % (mean, standard error)", fontsize=10)
    labels: dict[str, Any] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_cost(tasks: dict[str, dict[str, Seeds]], rows: dict[str, dict[str, Any]]) -> Figure:
    """A line for each method, those of few parameters first: quality, size and what a step costs, side by side."""
    sizes = {method: trained(runs) for method, runs in tasks[TEXT].items()}
    methods = sorted(COLOURS.keys() & sizes.keys(), key=lambda method: -sizes[method])
    figure = Figure(figsize=(8, 0.3 * len(methods) + 1.3), dpi=150, layout="constrained")
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(3, 2, 2, 2))
    for place, method in enumerate(methods):
        points = [
            statistics.mean(differences(found[method], found["LoRA r=8"]))
            for found in tasks.values()
            if method in found
        ]
        colour = COLOURS[method]
        panels[0].plot(points, [place] * len(points), "o", color=colour, alpha=0.45, markersize=4)
        panels[0].plot(statistics.median(points), place, "|", color=colour, markersize=15, markeredgewidth=2.5)
        panels[1].plot(sizes[method], place, "o", color=colour)
        if method in ROWS:
            panels[2].plot(rows[ROWS[method]]["step_ratio"], place, "o", color=colour)
            panels[3].plot(rows[ROWS[method]]["saved_bytes"] / 2**20, place, "o", color=colour)
    titles = (
        "test beside LoRA r=8,\npoints",
        "trained,\nMiniLM",
        "training step,\nx the frozen one",
        "kept for\nbackward, MiB",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=9)
    panels[0].axvline(0, color="#999", linewidth=1)
    panels[0].set_yticks(range(len(methods)), methods)
    for axes in panels[1:3]:
        axes.set_xscale("log")
    panels[1].set_xlim(panels[1].get_xlim()[0] / 2, panels[1].get_xlim()[1] * 2)
    panels[2].set_xticks([1, 2, 4], ["1", "2", "4"])
    panels[2].xaxis.set_minor_formatter(NullFormatter())
    return figure


def main() -> None:
    files = sorted((RESULTS / "quality").glob("*.json"))
    found = {file.stem: methods_of(json.loads(file.read_text())) for file in files}
    tasks = {task: methods for task, methods in found.items() if methods}
    rows = {row["method"]: row for row in json.loads((RESULTS / "bench" / "bench.json").read_text())["rows"]}
    draw_size(tasks).savefig(RESULTS / "quality" / "size.png")
    draw_cost(tasks, rows).savefig(RESULTS / "quality" / "cost.png")


if __name__ == "__main__":
    main()
