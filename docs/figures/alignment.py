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
    figure, ax = plt.subplots(figsize=(9.6, 4.3))
    ax.fill([0.3, 6.6, 9.6, 3.3], [0.5, 0.5, 2.5, 2.5], color="#E8EEF4", ec="#A9BACB")
    ax.text(6.25, 0.62, "steps a rank-r adapter can take", ha="right", color="#5B7187", size=11)
    point = (2.6, 1.25)
    tip, foot, lora = (6.6, 4.1), (6.6, 1.75), (3.05, 2.2)
    arrow(ax, point, tip, FULL)
    arrow(ax, point, foot, PRO)
    arrow(ax, point, lora, LORA)
    ax.plot([tip[0], foot[0]], [tip[1], foot[1]], ls=(0, (4, 3)), color=INK, lw=1.3)
    ax.plot([6.4, 6.4, 6.6], [1.73, 1.94, 1.96], color=INK, lw=1.1)
    ax.plot(*point, "o", color=INK, ms=7)
    ax.text(2.45, 1.08, "W = W0 + s·B·A", ha="right", va="center", color=INK, size=12)
    ax.text(6.72, 4.1, "g: full fine-tuning's gradient", color=FULL, size=12, va="center")
    ax.text(
        6.78,
        1.72,
        "LoRA-Pro: the closest step,\nin closed form, from LoRA's gradients",
        color=PRO,
        size=12,
        va="center",
    )
    ax.text(2.95, 2.33, "LoRA's own step", color=LORA, size=12, ha="right", va="center")
    ax.text(6.72, 2.95, "as short as can be", color=INK, size=10.5, va="center", style="italic")
    ax.set(xlim=(0, 10.6), ylim=(0.2, 4.5), aspect="equal")
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
