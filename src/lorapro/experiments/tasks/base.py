"""What a task is, and what a family of tasks gives to the runner.

A *task* is one entry of :data:`lorapro.experiments.tasks.catalogue.TASKS`: family x data set x
columns x prompt x metric. A *family* is a subclass of :class:`Family`: it knows how rows become
examples, which model class reads them, and how examples are scored. Adding a task is an entry;
adding a family is a class with an options dataclass of its own.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.assets import asset_path
from lorapro.experiments.data import Row, load_rows, require_columns
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import NoOptions, RunOptions

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Examples", "Family", "Items", "TaskEntry", "TextFamily", "load_tokenizer"]

Examples = list[dict[str, Any]]

Items = "Mapping[str, ndarray]"
"""Scores of every test example, arrays of one length: at least ``loss`` (its mean loss) and
``weight`` (labels it was averaged over; the reported loss is the weighted mean); where there is one
answer an example, ``prediction``, ``label`` and ``correct`` (0 or 1)."""


@dataclass(frozen=True)
class TaskEntry:
    """A task: which family reads which data how, and what it is judged by.

    Attributes:
        name: as written in configs.
        family: key of :data:`~lorapro.experiments.tasks.catalogue.FAMILIES`.
        about: one line for help and tables.
        model: asset or hub id, used when the config names none.
        data: likewise; ``None`` where the config must name it.
        data_config: configuration name on the hub, used when ``data`` is not given.
        values: defaults of this task for keys of the family or of
            :class:`~lorapro.experiments.options.RunOptions`: columns, prompt, lengths, ...
        metric: name of the main metric (higher is better), ``None`` where the loss is all.
        row: changes a row before it is used, or drops it by returning ``None``; it gets the row
            and the family's options.
        toy: names in :mod:`lorapro.experiments.toys` of (model, data writer) for ``--toy true``.
    """

    name: str
    family: str
    about: str
    model: str
    data: str | None = None
    data_config: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None
    row: Callable[[Row, Any], Row | None] | None = None
    toy: tuple[str, str] | None = None


class Family(ABC):
    """Data, model and scores of the tasks of one kind.

    An instance belongs to one task of one configuration. It reads and encodes its data once
    (:meth:`prepare`) and gives fresh models (:meth:`load_model`). Splits depend on ``split_seed``
    alone: methods and seeds share them.

    What a subclass must have: ``options`` (a dataclass of its keys), ``columns_used``,
    ``load_processor``, ``encode``, ``load_model``, ``collator``, ``item_scores``. What it may have:
    ``split_rows`` or ``examples`` (other ways to split), ``metrics``, ``final_metrics``
    (generation), ``training_values`` (say, steps from a budget of tokens).

    Class attributes:
        options: dataclass of the family's keys.
        named_labels: read labels that the hub stores as numbers by their names.
        peft_task_type: name of a ``peft.TaskType``, ``None`` where PEFT has none.
        head: name of the module that starts afresh and is trained in full beside the adapters,
            ``None`` where there is none or PEFT knows it from the task type.
        carried: attributes that come from the data and that saved weights cannot be used without,
            such as ``labels``; they are kept beside the weights, as JSON.

    Attributes:
        train, validation, test: examples, once prepared.
        test_rows: the rows that ``test`` was made of, in the same order as ``test_order``.
        processor: tokenizer or image processor; saved beside models.
        model_path: local path of the model, or its hub id.
        new_parameters: names of the parameters that the last model that was loaded has from no
            checkpoint, such as those of a new head.
    """

    options: ClassVar[type] = NoOptions
    named_labels: ClassVar[bool] = False
    peft_task_type: ClassVar[str | None] = None
    head: ClassVar[str | None] = None
    carried: ClassVar[tuple[str, ...]] = ()

    train: Examples
    validation: Examples
    test: Examples
    test_rows: list[Row]
    model_path: str
    processor: Any
    new_parameters: frozenset[str] = frozenset()
    say: Callable[[str], None]

    def __init__(self, entry: TaskEntry, run: RunOptions, options: Any) -> None:
        self.entry, self.run, self.args = entry, run, options
        self.model_name = run.model or entry.model
        data = run.data or entry.data
        if data is None:
            raise UserError(f"task {entry.name!r} needs 'data': a file, a folder or a hub id")
        self.data_name = _part_of(data, entry)
        self.data_config = run.data_config or (entry.data_config if run.data is None else None)
        self.whole_test = False

    @classmethod
    def training_values(cls, options: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of ``TrainingArguments`` that follow from the family's keys (``max_steps``, ...).

        Args:
            options: the family's options.
            given: keys of the config, ours and Trainer's.
        """
        return {}

    @classmethod
    def toy(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a toy run, cut down already, without what no toy can have."""
        return values

    def prepare(self, log: Callable[[str], None] | None = None, limit: int | None = None) -> None:
        """Fetch what is missing, read the data, encode it.

        With ``limit`` the first that many test rows are kept (0: all of them), where the data's own
        test split counts as a whole. A test set cut from the training rows stays what it was.
        """
        self.say = log or (lambda _: None)
        self.whole_test = limit is not None
        self.model_path = asset_path(self.model_name, log)
        asset_path(self.data_name, log)
        self.processor = self.load_processor()
        self.train, self.validation, self.test = self.examples(limit or 0)
        if not self.train:
            raise UserError(f"no training example of {self.data_name} fits into max_length")

    def examples(self, limit: int) -> tuple[Examples, Examples, Examples]:
        """Return the examples of train, validation and test, of which ``limit`` (0: all)."""
        train, validation, test = self.split_rows()
        self.test_rows = take(test, limit)
        return self.encode(train), self.encode(validation), self.encode(self.test_rows)

    def rows(self, keys: str = "") -> dict[str, list[Row]]:
        """Read the data's splits, each row through the entry's ``row``; check the columns.

        ``keys`` is added to the error for a missing column: which keys name the columns.
        """
        splits = load_rows(self.data_name, self.data_config, names=self.reads_names())
        self.settle(splits)
        if "train" not in splits:
            raise UserError(f"{self.data_name} has no split 'train'; it has: {', '.join(splits)}")
        columns = self.columns_used()
        for name, rows in splits.items():
            if name in ("train", "validation", "test"):
                where = self.data_name if len(splits) == 1 else f"{self.data_name} ({name})"
                require_columns(rows, columns, where, keys)
        if self.entry.row is not None:
            change = self.entry.row
            splits = {
                name: [new for row in rows if (new := change(row, self.args)) is not None]
                for name, rows in splits.items()
            }
        return splits

    def reads_names(self) -> bool:
        """Whether labels that the hub stores as numbers go by their names."""
        return self.named_labels

    def settle(self, splits: Mapping[str, list[Row]]) -> None:
        """Settle by the data what the config leaves open, such as names of columns."""
        return

    @abstractmethod
    def columns_used(self) -> tuple[str, ...]:
        """Columns that every row must have."""

    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Return the rows of train, validation and test; what has no split is cut from train."""
        run, splits = self.run, self.rows()
        train = shuffled(splits["train"], run.split_seed)
        available = len(train)
        if "test" in splits:
            count = 0 if self.whole_test else run.test_samples
            test = take(shuffled(splits["test"], run.split_seed), count)
        else:
            count = self.held_out("test_samples", available)
            train, test = train[count:], train[:count]
        if "validation" in splits:
            validation = take(splits["validation"], run.validation_samples)
        else:
            count = self.held_out("validation_samples", available)
            validation, train = train[:count], train[count:]
        if not train:
            raise UserError(
                f"{self.data_name} has {len(splits['train'])} training rows: too few to cut "
                "validation_samples and test_samples from"
            )
        return take(train, run.train_samples), validation, test

    def held_out(self, key: str, available: int) -> int:
        """How many of the training rows to hold out, for data without such a split.

        The number of ``validation_samples`` or ``test_samples``; where that is only the default,
        at most a tenth of the rows; a fifth for 0.
        """
        wanted, default = getattr(self.run, key), getattr(RunOptions, key)
        if wanted == 0:
            return available // 5
        return min(wanted, max(1, available // 10)) if wanted == default else wanted

    @abstractmethod
    def load_processor(self) -> Any:
        """Return the model's tokenizer or image processor, which is saved beside the model."""

    @abstractmethod
    def encode(self, rows: list[Row]) -> Examples:
        """Turn rows into examples for :meth:`collator`, with the processor at hand.

        Rows that do not fit may be left out.
        """

    @abstractmethod
    def load_model(self) -> PreTrainedModel:
        """Return a fresh pretrained model (new weights, such as a head, from torch's RNG)."""

    @abstractmethod
    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Return the function that turns examples into a batch for the model."""

    @abstractmethod
    def item_scores(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Score each example of a batch.

        Args:
            outputs: the model's, with ``logits``.
            batch: what the collator made.

        Returns:
            Tensors of shape (batch,), the arrays of :data:`Items`: ``loss`` and ``weight``, and
            ``prediction``, ``label``, ``correct`` where they mean something.
        """

    def metrics(self, items: Mapping[str, ndarray]) -> dict[str, float]:
        """Return metrics of all examples, beside the loss, from their scores."""
        return {}

    def final_metrics(
        self, model: PreTrainedModel, save_to: Path | None, samples: int
    ) -> dict[str, float]:
        """Return metrics of ``samples`` test rows that need more than a loss (generation).

        What the model said goes to the JSONL file ``save_to``, one object a test row with at least
        ``correct``.
        """
        return {}

    def evaluation_samples(self, limit: int | None) -> int:
        """How many rows ``lorapro evaluate`` asks :meth:`final_metrics` for."""
        return len(self.test_rows)

    def input_columns(self) -> tuple[str, ...]:
        """Columns that :meth:`predict` reads: those of :meth:`columns_used` without the answer."""
        raise UserError(f"task {self.entry.name!r} has nothing to predict for new rows")

    def input_row(self, text: str) -> Row:
        """A row of one text, for tasks that read one column."""
        columns = self.input_columns()
        if len(columns) != 1:
            raise UserError(
                f"task {self.entry.name!r} reads the columns {', '.join(columns)}; give a file "
                "with --data"
            )
        return {columns[0]: text}

    def predict(self, model: PreTrainedModel, rows: list[Row], batch_size: int) -> list[Row]:
        """Return what the model says of new rows, one mapping a row."""
        raise UserError(f"task {self.entry.name!r} has nothing to predict for new rows")

    @property
    def final_samples(self) -> int:
        """How many test rows :meth:`final_metrics` is asked for after training."""
        return 0


class TextFamily(Family):
    """A family whose models read tokens."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor
        return tokenizer

    def load_processor(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(self.model_path, self.model_name)


def _part_of(data: str, entry: TaskEntry) -> str:
    """A task's folder, by its name or configuration, in a folder of several tasks' data."""
    for name in (entry.name, entry.data_config):
        if name is not None and (part := Path(data).expanduser() / name).is_dir():
            return str(part)
    return data


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
    from safetensors import SafetensorError

    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _no_model(name, error) from error


def _no_model(name: str, error: Exception) -> UserError:
    from lorapro.experiments.assets import ASSETS
    from lorapro.experiments.errors import nearest_hint

    models = [asset.name for asset in ASSETS.values() if asset.kind == "model"]
    reason = " ".join(str(error).split())[:160]
    if Path(name).expanduser().exists():
        return UserError(f"cannot load the model in {name}: {reason}")
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
