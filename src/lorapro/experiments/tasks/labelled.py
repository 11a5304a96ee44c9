"""What the tasks with one label a row share: distinct rows, stratified splits, metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from lorapro.experiments.data import Row, load_rows, require_columns
from lorapro.experiments.errors import UserError
from lorapro.experiments.tasks.base import shuffled, take

if TYPE_CHECKING:
    from lorapro.experiments.tasks.base import Task

__all__ = ["classification_metrics", "distinct_rows", "split_labelled", "stratified_split"]

Splits = tuple[list[Row], list[Row], list[Row]]


def distinct_rows(rows: list[Row], key: Callable[[Row], Hashable], label: str) -> list[Row]:
    """Keep one row per ``key``, and none of a key that carries two labels."""
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [same[0] for same in groups.values() if len({str(row[label]) for row in same}) == 1]


def stratified_split(rows: list[Row], label: str, count: int) -> tuple[list[Row], list[Row]]:
    """Cut about ``count`` rows off, each label in its proportion; return (rest, cut)."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[str(row[label])].append(row)
    cut_ids: set[int] = set()
    for same in by_label.values():
        share = round(count * len(same) / len(rows))
        cut_ids.update(id(row) for row in same[:share])
    rest = [row for row in rows if id(row) not in cut_ids]
    return rest, [row for row in rows if id(row) in cut_ids]


def split_labelled(
    task: Task, column: str, label: str, hint: str, key: Callable[[Row], Hashable]
) -> tuple[Splits, list[str]]:
    """Read a task's data, check its columns, drop repeated training rows, split.

    Validation and test rows are cut from the training rows, stratified, when the data has no such
    split.

    Args:
        task: whose ``data_name`` and arguments to use.
        column: column of what is classified.
        label: column of the label.
        hint: added when a column is missing: which keys name the columns.
        key: what two rows that count as the same have in common.

    Returns:
        ((train, validation, test), labels), where the labels are sorted, by value if they are
        numbers.

    Raises:
        UserError: no such column, fewer than two labels, too few rows to cut from.
    """
    args, name = task.arguments, task.data_name
    splits = load_rows(name, args.data_config)
    for split, rows in splits.items():
        if split in ("train", "validation", "test"):
            where = name if len(splits) == 1 else f"{name} ({split})"
            require_columns(rows, (column, label), where, hint)
    if "train" not in splits:
        raise UserError(f"{name} has no split 'train'; it has: {', '.join(splits)}")
    train = shuffled(distinct_rows(splits["train"], key, label), args.split_seed)
    if "test" in splits:
        count = 0 if task.whole_test else args.test_samples
        test = take(shuffled(splits["test"], args.split_seed), count)
    else:
        train, test = _cut(name, train, label, args.test_samples or len(train) // 5, "test")
    if "validation" in splits:
        held_out = shuffled(splits["validation"], args.split_seed)
        validation = take(held_out, args.validation_samples)
    else:
        train, validation = _cut(name, train, label, args.validation_samples, "validation")
    labels = _sorted_labels({str(row[label]) for row in train})
    if len(labels) < 2:
        raise UserError(
            f"column {label!r} of {name} holds one label only "
            f"({', '.join(labels)}); classification needs two or more"
        )
    for row in (*validation, *test):
        if str(row[label]) not in labels:
            raise UserError(
                f"label {str(row[label])!r} of {name} occurs outside the training "
                f"rows only; there the labels are: {', '.join(labels)}"
            )
    return (take(train, args.train_samples), validation, test), labels


def _sorted_labels(labels: set[str]) -> list[str]:
    numbers = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))


def _cut(
    source: str, rows: list[Row], label: str, count: int, name: str
) -> tuple[list[Row], list[Row]]:
    if count >= len(rows):
        raise UserError(
            f"{name}_samples is {count}, but only {len(rows)} distinct rows of "
            f"{source} are left to cut them from"
        )
    return stratified_split(rows, label, count)


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy, macro F1, and the standard error that the sample size gives the mean loss."""
    import numpy as np

    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    guess, truth = np.argmax(logits, axis=-1), prediction.label_ids
    scores = []
    for label in np.unique(truth):
        hits = float(np.sum((guess == label) & (truth == label)))
        scores.append(2 * hits / float(np.sum(guess == label) + np.sum(truth == label)))
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, truth[:, None], 1)[:, 0]
    return {
        "accuracy": float(np.mean(guess == truth)),
        "macro_f1": float(np.mean(scores)),
        "loss_standard_error": float(np.std(losses) / len(losses) ** 0.5),
    }
