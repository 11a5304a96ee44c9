"""Mean and deviation, intervals, and the share of a gap that is closed. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Gap",
    "Summary",
    "difference",
    "gap_between",
    "share_closed",
    "summarize",
    "wilson_interval",
]

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (``None`` for one value) of ``count`` values."""

    mean: float
    sd: float | None
    count: int


def summarize(values: Sequence[float]) -> Summary:
    """Mean and standard deviation over seeds.

    >>> summarize([1.0, 2.0, 3.0])
    Summary(mean=2.0, sd=1.0, count=3)
    """
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), sd, len(values))


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default).

    Unlike mean ± z·sd it stays inside [0, 1] and has width at 0 and ``total`` successes.

    >>> [round(end, 3) for end in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if total <= 0:
        raise ValueError(f"total must be positive, found {total}")
    share = correct / total
    denominator = 1 + z * z / total
    center = (share + z * z / (2 * total)) / denominator
    spread = share * (1 - share) / total + z * z / (4 * total * total)
    half = z * math.sqrt(spread) / denominator
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class Gap:
    """Loss of the baseline minus loss of the target, and how sure its sign is.

    ``noise`` is the half-width of the difference's 95 % interval: a t-interval over seeds; with one
    seed what the size of the test set alone leaves open; ``None`` where neither is known.
    """

    size: float
    noise: float | None

    @property
    def exists(self) -> bool:
        """Whether the target is better by more than noise (with one seed: better at all)."""
        return self.size > (self.noise or 0.0)


def gap_between(
    baseline: Sequence[float],
    target: Sequence[float],
    errors: tuple[float, float] | None = None,
) -> Gap:
    """Return the gap between two methods' losses, one value a seed, seeds in the same order.

    ``errors`` are the standard errors of the two losses as means over the test set, used when one
    seed is all there is; taken as independent, which makes the interval too wide rather than too
    narrow.

    With as many seeds on both sides the standard error is that of the paired differences: the
    seeds share their data order and initial head, which moves both methods together.
    """
    size = statistics.fmean(baseline) - statistics.fmean(target)
    if min(len(baseline), len(target)) < 2:
        return Gap(size, None if errors is None else 1.96 * math.hypot(*errors))
    if len(baseline) == len(target):
        differences = [b - t for b, t in zip(baseline, target, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        freedom = len(differences) - 1
    else:
        error = math.sqrt(
            statistics.variance(baseline) / len(baseline)
            + statistics.variance(target) / len(target)
        )
        freedom = min(len(baseline), len(target)) - 1
    quantile = _T_975[freedom - 1] if freedom <= len(_T_975) else 1.96
    return Gap(size, quantile * error)


def difference(losses: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """``losses`` minus ``baseline`` as reports keep it: its size, and ``noise`` as in :class:`Gap`.

    >>> difference([0.5, 0.5], [0.25, 0.25])
    {'size': 0.25, 'noise': 0.0}
    """
    gap = gap_between(losses, baseline)
    return {"size": gap.size, "noise": gap.noise}


def share_closed(baseline: float, method: float, target: float) -> float:
    """Share of the way from ``baseline`` to ``target`` that ``method`` has gone (1 is all of it).

    >>> share_closed(0.72, 0.70, 0.68)
    0.5
    """
    return round((baseline - method) / (baseline - target), 12)
