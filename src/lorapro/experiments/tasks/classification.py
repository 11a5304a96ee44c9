"""Text classification from any table with a text and a label column."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row, load_rows, require_columns
from lorapro.experiments.errors import UserError
from lorapro.experiments.tasks.base import Examples, Task, load_pretrained, shuffled, take

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Classification", "Tweets", "deduplicate", "stratified_split"]

_URL = re.compile(r"https?://\S+")


def deduplicate(rows: list[Row], text: str, label: str) -> list[Row]:
    """Keep one row per text, and none of a text that carries two labels.

    Texts are compared without case, links and spacing: a tweet sent twice differs in its short link
    only, and would otherwise lie in the training and in the test set.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[" ".join(_URL.sub("", str(row[text])).casefold().split())].append(row)
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


class Classification(Task):
    """Classify a text; loss is cross-entropy, metric is accuracy.

    Validation and test rows are cut from the training rows, stratified, when the data has no such
    split. Labels are the sorted distinct values of the label column.
    """

    default_model: ClassVar[str] = "minilm-l6"
    default_data: ClassVar[str | None] = None
    default_label: ClassVar[str] = "label"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    metric: ClassVar[str | None] = "accuracy"

    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Read, check, deduplicate, split."""
        args = self.arguments
        text, label = args.text_column, args.label_column or self.default_label
        splits = load_rows(self.data_name, args.data_config)
        for name, rows in splits.items():
            if name in ("train", "validation", "test"):
                where = self.data_name if len(splits) == 1 else f"{self.data_name} ({name})"
                hint = " (set text_column and label_column)"
                require_columns(rows, (text, label), where, hint)
        if "train" not in splits:
            raise UserError(f"{self.data_name} has no split 'train'; it has: {', '.join(splits)}")
        train = shuffled(deduplicate(splits["train"], text, label), args.split_seed)
        if "test" in splits:
            count = 0 if self.whole_test else args.test_samples
            test = take(shuffled(splits["test"], args.split_seed), count)
        else:
            train, test = self._cut(train, label, args.test_samples or len(train) // 5, "test")
        if "validation" in splits:
            held_out = shuffled(splits["validation"], args.split_seed)
            validation = take(held_out, args.validation_samples)
        else:
            train, validation = self._cut(train, label, args.validation_samples, "validation")
        self.labels = sorted({str(row[label]) for row in train})
        if len(self.labels) < 2:
            raise UserError(
                f"column {label!r} of {self.data_name} holds one label only "
                f"({', '.join(self.labels)}); classification needs two or more"
            )
        for row in (*validation, *test):
            if str(row[label]) not in self.labels:
                raise UserError(
                    f"label {str(row[label])!r} of {self.data_name} occurs outside the training "
                    f"rows only; there the labels are: {', '.join(self.labels)}"
                )
        self.columns = (text, label)
        return take(train, args.train_samples), validation, test

    def _cut(
        self, rows: list[Row], label: str, count: int, name: str
    ) -> tuple[list[Row], list[Row]]:
        if count >= len(rows):
            raise UserError(
                f"{name}_samples is {count}, but only {len(rows)} distinct rows of "
                f"{self.data_name} are left to cut them from"
            )
        return stratified_split(rows, label, count)

    def encode(self, rows: list[Row]) -> Examples:
        """Tokenize the texts, truncated to ``max_length``."""
        text, label = self.columns
        texts = [str(row[text]) for row in rows]
        ids = self.tokenizer(texts, truncation=True, max_length=self.arguments.max_length)
        numbers = {name: number for number, name in enumerate(self.labels)}
        return [
            {"input_ids": tokens, "attention_mask": mask, "labels": numbers[str(row[label])]}
            for tokens, mask, row in zip(ids["input_ids"], ids["attention_mask"], rows, strict=True)
        ]

    def load_model(self) -> PreTrainedModel:
        """Load the encoder with a fresh head for these labels."""
        from transformers import AutoModelForSequenceClassification

        model = load_pretrained(
            AutoModelForSequenceClassification,
            self.model_path,
            self.model_name,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={name: number for number, name in enumerate(self.labels)},
            dtype=self.arguments.dtype,
        )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Pad to the longest text of the batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def compute_metrics(self) -> Callable[[Any], dict[str, float]] | None:
        """Accuracy, and the F1 score averaged over labels."""
        return classification_metrics


class Tweets(Classification):
    """Sentiment of tweets (negative, neutral, positive): the asset ``tweets``."""

    default_data: ClassVar[str | None] = "tweets"
    default_label: ClassVar[str] = "sentiment"


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
