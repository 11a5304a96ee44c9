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
``title``, ``paper``, ``columns``
    for the report. ``paper`` holds the paper's own numbers as
    ``{row label: {column: number or [mean, sd]}}``, with the rows of ``methods``. ``columns`` says
    what a column of ours is, ``{column: {task: label, value: accuracy, scale: 100, further keys to
    select runs by: value}}``; ``value`` is a test metric or, with ``cost.``, a cost. A column that
    is not listed is the main metric of the task of that name, in per cent.

A *cell* is one method on one task at one point of the grid. A key of the recipe that a cell's task
or method does not read is no part of that cell, so that full fine-tuning is run once for all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorapro.experiments.config import (
    COMPARE_ONLY,
    RunConfig,
    from_values,
    option_defaults,
    our_keys,
    owners,
    parse_values,
    relevant,
)
from lorapro.experiments.errors import UserError, check_name
from lorapro.experiments.methods import METHODS, find_method
from lorapro.experiments.tasks import FAMILIES, TASKS, find_task
from lorapro.experiments.toys import cut, toy_values
from lorapro.experiments.yaml_file import read_yaml

__all__ = ["STRATEGIES", "Cell", "Comparison", "load_comparison"]

STRATEGIES = ("tune", "grid")
FLAGS = ("seeds", "methods", "tasks", "strategy", "toy")


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
    ours, rest = _take_flags(flags)
    rows = _rows(path, own.get("methods"), ours.get("methods"))
    for key in ("method", "learning_rate", "seed"):
        if key in values:
            raise UserError(f"{key!r} belongs under 'methods' and 'seeds' in a comparison")
    for name, chosen in ours.items():
        if not chosen:
            raise UserError(f"--{name} needs a value")
    toy = _boolean("toy", ours.get("toy", ["false"]))
    values.setdefault("disable_tqdm", True)
    values.setdefault("save_full_model", False)
    base = parse_values(values, rest)
    for key in ("method", "learning_rate", "seed"):
        if key in base:
            raise UserError(f"--{key} belongs under 'methods' and 'seeds' in a comparison")
    given = base.pop("output_dir", None)
    where = Path(folder or given or f"runs/{Path(path).stem}{'-toy' * toy}")

    columns = _columns(own.get("tasks"), ours.get("tasks"), base)
    seeds = _seeds(ours.get("seeds") or own.get("seeds", [0]))
    strategy = str((ours.get("strategy") or [own.get("strategy", "tune")])[-1])
    check_name("strategy", strategy, STRATEGIES)
    seeds = seeds[:2] if toy else seeds
    points = _points(own.get("grid"))
    cells = _cells(where, base, columns, rows, points, toy)
    unread = _unread({**base, **{k: v for point in points for k, v in point.items()}}, cells)
    paper, described = _paper(own)
    title = own.get("title") or ""
    if not isinstance(title, str):
        raise UserError(f"title must be a line of text, found {title!r}")
    comparison = Comparison(
        str(path), where, cells, seeds, strategy, title, paper, described, toy, unread
    )
    for cell in cells:
        for rate in cell.learning_rates:
            cell.config(rate, seeds[0])
    return comparison


def _take_flags(flags: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split off the flags of the comparison itself: ``--seeds 0 1``, ``--methods lora full``."""
    ours: dict[str, list[str]] = {}
    rest: list[str] = []
    target = rest
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--"):
            target = ours.setdefault(name, []) if name in FLAGS else rest
            if target is not rest:
                target += [value] if equals else []
                continue
        target.append(flag)
    return ours, rest


def _boolean(name: str, values: list[str]) -> bool:
    value = values[-1].lower()
    if value not in ("true", "false", "1", "0", "yes", "no"):
        raise UserError(f"--{name} must be true or false, found {value!r}")
    return value in ("true", "1", "yes")


Rows = dict[str, tuple[tuple[float, ...] | None, dict[str, Any]]]
"""label -> (learning rates, or None; further keys of its own)."""


def _rows(path: Any, given: Any, chosen: list[str] | None) -> Rows:
    if isinstance(given, list):
        given = _once("methods", given)
    if not isinstance(given, dict) or not given:
        raise UserError(f"{path} has no 'methods' (a mapping from method to learning rates)")
    given = {str(label): value for label, value in given.items()}
    if chosen is not None:
        known = [*given, *(m for m in METHODS if m not in given)]
        for label in chosen:
            if label not in given:
                try:
                    find_method(label)
                except UserError:
                    check_name("method", label, known)
        given = {label: given.get(label) for label in chosen}
    return {label: _row(label, value) for label, value in given.items()}


def _once(kind: str, names: list[Any]) -> dict[str, Any]:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{kind} names {name!r} more than once; keep one of them")
    return dict.fromkeys(map(str, names))


def _row(label: str, value: Any) -> tuple[tuple[float, ...] | None, dict[str, Any]]:
    own = dict(value) if isinstance(value, Mapping) else {"learning_rate": value}
    own["method"] = find_method(str(own.get("method", label))).name
    _check_label("methods", label)
    rates = _rates(label, own.pop("learning_rate", None))
    return rates, {**parse_values(own)}


def _check_label(kind: str, label: str) -> None:
    if set("/\\") & set(label) or label in (".", "..") or not label.strip():
        raise UserError(f"{kind}: {label!r} is used as a folder's name and cannot hold a slash")


def _rates(label: str, value: Any) -> tuple[float, ...] | None:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"methods: {label}: learning_rate is an empty list")
    try:
        rates = tuple(sorted({float(v) for v in values if v is not None}))
    except (TypeError, ValueError):
        raise UserError(
            f"methods: {label}: learning rates must be numbers, found {value!r}"
        ) from None
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(f"methods: {label}: learning_rate must be positive, found {rate:g}")
    return rates or None


def _columns(
    given: Any, chosen: list[str] | None, base: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return label -> keys of each task, ``task`` among them."""
    if given is None and chosen is None:
        task = find_task(str(base.pop("task", "tweets"))).name
        return {task: {"task": task}}
    if "task" in base:
        raise UserError("give 'task' or 'tasks', not both")
    if isinstance(given, list) or given is None:
        given = _once("tasks", given or [])
    if not isinstance(given, dict) or not (given or chosen):
        raise UserError("tasks must be a list of tasks, or a mapping from label to further keys")
    if chosen is not None:
        for label in chosen:
            check_name("task", label, dict.fromkeys([*given, *TASKS]))
        given = {label: given.get(label) for label in chosen}
    columns = {}
    for label, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"tasks: {label}: expected further keys, found {value!r}")
        own = dict(value or {})
        own["task"] = find_task(str(own.get("task", label))).name
        _check_label("tasks", str(label))
        rates = own.pop("learning_rate", None)
        columns[str(label)] = parse_values(own)
        if rates is not None:
            columns[str(label)]["learning_rate"] = _rates(str(label), rates)
    return columns


def _points(given: Any) -> list[dict[str, Any]]:
    """Return the points of the grid, each a mapping from key to value."""
    if given is None:
        return [{}]
    if isinstance(given, Mapping) and given:
        for key, values in given.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"grid: {key}: expected a list of values, found {values!r}")
        keys, products = list(given), itertools.product(*given.values())
        points = [dict(zip(keys, values, strict=True)) for values in products]
    elif isinstance(given, list) and given and all(isinstance(p, Mapping) for p in given):
        points = [dict(p) for p in given]
    else:
        raise UserError("grid must be a mapping from key to values, or a list of mappings")
    for point in points:
        for key in ("learning_rate", "method", "seed", "task"):
            if key in point:
                raise UserError(f"grid: {key!r} has a place of its own in a comparison")
    return [parse_values(point) for point in points]


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
        axes = {k: v for k, v in point.items() if k in shared}
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


def _seeds(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        seeds = tuple(int(v) for v in values)
    except (TypeError, ValueError):
        raise UserError(f"seeds must be whole numbers, found {value!r}") from None
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be distinct whole numbers from 0 on, found {value!r}")
    return seeds


def _paper(own: Mapping[str, Any]) -> tuple[Any, Any]:
    """Check the paper's numbers: rows and tasks are the recipe's, numbers are numbers."""
    paper, described = own.get("paper") or {}, own.get("columns") or {}
    for name, block in (("paper", paper), ("columns", described)):
        if not isinstance(block, Mapping) or not all(
            isinstance(v, Mapping) for v in block.values()
        ):
            raise UserError(f"{name} must be a mapping of mappings, found {str(block)[:80]!r}")
    for column, what in described.items():
        if "task" in what and own.get("tasks"):
            check_name(f"task of column {column!r}:", str(what["task"]), map(str, own["tasks"]))
    for label, numbers in paper.items():
        check_name("row of 'paper'", str(label), map(str, own["methods"]))
        for column, number in numbers.items():
            pair = number if isinstance(number, list) else [number]
            if not 1 <= len(pair) <= 2 or not all(_is_number(n) for n in pair):
                raise UserError(
                    f"paper: {label}: {column}: expected a number or [mean, sd], found {number!r}"
                )
    return paper, described


def _is_number(value: Any) -> bool:
    """Whether a table can print it: a number, or what a paper prints instead (``> 48``)."""
    return value is None or (isinstance(value, int | float | str) and not isinstance(value, bool))
