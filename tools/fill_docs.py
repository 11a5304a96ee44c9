"""Fill the numbers of README and docs from results and code: ``python tools/fill_docs.py``.

In a page ``<!--v:name-->61 %<!--/v-->`` is the value ``name`` of ``docs/values.yaml``, a cell of a
generated table or a constant. Between ``<!--table:name-->`` and ``<!--/table-->`` stands the table
that ``TABLES[name]`` of ``docs_tables.py`` makes. ``--check`` writes nothing and fails where a page
says something else.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from docs_tables import TABLES, rate
from markdown_tables import cell

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
VALUES = ROOT / "docs/values.yaml"
VALUE = re.compile(r"<!--v:([\w.-]+)-->(.*?)<!--/v-->", re.DOTALL)
TABLE = re.compile(r"<!--table:([\w.-]+)-->(.*?)<!--/table-->", re.DOTALL)

# What may be taken of a cell such as "61 % (52 to 70)" or "-0.3487 ± 0.0369".
TAKE = {
    "all": r".*",
    "first": r"[-+]?[\d.]+(?: %)?",
    "range": r"(?<=\().*(?=\))",
    "error": r"(?<=± )[\d.]+",
}


def value(entry: dict[str, Any]) -> str:
    """A value as it stands in a page.

    Raises:
        LookupError: the table has no such cell, or the cell nothing of that kind.
    """
    if "code" in entry:
        constant = named(entry["code"])
        return f"{constant:g}" if entry.get("plain") else rate(str(constant))
    text = cell(entry["file"], entry["section"], entry["row"], entry["column"])
    found = re.search(TAKE[entry.get("take", "first")], text)
    if found is None:
        raise LookupError(f"nothing of {entry} in {text!r}")
    shown = found[0]
    if entry.get("size"):
        shown = shown.lstrip("+-")
    if "times" in entry or "digits" in entry:
        number = float(shown.removesuffix(" %")) * entry.get("times", 1)
        shown = f"{number:.{entry.get('digits', 0)}f}" + (" %" if shown.endswith("%") else "")
    return shown.replace("-", "−") + entry.get("unit", "")


def named(path: str) -> Any:
    """What a dotted path through modules, attributes and keys leads to.

    Raises:
        LookupError: it leads nowhere.
    """
    first, *rest = path.split(".")
    found: Any = importlib.import_module(first)
    for i, part in enumerate(rest):
        if isinstance(found, dict) and part in found:
            found = found[part]
            continue
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join([first, *rest[: i + 1]]))
            except ImportError:
                raise LookupError(f"{path}: no {part!r} in {found!r:.60}") from None
        found = getattr(found, part)
    return found


def filled(text: str) -> str:
    """A page's text with every value and table as its source has it."""
    values = yaml.safe_load(VALUES.read_text(encoding="utf-8"))

    def put(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise LookupError(f"{VALUES.name} has no value {found[1]!r}")
        return f"<!--v:{found[1]}-->{value(values[found[1]])}<!--/v-->"

    def table(found: re.Match[str]) -> str:
        return f"<!--table:{found[1]}-->\n\n{TABLES[found[1]]()}\n\n<!--/table-->"

    return VALUE.sub(put, TABLE.sub(table, text))


def stale() -> list[str]:
    """Pages that say something else than their sources, with the lines."""
    found = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        for number, (a, b) in enumerate(
            zip(old.split("\n"), filled(old).split("\n"), strict=False)
        ):
            if a != b:
                found.append(f"{page.relative_to(ROOT)}:{number + 1}: {a!r} should be {b!r}")
    return found


def main(arguments: list[str]) -> int:
    """Fill, or check."""
    if arguments == ["--check"]:
        print("\n".join(stale()) or "every number is that of its source")
        return 1 if stale() else 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := filled(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(f"filled: {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
