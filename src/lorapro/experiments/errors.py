"""The one exception a user is meant to read, and names nearest to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "check_name", "nearest_hint"]


class UserError(Exception):
    """Bad input: one line that says what was found, what was expected and what to do.

    The command line prints it as ``lorapro: error: ...`` and exits with status 2, without a
    traceback. Raise it before anything has been written.
    """


def nearest_hint(name: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice nearest to ``name``, or ``""``.

    >>> nearest_hint("lora-por", ["full", "lora-pro"])
    " (did you mean 'lora-pro'?)"
    """
    known = list(choices)
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    found = found or [choice for choice in known if name and choice.startswith(name)]
    return f" (did you mean {found[0]!r}?)" if found else ""


def check_name(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``choices``.

    Raises:
        UserError: naming the kind, the nearest choice and all of them.

    >>> check_name("method", "lora", ["full", "lora"])
    'lora'
    """
    known = list(choices)
    if name in known:
        return name
    hint = nearest_hint(name, known)
    raise UserError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}")
