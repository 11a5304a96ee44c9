"""How figures look: colours, panels, files of several panels and inline SVG that follows a page.

A figure is a list of small panels with few lines each, so that it stays legible with fifteen
methods and on a telephone: a file holds all panels in a grid, a page lets them flow.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "FigurePanels", "Panel", "frame", "log_axis", "smooth", "spread_labels"]

# Each is a custom property of the page, which has a second set for dark surroundings.
COLORS = {
    "ink": "#1f2328",
    "muted": "#656d76",
    "line": "#dde1e6",
    "focus": "#1f6feb",  # the panel's own method
    "baseline": "#d4720b",  # what it is compared with
    "target": "#8250df",  # full fine-tuning
    "better": "#1a7f37",
    "worse": "#cf222e",
    "tie": "#6e7781",
}
FONT = 8.5
WIDTH, HEIGHT = 3.5, 2.35  # of a panel, in inches


@dataclass
class Panel:
    """One pair of axes: its title and what draws on it; ``height`` in inches.

    ``fitted``: the margins are made to fit the labels, which takes time; else they are the usual.
    """

    title: str
    draw: Callable[[Any], None]
    height: float = HEIGHT
    fitted: bool = False


@dataclass
class FigurePanels:
    """A figure: a name for its file, title, caption, panels; ``legend`` maps words to colours."""

    name: str
    title: str
    caption: str
    panels: list[Panel]
    legend: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write all panels in a grid, as PNG or SVG by the file's ending."""
        columns = min(len(self.panels), 4 if len(self.panels) > 6 else 3)
        rows = math.ceil(len(self.panels) / columns)
        height = max(panel.height for panel in self.panels)
        figure = _figure(WIDTH * columns, height * rows + 0.55)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, self.panels, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title, loc="left", fontsize=FONT + 1, color=COLORS["ink"])
        for axes in list(grid.flat)[len(self.panels) :]:
            axes.set_visible(False)
        figure.suptitle(self.title, x=0.01, ha="left", fontsize=FONT + 3, color=COLORS["ink"])
        if self.legend:
            figure.legend(
                handles=[_handle(color) for color in self.legend.values()],
                labels=list(self.legend),
                loc="outside lower left",
                ncols=len(self.legend),
                frameon=False,
                fontsize=FONT,
            )
        scratch = path.with_name(path.name + ".part")
        with _settings(self.name):
            kind = path.suffix.removeprefix(".")
            date = {"Date": None} if kind == "svg" else {}
            figure.savefig(scratch, format=kind, dpi=130, facecolor="white", metadata=date)
        scratch.replace(path)

    def inline(self, place: str = "") -> list[tuple[str, str]]:
        """Return (title, SVG) of each panel for a page: its fonts, its colours, no fixed size.

        ``place`` keeps ids apart where several figures of one name share a page.
        """
        names = [f"{place}-{self.name}-{number}" for number in range(len(self.panels))]
        pairs = zip(self.panels, names, strict=True)
        return [(panel.title, self._svg(panel, name)) for panel, name in pairs]

    def _svg(self, panel: Panel, name: str) -> str:
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        figure = _figure(WIDTH, panel.height, fitted=panel.fitted)
        if not panel.fitted:
            low, high = 0.42 / panel.height, 1 - 0.1 / panel.height
            figure.subplots_adjust(0.13, low, 0.985, high)
        axes = figure.subplots()
        panel.draw(axes)
        for patch in (figure.patch, axes.patch):
            patch.set_alpha(0)
        out = io.StringIO()
        with _settings(name):
            FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
        svg = out.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        svg = re.sub(r' id="([^"]*)"', lambda m: m.group() if m[1] in used else "", svg)
        prefix = re.sub("[^a-z0-9]+", "-", name.lower())
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
        svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
        svg = re.sub(r'="[^"]*"', lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m.group()), svg)
        for word, color in COLORS.items():
            svg = svg.replace(color, f"var(--{word})")
        size = re.search(r'viewBox="[^"]*"', svg)
        label = f'role="img" aria-label="{html.escape(panel.title)}"'
        opening = f"<svg {size.group() if size else ''} {label}>"
        return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def _figure(width: float, height: float, *, fitted: bool = True) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if fitted else None)
    FigureCanvasAgg(figure)
    return figure


def _settings(name: str) -> Any:
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name})


def _handle(color: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linewidth=2)


def frame(axes: Any, x_label: str = "", y_label: str = "") -> None:
    """Take away what does not carry data; name the axes."""
    axes.set_xlabel(x_label, fontsize=FONT, color=COLORS["muted"])
    axes.set_ylabel(y_label, fontsize=FONT, color=COLORS["muted"])
    axes.tick_params(colors=COLORS["muted"], length=2.5, labelsize=FONT, which="both")
    axes.grid(axis="y", color=COLORS["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLORS["line"])


def log_axis(
    axes: Any, low: float, high: float, *, which: str = "x", ticks_to: float = math.inf
) -> None:
    """A logarithmic axis with a handful of round ticks, whatever its range; none beyond a value."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(log_ticks(low, high, ticks_to)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def log_ticks(low: float, high: float, end: float = math.inf, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, none beyond ``end``, an eighth of the axis apart.

    >>> log_ticks(1e-4, 1e-3)
    [0.0001, 0.0002, 0.0005, 0.001]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**k for k in range(first, last + 1)]
    inside: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        for every in (1,) if len(steps) > 1 else (1, 2, 3, 4):
            ticks = [float(f"{m * d:.6g}") for d in decades[::every] for m in steps]
            inside = [t for t in ticks if low * 0.999 <= t <= min(high, end) * 1.001]
            least = min((b / a for a, b in itertools.pairwise(inside)), default=math.inf)
            if inside and len(inside) <= most and least >= (high / low) ** 0.125:
                return inside
    return inside


def short_number(value: float) -> str:
    """A number for an axis.

    >>> short_number(0.0005), short_number(0.2), short_number(4096), short_number(2e6)
    ('5e-4', '0.2', '4096', '2e6')
    """
    if value == 0 or 0.1 <= abs(value) < 1e5:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def smooth(values: Sequence[float], width: float = 0.04) -> list[float]:
    """Moving average with a Gaussian window of ``width`` times the curve's length to each side.

    Centred, so that a falling curve is not shown late; at the ends the window is one-sided.

    >>> smooth([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    import numpy as np

    at = np.arange(len(values))
    sigma = max(width * len(values), 1.0)
    weights = np.exp(-0.5 * ((at[:, None] - at[None, :]) / sigma) ** 2)
    return list(map(float, weights @ np.asarray(values) / weights.sum(axis=1)))


def spread_labels(positions: Sequence[float], distance: float) -> list[float]:
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
