"""The command line: one command a file, ``main`` picks it."""

from __future__ import annotations

__all__: list[str] = []
