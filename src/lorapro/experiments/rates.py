"""Learning rates: how wide the range of good ones is, and what a rate tuned elsewhere costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

__all__ = ["RateRange", "noise_of_one_run", "tolerated_rates", "transfer_regret"]

LEVEL = 0.95


@dataclass(frozen=True)
class RateRange:
    """The rates around the best one whose loss is within noise of it.

    ``open_below`` and ``open_above``: the range ends with the grid, so it may be wider.
    """

    best: float
    low: float
    high: float
    open_below: bool
    open_above: bool

    @property
    def factor(self) -> float:
        """Highest over lowest rate."""
        return self.high / self.low


def noise_of_one_run(groups: Sequence[ArrayLike]) -> float | None:
    """How far two single runs of one method may lie apart by chance, at 95 %: ``t·√2·sd``.

    ``groups`` hold the losses of the seeds of one method each; sd is pooled over them. Too wide
    rather than too narrow where the runs share a seed. ``None`` without repeated seeds.
    """
    arrays = [x for x in (np.ravel(np.asarray(g, dtype=float)) for g in groups) if x.size > 1]
    freedom = sum(x.size - 1 for x in arrays)
    if not freedom:
        return None
    variance = sum(((x - x.mean()) ** 2).sum() for x in arrays) / freedom
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(2 * variance))


def tolerated_rates(losses: Mapping[float, float], noise: float) -> RateRange:
    """Range of rates around the best one with a loss of at most ``noise`` above the best.

    ``losses`` by learning rate; NaN and infinity are diverged runs.

    >>> tolerated_rates({1e-4: 0.9, 2e-4: 0.52, 4e-4: 0.5, 8e-4: 0.55}, 0.1).low
    0.0002
    """
    rates = sorted(losses)
    finite = {r: losses[r] if math.isfinite(losses[r]) else math.inf for r in rates}
    best = min(rates, key=lambda r: finite[r])
    low = high = rates.index(best)
    most = finite[best] + noise
    while low > 0 and finite[rates[low - 1]] <= most:
        low -= 1
    while high < len(rates) - 1 and finite[rates[high + 1]] <= most:
        high += 1
    return RateRange(best, rates[low], rates[high], low == 0, high == len(rates) - 1)


def transfer_regret(losses: Mapping[str, Mapping[float, float]]) -> dict[tuple[str, str], float]:
    """Loss lost in one setting by taking the rate that is best in another.

    Args:
        losses: for each setting (a rank, a task, a batch size) the loss by learning rate.

    Returns:
        ``{(tuned in, used in): loss − best loss there}``; infinite where that run diverged, NaN
        where the rate was not tried.

    >>> table = {"r=8": {1e-3: 0.5, 2e-3: 0.6}, "r=64": {1e-3: 0.7, 2e-3: 0.4}}
    >>> round(transfer_regret(table)["r=8", "r=64"], 3)
    0.3
    """
    clean = {
        name: {rate: v if math.isfinite(v) else math.inf for rate, v in row.items()}
        for name, row in losses.items()
    }
    best = {name: min(row, key=lambda rate: row[rate]) for name, row in clean.items()}
    regret = {}
    for tuned in clean:
        for used, row in clean.items():
            value = row.get(best[tuned], math.nan)
            least = row[best[used]]
            regret[tuned, used] = value - least if math.isfinite(least) else math.nan
    return regret
