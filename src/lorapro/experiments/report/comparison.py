"""What is compared with what: each row's chosen rate, differences, corrections, verdicts.

A row is a method in a problem, at the learning rate that does best on validation data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lorapro.experiments.report.problems import Problem, default_measure
from lorapro.experiments.report.text import is_loss
from lorapro.experiments.statistics import (
    Interval,
    Summary,
    holm,
    mcnemar_p,
    paired_t,
    share_closed,
    sign_flip_p,
    summarize,
    two_level_intervals,
)

__all__ = [
    "Comparison",
    "Row",
    "Versus",
    "choose_rate",
    "compare",
    "rate_losses",
]

BASELINE, RIVAL, TARGET = "lora", "rslora", "full"
ALPHA = 0.05
BETTER, WORSE, TIE, ONE_SEED = "better", "worse", "tie", "one seed"


@dataclass(frozen=True)
class Versus:
    """A row minus another row of its problem, seed by seed, in the measure's own unit."""

    other: str
    size: float
    seeds: int
    interval: Interval | None  # paired t over seeds
    boot: Interval | None  # seeds and items resampled
    holm: float  # p of the t-test, corrected for all rows that are compared with this one
    family: int  # how many those are
    flip: float | None  # p of the exact sign-flip test
    mcnemar: float | None  # p of McNemar's test of the right answers, of one seed
    verdict: str
    alone: bool  # a tie that is none without the correction


@dataclass
class Row:
    """A method in a problem, at its chosen learning rate."""

    label: str
    method: str
    rate: float
    rates: tuple[float, ...]
    runs: pd.DataFrame
    values: dict[int, float]
    versus: dict[str, Versus] = field(default_factory=dict)
    share: Interval | None = None

    @property
    def summary(self) -> Summary | None:
        """Mean and deviation over seeds."""
        return summarize(list(self.values.values())) if self.values else None

    @property
    def lost(self) -> int:
        """Runs at the chosen rate without a finite value."""
        return len(self.runs) - len(self.values)

    @property
    def edge(self) -> str | None:
        """Which end of its grid the chosen rate is, if it is one."""
        if len(self.rates) < 2 or self.rate not in (self.rates[0], self.rates[-1]):
            return None
        return "lowest" if self.rate == self.rates[0] else "highest"


@dataclass
class Comparison:
    """A problem's rows by one measure, against ``baseline``.

    ``gap`` is the row ``goal`` (full fine-tuning) against the baseline, where there are both.
    """

    problem: Problem
    measure: str
    rows: list[Row]
    baseline: str = BASELINE
    goal: str = TARGET
    gap: Versus | None = None

    def row(self, label: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.label == label), None)

    @property
    def baseline_name(self) -> str:
        """The baseline for people: ``"tuned lora"`` where several rates of it were tried."""
        row = self.row(self.baseline)
        return ("tuned " if row is not None and len(row.rates) > 1 else "") + self.baseline

    @property
    def seeds(self) -> list[int]:
        """All seeds of the chosen runs."""
        return sorted({seed for row in self.rows for seed in row.values})


# Rows


def _score(runs: pd.DataFrame) -> pd.Series:
    """What a rate is chosen by: validation loss, else the validation metric; less is better."""
    if "validation_loss" in runs and runs["validation_loss"].notna().any():
        return runs["validation_loss"].fillna(math.inf)
    names = [c for c in runs if str(c).startswith("validation_") and runs[c].notna().any()]
    if not names:
        return pd.Series(math.inf, runs.index)
    return (-runs[names[0]]).fillna(math.inf)


def rate_losses(runs: pd.DataFrame, column: str = "") -> dict[float, float]:
    """One method's mean score by learning rate, over the seeds that every rate was run with.

    The score is what rates are chosen by (validation loss), or ``column``. A diverged run makes
    its rate infinitely bad.
    """
    done = runs[runs["status"] != "unfinished"]
    table = pd.DataFrame(
        {
            "rate": done["learning_rate"],
            "seed": done["seed"],
            "score": done[column] if column else _score(done),
        }
    ).pivot_table(index="rate", columns="seed", values="score", aggfunc="last", dropna=False)
    shared = table.dropna(axis=1)
    means = (shared if shared.shape[1] else table).mean(axis=1)
    return {float(rate): float(value) for rate, value in means.items()}


def choose_rate(runs: pd.DataFrame) -> float:
    """The rate of one method that does best on validation data (see :func:`rate_losses`)."""
    losses = rate_losses(runs)
    return min(losses, key=lambda rate: losses[rate] if not math.isnan(losses[rate]) else math.inf)


def compare(
    problem: Problem,
    measure: str | None = None,
    *,
    baseline: str | None = None,
    rival: str = RIVAL,
    target: str = TARGET,
) -> Comparison:
    """Compare a problem's rows by a measure with ``baseline`` and ``rival``, each one Holm family.

    A difference is beyond noise where the t-test over seeds says so after Holm's correction at 5 %
    and, where there are per-item values, zero lies outside the interval of resampled seeds and
    items too.

    Args:
        problem: what is compared.
        measure: a column, ``"test_loss"`` for one; default: :func:`default_measure`.
        baseline: the row that every other is compared with; default: ``lora``, else the first row
            whose method that is, else the first that is not full fine-tuning.
        rival: a second one.
        target: the row that a gap from ``baseline`` leads to; ``"better"``: of the rows of full
            fine-tuning the one with the best validation loss.
    """
    measure = measure or default_measure(problem.runs)
    rows = [
        _row(str(label), runs, measure) for label, runs in problem.runs.groupby("label", sort=False)
    ]
    found = Comparison(problem, measure, [row for row in rows if len(row.runs)])
    found.baseline = baseline = baseline or _baseline(found)
    found.goal = _target(found, target)
    for other in dict.fromkeys((baseline, rival)):
        against = found.row(other)
        if against is not None and against.values:
            _add_differences(found, against)
    base, goal = found.row(baseline), found.row(found.goal)
    if base is not None and goal is not None and baseline in goal.versus:
        found.gap = goal.versus[baseline]
        for row in found.rows:
            if row is not base and row is not goal:
                row.share = _share(base, row, goal, measure)
    return found


def _row(label: str, runs: pd.DataFrame, measure: str) -> Row:
    done = runs[runs["status"] != "unfinished"]
    if not len(done):
        return Row(label, str(runs["method"].iloc[0]), math.nan, (), done, {})
    rate = choose_rate(done)
    chosen = (
        done[done["learning_rate"] == rate].drop_duplicates("seed", keep="last").sort_values("seed")
    )
    if measure not in chosen:
        chosen = chosen.assign(**{measure: math.nan})
    values = {
        int(seed): float(value)
        for seed, value in zip(chosen["seed"], chosen[measure], strict=True)
        if value is not None and math.isfinite(value)
    }
    rates = tuple(sorted(float(r) for r in done["learning_rate"].unique()))
    return Row(label, str(runs["method"].iloc[0]), rate, rates, chosen, values)


def _baseline(found: Comparison) -> str:
    names = [row.label for row in found.rows if row.label == BASELINE]
    names += [row.label for row in found.rows if row.method == BASELINE]
    names += [row.label for row in found.rows if not row.method.startswith("full")]
    return next(iter(names), BASELINE)


def _target(found: Comparison, target: str) -> str:
    if target != "better":
        return target
    full = [row for row in found.rows if row.method.startswith("full") and len(row.rates)]
    best = min(full, key=lambda row: min(rate_losses(row.runs).values()), default=None)
    return best.label if best is not None else target


def _paired(row: Row, other: Row) -> tuple[list[int], np.ndarray]:
    seeds = sorted(set(row.values) & set(other.values))
    return seeds, np.array([row.values[s] - other.values[s] for s in seeds])


def _add_differences(found: Comparison, other: Row) -> None:
    rows = [row for row in found.rows if row is not other and _paired(row, other)[0]]
    pairs = [_paired(row, other) for row in rows]
    intervals = [paired_t(differences) for _, differences in pairs]
    corrected = holm([math.nan if i is None or i.p is None else i.p for i in intervals])
    boots = _bootstrap(rows, other, found.measure)
    sign = -1.0 if is_loss(found.measure) else 1.0
    for row, (seeds, differences), interval, p in zip(
        rows, pairs, intervals, corrected, strict=True
    ):
        boot = boots.get(row.label)
        verdict, alone = ONE_SEED, False
        if interval is not None:
            sure = boot is None or boot.excludes_zero
            alone = bool(interval.excludes_zero and sure and p >= ALPHA)
            verdict = TIE
            if p < ALPHA and sure:
                verdict = BETTER if sign * interval.size > 0 else WORSE
        row.versus[other.label] = Versus(
            other=other.label,
            size=float(differences.mean()),
            seeds=len(seeds),
            interval=interval,
            boot=boot,
            holm=float(p),
            family=int(np.isfinite(corrected).sum()),
            flip=sign_flip_p(differences) if len(seeds) > 1 else None,
            mcnemar=_mcnemar(row, other, seeds) if len(seeds) == 1 else None,
            verdict=verdict,
            alone=alone,
        )


def _bootstrap(rows: Sequence[Row], other: Row, measure: str) -> dict[str, Interval]:
    """Two-level intervals of the rows whose measure is the mean of their per-item values."""
    name = "loss" if is_loss(measure) else "correct"
    groups: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    weights: dict[tuple[int, int], np.ndarray] = {}
    for row in rows:
        seeds, _ = _paired(row, other)
        ours, theirs = _items(row, name, seeds), _items(other, name, seeds)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            continue
        weight = _items(other, "weight", seeds) if name == "loss" else None
        w = np.ones(ours.shape[1]) if weight is None else weight[0]
        means = ours @ w / w.sum()
        if not np.allclose(means, [row.values[s] for s in seeds], rtol=1e-3, atol=1e-4):
            continue  # the measure is no mean over items: F1, or another split
        groups.setdefault(ours.shape, {})[row.label] = ours - theirs
        weights[ours.shape] = w
    found: dict[str, Interval] = {}
    for shape, members in groups.items():
        intervals = two_level_intervals(np.stack(list(members.values())), weights[shape])
        found |= dict(zip(members, intervals, strict=True))
    return found


def _items(row: Row, name: str, seeds: Sequence[int]) -> np.ndarray | None:
    by_seed = dict(zip(row.runs["seed"], row.runs["items"], strict=True))
    arrays = [by_seed[seed].get(name) for seed in seeds]
    if any(a is None for a in arrays) or len({a.shape for a in arrays}) != 1:
        return None
    return np.stack(arrays).astype(float)


def _mcnemar(row: Row, other: Row, seeds: Sequence[int]) -> float | None:
    ours, theirs = _items(row, "correct", seeds), _items(other, "correct", seeds)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    return mcnemar_p(ours[0], theirs[0])


def _share(base: Row, row: Row, goal: Row, measure: str) -> Interval | None:
    seeds = sorted(set(base.values) & set(row.values) & set(goal.values))
    if len(seeds) < 2:
        return None
    b, m, t = (np.array([r.values[s] for s in seeds]) for r in (base, row, goal))
    ahead = (b - t).mean() > 0 if is_loss(measure) else (t - b).mean() > 0
    return share_closed(b, m, t) if ahead else None
