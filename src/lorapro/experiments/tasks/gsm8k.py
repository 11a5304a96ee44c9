"""What GSM8K's rows need before they are used."""

from __future__ import annotations

import re
from typing import Any

from lorapro.experiments.data import Row

__all__ = ["gsm8k_row", "strip_annotations"]

_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer: str) -> str:
    """Remove GSM8K's calculator annotations.

    >>> strip_annotations("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    """
    return _ANNOTATION.sub("", answer)


def gsm8k_row(row: Row, options: Any) -> Row:
    """Strip the annotations, unless they are wanted."""
    if options.calculator_annotations:
        return row
    return {**row, "answer": strip_annotations(str(row["answer"]))}
