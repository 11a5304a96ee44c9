"""Docstrings as Markdown, for the API pages: roles as code, doctests as code blocks."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([^`]+)`")
DOCTEST = re.compile(r"^([ ]*)>>> .*\n?(?:^.*\S.*\n?)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring without what Markdown does not know.

    >>> print(as_markdown("See :func:`f`::\\n\\n    f(1)\\n\\n>>> f(1)\\n2"))
    See `f`:
    <BLANKLINE>
        f(1)
    <BLANKLINE>
    ```pycon
    >>> f(1)
    2
    ```
    """

    def fenced(found: re.Match[str]) -> str:
        indent = found[1]
        return f"{indent}```pycon\n{found[0].rstrip()}\n{indent}```\n"

    text = ROLE.sub(r"`\1`", text)
    text = re.sub(r"^::$", "", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return DOCTEST.sub(fenced, text).rstrip("\n")


class Docstrings(Extension):
    """Changes every docstring once, when it is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for every object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
