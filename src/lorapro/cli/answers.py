"""Rows that commands print or write."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapro.experiments.errors import UserError

__all__ = ["at_least", "writable", "write_rows"]

SUFFIXES = (".jsonl", ".csv")


def at_least(least: int, **values: int) -> None:
    """Refuse numbers below ``least``, by the flag's name.

    >>> at_least(1, limit=0)
    Traceback (most recent call last):
        ...
    lorapro.experiments.errors.UserError: --limit must be at least 1, found 0
    """
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name} must be at least {least}, found {value}")


def writable(output: str | None) -> None:
    """Refuse a file of another kind, one that is there, or one without a folder."""
    if output is None:
        return
    path = Path(output)
    if path.suffix not in SUFFIXES:
        raise UserError(f"--output {output}: expected a file ending in {' or '.join(SUFFIXES)}")
    if path.exists():
        raise UserError(f"--output {output} exists already; give a new file")
    if not path.resolve().parent.is_dir():
        raise UserError(f"--output {output}: no folder {path.resolve().parent}")


def write_rows(rows: Sequence[Mapping[str, Any]], output: str | None) -> None:
    """Write rows to a file, or as JSON lines to standard output."""
    if output is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, default=str))
        return
    path = Path(output)
    if path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    else:
        import csv

        flat = [_flat(row) for row in rows]
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(flat[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(flat)
    print(f"{len(rows)} rows: {path}", file=sys.stderr)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose mappings are columns of their own."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key == "probabilities":
            flat |= {f"probability of {name}": share for name, share in value.items()}
        elif isinstance(value, list | dict):
            flat[key] = json.dumps(value, ensure_ascii=False, default=str)
        else:
            flat[key] = value
    return flat
