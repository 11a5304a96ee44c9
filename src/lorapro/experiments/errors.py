"""The one exception a user is meant to read, and names nearest to a mistyped one."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from lorapro.choices import nearest_hint

__all__ = ["UserError", "check_name", "disk_is_full", "nearest_hint"]


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


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one behind it, is that a file could not be written for want of room.

    torch and safetensors write past Python and say it in words.

    >>> disk_is_full(OSError(errno.ENOSPC, "No space left on device"))
    True
    """
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter failed")
    behind = error.__cause__ or error.__context__
    return any(w in str(error) for w in words) or (behind is not None and disk_is_full(behind))
