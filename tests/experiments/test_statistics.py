from __future__ import annotations

import pytest
from scipy import stats

from lorapro.experiments.statistics import gap_between, share_closed, summarize, wilson_interval


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (7, 7), (3, 50), (640, 1319)])
def test_wilson_interval_is_scipys(correct, total):
    expected = stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert wilson_interval(correct, total) == pytest.approx(tuple(expected), abs=1e-6)


def test_noise_is_the_paired_t_interval():
    lora, full = [0.72, 0.75, 0.70], [0.69, 0.70, 0.68]
    gap = gap_between(lora, full)
    low, high = stats.ttest_rel(lora, full).confidence_interval(0.95)
    assert gap.size == pytest.approx((low + high) / 2)
    assert gap.noise == pytest.approx((high - low) / 2, rel=1e-3)


def test_a_gap_within_noise_is_none():
    assert gap_between([0.72, 0.75], [0.66, 0.60]).exists is False  # two seeds say little
    assert gap_between([0.72, 0.75, 0.73, 0.74], [0.62, 0.65, 0.63, 0.63]).exists is True
    assert gap_between([0.7], [0.6]).noise is None
    assert gap_between([0.7], [0.6], (0.03, 0.04)).noise == pytest.approx(1.96 * 0.05)
    assert gap_between([0.7], [0.6], (0.03, 0.04)).exists is True
    assert gap_between([0.7], [0.61], (0.03, 0.04)).exists is False
    assert gap_between([0.6], [0.7]).exists is False


def test_share_closed_has_ends_and_goes_beyond_them():
    assert share_closed(0.72, 0.72, 0.68) == 0
    assert share_closed(0.72, 0.68, 0.68) == 1
    assert share_closed(0.72, 0.66, 0.68) == 1.5
    assert share_closed(0.72, 0.74, 0.68) == -0.5


def test_one_value_has_no_deviation():
    assert summarize([0.5]).sd is None


@pytest.mark.parametrize("seeds", [2, 9, 16, 31])
def test_intervals_over_seeds_are_students(seeds):
    stats = pytest.importorskip("scipy.stats")
    differences = [0.01 * ((7 * i) % 11) for i in range(seeds)]
    gap = gap_between(differences, [0.0] * seeds)
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert gap.noise == pytest.approx((interval.high - interval.low) / 2, rel=3e-4)
