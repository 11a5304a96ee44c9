"""The parts of a recipe, each checked: methods, tasks, grid, seeds, the paper's numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorapro.experiments.errors import UserError, check_name
from lorapro.experiments.keys import parse_values
from lorapro.experiments.methods import METHODS, find_method
from lorapro.experiments.tasks import TASKS, find_task

__all__ = [
    "Rows",
    "boolean",
    "grid_points",
    "method_rows",
    "paper_numbers",
    "seed_list",
    "take_flags",
    "task_columns",
]

AVERAGE = ("avg", "average")  # columns that the report makes of those before them
FLAGS = ("seeds", "methods", "tasks", "strategy", "toy")


def take_flags(flags: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
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


def boolean(name: str, values: list[str]) -> bool:
    """Read the last value of a flag as true or false."""
    value = values[-1].lower()
    if value not in ("true", "false", "1", "0", "yes", "no"):
        raise UserError(f"--{name} must be true or false, found {value!r}")
    return value in ("true", "1", "yes")


Rows = dict[str, tuple[tuple[float, ...] | None, dict[str, Any]]]
"""label -> (learning rates, or None; further keys of its own)."""


def method_rows(path: Any, given: Any, chosen: list[str] | None) -> Rows:
    """Read ``methods``, or those of them (and others by name) that a flag has chosen."""
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


def task_columns(
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


def grid_points(given: Any) -> list[dict[str, Any]]:
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
        for key, value in point.items():
            if key in ("learning_rate", "method", "seed", "task"):
                raise UserError(f"grid: {key!r} has a place of its own in a comparison")
            if value is None:
                raise UserError(
                    f"grid: {key}: null is no value to compare; leave it out, and give {key} in a "
                    "row of 'methods' (where null takes it away)"
                )
    return [parse_values(point) for point in points]


def seed_list(value: Any) -> tuple[int, ...]:
    """Read ``seeds``: distinct whole numbers from 0 on."""
    values = value if isinstance(value, list) else [value]
    try:
        seeds = tuple(int(v) for v in values)
    except (TypeError, ValueError):
        raise UserError(f"seeds must be whole numbers, found {value!r}") from None
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be distinct whole numbers from 0 on, found {value!r}")
    return seeds


def paper_numbers(own: Mapping[str, Any], single: str) -> tuple[Any, Any]:
    """Check the paper's numbers: rows and columns are the recipe's, numbers are numbers.

    ``single`` is the task of a recipe without ``tasks``.
    """
    paper, described = own.get("paper") or {}, own.get("columns") or {}
    for name, block in (("paper", paper), ("columns", described)):
        if not isinstance(block, Mapping) or not all(
            isinstance(v, Mapping) for v in block.values()
        ):
            raise UserError(f"{name} must be a mapping of mappings, found {str(block)[:80]!r}")
    for column, what in described.items():
        if "task" in what and own.get("tasks"):
            check_name(f"task of column {column!r}:", str(what["task"]), map(str, own["tasks"]))
    known = [*map(str, described), *map(str, own.get("tasks") or [single]), *AVERAGE]
    for label, numbers in paper.items():
        check_name("row of 'paper'", str(label), map(str, own["methods"]))
        for column, number in numbers.items():
            check_name(f"column of 'paper' in row {label!r}:", str(column), known)
            if number is None:
                continue  # the paper prints none
            pair = number if isinstance(number, list) else [number]
            if not 1 <= len(pair) <= 2 or not all(_is_number(n) for n in pair):
                raise UserError(
                    f"paper: {label}: {column}: expected a number or [mean, sd], found {number!r}"
                )
    paper = {
        str(label): {column: number for column, number in numbers.items() if number is not None}
        for label, numbers in paper.items()
    }
    return paper, described


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
