"""Text classification from any table with a text and a label column."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row
from lorapro.experiments.tasks.base import Examples, TextTask, load_pretrained
from lorapro.experiments.tasks.labelled import (
    classification_metrics,
    distinct_rows,
    split_labelled,
    stratified_split,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Classification", "Tweets", "deduplicate", "stratified_split"]

_URL = re.compile(r"https?://\S+")


def deduplicate(rows: list[Row], text: str, label: str) -> list[Row]:
    """Keep one row per text, and none of a text that carries two labels.

    Texts are compared without case, links and spacing: a tweet sent twice differs in its short link
    only, and would otherwise lie in the training and in the test set.
    """
    return distinct_rows(rows, lambda row: _normalised(row[text]), label)


def _normalised(text: Any) -> str:
    return " ".join(_URL.sub("", str(text)).casefold().split())


class Classification(TextTask):
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
        text = self.arguments.text_column
        label = self.arguments.label_column or self.default_label
        self.columns = (text, label)
        hint = " (set text_column and label_column)"
        splits, self.labels = split_labelled(
            self, text, label, hint, lambda row: _normalised(row[text])
        )
        return splits

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
