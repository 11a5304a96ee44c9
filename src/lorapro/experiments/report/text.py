"""Numbers and names as the report prints them."""

from __future__ import annotations

import math

from lorapro.experiments.statistics import Interval

__all__ = [
    "bytes_text",
    "count",
    "is_loss",
    "listed",
    "measure_name",
    "number",
    "p_text",
    "plain",
    "signed",
    "with_interval",
]

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MINUS = "−"


def is_loss(measure: str) -> bool:
    """Whether less of a measure is better.

    >>> is_loss("test_loss"), is_loss("test_accuracy")
    (True, False)
    """
    return measure.endswith(("loss", "perplexity", "error"))


def measure_name(measure: str) -> str:
    """A measure's name for people.

    >>> measure_name("test_exact_match")
    'test exact match'
    """
    return measure.replace("_", " ")


def _digits(measure: str) -> int:
    return 4 if is_loss(measure) else 3


def number(measure: str, mean: float | None, sd: float | None = None) -> str:
    """A mean and its deviation; a dash for what is not known.

    >>> number("test_loss", 0.23581, 0.04161), number("test_accuracy", 0.9, None)
    ('0.2358 ± 0.0416', '0.900')
    """
    if mean is None or not math.isfinite(mean):
        return "-"
    digits = _digits(measure)
    text = f"{mean:.{digits}f}"
    return text if sd is None or not math.isfinite(sd) else f"{text} ± {sd:.{digits}f}"


def signed(measure: str, value: float) -> str:
    """A difference with its sign.

    >>> signed("test_loss", -0.01)
    '-0.0100'
    """
    return f"{value:+.{_digits(measure)}f}"


def with_interval(measure: str, interval: Interval) -> str:
    """A difference and half the width of its interval.

    >>> with_interval("test_loss", Interval(0.01, -0.01, 0.03))
    '+0.0100 ± 0.0200'
    """
    return f"{signed(measure, interval.size)} ± {interval.half:.{_digits(measure)}f}"


def p_text(p: float | None) -> str:
    """A p-value.

    >>> p_text(0.0312), p_text(1e-5), p_text(None)
    ('0.031', '< 0.001', '')
    """
    if p is None or not math.isfinite(p):
        return ""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def bytes_text(value: float | None) -> str:
    """Bytes in mega- or gigabytes.

    >>> bytes_text(3 * 2**20), bytes_text(None)
    ('3.0 MB', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value / 2**20:.1f} MB" if value < 2**30 else f"{value / 2**30:.2f} GB"


def count(value: int, noun: str) -> str:
    """A count in words, with its noun.

    >>> count(3, "seed"), count(1, "seed"), count(16, "seed")
    ('three seeds', 'one seed', '16 seeds')
    """
    return f"{WORDS[value] if value < len(WORDS) else value} {noun}{'' if value == 1 else 's'}"


def listed(names: list[str]) -> str:
    """A list in words.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    comma = "; " if any(", " in name for name in names) else ", "
    return names[0] if len(names) == 1 else f"{comma.join(names[:-1])} and {names[-1]}"


def plain(value: object) -> str:
    """A config's value: whole numbers without a point, lists of words as they are.

    >>> plain(8.0), plain(2.5e-4), plain("minilm-l6")
    ('8', '0.00025', 'minilm-l6')
    """
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:g}"
    return str(value)
