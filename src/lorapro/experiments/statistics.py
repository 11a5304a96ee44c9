"""Statistics of comparisons: intervals over seeds and items, corrections, shares of a gap.

Differences are paired: two runs with one seed share split, data order and first head, and the test
items are the same for every run. Distributions and tests are SciPy's.

Shapes: ``S`` seeds, ``N`` test items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "Interval",
    "Summary",
    "holm",
    "iqm",
    "mcnemar_p",
    "paired_t",
    "probability_of_improvement",
    "share_closed",
    "sign_flip_p",
    "smallest_sign_flip_p",
    "stratified_interval",
    "summarize",
    "two_level_intervals",
    "wilson_interval",
]

LEVEL, RESAMPLES = 0.95, 10_000
MOST_EXACT_FLIPS = 16  # seeds up to which all 2^S sign flips are tried

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (``None`` for one value) of ``count`` values."""

    mean: float
    sd: float | None
    count: int


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its 95 % interval and, from a t-test, its p-value."""

    size: float
    low: float
    high: float
    p: float | None = None

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the estimate is beyond noise."""
        return self.low > 0 or self.high < 0


def summarize(values: ArrayLike) -> Summary:
    """Mean and standard deviation over seeds.

    >>> summarize([1.0, 2.0, 3.0])
    Summary(mean=2.0, sd=1.0, count=3)
    """
    x = np.asarray(values, dtype=float)
    return Summary(float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else None, x.size)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    >>> [round(end, 3) for end in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    interval = stats.binomtest(correct, total).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


# Two methods on one task


def paired_t(differences: ArrayLike) -> Interval | None:
    """t-interval and t-test of the mean of S paired differences; ``None`` for one seed.

    >>> paired_t([0.5])
    >>> interval = paired_t([1.0, 2.0, 3.0])
    >>> round(interval.size, 3), round(interval.half, 3), round(interval.p, 3)
    (2.0, 2.484, 0.074)
    """
    d = np.asarray(differences, dtype=float)
    if d.size < 2:
        return None
    mean, spread = float(d.mean()), float(d.std(ddof=1))
    if spread <= 1e-12 * max(abs(mean), 1e-300):  # all seeds agree to the last digit
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    test = stats.ttest_1samp(d, 0.0)
    ends = test.confidence_interval(LEVEL)
    return Interval(mean, float(ends.low), float(ends.high), float(test.pvalue))


def two_level_intervals(
    differences: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Percentile intervals of mean differences, seeds and items resampled.

    Every resample draws S seeds, then N items, the same items for all seeds and methods: the test
    set is one draw that all runs share. Resampling items alone would leave out the noise of
    training, seeds alone the finite test set. At three seeds the level of seeds cannot be trusted:
    give :func:`paired_t` beside it.

    Args:
        differences: (M, S, N), method minus baseline of M methods.
        weights: (N,), of the items in the mean (labels in each, for a loss by label); default: 1.
        resamples: how many.
        seed: of the random draws.

    >>> [interval] = two_level_intervals([[[0.1, 0.3, 0.2, 0.2], [0.3, 0.1, 0.2, 0.2]]])
    >>> interval.excludes_zero, round(interval.size, 3)
    (True, 0.2)
    """
    d = np.asarray(differences, dtype=float)
    methods, seeds, items = d.shape
    w = np.ones(items) if weights is None else np.asarray(weights, dtype=float)
    flat = (d * w).reshape(methods * seeds, items)
    random = np.random.default_rng(seed)
    means = np.empty((methods, resamples))
    block = max(1, 4_000_000 // items)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        by_seed = _times_drawn(random, count, seeds)
        by_item = _times_drawn(random, count, items)
        sums = (flat @ by_item.T).reshape(methods, seeds, count)
        summed = np.einsum("msk,ks->mk", sums, by_seed)
        means[:, start : start + count] = summed / (seeds * (by_item @ w))
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    sizes = (d.mean(axis=1) @ w) / w.sum()
    return [
        Interval(float(size), float(low), float(high))
        for size, low, high in zip(sizes, *ends, strict=True)
    ]


def _times_drawn(random: np.random.Generator, resamples: int, of: int) -> Array:
    """How often each of ``of`` things is drawn in each resample of ``of`` draws."""
    drawn = random.integers(of, size=(resamples, of)) + of * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * of).reshape(resamples, of).astype(float)


def sign_flip_p(differences: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p-value of the mean of S differences under flips of their signs.

    Exact (all 2^S flips) up to sixteen seeds, from 10,000 random flips beyond.

    >>> sign_flip_p([1.0, 2.0, 3.0])
    0.25
    """
    d = np.asarray(differences, dtype=float)
    if not d.any():
        return 1.0
    exact = d.size <= MOST_EXACT_FLIPS
    test = stats.permutation_test(
        (d,),
        lambda x, axis=-1: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(min(test.pvalue, 1.0))


def smallest_sign_flip_p(seeds: int) -> float:
    """Least two-sided p-value that a sign-flip test over ``seeds`` seeds can give: 2^(1 − S).

    >>> [smallest_sign_flip_p(seeds) for seeds in (1, 3, 5)]
    [1.0, 0.25, 0.0625]
    """
    return 2.0 ** (1 - seeds)


def mcnemar_p(correct: ArrayLike, other: ArrayLike) -> float:
    """Exact McNemar test of two single runs on the same items (training noise is not in it).

    >>> mcnemar_p([1, 1, 1, 0, 1], [0, 0, 0, 0, 1])
    0.25
    """
    a, b = np.asarray(correct, dtype=bool), np.asarray(other, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def holm(p_values: ArrayLike) -> Array:
    """Holm's step-down adjusted p-values of one family; NaN stays NaN and is not counted.

    The k-th smallest of m is multiplied by ``m − k + 1``, made monotone and cut at 1.

    >>> [float(round(p, 3)) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]  # NaN sorts last
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def share_closed(baseline: ArrayLike, method: ArrayLike, target: ArrayLike) -> Interval | None:
    """Share of the gap from ``baseline`` to ``target`` that ``method`` closes, over S paired seeds.

    ``ρ = mean(b − m) / mean(b − t)`` with Fieller's 95 % interval: all ρ for which a paired t-test
    does not tell ``(b − m) − ρ·(b − t)`` from zero. It is bounded just where the gap itself is
    beyond noise.

    Returns:
        ``None`` where there is no gap beyond noise: the interval would be unbounded, and a share of
        nothing means nothing. Also for a single seed.

    >>> share = share_closed([0.71, 0.72, 0.73], [0.66, 0.67, 0.68], [0.61, 0.62, 0.63])
    >>> round(share.size, 3)
    0.5
    """
    b, m, t = (np.asarray(x, dtype=float) for x in (baseline, method, target))
    if b.size < 2:
        return None
    u, v = b - m, b - t
    covariance = np.cov(u, v)
    k = stats.t.ppf((1 + LEVEL) / 2, b.size - 1) ** 2 / b.size
    a = v.mean() ** 2 - k * covariance[1, 1]
    half = u.mean() * v.mean() - k * covariance[0, 1]
    c = u.mean() ** 2 - k * covariance[0, 0]
    if a <= 0 or v.mean() == 0:
        return None
    root = math.sqrt(max(half**2 - a * c, 0.0))
    return Interval(float(u.mean() / v.mean()), float((half - root) / a), float((half + root) / a))


# Many tasks


def iqm(scores: Sequence[ArrayLike]) -> float:
    """Mean of the middle half of all runs of all tasks (interquartile mean).

    >>> iqm([[0.0, 1.0, 2.0, 30.0]])
    1.5
    """
    return float(stats.trim_mean(np.concatenate([np.ravel(x) for x in scores]), 0.25))


def probability_of_improvement(ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]) -> float:
    """Chance that a run of ours scores above a run of theirs, ties counted half, mean over tasks.

    >>> probability_of_improvement([[2.0, 3.0]], [[1.0, 2.0]])
    0.875
    """
    chances = []
    for x, y in zip(ours, theirs, strict=True):
        difference = np.subtract.outer(np.ravel(x), np.ravel(y))
        chances.append(((difference > 0) + 0.5 * (difference == 0)).mean())
    return float(np.mean(chances))


def stratified_interval(
    statistic: Callable[..., float],
    *scores: Sequence[ArrayLike],
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of ``statistic(*scores)``, runs resampled within each task.

    ``scores`` hold one array of runs a task; several (as for
    :func:`probability_of_improvement`) are resampled independently.
    """
    random = np.random.default_rng(seed)

    def draw(tasks: Sequence[ArrayLike]) -> list[Array]:
        runs = (np.ravel(np.asarray(x, dtype=float)) for x in tasks)
        return [x[random.integers(x.size, size=x.size)] for x in runs]

    values = [statistic(*(draw(tasks) for tasks in scores)) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(statistic(*scores), float(low), float(high))
