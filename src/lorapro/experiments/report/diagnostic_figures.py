"""Figures of what `lorapro.diagnostics` measured: ranks of the factors, distances to the gradient.

A record is one pair at one step: ``name``, ``step``, ``rank_A``, ``rank_B``, ``lora_distance``
(‖g̃ − g‖_F of LoRA's own gradients), ``aligned_distance`` (after the adjustment), and more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorapro.experiments.report.comparison import Comparison
from lorapro.experiments.report.drawing import COLORS, FigurePanels, Panel, frame, log_axis

__all__ = ["diagnostic_figures", "distances_figure", "ranks_figure", "shown_pairs"]

MOST_PAIRS = 24


def diagnostic_figures(found: Comparison) -> list[FigurePanels]:
    """Both figures of every row whose first seed was measured."""
    figures = []
    for row in found.rows:
        column = row.runs.get("diagnostics", ())
        records = next((d for d in column if isinstance(d, pd.DataFrame)), None)
        if records is not None:
            figures += [ranks_figure(records, row.label), distances_figure(records, row.label)]
    return figures


def layer_and_module(name: str) -> tuple[int, str]:
    """The number of a pair's layer (-1: none) and the rest of its name.

    >>> layer_and_module("base_model.model.model.layers.9.self_attn.q_proj")
    (9, 'q_proj')
    """
    found = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", name)
    return (int(found[1]), found[2]) if found else (-1, name.rpartition(".")[2])


def shown_pairs(names: Sequence[str], most: int = MOST_PAIRS) -> list[str]:
    """All pairs, or those of the first, middle and last layer, at most ``most``."""
    known = list(dict.fromkeys(names))
    layers = sorted({layer_and_module(name)[0] for name in known})
    if len(known) > most:
        wanted = {layers[0], layers[len(layers) // 2], layers[-1]}
        known = [name for name in known if layer_and_module(name)[0] in wanted]
    return known[:most]


def _title(name: str) -> str:
    layer, module = layer_and_module(name)
    return module if layer < 0 else f"layer {layer}, {module}"


def ranks_figure(records: pd.DataFrame, label: str) -> FigurePanels:
    """Rank of A and of B over steps, a panel a pair (the paper's Figure 2)."""
    return FigurePanels(
        f"ranks_{label}",
        f"{label}: rank of A and B",
        "Numerical rank of the factors over steps, first seed.",
        _panels(records, {"rank_A": "focus", "rank_B": "baseline"}, log=False),
        {"A": COLORS["focus"], "B": COLORS["baseline"]},
    )


def distances_figure(records: pd.DataFrame, label: str) -> FigurePanels:
    """Distance from full fine-tuning's gradient before and after, a panel a pair (Figure 4)."""
    return FigurePanels(
        f"distances_{label}",
        f"{label}: distance to the gradient of full fine-tuning",
        "‖g̃ − g‖ over steps, g̃ the step on W that the factors' gradients amount to: LoRA's own, "
        "and adjusted. First seed.",
        _panels(records, {"lora_distance": "baseline", "aligned_distance": "focus"}, log=True),
        {"LoRA's gradients": COLORS["baseline"], "adjusted": COLORS["focus"]},
    )


def _panels(records: pd.DataFrame, lines: dict[str, str], *, log: bool) -> list[Panel]:
    return [
        _panel(_title(name), records[records["name"] == name].sort_values("step"), lines, log=log)
        for name in shown_pairs(list(records["name"]))
    ]


def _panel(title: str, of_pair: pd.DataFrame, lines: dict[str, str], *, log: bool) -> Panel:
    def draw(axes: Any) -> None:
        values = of_pair[list(lines)].to_numpy(dtype=float)
        for column, color in lines.items():
            axes.plot(of_pair["step"], of_pair[column], color=COLORS[color], linewidth=1.8)
        positive = values[np.isfinite(values) & (values > 0)]
        if log and positive.size:
            log_axis(axes, positive.min() / 1.3, positive.max() * 1.3, which="y")
        elif positive.size:
            axes.set_ylim(0, 1.08 * positive.max())
            axes.locator_params(axis="y", integer=True, nbins=5)
        axes.locator_params(axis="x", integer=True, nbins=5)
        frame(axes, "step")

    return Panel(title, draw)
