"""All runs under one or more folders as one tidy table, a row a run; and its compact form.

What a run's folder holds is described in :mod:`lorapro.experiments.folders`. An experiment is the
folder of a comparison: ``comparison.json``, and runs below ``runs/<task>/<label>``. Its compact
form is one ``results.json`` with ``items.npz`` and ``diagnostics.csv.gz`` where there is something
for them: enough for every table and figure.

Columns of the table: ``experiment``, ``task`` and ``label`` (column and row of the recipe),
``axes`` (its point of the recipe's grid, a dictionary), ``learning_rate``, ``seed``, ``status``,
measures as ``validation_loss``, ``test_loss``, ``test_accuracy``, ...; ``metric`` (the task's
headline measure), costs by their name in ``result.json``, ``config`` (a dictionary of what else the
run was told), ``versions``, ``curves`` (``{series: (steps, values)}``), ``items`` (a dictionary of
arrays, one value a test item) and ``diagnostics`` (the records of :mod:`lorapro.diagnostics` as a
table, or ``None``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorapro.experiments.errors import UserError
from lorapro.experiments.folders import ITEMS, METRICS, PREDICTIONS, RESULT, RUN, write_text

__all__ = ["RESULTS", "Experiment", "Numbers", "Results", "merged", "read_results", "write_results"]

RESULTS, COMPARISON = "results.json", "comparison.json"
DIAGNOSTICS, COMPACT_DIAGNOSTICS = "diagnostics.jsonl", "diagnostics.csv.gz"
MOST_POINTS = 200  # of a curve in the compact form, and of steps with diagnostics
KEPT_ITEMS = ("loss", "weight", "correct")

FIRST = ("task", "label", "method", "learning_rate", "seed", "status", "metric", "axes")
LAST = ("folder", "config", "versions", "curves")
NOT_COMPACT = ("experiment", "items", "diagnostics")

# {row: {column: (mean, sd)}}
Numbers = dict[str, dict[str, tuple[float, float | None]]]


@dataclass
class Experiment:
    """What is known of an experiment beside its runs.

    Attributes:
        title: the recipe's.
        paper: numbers that the recipe cites.
        columns: what a column of ``paper`` is, see :mod:`lorapro.experiments.plan`.
        reported: numbers of our own, by measure, of which only mean and deviation are known.
        toy: whether the recipe was cut down to toy size.
        target: the row that gaps lead to, where it is not ``full`` (see ``lorapro report --help``).
    """

    title: str = ""
    paper: Numbers = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    reported: Numbers = field(default_factory=dict)
    toy: bool = False
    target: str = ""


@dataclass
class Results:
    """The tidy table, and by name what is known of each experiment beside it."""

    runs: pd.DataFrame
    experiments: dict[str, Experiment]


# Reading


def read_results(*folders: str | Path) -> Results:
    """Read all runs under ``folders``.

    An experiment is read from its runs where they are, else from its compact form. Rows are in the
    order of its recipe.

    Raises:
        UserError: a folder is missing, holds no runs, or a file in it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    experiments: dict[str, Experiment] = {}
    for given in map(Path, folders):
        if not given.is_dir():
            raise UserError(f"{given} is not a folder; give folders of runs, or of {RESULTS}")
        with_runs: dict[Path, list[Path]] = {}
        for run in sorted({p.parent for name in (RUN, RESULT) for p in given.rglob(name)}):
            with_runs.setdefault(_root(run, given), []).append(run)
        compact = {p.parent for p in given.rglob(RESULTS)} - set(with_runs)
        if not with_runs and not compact:
            raise UserError(f"{given} holds no runs: expected {RESULT} or {RESULTS} below it")
        for root in sorted({*with_runs, *compact}):
            name = _free_name(root, experiments)
            if root in with_runs:
                found, experiments[name] = _read_comparison(root, with_runs[root])
            else:
                found, experiments[name] = _read_compact(root)
            rows += [{"experiment": name, **row} for row in found]
    return Results(pd.DataFrame(rows), experiments)


def merged(results: Results) -> Results:
    """Runs of several experiments as one, named and described as the first.

    Of a run that is there twice, by task, row, point of the grid, rate and seed, the last is kept.

    Raises:
        UserError: runs of one cell that were told different things.
    """
    first = next(iter(results.experiments))
    rows: dict[str, dict[str, Any]] = {}
    told: dict[str, Mapping[str, Any]] = {}
    for row in results.runs.to_dict("records"):
        cell = json.dumps([row["task"], row["label"], row["axes"]], sort_keys=True, default=str)
        known = told.setdefault(cell, row["config"])
        for key in known.keys() & row["config"].keys():
            if known[key] != row["config"][key]:
                raise UserError(
                    f"runs of {row['label']} cannot be merged: {key} is {known[key]!r} in one and "
                    f"{row['config'][key]!r} in another"
                )
        place = f"{cell} {row['learning_rate']} {row['seed']}"
        rows.pop(place, None)
        rows[place] = {**row, "experiment": first}
    order = {label: i for i, label in enumerate(dict.fromkeys(results.runs["label"]))}
    runs = sorted(rows.values(), key=lambda row: order[row["label"]])
    return Results(pd.DataFrame(runs), {first: results.experiments[first]})


def _root(folder: Path, given: Path) -> Path:
    """The experiment's folder of a run's: what lies above its last ``runs``, at most ``given``."""
    parts = folder.relative_to(given).parts
    if "runs" not in parts:
        return given
    last = len(parts) - 1 - parts[::-1].index("runs")
    return given.joinpath(*parts[:last])


def _free_name(root: Path, taken: Mapping[str, Any]) -> str:
    full = root.resolve()
    for name in (full.name, f"{full.parent.name}/{full.name}", str(full)):
        if name not in taken:
            return name
    raise UserError(f"{root} is given more than once")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it or run again") from None


def _read_comparison(root: Path, runs: list[Path]) -> tuple[list[dict[str, Any]], Experiment]:
    plan = _json(root / COMPARISON) if (root / COMPARISON).is_file() else {}
    cells = {cell["folder"]: cell for cell in plan.get("cells", [])}
    order = list(cells)
    rows = [_read_run(folder, root, cells) for folder in runs]
    at = {name: place for place, name in enumerate(order)}
    rows.sort(key=lambda row: at.get(_cell(row["folder"]), len(order)))
    about = Experiment(
        plan.get("title", ""),
        _numbers(plan.get("paper", {}), root / COMPARISON),
        plan.get("columns", {}),
        toy=bool(plan.get("toy")),
        target=str(plan.get("target", "")),
    )
    return rows, about


def _read_run(folder: Path, root: Path, cells: Mapping[str, Any]) -> dict[str, Any]:
    held: dict[str, Any] = _json(folder / RUN) if (folder / RUN).is_file() else {}
    result: dict[str, Any] = {"status": "unfinished"}
    if (folder / RESULT).is_file():
        result = _json(folder / RESULT)
    config: dict[str, Any] = result.get("identity") or held.get("identity") or {}
    row = {key: config.get(key) for key in ("task", "method", "learning_rate", "metric")}
    row |= {"seed": config.get("seed", 0), **_flat(result)}
    row["folder"] = place = folder.relative_to(root).as_posix()
    row["label"], row["axes"] = row["method"] or folder.name, {}
    if place.startswith("runs/") and place.count("/") >= 4:
        cell = cells.get(_cell(place)) or _from_path(place)
        row |= {key: cell[key] for key in ("task", "label", "axes")}
    row["config"] = {k: v for k, v in config.items() if k not in FIRST}
    row["versions"] = result.get("versions") or {}
    row["curves"] = _read_curves(folder / METRICS)
    row["items"] = _read_items(folder)
    row["diagnostics"] = _read_diagnostics(folder / DIAGNOSTICS)
    return row


def _cell(place: str) -> str:
    """The folder of a run's cell, above those of its rate and seed."""
    return place.rpartition("/")[0].rpartition("/")[0]


def _from_path(place: str) -> dict[str, Any]:
    """Task, label and axes of ``runs/<task>/<label>[/<key>=<value>,...]/lr-<rate>/seed-<seed>``."""
    _, task, label, *axes = place.split("/")[:-2]
    pairs = [pair.partition("=")[::2] for pair in axes[0].split(",")] if axes else []
    return {"task": task, "label": label, "axes": {k: _number(v) for k, v in pairs}}


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and words of a nested mapping; ``metrics`` and ``cost`` lose their name."""
    row: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("versions", "identity", "saved"):
            continue
        if isinstance(value, dict):
            prefix = "" if key in ("metrics", "cost") else f"{key}_"
            row |= {f"{prefix}{name}": inner for name, inner in _flat(value).items()}
        elif isinstance(value, (int, float, str)):
            row[key] = value
    return row


def _read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and finite values of every loss and norm that is logged more than once."""
    series: dict[str, dict[float, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        entry = json.loads(line)
        for name, value in entry.items():
            if name.endswith(("_loss", "_norm")) and value is not None and math.isfinite(value):
                series.setdefault(name, {})[float(entry["step"])] = float(value)
    ordered = {name: sorted(at.items()) for name, at in series.items() if len(at) > 1}
    return {name: ([s for s, _ in at], [v for _, v in at]) for name, at in ordered.items()}


def _read_items(folder: Path) -> dict[str, np.ndarray]:
    """Per-item loss, weight and correctness; of generated answers from the predictions."""
    items = _load_items(folder / ITEMS)
    if "correct" not in items and (folder / PREDICTIONS).is_file():
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        if records and all("correct" in record for record in records):
            items["correct"] = np.array([float(record["correct"]) for record in records])
    return items


def _load_items(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with np.load(path) as stored:
        found = {name: stored.get(f"{prefix}{name}") for name in KEPT_ITEMS}
    return {name: values for name, values in found.items() if values is not None}


def _read_diagnostics(path: Path) -> pd.DataFrame | None:
    """Records of pairs and steps, at most 200 steps evenly spread."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    records = pd.DataFrame([json.loads(line) for line in lines if line.endswith("}")])
    records = records.dropna(subset=["step"])
    numbers = [column for column in records if column != "name"]
    records[numbers] = records[numbers].apply(pd.to_numeric)  # null where nothing was measured
    steps = np.sort(records["step"].unique())
    kept = steps[np.linspace(0, steps.size - 1, min(steps.size, MOST_POINTS)).round().astype(int)]
    return records[records["step"].isin(kept)].reset_index(drop=True)


def _numbers(block: Mapping[str, Any], path: Path) -> Numbers:
    """``{row: {column: mean or [mean, sd]}}``, checked."""
    numbers: Numbers = {}
    for row, cells in block.items():
        for column, cell in (cells or {}).items():
            mean, sd = [*cell, None][:2] if isinstance(cell, list) and cell else [cell, None]
            if mean is None:  # the paper gives none; recipes may say so
                continue
            if not all(isinstance(v, (int, float)) for v in ([mean] if sd is None else [mean, sd])):
                raise UserError(f"{path}: {row}: {column} must be [mean, sd], found {cell!r}")
            numbers.setdefault(str(row), {})[str(column)] = (mean, sd)
    return numbers


# The compact form


def write_results(results: Results, experiment: str, folder: Path) -> None:
    """Write one experiment as ``results.json`` (``items.npz``, diagnostics) into ``folder``.

    A line a run; what all runs share stands once, above. Curves of more than 200 points are
    thinned, training losses by their mean over each stretch.
    """
    runs = results.runs[results.runs["experiment"] == experiment].to_dict("records")
    rows = [_compact(row) for row in runs]
    shared = {k: v for k, v in _common(rows).items() if k != "curves"}
    for key in ("config", "versions"):
        if key not in shared:
            shared[key] = _common([row.get(key, {}) for row in rows])
    about = {k: v for k, v in vars(results.experiments[experiment]).items() if v}
    head = json.dumps({**about, "shared": shared}, indent=1, ensure_ascii=False, allow_nan=False)
    lines = [json.dumps(_without(row, shared), ensure_ascii=False, allow_nan=False) for row in rows]
    text = head.removesuffix("\n}") + ',\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    write_text(folder / RESULTS, text)
    arrays = {
        f"{number}_{name}": values.astype(np.float32 if name == "loss" else values.dtype)
        for number, row in enumerate(runs)
        for name, values in row["items"].items()
        if name in KEPT_ITEMS
    }
    (folder / ITEMS).unlink(missing_ok=True)
    if arrays:
        np.savez_compressed(folder / ITEMS, **arrays)
    tables = [
        row["diagnostics"].assign(run=number)
        for number, row in enumerate(runs)
        if isinstance(row["diagnostics"], pd.DataFrame)
    ]
    (folder / COMPACT_DIAGNOSTICS).unlink(missing_ok=True)
    if tables:
        how = {"method": "gzip", "mtime": 0}  # the same bytes for the same records
        pd.concat(tables).to_csv(
            folder / COMPACT_DIAGNOSTICS, index=False, float_format="%.6g", compression=how
        )


def _common(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = rows
    return {k: v for k, v in first.items() if all(k in r and r[k] == v for r in others)}


def _without(row: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row is its own; of dictionaries, which of their keys."""
    own = {}
    for key, value in row.items():
        if isinstance(value, dict) and key in ("config", "versions"):
            value = {k: v for k, v in value.items() if k not in shared[key]}
            if value:
                own[key] = value
        elif key not in shared:
            own[key] = value
    return own


def _compact(row: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    left_out = {*NOT_COMPACT, *FIRST, *LAST}
    for key in (*FIRST, *sorted(set(row) - left_out), *LAST):
        value = row.get(key)
        if key == "curves":
            kept[key] = {name: _thin(name, *curve) for name, curve in (value or {}).items()}
        elif isinstance(value, float):
            if math.isfinite(value):  # whole numbers are floats in a column with gaps
                kept[key] = int(value) if value.is_integer() and abs(value) < 2**53 else value
        elif value is not None:
            kept[key] = value.item() if isinstance(value, np.generic) else value
    return kept


def _thin(name: str, steps: Sequence[float], values: Sequence[float]) -> list[list[float]]:
    at, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if at.size > MOST_POINTS:
        ends = np.linspace(0, at.size, MOST_POINTS + 1).round().astype(int)
        averaged = np.add.reduceat(y, ends[:-1]) / np.diff(ends)
        y = averaged if name == "train_loss" else y[ends[1:] - 1]
        at = at[ends[1:] - 1]
    whole = [int(s) if s.is_integer() else s for s in at.tolist()]
    return [whole, [float(f"{v:.8g}") for v in y]]


def _read_compact(root: Path) -> tuple[list[dict[str, Any]], Experiment]:
    path = root / RESULTS
    stored = _json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("runs"), list):
        raise UserError(
            f"{path} has no list of 'runs'; write it anew: lorapro report RUNS --compact"
        )
    shared = stored.get("shared", {})
    measured = root / COMPACT_DIAGNOSTICS
    by_run = dict(list(pd.read_csv(measured).groupby("run"))) if measured.is_file() else {}
    rows = []
    for number, own in enumerate(stored["runs"]):
        row = {"metric": None, "axes": {}, **shared, **own}
        for key in ("config", "versions"):
            row[key] = {**shared.get(key, {}), **own.get(key, {})}
        row["curves"] = {
            series: (list(map(float, steps)), values)
            for series, (steps, values) in row.get("curves", {}).items()
        }
        row["items"] = _load_items(root / ITEMS, f"{number}_")
        row["diagnostics"] = by_run.get(number)
        rows.append(row)
    about = Experiment(
        stored.get("title", ""),
        _numbers(stored.get("paper", {}), path),
        stored.get("columns", {}),
        _numbers(stored.get("reported", {}), path),
        bool(stored.get("toy")),
        str(stored.get("target", "")),
    )
    return rows, about
