"""Names of classes and prompts for CLIP, as data sets and CLIP's authors give them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorapro.experiments.assets import asset_path
from lorapro.experiments.errors import UserError, check_name

__all__ = ["class_names", "published_names", "published_templates"]

NAMES = "en_classnames.json"
TEMPLATES = "en_zeroshot_classification_templates.json"


def class_names(labels: Sequence[str], published: Sequence[str] | None = None) -> list[str]:
    """Return what each label is called in a prompt.

    Args:
        labels: the data's own names.
        published: names in the order of the labels (folders in alphabetical order, numbers by
            value), or the very names that the data has; ``None`` takes the data's own names,
            underscores as spaces.

    Raises:
        UserError: another number of names than of labels.

    >>> class_names(["baseball_diamond", "sea_ice"])
    ['baseball diamond', 'sea ice']
    >>> class_names(["10", "2"], ["a red circle", "a blue one"])
    ['a blue one', 'a red circle']
    """
    if published is None:
        return [label.replace("_", " ") for label in labels]
    if set(published) == set(labels):
        return list(labels)
    if len(published) != len(labels):
        raise UserError(
            f"CLIP's published names are {len(published)}, but the data has {len(labels)} classes"
        )
    numbers = all(label.isdecimal() for label in labels)
    order = sorted(labels, key=int) if numbers else sorted(labels)
    known = dict(zip(order, published, strict=True))
    return [known[label] for label in labels]


def published_names(key: str, data: str) -> list[str]:
    """Return CLIP's published names of a data set's classes.

    They come from the file ``en_classnames.json`` in the folder ``data`` if it has one, else from
    the asset ``clip-prompts``.

    Raises:
        UserError: none of that data set.
    """
    return _read(NAMES, key, data)


def published_templates(key: str, data: str) -> list[str]:
    """Return CLIP's published templates of a data set, likewise."""
    return _read(TEMPLATES, key, data)


def _read(file: str, key: str, data: str) -> list[str]:
    own = Path(data) / file
    path = own if own.is_file() else Path(asset_path("clip-prompts")) / file
    content = json.loads(path.read_text(encoding="utf-8"))
    found: list[str] = content[check_name("data set of CLIP's prompts", key, content)]
    return found
