"""The one exception a user is meant to read, and names nearest to a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable

from lorapro.choices import nearest_hint

__all__ = ["UserError", "check_name", "nearest_hint"]


class UserError(Exception):
    """Bad input: one line that says what was found, what was expected and what to do.

    The command line prints it as ``lorapro: error: ...`` and exits with status 2, without a
    traceback. Raise it before anything has been written.
    """


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
