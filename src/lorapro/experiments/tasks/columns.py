"""Which columns of a table hold the text and the label, where the config does not say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorapro.experiments.data import Row, missing

__all__ = ["find_columns"]

LABELS = (
    *("label", "labels", "class", "target", "category", "sentiment", "topic", "intent"),
    *("label_name", "label_text", "class_name", "tag", "rating"),
)
TEXTS = (
    *("text", "texts", "sentence", "content", "body", "review", "message", "comment"),
    *("document", "tweet", "post", "utterance", "question", "query", "title"),
)
MOST_LABELS = 200


def find_columns(
    rows: Sequence[Row], text: str = "text", label: str = "label"
) -> tuple[str | None, str | None]:
    """Return the column of the texts and that of the labels, ``None`` for one that is not clear.

    Columns of the names ``text`` and ``label`` are taken. Else a column is clear if it is the only
    one with a usual name, or, where none has one, the only one that looks like it: a label's values
    repeat, a text's are long and do not.

    >>> find_columns([{"id": i, "line": f"item no. {i}, a long one", "Class": "ab"[i % 2]}
    ...               for i in range(20)])
    ('line', 'Class')
    """
    columns = [str(column) for column in rows[0]]
    of_text, of_label = _named(columns, TEXTS, text), _named(columns, LABELS, label)
    if of_label is None:
        of_label = _only(rows, [c for c in columns if c != of_text], _is_label)
    if of_text is None:
        of_text = _only(rows, [c for c in columns if c != of_label], _is_text)
    return of_text, of_label


def _named(columns: Sequence[str], names: Sequence[str], first: str) -> str | None:
    if first in columns:
        return first
    found = [column for column in columns if column.strip().casefold() in names]
    return found[0] if len(found) == 1 else None


def _only(
    rows: Sequence[Row], columns: Sequence[str], fits: Callable[[list[Any]], bool]
) -> str | None:
    found = [c for c in columns if fits([v for row in rows if not missing(v := row.get(c))])]
    return found[0] if len(found) == 1 else None


def _is_label(values: list[Any]) -> bool:
    """Few short values, each several times on average."""
    short = all(isinstance(v, str | int) and len(str(v)) <= 60 for v in values)
    kinds = len(set(map(str, values))) if short else 0
    return 2 <= kinds <= min(MOST_LABELS, len(values) // 3)


def _is_text(values: list[Any]) -> bool:
    """Mostly of several words, mostly distinct."""
    texts = [v for v in values if isinstance(v, str) and len(v.split()) > 1]
    return len(texts) > len(values) / 2 and len(set(texts)) > len(texts) / 2
