"""Figures of sweeps: the measure against batch, rank, data size or any other key of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorapro.experiments.report.comparison import Comparison
from lorapro.experiments.report.drawing import (
    COLORS,
    FigurePanels,
    Panel,
    frame,
    log_axis,
    short_number,
)
from lorapro.experiments.report.figures import padded, references
from lorapro.experiments.report.problems import short
from lorapro.experiments.report.text import measure_name, plain
from lorapro.experiments.statistics import paired_t, summarize

__all__ = ["sweep_figures", "swept_figure"]

Line = list[tuple[Any, float, float]]
"""(value of the variable, mean, half of its interval) of each point."""


def sweep_figures(comparisons: Sequence[Comparison], variable: str) -> list[FigurePanels]:
    """The measure against a variable, a figure for each task and setting of everything else.

    ``variable`` is a key of the problems' settings, or of the configs where each problem has one
    value of it.
    """
    groups: dict[str, list[Comparison]] = {}
    for found in comparisons:
        rest = {k: v for k, v in found.problem.setting.items() if k != variable}
        words = [found.problem.task, *(f"{short(k)} {plain(v)}" for k, v in rest.items())]
        groups.setdefault(", ".join(words), []).append(found)
    drawn = [swept_figure(group, variable, where) for where, group in groups.items()]
    return [figure for figure in drawn if figure is not None]


def swept_figure(
    comparisons: Sequence[Comparison], variable: str, where: str = ""
) -> FigurePanels | None:
    """One figure of :func:`sweep_figures`: a panel a method; ``None`` for fewer than two values."""
    lines: dict[str, Line] = {}
    for found in comparisons:
        value = found.problem.setting.get(variable, _only(found, variable))
        for row in found.rows:
            if value is not None and row.values:
                every = list(row.values.values())
                interval = paired_t(every)
                half = 0.0 if interval is None else interval.half
                lines.setdefault(row.label, []).append((value, summarize(every).mean, half))
    values = list(dict.fromkeys(v for line in lines.values() for v, _, _ in line))
    if len(values) < 2:
        return None
    numeric = all(isinstance(v, (int, float)) for v in values)
    values = sorted(values) if numeric else values
    places = {v: float(v) if numeric else float(k) for k, v in enumerate(values)}
    ends = [m + side * h for line in lines.values() for _, m, h in line for side in (-1, 1)]
    means = [m for line in lines.values() for _, m, _ in line]
    low, high = padded(min(means), max(means))
    limits = max(min(ends), 2 * low - high), min(max(ends), 2 * high - low)
    beside = references(comparisons[0])
    name = variable.replace("_", " ")

    def panel(label: str) -> Panel:
        def draw(axes: Any) -> None:
            for other in [*(o for o in beside if o != label and o in lines), label]:
                line = sorted(lines[other], key=lambda point: places[point[0]])
                x, y = [places[v] for v, _, _ in line], [m for _, m, _ in line]
                color = beside.get(other, COLORS["focus"])
                thick, size = (2.0, 4.0) if other == label else (1.2, 2.5)
                axes.plot(x, y, color=color, linewidth=thick, marker="o", markersize=size)
                if other == label:
                    bars = [h for _, _, h in line]
                    axes.errorbar(x, y, bars, color=color, linewidth=1, capsize=2, fmt="none")
            axes.set_ylim(*padded(*limits))
            frame(axes, short(variable))
            first, last = places[values[0]], places[values[-1]]
            if numeric and first > 0 and last / first >= 4:
                log_axis(axes, first / 1.2, last * 1.2)
            if len(values) <= 6:
                shown = [short_number(v) if numeric else str(v) for v in values]
                axes.set_xticks(list(places.values()), shown)

        return Panel(label, draw)

    measure = measure_name(comparisons[0].measure)
    labels = [label for label in lines if label not in beside] or list(lines)
    return FigurePanels(
        "_".join([measure, "by", variable, *([where] if where else [])]),
        f"{measure.capitalize()} against {name}" + (f" ({where})" if where else ""),
        "Each method at the rate tuned in that setting; bars: 95 % t-intervals over seeds.",
        [panel(label) for label in labels],
        {"the method": COLORS["focus"], **beside},
    )


def _only(found: Comparison, variable: str) -> Any:
    values = {config.get(variable) for config in found.problem.runs["config"]} - {None}
    return values.pop() if len(values) == 1 else None
