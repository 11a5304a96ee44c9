"""From the tidy table to problems: what may be compared with what.

A problem is a task at one point of the recipe's grid (rank, batch, ...): the runs whose methods are
compared with one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lorapro.experiments.report.text import plain

__all__ = ["Problem", "default_measure", "headline", "problems", "short"]

KNOWN_METRICS = ("accuracy", "exact_match", "matthews_correlation", "f1", "pass_at_1", "score")


@dataclass(frozen=True)
class Problem:
    """Runs whose methods are compared with one another; ``setting`` is its point of the grid."""

    name: str
    experiment: str
    task: str
    runs: pd.DataFrame
    setting: dict[str, Any] = field(default_factory=dict)


def problems(runs: pd.DataFrame, titles: Mapping[str, str] | None = None) -> list[Problem]:
    """Split a table of runs into problems.

    A row that reads less of the grid than others (full fine-tuning has no rank) belongs to every
    point of it. ``titles`` are what experiments are called beside one another.
    """
    found = []
    several = runs["experiment"].nunique() > 1
    for experiment, group in runs.groupby("experiment", sort=False):
        tasks = list(dict.fromkeys(group["task"]))
        for task in tasks:
            of_task = group[group["task"] == task]
            points = _points(of_task)
            telling = _telling(points)
            for point in points:
                inside = [axes.items() <= point.items() for axes in of_task["axes"]]
                parts = [(titles or {}).get(str(experiment)) or str(experiment)] if several else []
                setting = {key: point[key] for key in telling if key in point}
                parts += [str(task)] if len(tasks) > 1 or not (parts or setting) else []
                parts += [f"{short(key)} {plain(value)}" for key, value in setting.items()]
                name = ", ".join(parts)
                found.append(Problem(name, str(experiment), str(task), of_task[inside], setting))
    return found


def _points(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """The whole points of the grid: those that are not a part of another."""
    known: list[dict[str, Any]] = []
    for axes in runs["axes"]:
        if axes not in known:
            known.append(axes)
    whole = [p for p in known if not any(p.items() < q.items() for q in known)]
    return sorted(whole, key=lambda p: [v for v in p.values() if isinstance(v, (int, float))])


def _telling(points: list[dict[str, Any]]) -> list[str]:
    """The first keys that tell all points apart: alpha = 2r needs no name beside r."""
    kept: list[str] = []
    for key in dict.fromkeys(key for point in points for key in point):
        before = {tuple(str(p.get(k)) for k in kept) for p in points}
        after = {tuple(str(p.get(k)) for k in (*kept, key)) for p in points}
        kept += [key] if len(after) > len(before) else []
    return kept


def short(key: str) -> str:
    """A config's key for people.

    >>> short("per_device_train_batch_size"), short("train_samples")
    ('batch', 'train samples')
    """
    names = {"per_device_train_batch_size": "batch", "max_steps": "steps"}
    return names.get(key, key.replace("_", " "))


def headline(runs: pd.DataFrame) -> str | None:
    """The column of the task's headline measure on test data, if it has one beside the loss."""
    named = [f"test_{m}" for m in runs["metric"].dropna().unique()] if "metric" in runs else []
    names = [*named, *(f"test_{m}" for m in KNOWN_METRICS)]
    return next((n for n in names if n in runs and runs[n].notna().any()), None)


def default_measure(runs: pd.DataFrame) -> str:
    """Test loss where there is one, else the headline measure, else validation loss."""
    for name in ("test_loss", headline(runs), "validation_loss"):
        if name is not None and name in runs and runs[name].notna().any():
            return name
    return "test_loss"  # no run has ended: an empty table
