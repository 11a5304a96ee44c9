"""Tables over several problems, beside the papers' numbers, and of what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorapro.experiments.report.comparison import (
    BETTER,
    ONE_SEED,
    TIE,
    WORSE,
    Comparison,
    Row,
)
from lorapro.experiments.report.problems import headline, short
from lorapro.experiments.report.tables import Table
from lorapro.experiments.report.text import is_loss, listed, number, plain, signed
from lorapro.experiments.results import Experiment
from lorapro.experiments.statistics import (
    Interval,
    iqm,
    probability_of_improvement,
    stratified_interval,
    summarize,
)

__all__ = [
    "across_table",
    "conditions_table",
    "gaps_table",
    "paper_table",
    "unfinished_table",
]

UNTRAINED = ("zero-shot", "untrained", "base")


def across_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Each method over all problems: verdicts counted, chance to improve on the baseline, IQM.

    The chance compares all pairs of runs within a problem. The interquartile mean is over runs
    whose measure is scaled to 0 for the untrained model and 1 for full fine-tuning, in the problems
    that hold both.
    """
    labels = list(dict.fromkeys(row.label for found in comparisons for row in found.rows))
    if len(comparisons) < 2:
        return None
    baseline = listed(list(dict.fromkeys(found.baseline for found in comparisons)))
    rows = []
    for label in labels:
        pairs = [(found, row) for found in comparisons if (row := found.row(label)) and row.values]
        against = [row.versus[f.baseline] for f, row in pairs if f.baseline in row.versus]
        verdicts = [versus.verdict for versus in against]
        counts = [str(verdicts.count(kind) or "") for kind in (BETTER, TIE, WORSE, ONE_SEED)]
        rows.append([label, str(len(pairs)), *counts, _chance(pairs), _scaled(pairs)])
    header = ["method", "problems", "better", "ties", "worse", "one seed"]
    header += [f"P(better than {baseline})", "IQM"]
    notes = [
        f"better, ties, worse: against {baseline}, as in the tables of each problem. P: "
        f"chance that a run beats one of {baseline}'s, mean over problems, with a 95 % interval "
        "from runs resampled within each problem."
    ]
    table = Table("Over all problems", header, rows, notes).without_empty_columns()
    if "IQM" in table.header:
        table.notes.append(
            "IQM: mean of the middle half of all runs, scaled to 0 for the untrained model and 1 "
            "for full fine-tuning."
        )
    return table


def _gains(found: Comparison, row: Row) -> np.ndarray:
    sign = -1.0 if is_loss(found.measure) else 1.0
    return sign * np.array(list(row.values.values()))


def _chance(pairs: Sequence[tuple[Comparison, Row]]) -> str:
    both = [(f, row, base) for f, row in pairs if (base := f.row(f.baseline)) and base.values]
    both = [(f, row, base) for f, row, base in both if row is not base]
    if not both:
        return ""
    ours, theirs = [_gains(f, row) for f, row, _ in both], [_gains(f, b) for f, _, b in both]
    return _interval(stratified_interval(probability_of_improvement, ours, theirs))


def _interval(i: Interval) -> str:
    return f"{i.size:.2f} ({i.low:.2f} to {i.high:.2f})"


def _scaled(pairs: Sequence[tuple[Comparison, Row]]) -> str:
    scores = []
    for found, row in pairs:
        zero = next((r for r in found.rows if r.method in UNTRAINED and r.values), None)
        one = found.row(found.goal)
        if zero is None or one is None or not one.values:
            continue
        start, end = _gains(found, zero).mean(), _gains(found, one).mean()
        if end > start:
            scores.append((_gains(found, row) - start) / (end - start))
    return _interval(stratified_interval(iqm, scores)) if scores else ""


def gaps_table(comparisons: Sequence[Comparison]) -> Table | None:
    """The gap of each problem, and the share of it that each method closes."""
    found, sizes = [], []
    for f in comparisons:
        if f.gap is not None and f.gap.interval is not None:
            size = (-1.0 if is_loss(f.measure) else 1.0) * f.gap.size
            half = number(f.measure, f.gap.interval.half)
            found.append(f)
            sizes.append(f"{signed(f.measure, size)} ± {half}")
    if len(found) < 2:
        return None
    rows = [["gap", *sizes]]
    labels = dict.fromkeys(r.label for f in found for r in f.rows)
    for label in labels:
        shares = [row.share if (row := f.row(label)) else None for f in found]
        if any(share is not None for share in shares):
            cells = ["-" if x is None else _percent(x) for x in shares]
            rows.append([label, *cells])
    goals = listed(list(dict.fromkeys(f"{f.baseline} to {f.goal}" for f in found)))
    notes = [
        f"From {goals}, 95 % t-interval over seeds; shares with Fieller's 95 % interval, where "
        "there is a gap beyond noise."
    ]
    return Table("Shares of the gap", ["method", *(f.problem.name for f in found)], rows, notes)


def _percent(share: Interval) -> str:
    low, high = 100 * share.low, 100 * share.high
    return f"{100 * share.size:.0f} % ({low:.0f} to {high:.0f})"


# Beside the papers' numbers


def paper_table(comparisons: Sequence[Comparison], about: Experiment) -> Table:
    """Our numbers beside a paper's: two columns for each of its own.

    What a column is of ours stands in the recipe's ``columns`` (see
    :mod:`lorapro.experiments.plan`); a column that is not there is the main metric of the task of
    that name, in per cent, and ``avg`` the mean of the columns before it.
    """
    columns = list(dict.fromkeys(c for cells in about.paper.values() for c in cells))
    labels = list(dict.fromkeys(row.label for found in comparisons for row in found.rows))
    rows = []
    missing = set(columns)
    for label in dict.fromkeys([*about.paper, *labels]):
        cells = [label]
        so_far: list[float] = []
        for column in columns:
            ours = _ours(comparisons, label, about.columns.get(column, {"task": column}))
            if ours is None and column.lower() in ("avg", "average") and len(so_far) > 1:
                whole = len(so_far) == columns.index(column)
                ours = (float(np.mean(so_far)), None) if whole else None
            elif ours is not None:
                so_far.append(ours[0])
            missing -= {column} if ours is not None else set()
            cells += [_pair(ours), _pair(about.paper.get(label, {}).get(column))]
        rows.append(cells)
    header = ["method", *(h for c in columns for h in (c, f"{c}, paper"))]
    notes = ["Mean ± standard deviation over seeds. The paper's numbers are cited."]
    if about.toy:
        notes.append("Toy size: tiny random models and written data; ours mean nothing here.")
    if missing:
        notes.append(f"Not run here: {', '.join(c for c in columns if c in missing)}.")
    return Table("Beside the paper's numbers", header, rows, notes)


def _pair(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.2f}" + ("" if value[1] is None else f" ± {value[1]:.2f}")


def _ours(
    comparisons: Sequence[Comparison], label: str, what: Mapping[str, Any]
) -> tuple[float, float | None] | None:
    """Mean and deviation of our row in a column, at its chosen rate unless the column names one."""
    select = {k: v for k, v in what.items() if k not in ("task", "value", "scale")}
    found = [f for f in comparisons if f.row(label) and _fits(f, what, select)]
    if not found:
        return None
    row = found[0].row(label)
    metric = headline(found[0].problem.runs)
    value = str(what.get("value") or (metric or found[0].measure).removeprefix("test_"))
    cost = value.startswith("cost.")
    measure = value.removeprefix("cost.") if cost else f"test_{value}"
    runs = found[0].problem.runs
    if "learning_rate" in select:
        near = np.isclose(runs["learning_rate"].astype(float), float(select["learning_rate"]))
        runs = runs[near & (runs["label"] == label)]
    elif row is not None:
        runs = row.runs
    values = runs[measure].dropna().to_list() if measure in runs else []
    if not values:
        return None
    scale = float(what.get("scale", 1 if cost or is_loss(measure) else 100))
    summary = summarize([scale * float(v) for v in values])
    return summary.mean, summary.sd


def _fits(found: Comparison, what: Mapping[str, Any], select: Mapping[str, Any]) -> bool:
    if "task" in what and str(what["task"]) != found.problem.task:
        return False
    told = {**found.problem.runs["config"].iloc[0], **found.problem.setting}
    told |= {k: found.problem.runs[k].iloc[0] for k in select if k in found.problem.runs}
    return all(k == "learning_rate" or str(told.get(k)) == str(v) for k, v in select.items())


def unfinished_table(runs: pd.DataFrame, titles: Mapping[str, str]) -> Table | None:
    """Runs that diverged, failed or did not end; ``titles`` of the experiments, by name."""
    bad = runs[runs["status"] != "finished"]
    if not len(bad):
        return None
    rows = [
        [
            str(r["label"]),
            titles.get(str(r["experiment"])) or str(r["experiment"]),
            ", ".join([str(r["task"]), *(f"{short(k)} {plain(v)}" for k, v in r["axes"].items())]),
            f"{r['learning_rate']:g}",
            plain(r["seed"]),
            str(r["status"]),
        ]
        for r in bad.to_dict("records")
    ]
    header = ["method", "experiment", "task", "lr", "seed", "what happened"]
    return Table("Runs without an end", header, rows, text=True)


def conditions_table(runs: pd.DataFrame, titles: Mapping[str, str]) -> Table:
    """What all runs of each experiment had in common: model, data, steps, versions."""
    rows = []
    for experiment, group in runs.groupby("experiment", sort=False):
        configs = list(group["config"])
        keys = sorted(configs[0])
        said = {k: configs[0][k] for k in keys if all(c.get(k) == configs[0][k] for c in configs)}
        steps = group["steps"].dropna() if "steps" in group else pd.Series(dtype=float)
        if "max_steps" not in said and steps.nunique() == 1:
            said["steps"] = steps.iloc[0]
        versions = {f"{k} {v}" for d in group["versions"] for k, v in d.items()}
        revisions = {str(r)[:12] for r in group.get("git_revision", pd.Series(dtype=str)).dropna()}
        text = ", ".join(f"{k} {plain(v)}" for k, v in said.items())
        rows.append(
            [
                titles.get(str(experiment)) or str(experiment),
                text,
                ", ".join(sorted(versions)),
                ", ".join(sorted(revisions)),
            ]
        )
    header = ["experiment", "the same in all runs", "versions", "revision"]
    return Table("Conditions", header, rows, text=True).without_empty_columns()
