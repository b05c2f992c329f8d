"""`python -m benchmarks.picture`: the picture at the top of the README, from the committed ranks."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


ROOT = Path(__file__).parents[1]
RANKS = ROOT / "benchmarks" / "results" / "ranks" / "ranks.json"
PICTURE = ROOT / "docs" / "images" / "hyperadapt.png"
TRAINED, FROZEN = "#d9552b", "#c9ced6"


def draw() -> Figure:
    """Left what is trained, right the singular values of what was learned."""
    figure = Figure(figsize=(8, 3.2), dpi=200, layout="constrained")
    product, spectra = figure.subplots(1, 2, width_ratios=[1.25, 1])
    draw_product(product)
    draw_spectra(spectra, json.loads(RANKS.read_text()))
    return figure


def draw_product(axes) -> None:
    """`W' = diag(a) W diag(b)`, with the trained diagonals in colour."""
    axes.set(xlim=(0, 12.4), ylim=(-1.7, 4.6), aspect="equal")
    axes.axis("off")
    for left, width, height, diagonal, name in (
        (0, 4, 4, True, "diag(a)"),
        (4.6, 3, 4, False, "W, frozen"),
        (8.2, 3, 3, True, "diag(b)"),
    ):
        bottom = 4 - height
        axes.add_patch(
            Rectangle((left, bottom), width, height, facecolor="white" if diagonal else FROZEN, edgecolor="#555")
        )
        count = 8 if height == 4 else 6
        size = height / count
        for i in range(count if diagonal else 0):
            axes.add_patch(Rectangle((left + i * size, 4 - (i + 1) * size), size, size, facecolor=TRAINED))
        axes.text(left + width / 2, 4.25, name, ha="center", color=TRAINED if diagonal else "#333", fontsize=11)
    axes.text(5.6, -1.15, "n x m weight, n + m trained parameters", ha="center", fontsize=11)


def draw_spectra(axes, ranks: dict) -> None:
    """The singular values of every adapted matrix's update, relative to the largest."""
    for (label, report), colour in zip(ranks.items(), (TRAINED, "#3b6fb6"), strict=True):
        for i, entry in enumerate(report.values()):
            values = np.array([value for value in entry["singular_values"] if value > 0])
            share = np.arange(1, len(values) + 1) / entry["full_rank"]
            name = "LoRA r=8" if "LORA" in label.upper() else "HyperAdapt"
            axes.plot(share, values / values[0], color=colour, alpha=0.35, linewidth=1, label=None if i else name)
    axes.set(
        yscale="log", ylim=(1e-4, 1.5), xlim=(0, 1), xlabel="place / full rank", ylabel="singular value / largest"
    )
    axes.set_title("trained updates", fontsize=11)
    legend = axes.legend(loc="lower center", frameon=False)
    for line in legend.get_lines():
        line.set(alpha=1, linewidth=2)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw().savefig(PICTURE)
