"""Draw docs/figures/alignment.png: `python docs/figures/alignment.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, FULL, LORA, PRO = "#333333", "#555555", "#D55E00", "#0072B2"


def arrow(ax, start, end, color, width=2.6, **options):
    style = {"arrowstyle": "-|>", "mutation_scale": 20, "lw": width, "color": color}
    ax.annotate(
        "", xy=end, xytext=start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0, **options}
    )


def main() -> None:
    figure, ax = plt.subplots(figsize=(8.2, 4.4))
    ax.fill([0.2, 7.2, 9.7, 2.7], [0.1, 0.1, 2.5, 2.5], color="#E8EEF4", ec="#A9BACB")
    point, tip, foot, lora = (2.1, 1.05), (5.6, 4.3), (5.6, 1.75), (2.75, 2.15)
    arrow(ax, point, tip, FULL)
    arrow(ax, point, foot, PRO)
    arrow(ax, point, lora, LORA)
    ax.plot([tip[0], foot[0]], [tip[1], foot[1]], ls=(0, (4, 3)), color=INK, lw=1.3)
    ax.plot([5.36, 5.36, 5.6], [1.71, 1.96, 2.0], color=INK, lw=1.1)
    ax.plot(*point, "o", color=INK, ms=8)

    def label(x, y, text, color=INK, size=17, **options):
        ax.text(x, y, text, color=color, size=size, linespacing=1.25, va="center", **options)

    label(2.2, 0.72, "W = W0 + s·B·A", size=15)
    label(2.38, 2.25, "LoRA's\nown step", LORA, ha="right")
    label(5.75, 4.15, "full fine-tuning's\ngradient", FULL)
    label(5.75, 2.95, "as short as can be", size=15, style="italic")
    label(5.75, 1.5, "LoRA-Pro:\nthe closest step", PRO)
    label(0.75, 0.3, "steps that an adapter can take", "#5B7187", size=14)
    ax.set(xlim=(0.1, 9.8), ylim=(0, 4.6), aspect="equal")
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
