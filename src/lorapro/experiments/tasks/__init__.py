"""What to train on: a task is one entry, a family of tasks one class. See :mod:`.catalogue`."""

from __future__ import annotations

from lorapro.experiments.tasks.base import Family, TaskEntry, TextFamily, load_tokenizer
from lorapro.experiments.tasks.catalogue import FAMILIES, TASKS, find_task, make_family

__all__ = [
    "FAMILIES",
    "TASKS",
    "Family",
    "TaskEntry",
    "TextFamily",
    "find_task",
    "load_tokenizer",
    "make_family",
]
