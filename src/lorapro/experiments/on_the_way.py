"""Who learns faster: validation losses of a comparison's chosen runs while they train."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorapro.experiments.figure import read_curves
from lorapro.experiments.statistics import difference

__all__ = ["add_losses_on_the_way", "shown_steps", "way_cells"]

MOST_COLUMNS = 4


def add_losses_on_the_way(folder: Path, rows: list[dict[str, Any]], baseline: str) -> None:
    """Add ``on_the_way`` to the rows: validation losses at the steps that all seeds evaluated.

    Each entry has ``step``, ``losses`` (one a seed) and, where ``baseline`` was evaluated at that
    step too and there are several seeds, ``over_baseline``: the difference seed by seed with its
    95 % interval.
    """
    for row in rows:
        curves = read_curves([folder / name for name in row["folders"]], "validation_loss")
        row["on_the_way"] = [
            {"step": int(step), "losses": losses} for step, losses in curves.items()
        ]
    known = {row["label"]: row["on_the_way"] for row in rows}
    base = {entry["step"]: entry["losses"] for entry in known.get(baseline, [])}
    for label, entries in known.items():
        for entry in entries:
            if label == baseline or entry["step"] not in base or len(entry["losses"]) < 2:
                continue
            entry["over_baseline"] = difference(entry["losses"], base[entry["step"]])


def shown_steps(steps: Sequence[int], most: int = MOST_COLUMNS) -> list[int]:
    """At most ``most`` steps, evenly spread, the last one always.

    >>> shown_steps([10, 20, 30, 40, 50, 60, 70, 80])
    [20, 40, 60, 80]
    >>> shown_steps([30, 60])
    [30, 60]
    """
    count = min(most, len(steps))
    return [steps[round((k + 1) * len(steps) / count) - 1] for k in range(count)]


def way_cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the table of validation losses on the way; empty if there is none.

    A cell holds the mean and, in parentheses, the difference from the baseline; a dash where a
    method has no finite loss of every seed.
    """
    ways = {
        row["label"]: {entry["step"]: entry for entry in row.get("on_the_way", [])}
        for row in summary["methods"]
    }
    known = sorted(set().union(*ways.values()))
    if len(known) < 2:
        return [], []
    steps = shown_steps(known)
    rows = []
    for label, way in ways.items():
        cells = [label]
        for step in steps:
            entry = way.get(step)
            if entry is None:
                cells.append("-")
                continue
            text = f"{statistics.fmean(entry['losses']):.4f}"
            if over := entry.get("over_baseline"):
                text += f" ({over['size']:+.4f} ± {over['noise']:.4f})"
            cells.append(text)
        rows.append(cells)
    return ["method", *(f"step {step}" for step in steps)], rows
