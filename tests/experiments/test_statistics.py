from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize, stats

from lorapro.experiments.rates import noise_of_one_run, tolerated_rates, transfer_regret
from lorapro.experiments.statistics import (
    holm,
    iqm,
    mcnemar_p,
    paired_t,
    probability_of_improvement,
    share_closed,
    sign_flip_p,
    smallest_sign_flip_p,
    stratified_interval,
    summarize,
    two_level_intervals,
    wilson_interval,
)


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (3, 50), (640, 1319)])
def test_wilson_interval_is_the_closed_form(correct, total):
    z = stats.norm.ppf(0.975)
    share = correct / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total)
    half *= np.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    expected = (max(0, center - half), min(1, center + half))
    assert wilson_interval(correct, total) == pytest.approx(expected, abs=1e-12)


def test_one_value_has_no_deviation():
    assert summarize([0.5]).sd is None
    assert summarize([1.0, 3.0]).sd == pytest.approx(2**0.5)


# Pairs over seeds


@pytest.mark.parametrize("seeds", [2, 3, 9, 31])
def test_the_t_interval_is_the_closed_form_and_the_test_is_scipys(seeds, random):
    ours, theirs = random.normal(0.70, 0.03, seeds), random.normal(0.72, 0.03, seeds)
    found = paired_t(ours - theirs)
    d = ours - theirs
    half = stats.t.ppf(0.975, seeds - 1) * d.std(ddof=1) / np.sqrt(seeds)
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert found.excludes_zero == (found.p < 0.05)


def test_one_seed_has_no_interval_and_equal_differences_a_point():
    assert paired_t([0.3]) is None
    assert paired_t([0.0, 0.0]).p == 1.0
    point = paired_t([0.25, 0.25, 0.25])
    assert (point.low, point.high, point.p) == (0.25, 0.25, 0.0)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_sign_flips_are_all_counted(seeds, random):
    d = random.normal(0.5, 1.0, seeds)
    means = [abs((d * signs).mean()) for signs in itertools.product((1, -1), repeat=seeds)]
    expected = np.mean([m >= abs(d.mean()) * (1 - 1e-9) for m in means])
    assert sign_flip_p(d) == pytest.approx(expected)
    assert sign_flip_p(np.abs(d)) == pytest.approx(smallest_sign_flip_p(seeds))


def test_many_seeds_are_flipped_at_random(random):
    d = random.normal(0.4, 1.0, 40)
    assert sign_flip_p(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)


def test_mcnemar_counts_disagreements():
    ours = np.r_[np.ones(9), np.zeros(1), np.ones(40)]
    theirs = np.r_[np.zeros(9), np.ones(1), np.ones(40)]
    tail = sum(stats.binom.pmf(k, 10, 0.5) for k in (0, 1, 9, 10))
    assert mcnemar_p(ours, theirs) == pytest.approx(tail)
    assert mcnemar_p(ours, ours) == 1.0


# Seeds and items


def exact_bootstrap_means(d, weights):
    """Every resample of seeds and of items, equally likely."""
    seeds, items = d.shape
    means = []
    for s in itertools.product(range(seeds), repeat=seeds):
        for i in itertools.product(range(items), repeat=items):
            w = weights[list(i)]
            means.append((d[np.ix_(s, i)] * w).sum() / (len(s) * w.sum()))
    return np.array(means)


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 5.0)])
def test_two_levels_agree_with_all_resamples_listed(weights):
    d = np.array([[0.1, 0.4, -0.3], [0.6, 0.2, 0.1]])
    w = np.ones(3) if weights is None else np.array(weights)
    exact = exact_bootstrap_means(d, w)
    [found] = two_level_intervals(d[None], weights, resamples=20_000)
    assert found.size == pytest.approx((d * w).sum() / (2 * w.sum()))
    # of few different means the percentile is one, give or take the luck of the draw
    assert np.quantile(exact, 0.015) - 1e-9 <= found.low <= np.quantile(exact, 0.035) + 1e-9
    assert np.quantile(exact, 0.965) - 1e-9 <= found.high <= np.quantile(exact, 0.985) + 1e-9


def test_one_seed_is_scipys_bootstrap_over_items(random):
    d = random.normal(0.1, 1.0, 300)
    [found] = two_level_intervals(d[None, None])
    scipys = stats.bootstrap((d,), np.mean, method="percentile", rng=random).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(scipys), abs=0.01)


def test_both_levels_of_noise_are_in_the_interval(random):
    seeds = random.normal(0.0, 1.0, (12, 1))
    items = random.normal(0.0, 1.0, (1, 200))
    width = [
        two_level_intervals(d[None], resamples=4000)[0].half
        for d in (seeds + 0 * items, 0 * seeds + items, seeds + items)
    ]
    assert width[0] == pytest.approx(1.96 * seeds.std() / 12**0.5, rel=0.1)
    assert width[1] == pytest.approx(1.96 * items.std() / 200**0.5, rel=0.1)
    assert width[2] == pytest.approx(np.hypot(*width[:2]), rel=0.1)


def test_methods_are_resampled_alike(random):
    d = random.normal(0.0, 1.0, (2, 3, 50))
    together = two_level_intervals(d, resamples=500)
    for found, one in zip(together, d, strict=True):
        [alone] = two_level_intervals(one[None], resamples=500)
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


# Many comparisons


def test_holm_is_the_step_down_rule(random):
    p = random.uniform(0, 0.1, 7)
    found = holm(p)
    # rejected at any level exactly where the rule rejects
    for level in (0.01, 0.05, 0.2, 0.4):
        rejected, order = set(), np.argsort(p)
        for k, i in enumerate(order):
            if p[i] > level / (len(p) - k):
                break
            rejected.add(i)
        assert {i for i in range(7) if found[i] <= level} == rejected


def test_holm_by_hand_and_with_gaps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    gaps = holm([0.02, np.nan, 0.01])
    assert gaps[[0, 2]] == pytest.approx([0.02, 0.02])
    assert np.isnan(gaps[1])
    assert holm([]).size == 0


# Shares of a gap


def test_the_share_holds_all_ratios_that_a_t_test_cannot_tell(random):
    baseline = random.normal(0.72, 0.01, 6)
    method, target = (
        baseline - random.normal(0.03, 0.01, 6),
        baseline - random.normal(0.06, 0.01, 6),
    )
    found = share_closed(baseline, method, target)
    u, v = baseline - method, baseline - target

    def undecided(ratio):
        return stats.ttest_1samp(u - ratio * v, 0).pvalue - 0.05

    assert found.size == pytest.approx(u.mean() / v.mean())
    assert found.low == pytest.approx(optimize.brentq(undecided, -3, found.size))
    assert found.high == pytest.approx(optimize.brentq(undecided, found.size, 5))


def test_there_is_a_share_exactly_where_the_gap_is_beyond_noise(random):
    for _ in range(40):
        baseline = random.normal(0.72, 0.02, 4)
        target = baseline - random.normal(0.02, 0.02, 4)
        share = share_closed(baseline, baseline - 0.01, target)
        assert (share is not None) == paired_t(baseline - target).excludes_zero
    assert share_closed([0.7], [0.6], [0.5]) is None


def test_the_share_has_ends_and_goes_beyond_them():
    baseline, target = np.array([0.72, 0.73, 0.74]), np.array([0.68, 0.691, 0.699])
    for size in (0.0, 1.0, 1.5, -0.5):
        method = baseline + size * (target - baseline)
        assert share_closed(baseline, method, target).size == pytest.approx(size, abs=1e-9)


# Many tasks


def test_iqm_leaves_out_a_quarter_at_each_end():
    assert iqm([[0, 1, 2, 3], [4, 5, 6, 700]]) == pytest.approx(3.5)


def test_probability_of_improvement_is_mann_whitneys(random):
    ours, theirs = random.normal(0.5, 1, 8), random.normal(0, 1, 5)
    u = stats.mannwhitneyu(ours, theirs).statistic
    found = probability_of_improvement([ours, [1.0]], [theirs, [1.0]])
    assert found == pytest.approx((u / 40 + 0.5) / 2)


def test_the_stratified_interval_resamples_within_tasks(random):
    tasks = [random.normal(0, 1, 20), random.normal(5, 1, 30)]
    found = stratified_interval(lambda t: float(np.mean([x.mean() for x in t])), tasks)
    error = np.sqrt(sum(x.var() / x.size for x in tasks)) / 2
    assert found.half == pytest.approx(1.96 * error, rel=0.1)  # the 5 between tasks is not in it


# Learning rates


def test_noise_of_a_run_is_pooled(random):
    groups = [random.normal(m, 0.1, 3) for m in (0, 5, 9)]
    pooled = np.sqrt(np.mean([g.var(ddof=1) for g in groups]))
    expected = stats.t.ppf(0.975, 6) * np.sqrt(2) * pooled
    assert noise_of_one_run([*groups, [4.0]]) == pytest.approx(expected)
    assert noise_of_one_run([[4.0], [5.0]]) is None


def test_the_range_of_rates_is_the_piece_around_the_best():
    losses = {1e-4: 0.5, 2e-4: 0.9, 4e-4: 0.55, 8e-4: 0.5, 16e-4: 0.52, 32e-4: float("nan")}
    wide = tolerated_rates({r: v for r, v in losses.items() if r > 1e-4}, 0.1)
    assert (wide.best, wide.low, wide.high) == (8e-4, 4e-4, 16e-4)
    assert (wide.open_below, wide.open_above) == (False, False)
    assert wide.factor == pytest.approx(4)
    edge = tolerated_rates({1e-3: 0.5, 2e-3: 0.51}, 0.1)
    assert (edge.open_below, edge.open_above) == (True, True)


def test_regret_of_a_rate_tuned_elsewhere():
    nan = float("nan")
    losses = {
        "8": {1e-3: 0.5, 2e-3: 0.6},
        "64": {1e-3: nan, 2e-3: 0.4},
        "4": {5e-4: 0.7, 2e-3: 0.8},
    }
    regret = transfer_regret(losses)
    assert regret["64", "8"] == pytest.approx(0.1)
    assert regret["8", "64"] == float("inf")
    assert np.isnan(regret["8", "4"])
    assert all(regret[name, name] == 0 for name in losses)
