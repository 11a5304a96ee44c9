"""One way to refuse an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["check_choice"]


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
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {kind} {value!r}{hint}; expected one of: {', '.join(known)}")
