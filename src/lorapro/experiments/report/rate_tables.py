"""Tables of learning rates: how much a method minds its own, what one tuned elsewhere costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from lorapro.experiments.rates import noise_of_one_run, tolerated_rates, transfer_regret
from lorapro.experiments.report.comparison import Comparison, Problem, Row, rate_losses
from lorapro.experiments.report.tables import Table
from lorapro.experiments.report.text import measure_name, number
from lorapro.experiments.statistics import summarize

__all__ = [
    "rates_table",
    "transfer_table",
    "transfers_table",
    "validation_noise",
    "values_by_rate_table",
]

# Rows whose rule full fine-tuning has, too: what its best rate costs them is a fair question.
FULL_BY_RULE = {
    **dict.fromkeys(("lora", "rslora", "lora+", "dora", "pissa", "lora-ga", "lora-pro"), "full"),
    **dict.fromkeys(("lora-pro-damped", "lora-pro-factored", "lora-pro-full"), "full"),
    **dict.fromkeys(("lora-muon", "balanced-muon", "lora-pro-muon"), "full-muon"),
}


def rates_table(found: Comparison) -> Table | None:
    """How much a method minds its learning rate: half and twice the best, the range in noise."""
    noise = validation_noise(found)
    rows = []
    for row in found.rows:
        losses = rate_losses(_of(found.problem, row.label))
        if len(losses) < 2 or not math.isfinite(losses[row.rate]):
            continue
        cells = [row.label, f"{row.rate:g}", f"{losses[row.rate]:.4f}"]
        for factor in (0.5, 2.0):
            near = next(
                (r for r in losses if math.isclose(r, factor * row.rate, rel_tol=0.01)), None
            )
            cells.append("-" if near is None else _more(losses[near] - losses[row.rate]))
        cells.append(f"{min(losses):g} to {max(losses):g}")
        if noise is not None:
            wide = tolerated_rates(losses, noise)
            left, right = "≤ " if wide.open_below else "", " or more" if wide.open_above else ""
            cells.append(f"{left}{wide.low:g} to {wide.high:g}{right}")
            at_least = "≥ " if wide.open_below or wide.open_above else ""
            cells.append(f"{at_least}{wide.factor:.3g}")
        rows.append(cells)
    if not rows:
        return None
    header = ["method", "best lr", "validation loss", "half of it", "twice it", "tried"]
    notes = []
    if noise is not None:
        header += ["within noise of the best", "factor"]
        notes.append(
            f"Within noise: at most {noise:.4f} above the best, as far as two runs of one method "
            "lie apart by chance (95 %, from the seeds at the chosen rates, pooled over methods)."
        )
    return Table("Learning rates", header, rows, notes)


def _of(problem: Problem, label: str) -> pd.DataFrame:
    return problem.runs[problem.runs["label"] == label]


def _more(difference: float) -> str:
    return f"{difference:+.4f}" if math.isfinite(difference) else "diverged"


def validation_noise(found: Comparison) -> float | None:
    """How far validation losses of two runs of one method lie apart by chance in this problem."""
    return noise_of_one_run([_validation(row) for row in found.rows])


def _validation(row: Row) -> list[float]:
    if "validation_loss" not in row.runs:
        return []
    return [float(v) for v in row.runs["validation_loss"] if math.isfinite(v)]


def values_by_rate_table(problem: Problem, measure: str) -> Table | None:
    """A measure at every learning rate (the question of the paper's Table 8)."""
    runs = problem.runs[problem.runs["status"] != "unfinished"]
    if measure not in runs:
        return None
    known = runs[runs[measure].notna()]
    groups = {k: g[measure] for k, g in known.groupby(["label", "learning_rate"], sort=False)}
    labels = list(dict.fromkeys(known["label"]))
    rates = sorted(known["learning_rate"].unique())
    if len(groups) <= len(labels) or len(groups) < 0.5 * len(labels) * len(rates):
        return None  # one rate a method: the main table has it; grids apart: mostly empty
    rows = []
    for label in labels:
        cells = [label]
        for rate in rates:
            values = groups.get((label, rate))
            summary = None if values is None else summarize(values.to_numpy(dtype=float))
            cells.append("" if summary is None else number(measure, summary.mean, summary.sd))
        rows.append(cells)
    title = f"{measure_name(measure)} by learning rate".capitalize()
    return Table(title, ["method", *(f"{rate:g}" for rate in rates)], rows)


def transfer_table(settings: Mapping[str, Problem], label: str) -> Table | None:
    """What a rate tuned in one setting costs in another: rows tuned, columns used, one method."""
    losses = _losses(settings, label)
    if len(losses) < 2 or max(map(len, losses.values())) < 2:
        return None
    regret = transfer_regret(losses)
    rows = []
    for tuned in losses:
        best = min(losses[tuned], key=lambda rate: losses[tuned][rate])
        rows.append([f"{tuned} (lr {best:g})", *(_regret(regret[tuned, used]) for used in losses)])
    notes = [
        "Validation loss above the best there; 'not tried' where that rate is not in the grid."
    ]
    title = f"{label}: cost of a learning rate tuned elsewhere"
    return Table(title, ["tuned on", *losses], rows, notes)


def transfers_table(settings: Mapping[str, Problem], labels: Sequence[str]) -> Table | None:
    """For each method what rates tuned in one setting cost in the others: mean and worst.

    Where there is full fine-tuning by the same rule (AdamW or Muon), also what its rate costs.
    """
    rows, from_full = [], []
    for label in labels:
        losses = _losses(settings, label)
        values = list(losses.values())
        if len(losses) < 2 or max(map(len, values)) < 2 or values.count(values[0]) == len(values):
            continue  # the last: the same runs everywhere
        apart = {k: v for k, v in transfer_regret(losses).items() if k[0] != k[1]}
        known = {pair: value for pair, value in apart.items() if not math.isnan(value)}
        cells = [label, f"{len(known)} of {len(apart)}"]
        if known:
            tuned, used = max(known, key=lambda pair: known[pair])
            mean = sum(known.values()) / len(known)
            cells += [_regret(mean), _regret(known[tuned, used]), f"{tuned} to {used}"]
        rows.append([*cells, *[""] * (5 - len(cells))])
        from_full.append(_costs_of_full_rates([settings[name] for name in losses], label))
    if not rows:
        return None
    header = ["method", "pairs tried", "mean cost", "worst", "where"]
    notes = ["Validation loss above the best there, with the rate that is best elsewhere."]
    if any(costs is not None for costs in from_full):
        header.append("with full fine-tuning's: mean, worst")
        for row, costs in zip(rows, from_full, strict=True):
            row.append("" if costs is None else _mean_and_worst(costs))
        notes.append(
            "With full fine-tuning's: with the rate that is best for it, by the same rule."
        )
    return Table("Rates tuned elsewhere", header, rows, notes)


def _losses(settings: Mapping[str, Problem], label: str) -> dict[str, dict[float, float]]:
    """Losses of one row by rate, in each setting in which a run of it is done."""
    losses = {name: rate_losses(_of(problem, label)) for name, problem in settings.items()}
    return {name: by_rate for name, by_rate in losses.items() if by_rate}


def _costs_of_full_rates(places: Sequence[Problem], label: str) -> list[float] | None:
    """What the best rate of full fine-tuning by the same rule costs, where both were tried.

    ``None`` where there is no such row.
    """
    costs, found = [], False
    for problem in places:
        full = FULL_BY_RULE.get(_of(problem, label)["method"].iloc[0])
        losses = {} if full is None else rate_losses(_of(problem, full))
        if not any(map(math.isfinite, losses.values())):
            continue
        found = True
        own = rate_losses(_of(problem, label))
        regret = transfer_regret({"full": losses, "own": own})["full", "own"]
        if not math.isnan(regret):
            costs.append(regret)
    return costs if found else None


def _mean_and_worst(costs: Sequence[float]) -> str:
    if not costs:
        return "not tried"
    return f"{_regret(sum(costs) / len(costs))}, {_regret(max(costs))}"


def _regret(value: float) -> str:
    if math.isnan(value):
        return "not tried"
    return "diverged" if math.isinf(value) else f"{value:.4f}"
