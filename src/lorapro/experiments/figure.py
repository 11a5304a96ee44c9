"""The figures of a comparison: loss curves, and validation loss against the learning rate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lorapro.experiments.folders import METRICS

__all__ = ["draw_curves", "draw_rates", "read_curve", "read_curves", "smooth", "spread_labels"]

# Okabe and Ito's palette, told apart with every common colour-vision deficiency; line styles
# repeat the distinction in grey print.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00")
STYLES = ("-", "--", "-", "--", "-", "--", "-", "--")
INK, FAINT = "#333333", "#dddddd"


def read_curve(path: Path, column: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of one column of a run's ``metrics.jsonl``, finite values only."""
    steps, values = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get(column) is not None:
            steps.append(float(row["step"]))
            values.append(float(row[column]))
    return steps, values


def smooth(values: list[float], width: float = 0.04) -> list[float]:
    """Moving average with a Gaussian window of ``width`` times the curve's length to each side.

    Centred, so that a falling curve is not shown late; at the ends the window is one-sided.

    >>> smooth([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    sigma = max(width * len(values), 1.0)
    smoothed = []
    for i in range(len(values)):
        weights = [math.exp(-0.5 * ((i - j) / sigma) ** 2) for j in range(len(values))]
        total = sum(w * v for w, v in zip(weights, values, strict=True))
        smoothed.append(total / sum(weights))
    return smoothed


def spread_labels(positions: list[float], distance: float) -> list[float]:
    """Move label positions apart to at least ``distance``, in order, as little as needed.

    >>> spread_labels([1.0, 1.0, 5.0], 1.0)
    [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    clusters: list[list[int]] = []
    centers: list[float] = []
    for i in order:
        clusters.append([i])
        centers.append(positions[i])
        while len(clusters) > 1:
            reach = distance * (len(clusters[-1]) + len(clusters[-2])) / 2
            if centers[-1] - centers[-2] >= reach:
                break
            merged = clusters.pop(-2) + clusters.pop()
            clusters.append(merged)
            centers[-2:] = [sum(positions[j] for j in merged) / len(merged)]
    placed = [0.0] * len(positions)
    for center, cluster in zip(centers, clusters, strict=True):
        for place, i in enumerate(cluster):
            placed[i] = center + distance * (place - (len(cluster) - 1) / 2)
    return placed


def read_curves(folders: list[Path], column: str) -> dict[float, list[float]]:
    """Return the values of all runs, in order, at each step that all of them have."""
    curves = [dict(zip(*read_curve(f / METRICS, column), strict=True)) for f in folders]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: [curve[step] for curve in curves] for step in steps}


def draw_curves(folder: Path, summary: dict[str, Any], target: Path) -> None:
    """Draw training loss (smoothed over its faint raw line) and validation loss of each method.

    One line a method, at its chosen learning rate, the mean over seeds, named at its end.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, column, title in zip(
        panels, ("train_loss", "validation_loss"), ("Training loss", "Validation loss"), strict=True
    ):
        ends: list[tuple[str, float, float, str]] = []
        for number, row in enumerate(summary["methods"]):
            color, style = _look(number)
            curves = read_curves([folder / name for name in row["folders"]], column)
            if not curves:
                continue
            steps = list(curves)
            values = [sum(losses) / len(losses) for losses in curves.values()]
            shown = smooth(values) if column == "train_loss" else values
            if column == "train_loss":
                axes.plot(steps, values, color=color, alpha=0.18, linewidth=1)
            marker = None if column == "train_loss" else "o"
            axes.plot(steps, shown, style, color=color, linewidth=2, marker=marker, markersize=3.5)
            ends.append((row["label"], steps[-1], shown[-1], color))
        _finish(axes, title, ends)
    rank, task = summary["rank"], summary["task"]
    figure.suptitle(
        f"{task}, rank {rank}: each method at its own learning rate", color=INK, x=0.01, ha="left"
    )
    _save(figure, target)


def draw_rates(summary: dict[str, Any], target: Path) -> bool:
    """Draw validation loss against the learning rate, the first seed of each method.

    Filled points are the chosen rates. Losses above one and a half times the worst chosen one,
    and diverged runs, lie beyond the upper edge.

    Returns:
        Whether there was anything to draw: a method with two rates or more.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seed = summary["seeds"][0]
    lines = []
    for number, row in enumerate(summary["methods"]):
        tried = {
            t["learning_rate"]: t["validation_loss"] for t in row["tried"] if t["seed"] == seed
        }
        if len(tried) > 1:
            lines.append((row, sorted(tried.items()), *_look(number)))
    if not lines:
        return False
    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    chosen = [dict(points)[row["learning_rate"]] for row, points, _, _ in lines]
    finite = [loss for loss in chosen if math.isfinite(loss)] or [1.0]
    seen = [loss for _, points, _, _ in lines for _, loss in points if math.isfinite(loss)]
    top = min(1.5 * max(finite), 1.03 * max(seen, default=1.0))
    ends = []
    for row, points, color, style in lines:
        rates = [rate for rate, _ in points]
        losses = [min(loss, 1.2 * top) if math.isfinite(loss) else 1.2 * top for _, loss in points]
        axes.plot(rates, losses, style, color=color, marker="o", markersize=4, markerfacecolor="w")
        best = rates.index(row["learning_rate"])
        axes.plot(rates[best], losses[best], "o", color=color, markersize=6)
        ends.append((row["label"], rates[-1], min(losses[-1], top), color))
    axes.set_xscale("log")
    axes.set_ylim(0.97 * min(finite), top)
    title = "Validation loss against the learning rate (first seed)"
    _finish(axes, title, ends, x_label="learning rate")
    figure.suptitle(
        f"{summary['task']}, rank {summary['rank']}", color=INK, x=0.01, ha="left", fontsize=11
    )
    _save(figure, target)
    return True


def _look(number: int) -> tuple[str, str]:
    """Colour and line style of the method of that number, not repeated for sixteen methods."""
    again = number // len(COLORS)
    return COLORS[number % len(COLORS)], STYLES[(number + again) % len(STYLES)]


def _save(figure: Any, target: Path) -> None:
    scratch = target.with_name(target.name + ".part")
    figure.savefig(scratch, format="png", facecolor="white")
    scratch.replace(target)


def _finish(
    axes: Any, title: str, ends: list[tuple[str, float, float, str]], x_label: str = "step"
) -> None:
    """Name the lines at their ends and take away what does not carry data."""
    from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullLocator

    if axes.get_xscale() == "log":  # 1, 2 and 5 of each decade: all nine run into one another
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.tick_params(colors=INK, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    low, high = axes.get_ylim()
    places = spread_labels([end for _, _, end, _ in ends], (high - low) * 0.052)
    for (label, step, value, color), place in zip(ends, places, strict=True):
        axes.annotate(
            label,
            xy=(step, value),
            xytext=(1.03, place),
            textcoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )
    axes.margins(x=0.01)
