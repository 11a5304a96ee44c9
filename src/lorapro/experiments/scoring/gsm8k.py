"""GSM8K: is the number that a text answers with the right one? As lm-eval and the papers count.

Four readings of the same generation, side by side, because published numbers differ in them:

- ``strict``: lm-eval's filter ``strict-match``, the first number after ``"#### "``;
- ``flexible``: lm-eval's filter ``flexible-extract``, the last thing that looks like a number;
- ``marked``: a number after ``####`` or after ``The answer is:``, the two endings that MetaMathQA
  teaches, in a normal form;
- ``paper``: the first match of ``####\\s*(\\d+)``, else 0, in generation and truth alike. Signs,
  decimals and what follows a thousands comma are lost on both sides, and a text without a mark is
  right where the answer is 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

__all__ = ["READINGS", "flexible_extract", "marked_answer", "paper_number", "score", "strict_match"]

INVALID = "[invalid]"  # lm-eval's word for "nothing found"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"))
_PAPER = re.compile(r"####\s*(\d+)")
_MARKED = re.compile(r"(?:####|The answer is:?)\s*\$?\s*([-+]?\$?\s*(?:\d[\d,]*\.?\d*|\.\d+))")


def strict_match(text: str) -> str:
    """Return what lm-eval's ``strict-match`` takes from ``text``.

    >>> strict_match("so 3 x 4 = 12 in all.\\n#### 1,200")
    '1,200'
    >>> strict_match("It is 12.")
    '[invalid]'
    """
    found = _STRICT.search(text)
    return found.group(1).strip() if found else INVALID


def flexible_extract(text: str) -> str:
    """Return what lm-eval's ``flexible-extract`` takes from ``text``.

    >>> flexible_extract("She pays $18.")
    '$18.'
    """
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else INVALID


def _normalized(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def paper_number(text: str) -> int:
    """Return the number that the papers' evaluation takes from ``text``.

    >>> paper_number("#### 12"), paper_number("#### 1,200"), paper_number("#### -3")
    (12, 1, 0)
    """
    found = _PAPER.search(text)
    return int(found.group(1)) if found else 0


def marked_answer(text: str) -> str | None:
    """Return the first marked number in a normal form, or ``None``.

    >>> marked_answer("#### $1,200.50"), marked_answer("The answer is: -4."), marked_answer("4")
    ('1200.5', '-4', None)
    """
    found = _MARKED.search(text)
    if not found:
        return None
    try:
        value = Decimal(re.sub(r"[,$\s]", "", found.group(1)))
    except InvalidOperation:
        return None
    number = format(value.normalize(), "f")
    return "0" if number == "-0" else number


def _marked(text: str, truth: str) -> bool:
    return (found := marked_answer(text)) is not None and found == marked_answer(truth)


READINGS: dict[str, Callable[[str, str], bool]] = {
    "strict": lambda text, truth: _normalized(strict_match(text)) == _normalized(truth),
    "flexible": lambda text, truth: _normalized(flexible_extract(text)) == _normalized(truth),
    "marked": _marked,
    "paper": lambda text, truth: paper_number(text) == paper_number(truth),
}
"""Name of a reading -> (generated text, the data set's answer) -> whether it counts as right."""


def score(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Read each generated text in every way.

    Args:
        rows: with ``question`` and ``answer``.
        texts: what was generated for each.

    Returns:
        (one record a row, with a verdict for each reading; share of right ones by reading).
    """
    records = []
    for row, text in zip(rows, texts, strict=True):
        truth = str(row["answer"])
        right = {name: read(text, truth) for name, read in READINGS.items()}
        records.append({"question": row["question"], "truth": truth, "generated": text, **right})
    return records, {
        name: sum(record[name] for record in records) / len(records) for name in READINGS
    }
