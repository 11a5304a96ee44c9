"""Figures of a comparison: losses over steps and rates, differences, cost and quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorapro.experiments.rates import tolerated_rates
from lorapro.experiments.report.comparison import Comparison, Row, rate_losses
from lorapro.experiments.report.drawing import (
    COLORS,
    FONT,
    FigurePanels,
    Panel,
    frame,
    log_axis,
    smooth,
    spread_labels,
)
from lorapro.experiments.report.rate_tables import validation_noise
from lorapro.experiments.report.tables import median
from lorapro.experiments.report.text import is_loss, measure_name

__all__ = [
    "cost_figure",
    "curves_figure",
    "difference_figure",
    "figures_of",
    "rates_figure",
]

SERIES = {"train_loss": "training loss", "validation_loss": "validation loss"}
COSTS = {
    "optimizer_state_bytes": "optimizer state, MB",
    "peak_memory_bytes": "peak memory, MB",
    "seconds_per_step": "seconds a step",
}


def figures_of(found: Comparison) -> list[FigurePanels]:
    """All figures that a problem's runs hold something for."""
    drawn = [difference_figure(found), *(curves_figure(found, series) for series in SERIES)]
    drawn += [rates_figure(found), cost_figure(found)]
    return [figure for figure in drawn if figure is not None]


def references(found: Comparison) -> dict[str, str]:
    """The rows that every panel shows beside its own, with their colours."""
    wanted = {found.baseline: COLORS["baseline"], found.goal: COLORS["target"]}
    return {label: color for label, color in wanted.items() if found.row(label) is not None}


def _facets(found: Comparison, labels: Sequence[str]) -> list[str]:
    """The rows that get a panel: all but the references, unless there is nothing else."""
    return [label for label in labels if label not in references(found)] or list(labels)


# Losses over steps


def curves_figure(found: Comparison, series: str) -> FigurePanels | None:
    """Loss over steps at the chosen rates: a panel a method, the mean of its seeds over a band."""
    curves = {row.label: mean for row in found.rows if (mean := _curve(row, series))}
    if not curves:
        return None
    every = np.concatenate([mean for _, mean, _, _ in curves.values()])
    # a beginning far above the rest would flatten it
    most = np.quantile(every, 0.97 if every.size > 8 * len(curves) else 1.0)
    top = max(most, max(float(mean[-1]) for _, mean, _, _ in curves.values()))
    limits = padded(float(every.min()), float(top))
    beside = references(found)

    def panel(label: str) -> Panel:
        def draw(axes: Any) -> None:
            for other, color in beside.items():
                if other in curves and other != label:
                    axes.plot(*curves[other][:2], color=color, linewidth=1.2)
            steps, mean, low, high = curves[label]
            color = beside.get(label, COLORS["focus"])
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
            marker = "o" if len(steps) < 12 else None
            axes.plot(steps, mean, color=color, linewidth=2, marker=marker, markersize=3.5)
            axes.set_ylim(*limits)
            axes.margins(x=0.02)
            frame(axes, "step")
            axes.locator_params(axis="x", nbins=5, integer=True)

        return Panel(label, draw)

    labels = _facets(found, list(curves))
    what = SERIES[series]
    smoothed = " Smoothed." if series == "train_loss" else ""
    return FigurePanels(
        f"{series.removesuffix('_loss')}_curves",
        f"{what.capitalize()} over steps",
        f"Each method at its own learning rate. Line: mean over seeds, band: range.{smoothed}",
        [panel(label) for label in labels],
        {"the method": COLORS["focus"], **beside},
    )


def _curve(row: Row, series: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps that all of a row's runs have; mean, least and greatest loss there."""
    curves = [dict(zip(*c[series], strict=True)) for c in row.runs["curves"] if series in c]
    if not curves:
        return None
    steps = np.array(sorted(set.intersection(*(set(c) for c in curves))))
    if len(steps) < 2:
        return None
    losses = np.array([[curve[step] for step in steps] for curve in curves])
    if series == "train_loss" and len(steps) > 20:
        losses = np.array([smooth(line) for line in losses])
    return steps, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)


def padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


# Learning rates


def rates_figure(found: Comparison) -> FigurePanels | None:
    """Validation loss against the learning rate: a panel a method, its chosen rate filled."""
    lines = {row.label: rate_losses(_of(found, row.label)) for row in found.rows if row.rates}
    lines = {label: losses for label, losses in lines.items() if len(losses) > 1}
    finite = [v for losses in lines.values() for v in losses.values() if math.isfinite(v)]
    if not lines or not finite:
        return None
    best = {label: min(v for v in losses.values()) for label, losses in lines.items()}
    worst_best = max(v for v in best.values() if math.isfinite(v))
    low, top = padded(min(finite), min(max(finite), worst_best + 0.6 * abs(worst_best)))
    rates = sorted({rate for losses in lines.values() for rate in losses})
    noise = validation_noise(found)
    beside = {k: v for k, v in references(found).items() if k == found.baseline and k in lines}

    def panel(label: str) -> Panel:
        def draw(axes: Any) -> None:
            losses = lines[label]
            color = beside.get(label, COLORS["focus"])
            if noise is not None and math.isfinite(best[label]):
                wide = tolerated_rates(losses, noise)
                axes.axvspan(wide.low, wide.high, color=color, alpha=0.12, linewidth=0)
            for other, ref in beside.items():
                if other != label:
                    axes.plot(*_clipped(lines[other], top), color=ref, linewidth=1.2)
            x, y = _clipped(losses, top)
            axes.plot(x, y, color=color, linewidth=2, marker="o", markersize=3.5)
            row = found.row(label)
            chosen = x.index(row.rate) if row is not None and row.rate in x else int(np.argmin(y))
            axes.plot(x[chosen], y[chosen], "o", color=color, markersize=7)
            for rate, loss in losses.items():
                if not loss <= top:
                    axes.plot(rate, top, "x", color=COLORS["worse"], markersize=5, clip_on=False)
            log_axis(axes, rates[0] / 1.3, rates[-1] * 1.3)
            axes.set_ylim(low, top)
            frame(axes, "learning rate")

        return Panel(label, draw)

    shaded = "" if noise is None else " Shaded: rates within noise of the best one."
    return FigurePanels(
        "learning_rates",
        "Validation loss against the learning rate",
        "Over the seeds that all of a method's rates were run with. Large: the chosen rate; "
        f"crosses: above the edge, or diverged.{shaded}",
        [panel(label) for label in _facets_of_rates(lines, beside)],
        {"the method": COLORS["focus"], **beside},
    )


def _facets_of_rates(lines: dict[str, Any], beside: dict[str, str]) -> list[str]:
    return [label for label in lines if label not in beside] or list(lines)


def _clipped(losses: dict[float, float], top: float) -> tuple[list[float], list[float]]:
    rates = sorted(losses)
    return rates, [min(losses[r], 2 * top) if math.isfinite(losses[r]) else 2 * top for r in rates]


def _of(found: Comparison, label: str) -> Any:
    return found.problem.runs[found.problem.runs["label"] == label]


# Differences


def difference_figure(found: Comparison) -> FigurePanels | None:
    """Differences from the baseline with their intervals, a line a method, coloured by verdict."""
    baseline = found.baseline
    rows = [row for row in found.rows if baseline in row.versus and row.versus[baseline].interval]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for place, row in enumerate(reversed(rows)):
            versus = row.versus[baseline]
            color = COLORS[versus.verdict if versus.verdict in COLORS else "tie"]
            if versus.boot is not None:
                ends = [versus.boot.low, versus.boot.high]
                axes.plot(ends, [place] * 2, color=color, linewidth=4.5, alpha=0.25)
            if versus.interval is not None:
                ends = [versus.interval.low, versus.interval.high]
                axes.plot(ends, [place] * 2, color=color, linewidth=2.2)
            axes.plot(versus.size, place, "o", color=color, markersize=5.5)
        axes.axvline(0, color=COLORS["baseline"], linewidth=1.2)
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        side = "left" if is_loss(found.measure) else "right"
        frame(axes, f"{side} is better")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=COLORS["line"], linewidth=0.7)
        axes.tick_params(axis="y", labelcolor=COLORS["ink"], length=0)

    boot = any(row.versus[baseline].boot for row in rows)
    wide = "; wide: 95 % of resampled seeds and items" if boot else ""
    return FigurePanels(
        "differences",
        f"Difference from {found.baseline_name}",
        f"Mean over seeds, line: 95 % t-interval over seeds{wide}. Intervals are not corrected for "
        "many comparisons, the colours are.",
        [
            Panel(
                f"{measure_name(found.measure)} minus {baseline}'s",
                draw,
                0.85 + 0.21 * len(rows),
                fitted=True,
            )
        ],
        {
            baseline: COLORS["baseline"],
            **{"better": COLORS["better"], "a tie": COLORS["tie"], "worse": COLORS["worse"]},
        },
    )


# Cost against quality


def cost_figure(found: Comparison) -> FigurePanels | None:
    """The measure against each cost; named are the methods that none is cheaper and better than."""
    panels = []
    for column, name in COSTS.items():
        scale = 1.0 if column == "seconds_per_step" else 2.0**20
        points = [
            (row.label, cost / scale, row.summary.mean)
            for row in found.rows
            if row.summary is not None and (cost := median(row, column)) is not None and cost > 0
        ]
        if len(points) > 1:
            panels.append(_cost_panel(found, name, points))
    if not panels:
        return None
    better = "lower" if is_loss(found.measure) else "higher"
    return FigurePanels(
        "cost",
        "Cost against quality",
        f"{measure_name(found.measure).capitalize()} ({better} is better) against cost. Named: the "
        "methods than which none is both cheaper and better in the mean; the differences between "
        "them may be inside noise.",
        panels,
        {"frontier": COLORS["focus"], found.baseline: COLORS["baseline"], "others": COLORS["tie"]},
    )


def frontier(points: Sequence[tuple[str, float, float]], *, less: bool) -> list[str]:
    """Names of the points (name, cost, value) that no other is cheaper and better than.

    >>> frontier([("a", 1, 0.5), ("b", 2, 0.4), ("c", 2, 0.6)], less=True)
    ['a', 'b']
    """
    sign = 1.0 if less else -1.0
    kept, best = [], math.inf
    for name, _, value in sorted(points, key=lambda p: (p[1], sign * p[2])):
        if sign * value < best:
            kept.append(name)
            best = sign * value
    return kept


def _cost_panel(found: Comparison, name: str, points: list[tuple[str, float, float]]) -> Panel:
    less = is_loss(found.measure)
    named = frontier(points, less=less)

    def draw(axes: Any) -> None:
        x = [cost for _, cost, _ in points]
        low, high = min(x), max(x)
        y_low, y_high = padded(min(v for *_, v in points), max(v for *_, v in points))
        wide = math.log(high / low) + 0.7
        # room for the names on the right
        log_axis(axes, low / 1.25, high * math.exp(0.75 * wide), ticks_to=high * 1.3)
        axes.set_ylim(y_low, y_high)
        shown = [p for p in points if p[0] in named or p[0] == found.baseline]
        for label, cost, value in points:
            color = COLORS["focus"] if label in named else COLORS["tie"]
            color = COLORS["baseline"] if label == found.baseline else color
            axes.plot(
                cost, value, "o", color=color, markersize=5 if (label, cost, value) in shown else 4
            )
        places = spread_labels([v for *_, v in shown], 0.085 * (y_high - y_low))
        for (label, cost, value), place in zip(shown, places, strict=True):
            axes.annotate(
                label,
                (cost, value),
                (high * math.exp(0.1 * wide), place),
                fontsize=FONT,
                color=COLORS["ink"],
                va="center",
                arrowprops={
                    "arrowstyle": "-",
                    "color": COLORS["line"],
                    "linewidth": 0.8,
                    "shrinkB": 3,
                },
            )
        frame(axes, name, "")

    return Panel(f"{measure_name(found.measure)} against {name}", draw, 2.6)
