"""Text classification with an encoder: one text, or a pair of texts, and a label."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row, load_rows, require_cells, require_columns
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import RunOptions, option
from lorapro.experiments.tasks.base import Examples, TaskEntry, TextFamily
from lorapro.experiments.tasks.columns import find_columns
from lorapro.experiments.tasks.labelled import (
    Labelled,
    NewHeadOptions,
    distinct_rows,
    split_labelled,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TextClassification", "TextClassificationOptions", "deduplicate"]

_URL = re.compile(r"https?://\S+")


@dataclass
class TextClassificationOptions(NewHeadOptions):
    """Keys of text classification."""

    text_column: str = option("text", "column of the text, found where it is clear")
    second_text_column: str | None = option(
        None, "column of a second text, for pairs (premise and hypothesis)"
    )
    label_column: str = option("label", "column of the label, found where it is clear")
    test_split: str = option("test", "split that is the test set, such as GLUE's validation")
    max_length: int = option(128, "longest sequence, in tokens", least=2)

    def check(self) -> None:
        """Refuse one column for two things."""
        names = (self.text_column, self.second_text_column, self.label_column)
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"column {name!r} is named twice among text_column, second_text_column and "
                    "label_column"
                )


def deduplicate(rows: list[Row], text: str, label: str) -> list[Row]:
    """Keep one row per text, and none of a text that carries two labels.

    Texts are compared without case, links and spacing: a tweet sent twice differs in its short link
    only, and would otherwise lie in the training and in the test set.
    """
    return distinct_rows(rows, lambda row: _normalised(row[text]), label)


def _normalised(text: Any) -> str:
    return " ".join(_URL.sub("", str(text)).casefold().split())


class TextClassification(Labelled, TextFamily):
    """Classify a text or a pair of texts; loss is cross-entropy, metric accuracy and its like.

    Validation and test rows are cut from the training rows, stratified, when the data has no such
    split. Labels are the sorted distinct values of the label column.
    """

    options: ClassVar[type] = TextClassificationOptions
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    def __init__(self, entry: TaskEntry, run: RunOptions, options: Any) -> None:
        # Columns are settled by the data; the config stays what was given.
        super().__init__(entry, run, replace(options))

    def reads_names(self) -> bool:
        """Those of own data; the tasks of the catalogue count by number."""
        return self.entry.data is None

    def settle(self, splits: Mapping[str, list[Row]]) -> None:
        """Find the columns that the config does not name, where it is clear which they are."""
        rows = next(iter(splits.values()))
        wanted = {"text_column": self.args.text_column, "label_column": self.args.label_column}
        found_columns = find_columns(rows, *wanted.values())
        for (key, name), found in zip(wanted.items(), found_columns, strict=True):
            given = name != getattr(TextClassificationOptions, key) or key in self.entry.values
            if not given and name not in rows[0] and found is not None:
                self.say(f"{key}: {found!r}")
                setattr(self.args, key, found)

    def columns_used(self) -> tuple[str, ...]:
        """Text, second text if there is one, and label."""
        return (*self._texts, self.args.label_column)

    def input_columns(self) -> tuple[str, ...]:
        """Text, and second text if there is one."""
        return self._texts

    @property
    def _texts(self) -> tuple[str, ...]:
        second = self.args.second_text_column
        return (self.args.text_column,) if second is None else (self.args.text_column, second)

    def rows(self, keys: str = "") -> dict[str, list[Row]]:
        """Read the splits; another split than ``test`` may be the test set."""
        splits = self._read(keys)
        for part, rows in splits.items():
            if part in ("train", "validation", "test"):
                require_cells(rows, self._texts, f"{self.data_name} ({part})")
        return splits

    def _read(self, keys: str) -> dict[str, list[Row]]:
        name = self.args.test_split
        if name == "test":
            return super().rows(keys)
        splits = load_rows(self.data_name, self.data_config)
        self.settle(splits)
        name = name if name in splits else "validation"  # local files have no validation_matched
        for wanted in ("train", name):
            if wanted not in splits:
                raise UserError(
                    f"{self.data_name} has no split {wanted!r}; it has: {', '.join(splits)}"
                )
            require_columns(
                splits[wanted], self.columns_used(), f"{self.data_name} ({wanted})", keys
            )
        return {"train": splits["train"], "test": splits[name]}

    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Read, check, deduplicate, split."""
        splits, self.labels = split_labelled(
            self,
            " (set text_column and label_column)",
            lambda row: tuple(_normalised(row[column]) for column in self._texts),
        )
        return splits

    def encode(self, rows: list[Row]) -> Examples:
        """Tokenize the texts, truncated to ``max_length``."""
        if not rows:
            return []
        texts = [[str(row[column]) for row in rows] for column in self._texts]
        ids = self.tokenizer(*texts, truncation=True, max_length=self.args.max_length)
        numbers = {name: number for number, name in enumerate(self.labels)}
        return [
            {
                **{name: values[i] for name, values in ids.items()},
                "labels": numbers[str(row[self.args.label_column])],
            }
            for i, row in enumerate(rows)
        ]

    def load_model(self) -> PreTrainedModel:
        """Load the encoder with a fresh head for these labels."""
        from transformers import AutoModelForSequenceClassification

        model = self.load_with_head(
            AutoModelForSequenceClassification, self.model_path, self.model_name
        )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Pad to the longest text of the batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)
