"""What the families with one label a row share: distinct rows, stratified splits, scores."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row, require_cells
from lorapro.experiments.errors import UserError
from lorapro.experiments.metrics import label_metrics
from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import load_pretrained, shuffled, take

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from transformers import PreTrainedModel

    from lorapro.experiments.tasks.base import Family

__all__ = ["Labelled", "distinct_rows", "split_labelled", "stratified_split"]

Splits = tuple[list[Row], list[Row], list[Row]]


def distinct_rows(rows: list[Row], key: Callable[[Row], Hashable], label: str) -> list[Row]:
    """Keep one row per ``key``, and none of a key that carries two labels."""
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [same[0] for same in groups.values() if len({str(row[label]) for row in same}) == 1]


def stratified_split(
    rows: list[Row], label: str, count: int, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Cut ``count`` rows off, each label in its proportion; return (rest, cut).

    A label that occurs once stays in the rest.
    """
    from sklearn.model_selection import train_test_split

    counts = Counter(str(row[label]) for row in rows)
    once = [row for row in rows if counts[str(row[label])] == 1]
    often = [row for row in rows if counts[str(row[label])] > 1]
    labels = [str(row[label]) for row in often]
    kinds = len(set(labels))
    enough = count >= kinds and len(often) - count >= kinds  # what stratifying needs
    rest, cut = train_test_split(
        often, test_size=count, random_state=seed, stratify=labels if enough else None
    )
    return [*rest, *once], cut


def split_labelled(
    task: Family, hint: str, key: Callable[[Row], Hashable]
) -> tuple[Splits, list[str]]:
    """Read a task's data, check its columns, drop repeated training rows, split.

    Validation and test rows are cut from the training rows, stratified, when the data has no such
    split.

    Args:
        task: whose data and options to use, ``label_column`` among them.
        hint: added when a column is missing: which keys name the columns.
        key: what two rows that count as the same have in common.

    Returns:
        ((train, validation, test), labels), where the labels are sorted, by value if they are
        numbers.

    Raises:
        UserError: no such column, fewer than two labels, as many labels as rows, too few rows to
            cut from, a label that no training row has.
    """
    run, name = task.run, task.data_name
    splits = task.rows(hint)
    label = task.args.label_column
    for part in ("train", "validation", "test"):
        require_cells(splits.get(part, ()), (label,), f"{name} ({part})")
    train = shuffled(distinct_rows(splits["train"], key, label), run.split_seed)
    if not train:
        raise UserError(f"no row of {name} is left: each of its texts has more than one label")
    _check_labels(Counter(str(row[label]) for row in train), label, name, hint)
    available = len(train)
    if "test" in splits:
        count = 0 if task.whole_test else run.test_samples
        test = take(shuffled(splits["test"], run.split_seed), count)
    else:
        train, test = _cut(task, train, label, task.held_out("test_samples", available), "test")
    if "validation" in splits:
        held_out = shuffled(splits["validation"], run.split_seed)
        validation = take(held_out, run.validation_samples)
    else:
        count = task.held_out("validation_samples", available)
        train, validation = _cut(task, train, label, count, "validation")
    labels = _sorted_labels({str(row[label]) for row in train})
    for row in (*validation, *test):
        if str(row[label]) not in labels:
            raise UserError(
                f"label {str(row[label])!r} of {name} occurs outside the training "
                f"rows only; there the labels are: {_listed(labels)}"
            )
    return (take(train, run.train_samples), validation, test), labels


def _check_labels(counts: Counter[str], label: str, name: str, hint: str) -> None:
    if len(counts) < 2:
        raise UserError(
            f"column {label!r} of {name} holds one label only "
            f"({', '.join(counts)}); classification needs two or more"
        )
    if max(counts.values()) == 1:
        raise UserError(
            f"column {label!r} of {name} holds another value in every one of its rows, so it is "
            f"not a label{hint}"
        )


def _listed(labels: list[str], most: int = 12) -> str:
    more = f", ... ({len(labels)} in all)" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def _sorted_labels(labels: set[str]) -> list[str]:
    numbers = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))


def _cut(
    task: Family, rows: list[Row], label: str, count: int, name: str
) -> tuple[list[Row], list[Row]]:
    if count >= len(rows):
        raise UserError(
            f"{name}_samples is {count}, but only {len(rows)} distinct rows of "
            f"{task.data_name} are left to cut them from"
        )
    counts = Counter(str(row[label]) for row in rows)
    often = sum(n for n in counts.values() if n > 1)
    if count >= often:
        raise UserError(
            f"only {often} rows of {task.data_name} have a label that another row has too: too few "
            f"to cut {name}_samples, {count}, from"
        )
    return stratified_split(rows, label, count, task.run.split_seed)


@dataclass
class NewHeadOptions:
    """Keys of families whose model gets a new head."""

    head_learning_rate: float | None = option(
        None,
        "learning rate of weights that start afresh, the head's; default: that of the rest",
        above=0,
    )


class Labelled:
    """Models and scores of families whose logits are (batch, labels), batches with ``labels``."""

    carried: ClassVar[tuple[str, ...]] = ("labels",)
    labels: list[str]

    def load_with_head(
        self, auto_class: Any, path: str, name: str, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a pretrained model with a head for these labels, and note what of it is new."""
        family: Any = self
        loaded: Any = load_pretrained(
            auto_class,
            path,
            name,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: number for number, label in enumerate(self.labels)},
            dtype=family.run.dtype,
            output_loading_info=True,
            **kwargs,
        )
        model, info = loaded
        other_shape = {key for key, *_ in info["mismatched_keys"]}
        family.new_parameters = frozenset(info["missing_keys"]) | other_shape
        return model

    def predict(self, model: Any, rows: list[Row], batch_size: int) -> list[Row]:
        """The most probable label of each row, and the probabilities of all."""
        import torch

        family: Any = self
        # Examples carry a label; any will do, it is not shown to the model.
        blank = {family.args.label_column: self.labels[0]}
        examples, collate = family.encode([{**row, **blank} for row in rows]), family.collator()
        found: list[Row] = []
        model.eval()
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size])
            batch.pop("labels")
            with torch.no_grad():
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                shares = model(**inputs).logits.float().softmax(-1)
            for share in shares.tolist():
                best = max(range(len(share)), key=share.__getitem__)
                every = dict(zip(self.labels, share, strict=True))
                answer = {"prediction": self.labels[best], "probability": share[best]}
                found.append({**answer, "probabilities": every})
        return found

    def item_scores(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy and correctness of each example."""
        import torch

        logits, labels = outputs.logits.float(), batch["labels"]
        prediction = logits.argmax(-1)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return {
            "loss": loss,
            "weight": torch.ones_like(loss),
            "prediction": prediction,
            "label": labels,
            "correct": (prediction == labels).float(),
        }

    def metrics(self, items: Mapping[str, ndarray]) -> dict[str, float]:
        """Accuracy, F1 scores, Matthews correlation."""
        return label_metrics(items["label"], items["prediction"])
