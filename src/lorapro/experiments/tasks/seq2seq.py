"""Encoder-decoder models: text to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row
from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import Examples, TextFamily, load_pretrained
from lorapro.experiments.tasks.causal import IGNORED, columns_of, fill, token_scores

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Seq2Seq", "Seq2SeqOptions"]


@dataclass
class Seq2SeqOptions:
    """Keys of text-to-text tasks."""

    source: str = option("{source}", "what the encoder reads, with {columns} of a row")
    target: str = option("{target}", "what is learned, with {columns} of a row")
    label_words: list[str] | None = option(
        None, "words for the numbers 0, 1, ... in the label column; {label} in target is the word"
    )
    label_column: str = option("label", "column of the number that label_words are words for")
    max_source_length: int = option(128, "longest source in tokens; cut beyond it", least=2)
    max_target_length: int = option(128, "longest target in tokens; cut beyond it", least=2)


class Seq2Seq(TextFamily):
    """Train an encoder-decoder on pairs of source and target text.

    Scores come from teacher-forced logits: ``correct`` is 1 where the most probable token is the
    right one at *every* label of the target.
    """

    options: ClassVar[type] = Seq2SeqOptions
    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    def columns_used(self) -> tuple[str, ...]:
        """Columns that the templates name."""
        return tuple(dict.fromkeys(columns_of(self.args.source) + columns_of(self.args.target)))

    def input_columns(self) -> tuple[str, ...]:
        """Columns that the source names."""
        return columns_of(self.args.source)

    def predict(self, model: PreTrainedModel, rows: list[Row], batch_size: int) -> list[Row]:
        """The target that the model writes, greedily."""
        import torch

        found: list[Row] = []
        model.eval()
        for start in range(0, len(rows), batch_size):
            sources = [fill(self.args.source, row) for row in rows[start : start + batch_size]]
            batch = self.tokenizer(
                sources,
                truncation=True,
                max_length=self.args.max_source_length,
                padding=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                written: Any = model.generate(  # type: ignore[operator]
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                    max_new_tokens=self.args.max_target_length,
                    do_sample=False,
                )
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            found += [{"prediction": text} for text in texts]
        return found

    def encode(self, rows: list[Row]) -> Examples:
        """Tokenize source and target."""
        words, column = self.args.label_words, self.args.label_column
        examples = []
        for row in rows:
            if words is not None:
                row = {**row, column: words[int(row[column])]}
            source = self.tokenizer(
                fill(self.args.source, row), truncation=True, max_length=self.args.max_source_length
            )
            target = self.tokenizer(
                text_target=fill(self.args.target, row),
                truncation=True,
                max_length=self.args.max_target_length,
            )
            examples.append(
                {
                    "input_ids": source["input_ids"],
                    "attention_mask": source["attention_mask"],
                    "labels": target["input_ids"],
                }
            )
        return examples

    def load_model(self) -> PreTrainedModel:
        """Load the encoder-decoder."""
        from transformers import AutoModelForSeq2SeqLM

        return load_pretrained(
            AutoModelForSeq2SeqLM, self.model_path, self.model_name, dtype=self.run.dtype
        )

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Pad both sides to the longest of the batch, labels with -100."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)

    def item_scores(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean loss a label, and whether every label is the most probable token."""
        labels = batch["labels"]
        right = (outputs.logits.argmax(-1) == labels) | (labels == IGNORED)
        return {**token_scores(outputs.logits, labels), "correct": right.all(-1).float()}

    def metrics(self, items: Mapping[str, ndarray]) -> dict[str, float]:
        """Share of targets whose every label is the most probable token."""
        return {"accuracy": float(items["correct"].mean())}
