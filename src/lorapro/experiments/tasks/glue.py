"""GLUE as text to text: five tasks, in LoRA-GA's words and in those T5 was pretrained with.

The papers score the validation split (MNLI: the matched one), and train on the whole train split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError
from lorapro.experiments.metrics import label_metrics
from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import Examples, TaskEntry, shuffled, take
from lorapro.experiments.tasks.causal import IGNORED, token_scores
from lorapro.experiments.tasks.seq2seq import Seq2Seq, Seq2SeqOptions

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

__all__ = ["GLUE_TASKS", "Glue", "GlueOptions"]


@dataclass
class GlueOptions(Seq2SeqOptions):
    """Keys of classification in words."""

    test_split: str = option("validation", "split that is the test set")
    whole_train: bool = option(
        False,
        "train on the whole train split and validate on test rows, as the papers do: nothing can "
        "be tuned fairly then",
    )
    reading: str = option(
        "hard",
        "accuracy by every token of the word (hard) or by its first one against those of the "
        "other words (soft)",
        choices=("hard", "soft"),
    )
    count_label_padding: bool = option(
        False, "the loss counts the padding of labels, as in LoRA-GA's code"
    )


class Glue(Seq2Seq):
    """Classify by saying a word; scores come from teacher-forced logits, nothing is generated."""

    options: ClassVar[type] = GlueOptions

    def columns_used(self) -> tuple[str, ...]:
        """Columns of the source, and the label's."""
        return (*super().columns_used(), self.args.label_column)

    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Test rows are a split of their own; validation rows are cut from train, or test rows."""
        run, splits = self.run, self.rows()
        name = self.args.test_split if self.args.test_split in splits else "validation"
        if name not in splits:
            raise UserError(f"{self.data_name} has no split {name!r}; it has: {', '.join(splits)}")
        words = self.args.label_words
        for split in ("train", name):
            for row in splits[split]:
                if not 0 <= int(row[self.args.label_column]) < len(words):
                    raise UserError(
                        f"label {row[self.args.label_column]} in split {split!r} of "
                        f"{self.data_name} has no word; there are: {', '.join(words)}"
                    )
        train, test = splits["train"], splits[name]
        test = test if self.whole_test else take(test, run.test_samples)
        if self.args.whole_train:
            return take(train, run.train_samples), take(test, run.validation_samples), test
        train = shuffled(train, run.split_seed)
        validation, train = train[: run.validation_samples], train[run.validation_samples :]
        if not train:
            raise UserError(
                f"{self.data_name} has {len(splits['train'])} training rows: too few to cut "
                f"{run.validation_samples} validation_samples from"
            )
        return take(train, run.train_samples), validation, test

    def encode(self, rows: list[Row]) -> Examples:
        """Tokenize source and word."""
        firsts = [ids[0] for ids in self._words()]
        if len(set(firsts)) < len(firsts):
            raise UserError(
                f"label_words {self.args.label_words} do not differ in their first token; the soft "
                "reading cannot tell them apart"
            )
        return super().encode(rows)

    def _words(self) -> list[list[int]]:
        return [self.tokenizer(text_target=w)["input_ids"] for w in self.args.label_words]

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Pad to the longest of the batch."""
        from transformers import DataCollatorForSeq2Seq

        pad = self.tokenizer.pad_token_id if self.args.count_label_padding else IGNORED
        return DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=int(pad or 0))

    def item_scores(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss, both readings, and the word that the first token speaks for."""
        import torch

        labels, logits = batch["labels"], outputs.logits
        padding = (labels == IGNORED) | (labels == self.tokenizer.pad_token_id)
        hard = ((logits.argmax(-1) == labels) | padding).all(-1)
        firsts = torch.tensor([ids[0] for ids in self._words()], device=labels.device)
        prediction = logits[:, 0, firsts].argmax(-1)
        label = (labels[:, :1] == firsts).float().argmax(-1)
        soft = prediction == label
        return {
            **token_scores(logits, labels),
            "prediction": prediction,
            "label": label,
            "hard": hard.float(),
            "soft": soft.float(),
            "correct": (hard if self.args.reading == "hard" else soft).float(),
        }

    def metrics(self, items: Mapping[str, ndarray]) -> dict[str, float]:
        """Accuracy in both readings, and scikit-learn's scores of the predicted words."""
        return {
            **label_metrics(items["label"], items["prediction"]),
            "accuracy_hard": float(items["hard"].mean()),
            "accuracy_soft": float(items["soft"].mean()),
            "accuracy": float(items["correct"].mean()),
        }


@dataclass(frozen=True)
class _Glue:
    """One task: instruction and columns in LoRA-GA's words, T5's source, both vocabularies."""

    instruction: str
    columns: tuple[str, ...]
    t5: str
    words: tuple[str, ...]
    t5_words: tuple[str, ...] | None = None
    reading: str = "hard"
    split: str = "validation"


_SIMILARITY = "classify the semantic similarity of the text: "

_GLUE = {
    "mnli": _Glue(
        _SIMILARITY,
        ("premise", "hypothesis"),
        "mnli hypothesis: {hypothesis} premise: {premise}",
        ("entailment", "neutral", "contradiction"),
        split="validation_matched",
    ),
    "sst2": _Glue(
        "classify the sentiment of the text: ",
        ("sentence",),
        "sst2 sentence: {sentence}",
        ("negative", "positive"),
    ),
    "cola": _Glue(
        "classify the grammaticality of the text: ",
        ("sentence",),
        "cola sentence: {sentence}",
        ("unacceptable", "acceptable"),
        reading="soft",
    ),
    "qnli": _Glue(
        "classify the semantic similarity of the question and the sentence: ",
        ("question", "sentence"),
        "qnli question: {question} sentence: {sentence}",
        ("entailment", "not_entailment"),
    ),
    "mrpc": _Glue(
        _SIMILARITY,
        ("sentence1", "sentence2"),
        "mrpc sentence1: {sentence1} sentence2: {sentence2}",
        ("different", "equivalent"),
        ("not_equivalent", "equivalent"),
        reading="soft",
    ),
}


def _entry(name: str, task: _Glue, own: bool) -> TaskEntry:
    joined = "\n".join(f"{{{column}}}" for column in task.columns)
    words = (task.t5_words or task.words) if own else task.words
    return TaskEntry(
        f"glue-{name}-t5" if own else f"glue-{name}",
        "glue",
        f"GLUE's {name} in words, {'in T5' if own else 'as LoRA-GA'}"
        + ("'s own format" if own else " puts it"),
        model="google-t5/t5-base",
        data="nyu-mll/glue",
        data_config=name,
        values={
            "source": task.t5 if own else f"{task.instruction}{joined}\nresult: ",
            "target": "{label}",
            "label_words": list(words),
            "reading": task.reading,
            "test_split": task.split,
            "test_samples": 0,
            "count_label_padding": not own,
        },
        metric="accuracy",
        toy=("t5", f"glue_{name}"),
    )


GLUE_TASKS = tuple(_entry(name, task, own) for own in (False, True) for name, task in _GLUE.items())
