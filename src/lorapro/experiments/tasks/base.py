"""What a task gives to the runner."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.assets import asset_path
from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorapro.experiments.config import ExperimentArguments

__all__ = ["Examples", "Task", "TextTask", "load_tokenizer"]

Examples = list[dict[str, Any]]


class Task(ABC):
    """Data, model and metric of one task.

    A task reads and encodes its data once (``prepare``) and gives fresh models
    (``load_model``). Splits depend on ``split_seed`` alone: methods and seeds share them.

    Class attributes:
        default_model: used when the config names none.
        default_data: likewise.
        peft_task_type: name of a ``peft.TaskType``, ``None`` where PEFT has none.
        head: name of the module that starts afresh and is trained in full beside the adapters,
            ``None`` where there is none or PEFT knows it from the task type.
        metric: name of the main metric (higher is better), ``None`` when the loss is all there is.
    """

    default_model: ClassVar[str]
    default_data: ClassVar[str | None]
    peft_task_type: ClassVar[str | None]
    head: ClassVar[str | None] = None
    metric: ClassVar[str | None] = None

    train: Examples
    validation: Examples
    test: Examples
    test_rows: list[Row]
    model_path: str
    processor: Any

    def __init__(self, arguments: ExperimentArguments) -> None:
        self.arguments = arguments
        self.model_name = arguments.model or self.default_model
        data = arguments.data or self.default_data
        if data is None:
            raise UserError(f"task {arguments.task!r} needs 'data': a file, a folder or a hub id")
        self.data_name = data
        self.whole_test = False

    def prepare(self, log: Callable[[str], None] | None = None, limit: int | None = None) -> None:
        """Fetch what is missing, read the data, encode it.

        With ``limit`` the first that many test rows are kept (0: all of them), where the data's own
        test split counts as a whole. A test set cut from the training rows stays what it was.
        """
        self.whole_test = limit is not None
        self.model_path = asset_path(self.model_name, log)
        asset_path(self.data_name, log)
        train, validation, test = self.split_rows()
        self.processor = self.load_processor()
        self.train = self.encode(train)
        self.validation = self.arrange(self.encode(validation))
        self.test_rows = take(test, limit or 0)
        self.test = self.arrange(self.encode(self.test_rows))
        if not self.train:
            raise UserError(f"no training example of {self.data_name} fits into max_length")

    @abstractmethod
    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Return the rows of train, validation and test."""

    @abstractmethod
    def load_processor(self) -> Any:
        """Return the model's tokenizer or image processor, which is saved beside the model."""

    @abstractmethod
    def encode(self, rows: list[Row]) -> Examples:
        """Turn rows into examples for :meth:`collator`, with the processor at hand."""

    def arrange(self, examples: Examples) -> Examples:
        """Return examples to evaluate in the order that is quickest."""
        return examples

    @abstractmethod
    def load_model(self) -> PreTrainedModel:
        """Return a fresh pretrained model (new weights, such as a head, from torch's RNG)."""

    @abstractmethod
    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Return the function that turns examples into a batch for the model."""

    def compute_metrics(self) -> Callable[[Any], dict[str, float]] | None:
        """Return Trainer's ``compute_metrics``, or ``None`` when the loss is all it can measure."""
        return None

    def final_metrics(
        self, model: PreTrainedModel, save_to: Path | None, samples: int
    ) -> dict[str, float]:
        """Return metrics of ``samples`` test rows that need more than a loss.

        What the model said goes to the JSONL file ``save_to``, if it said anything.
        """
        return {}


class TextTask(Task):
    """A task whose model reads tokens."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor
        return tokenizer

    def load_processor(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(self.model_path, self.model_name)

    def arrange(self, examples: Examples) -> Examples:
        """Put similar lengths side by side, so that batches need less padding."""
        return sorted(examples, key=lambda example: len(example["input_ids"]))


def load_tokenizer(path: str, name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(auto_class: Any, path: str, name: str, **kwargs: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained`` with one-line errors."""
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error


def _no_model(name: str, error: Exception) -> UserError:
    from lorapro.experiments.assets import ASSETS
    from lorapro.experiments.errors import nearest_hint

    models = [asset.name for asset in ASSETS.values() if asset.kind == "model"]
    reason = " ".join(str(error).split())[:160]
    return UserError(
        f"no model {name!r}{nearest_hint(name, models)}: neither an asset ({', '.join(models)}) "
        f"nor a folder, nor found on the hub ({reason})"
    )


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """Return the rows in a seeded random order."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return order


def take(rows: list[Row], count: int) -> list[Row]:
    """Return the first ``count`` rows, all of them for 0."""
    return rows[:count] if count else rows
