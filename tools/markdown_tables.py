"""Cells of the generated Markdown tables: what ``docs/values.yaml`` points at."""

from __future__ import annotations

import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

# {section: [{row: {column: cell}}, ...]} of a file
Tables = dict[str, dict[str, dict[str, str]]]


@functools.cache
def read(file: str) -> Tables:
    """The tables of a Markdown file, by the headings above them.

    A heading below another is joined to it with " / ": "rank 8 / Learning rates".
    """
    found: Tables = {}
    headings: dict[int, str] = {}
    header: list[str] = []
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"(#+) (.*)", line):
            level = len(heading[1])
            headings = {k: v for k, v in headings.items() if k < level} | {level: heading[2]}
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if not header:
            header = cells
        elif not set(line) <= set("|-: "):
            name = " / ".join(v for k, v in sorted(headings.items()) if k > 1)
            found.setdefault(name, {})[cells[0]] = dict(zip(header, cells, strict=True))
    return found


def cell(file: str, section: str, row: str, column: str) -> str:
    """One cell.

    Raises:
        LookupError: there is no such section, row or column; says which there are.
    """
    tables = read(file)
    for wanted, there, what in (
        (section, tables, "section"),
        (row, tables.get(section, {}), "row"),
        (column, tables.get(section, {}).get(row, {}), "column"),
    ):
        if wanted not in there:
            known = ", ".join(map(repr, there))
            raise LookupError(f"{file}: no {what} {wanted!r}, only {known}")
    return tables[section][row][column]
