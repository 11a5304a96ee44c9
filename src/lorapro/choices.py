"""Names in messages: the nearest known one, and the first few of many."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["check_choice", "first_few", "nearest_hint"]


def nearest_hint(name: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the choice nearest to ``name``, or ``""``.

    >>> nearest_hint("lora-por", ["full", "lora-pro"])
    " (did you mean 'lora-pro'?)"
    """
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def first_few(items: Sequence[str], most: int = 3) -> str:
    """Some items and the number of the others.

    >>> first_few(["q", "k", "v", "o", "up"])
    'q; k; v; and 2 more'
    """
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return "; ".join([*items[:most], *more])


def check_choice(kind: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: says what was found, the nearest choice and all of them.

    >>> check_choice("mode", "full", ["efficient", "full"])
    'full'
    >>> check_choice("mode", "ful", ["efficient", "full"])
    Traceback (most recent call last):
        ...
    ValueError: unknown mode 'ful' (did you mean 'full'?); expected one of: efficient, full
    """
    known = list(choices)
    if value in known:
        return value
    hint = nearest_hint(value, known)
    raise ValueError(f"unknown {kind} {value!r}{hint}; expected one of: {', '.join(known)}")
