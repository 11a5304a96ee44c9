"""A comparison: what a recipe asks for, as cells of runs.

A recipe is a run's keys and, beside them:

``methods``
    the rows: a mapping from label to learning rate(s), or to ``{method: ..., learning_rate: ...,
    further keys}``; or a list of names.
``tasks``
    the columns: a list of tasks, or a mapping from label to further keys (``task`` among them, if
    the label is not its name). Without it, the key ``task``.
``grid``
    further axes: a mapping from key to values (all combinations), or a list of mappings (one cell
    each, for keys that move together).
``seeds``, ``strategy``
    ``tune``: in each cell every rate with the first seed, the best on validation data with the
    others; ``grid``: every rate with every seed.
``title``, ``target``, ``paper``, ``columns``
    for the report. ``target`` is the row that the gap from LoRA leads to (``full``; ``better``: of
    the rows of full fine-tuning). ``paper`` holds the paper's own numbers as
    ``{row label: {column: number or [mean, sd]}}``, with the rows of ``methods``. ``columns`` says
    what a column of ours is, ``{column: {task: label, value: accuracy, scale: 100, further keys to
    select runs by: value}}``; ``value`` is a test metric or, with ``cost.``, a cost. A column that
    is not listed is the main metric of the task of that name, in per cent; ``avg`` is the mean of
    the columns before it.

A *cell* is one method on one task at one point of the grid. A key of the recipe that a cell's task
or method does not read, or fixes for itself, is no axis of that cell, so that full fine-tuning is
run once for all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorapro.experiments.config import RunConfig, from_values
from lorapro.experiments.errors import UserError, check_name
from lorapro.experiments.keys import (
    COMPARE_ONLY,
    option_defaults,
    our_keys,
    owners,
    parse_values,
    relevant,
)
from lorapro.experiments.methods import find_method
from lorapro.experiments.recipe import (
    Rows,
    boolean,
    grid_points,
    method_rows,
    paper_numbers,
    seed_list,
    take_flags,
    task_columns,
)
from lorapro.experiments.tasks import FAMILIES, TASKS
from lorapro.experiments.toys import cut, toy_values
from lorapro.experiments.yaml_file import read_yaml

__all__ = ["STRATEGIES", "Cell", "Comparison", "load_comparison"]

STRATEGIES = ("tune", "grid")


@dataclass(frozen=True)
class Cell:
    """One method on one task at one point of the grid.

    Attributes:
        task: label of the task, the table's column.
        label: label of the method, the table's row.
        axes: the point of the grid, as far as this cell reads it.
        learning_rates: to try.
        values: a run's keys, without learning rate, seed and folder.
        folder: where its runs lie.
    """

    task: str
    label: str
    axes: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    values: Mapping[str, Any] = field(repr=False)
    folder: Path

    def config(self, rate: float, seed: int) -> RunConfig:
        """Return the configuration of one run."""
        folder = self.folder / f"lr-{rate:g}" / f"seed-{seed}"
        values = {**self.values, "learning_rate": rate, "seed": seed, "output_dir": str(folder)}
        return from_values(values)

    @property
    def name(self) -> str:
        """For people."""
        axes = [f"{key} {value}" for key, value in self.axes.items()]
        return ", ".join([self.task, self.label, *axes])


@dataclass(frozen=True)
class Comparison:
    """Cells x learning rates x seeds, and what the report needs to know."""

    recipe: str
    folder: Path
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    strategy: str
    title: str = ""
    paper: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    toy: bool = False
    unread: tuple[str, ...] = ()
    target: str = ""

    def most_runs(self) -> int:
        """Return how many runs there are in all."""
        tries = sum(len(cell.learning_rates) for cell in self.cells)
        if self.strategy == "grid":
            return tries * len(self.seeds)
        return tries + len(self.cells) * (len(self.seeds) - 1)

    def describe(self) -> dict[str, Any]:
        """Return what ``comparison.json`` holds; folders are relative to it."""
        return {
            "recipe": self.recipe,
            "title": self.title,
            "target": self.target,
            "toy": self.toy,
            "seeds": list(self.seeds),
            "strategy": self.strategy,
            "paper": self.paper,
            "columns": self.columns,
            "cells": [
                {
                    "task": cell.task,
                    "label": cell.label,
                    "method": cell.values["method"],
                    "metric": TASKS[cell.values["task"]].metric,
                    "axes": dict(cell.axes),
                    "learning_rates": list(cell.learning_rates),
                    "folder": str(cell.folder.relative_to(self.folder)),
                }
                for cell in self.cells
            ],
        }


def load_comparison(
    path: str | Path, flags: Sequence[str] = (), *, folder: str | Path | None = None
) -> Comparison:
    """Read and check a recipe.

    Flags are a run's, and ``--seeds 0 1 2``, ``--strategy grid``, ``--methods lora full`` (a choice
    among the recipe's labels, or further methods at their usual learning rate), ``--tasks ...``
    (likewise) and ``--toy true``.

    Args:
        path: the YAML.
        flags: overrides.
        folder: where to write; default: ``output_dir``, or ``runs/<name of the recipe>``.

    Raises:
        UserError: as :func:`lorapro.experiments.config.build_config` does; no or unknown methods.
    """
    values = read_yaml(path)
    own = {key: values.pop(key) for key in COMPARE_ONLY if key in values}
    ours, rest = take_flags(flags)
    rows = method_rows(path, own.get("methods"), ours.get("methods"))
    for key in ("method", "learning_rate", "seed"):
        if key in values:
            raise UserError(f"{key!r} belongs under 'methods' and 'seeds' in a comparison")
    for name, chosen in ours.items():
        if not chosen:
            raise UserError(f"--{name} needs a value")
    toy = boolean("toy", ours.get("toy", ["false"]))
    values.setdefault("disable_tqdm", True)
    values.setdefault("save_full_model", False)
    base = parse_values(values, rest)
    for key in ("method", "learning_rate", "seed"):
        if key in base:
            raise UserError(f"--{key} belongs under 'methods' and 'seeds' in a comparison")
    given = base.pop("output_dir", None)
    where = Path(folder or given or f"runs/{Path(path).stem}{'-toy' * toy}")

    columns = task_columns(own.get("tasks"), ours.get("tasks"), base)
    seeds = seed_list(ours.get("seeds") or own.get("seeds", [0]))
    strategy = str((ours.get("strategy") or [own.get("strategy", "tune")])[-1])
    check_name("strategy", strategy, STRATEGIES)
    seeds = seeds[:2] if toy else seeds
    points = grid_points(own.get("grid"))
    cells = _cells(where, base, columns, rows, points, toy)
    unread = _unread({**base, **{k: v for point in points for k, v in point.items()}}, cells)
    paper, described = paper_numbers(own, next(iter(columns)))
    title = own.get("title") or ""
    if not isinstance(title, str):
        raise UserError(f"title must be a line of text, found {title!r}")
    target = str(own.get("target", ""))
    if target not in ("", "full", "better"):
        check_name("target", target, method_rows(path, own.get("methods"), None))
    comparison = Comparison(
        str(path), where, cells, seeds, strategy, title, paper, described, toy, unread, target
    )
    for cell in cells:
        for rate in cell.learning_rates:
            cell.config(rate, seeds[0])
    return comparison


def _cells(
    where: Path,
    base: Mapping[str, Any],
    columns: Mapping[str, Mapping[str, Any]],
    rows: Rows,
    points: list[dict[str, Any]],
    toy: bool,
) -> tuple[Cell, ...]:
    cells: dict[str, Cell] = {}
    for (task, of_task), point, (label, (rates, of_method)) in itertools.product(
        columns.items(), points, rows.items()
    ):
        of_task = dict(of_task)
        task_rates = of_task.pop("learning_rate", None)
        used = relevant({**of_task, **of_method})
        shared = {k: v for k, v in {**base, **point}.items() if not _foreign(k, used)}
        fixed = {*of_task, *of_method}  # of a column or a row itself, whatever the grid says
        axes = {k: v for k, v in point.items() if k in shared and k not in fixed}
        values = {**shared, **of_task, **of_method}
        if toy:
            entry = TASKS[of_task["task"]]
            with_defaults = {**_defaults(used), **entry.values, **values}
            small = cut(with_defaults)
            values = {k: v for k, v in small.items() if not _foreign(k, used)}
            values |= toy_values(entry.name)
            values = FAMILIES[entry.family].toy(values)
            values.pop("data_config", None)
        rates = rates or task_rates or (find_method(of_method["method"]).learning_rate,)
        folder = where / "runs" / task / label
        if axes:
            folder /= ",".join(f"{key}={_shown(value)}" for key, value in axes.items())
        key = (task, label, *axes.items())
        cells.setdefault(
            repr(key), Cell(task, label, axes, rates[:2] if toy else rates, values, folder)
        )
    return tuple(cells.values())


def _defaults(used: set[str]) -> dict[str, Any]:
    """Defaults of keys that a toy is cut down by."""
    return {k: v for k, v in option_defaults().items() if k in used and isinstance(v, int)}


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("/", "_")


def _foreign(key: str, used: set[str]) -> bool:
    """Whether a key is ours and belongs to another task or method."""
    return key in our_keys() and key not in used


def _unread(values: Mapping[str, Any], cells: Sequence[Cell]) -> tuple[str, ...]:
    """Return the keys that no cell reads.

    Raises:
        UserError: such a key belongs to another task.
    """
    used = set().union(*(relevant(cell.values) for cell in cells))
    unread = tuple(key for key in values if _foreign(key, used))
    for key in unread:
        if owners(key).startswith("tasks"):
            raise UserError(f"{key!r} is read by no task here; it belongs to {owners(key)}")
    return unread
