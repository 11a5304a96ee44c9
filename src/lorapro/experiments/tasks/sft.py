"""Supervised fine-tuning of a language model on own data: conversations, pairs, plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import RunOptions, option
from lorapro.experiments.scoring import harness
from lorapro.experiments.tasks.base import Examples, TaskEntry
from lorapro.experiments.tasks.causal import IGNORED, Causal
from lorapro.experiments.tasks.conversations import (
    Messages,
    encode_messages,
    messages_of,
    prompt_and_answer,
)

if TYPE_CHECKING:
    from numpy import ndarray
    from transformers import PreTrainedModel

__all__ = ["Sft", "SftOptions"]

FORMATS = ("messages", "prompt", "text")


@dataclass
class SftOptions:
    """Keys of supervised fine-tuning."""

    format: str = option(
        "auto",
        "messages, prompt (and completion) or text; auto: by the columns that the data has",
        choices=("auto", *FORMATS),
    )
    messages_column: str = option("messages", "column of the conversations")
    prompt_column: str = option("prompt", "column of the prompts")
    completion_column: str = option("completion", "column of the answers to the prompts")
    text_column: str = option("text", "column of the texts")
    system: str | None = option(None, "system message put before conversations that have none")
    chat: bool = option(True, "put the prompt into the tokenizer's chat template, where it has one")
    answers_only: bool = option(True, "loss on the answers only, not on prompts")
    max_length: int = option(512, "longest example in tokens; longer ones are left out", least=2)
    packing: bool = option(
        False, "put several examples into one row of max_length tokens, each for itself"
    )
    max_new_tokens: int = option(128, "longest generated answer", least=1, learned=False)
    generation_samples: int = option(
        5, "test prompts answered after training, in samples.jsonl", least=0, learned=False
    )
    generation_batch_size: int = option(8, "answers at a time", least=1, learned=False)
    harness_tasks: list[str] | None = option(
        None, "tasks of lm-eval to score after training, by name", learned=False
    )
    harness_folder: str | None = option(None, "folder of further tasks for lm-eval", learned=False)
    harness_samples: int = option(0, "items of each; 0: all", least=0, learned=False)


def _cell(value: Any) -> Any:
    """A text, of a number too; or a list of messages, of Parquet's array too."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return str(value) if isinstance(value, int | float) else value


class Sft(Causal):
    """Train a causal language model on conversations, on prompts and completions, or on texts.

    Conversations go through the tokenizer's chat template, and so do prompts and completions where
    there is one; a prompt and completion may be lists of messages themselves. The loss is on what
    assistants say. Examples longer than ``max_length`` are left out and counted, texts are cut into
    pieces. The reported loss is the mean over labels, perplexity its exponential.
    """

    options: ClassVar[type] = SftOptions

    def __init__(self, entry: TaskEntry, run: RunOptions, options: Any) -> None:
        # The format is settled by the data; the config stays what was given.
        super().__init__(entry, run, replace(options))

    @classmethod
    def training_values(cls, options: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The held-out loss before training too; small evaluation batches, for the logits."""
        values = {"eval_on_start": True, "per_device_eval_batch_size": 8}
        return {key: value for key, value in values.items() if key not in given}

    def prepare(self, log: Callable[[str], None] | None = None, limit: int | None = None) -> None:
        """Check the names of lm-eval's tasks first."""
        if self.args.harness_tasks:
            harness.check_tasks(self.args.harness_tasks, self.args.harness_folder)
        super().prepare(log, limit)

    def columns_used(self) -> tuple[str, ...]:
        """Those of the format."""
        args = self.args
        if args.format == "prompt":
            return args.prompt_column, args.completion_column
        return (args.messages_column if args.format == "messages" else args.text_column,)

    def rows(self, keys: str = "") -> dict[str, list[Row]]:
        """Read the data; check every cell, by the number of its row."""
        keys = " (set format, messages_column, prompt_column, completion_column, ...)"
        splits = super().rows(keys)
        for name, rows in splits.items():
            if name in ("train", "validation", "test"):
                where = self.data_name if len(splits) == 1 else f"{self.data_name} ({name})"
                for number, row in enumerate(rows, 1):
                    self._check(row, f"row {number} of {where}")
        return splits

    def _check(self, row: Row, where: str) -> None:
        if self.args.format == "messages":
            messages_of(row[self.args.messages_column], where)
            return
        for column in self.columns_used():
            value = _cell(row[column])
            if self.args.format == "prompt" and isinstance(value, list) and value:
                continue  # messages
            if not isinstance(value, str):
                raise UserError(
                    f"{where} holds {value!r:.60} in column {column!r}, expected a text"
                )
            if not value.strip():
                raise UserError(f"{where} has nothing in column {column!r}")
        if self.args.format == "prompt" and isinstance(_cell(row[self.args.prompt_column]), list):
            self.messages(row, where)

    def settle(self, splits: Mapping[str, list[Row]]) -> None:
        """Settle the format by the columns."""
        if self.args.format == "auto":
            self.args.format = self._found_format(list(next(iter(splits.values()))[0]))

    def _found_format(self, columns: list[str]) -> str:
        args = self.args
        for alias in ("conversations", "conversation"):
            if args.messages_column not in columns and alias in columns:
                args.messages_column = alias
        fits = {
            "messages": args.messages_column in columns,
            "prompt": args.prompt_column in columns and args.completion_column in columns,
            "text": args.text_column in columns,
        }
        found = [name for name in FORMATS if fits[name]]
        if not found:
            raise UserError(
                f"{self.data_name} has no column {args.messages_column!r}, no "
                f"{args.prompt_column!r} and {args.completion_column!r}, no {args.text_column!r}; "
                f"its columns are: {', '.join(map(str, columns))} (set messages_column, "
                "prompt_column and completion_column, or text_column)"
            )
        return found[0]

    def examples(self, limit: int) -> tuple[Examples, Examples, Examples]:
        """Split, encode, pack the training examples."""
        self.left_out = 0
        train, validation, test = super(Causal, self).examples(limit)
        total = self.left_out + len(train) + len(validation) + len(test)
        if not (train and validation):
            kind = "validation" if train else "training"
            raise UserError(
                f"no {kind} example of {self.data_name} fits into max_length "
                f"{self.args.max_length}: {self.left_out} of {total} are longer"
            )
        if self.left_out:
            self.say(
                f"{self.left_out} of {total} examples are longer than max_length "
                f"{self.args.max_length} tokens and left out"
            )
        return self._packed(train) if self.args.packing else train, validation, test

    def encode(self, rows: list[Row]) -> Examples:
        """Encode the rows; those that do not fit into ``max_length`` are left out and counted."""
        length, examples = self.args.max_length, []
        for row in rows:
            if self.args.format == "text":
                examples += self._pieces(str(row[self.args.text_column]))
                continue
            example = self._encode_row(row, f"a row of {self.data_name}")
            if len(example["input_ids"]) <= length:
                examples.append(example)
            else:
                self.left_out += 1
        return examples

    def _encode_row(self, row: Row, where: str) -> dict[str, list[int]]:
        messages = self.messages(row, where)
        if messages is not None:
            return encode_messages(
                self.tokenizer,
                messages,
                where,
                answers_only=self.args.answers_only,
                tools=row.get("tools"),
            )
        prompt = list(self.tokenizer(str(row[self.args.prompt_column]))["input_ids"])
        answer = str(row[self.args.completion_column])
        target = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        target.append(int(self.tokenizer.eos_token_id))
        asked = [IGNORED] * len(prompt) if self.args.answers_only else prompt
        return {"input_ids": prompt + target, "labels": asked + target}

    def messages(self, row: Row, where: str) -> Messages | None:
        """The row as a conversation; ``None`` for a prompt without chat template."""
        args = self.args
        template = getattr(self.tokenizer, "chat_template", None)
        if args.format == "messages":
            messages = messages_of(row[args.messages_column], where)
        else:
            prompt, completion = (_cell(row[c]) for c in self.columns_used())
            if isinstance(prompt, str) and not (args.chat and template):
                return None
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            messages = messages_of([*prompt, *completion], where)
        if not template:
            raise UserError(
                f"the tokenizer of {self.model_name!r} has no chat template for conversations; "
                "take a chat model, or data with prompt and completion as texts"
            )
        return self._with_system(messages)

    def _pieces(self, text: str) -> Examples:
        ids = list(self.tokenizer(text)["input_ids"])
        ids.append(int(self.tokenizer.eos_token_id))
        length = self.args.max_length
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        return [{"input_ids": p, "labels": list(p)} for p in pieces if len(p) > 1]

    def _packed(self, examples: Examples) -> Examples:
        from datasets import Dataset
        from trl import pack_dataset

        packed = pack_dataset(Dataset.from_list(examples), self.args.max_length, "bfd")
        rows: Examples = packed.to_list()
        return rows

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Pad to the longest of the batch; a row of several examples keeps them apart."""
        return SftCollator(int(self.tokenizer.pad_token_id))

    def prompt_ids(self, row: Row) -> list[int]:
        """Token ids of what comes before the last answer, or of a text that is to go on."""
        args, where = self.args, f"a row of {self.data_name}"
        if args.format == "text":
            return list(self.tokenizer(str(row[args.text_column]))["input_ids"])
        if args.format == "messages":
            return self._ask(messages_of(row[args.messages_column], where, answered=False))
        prompt = _cell(row[args.prompt_column])
        if not isinstance(prompt, str):
            return self._ask(messages_of(prompt, where, answered=False))
        if args.chat and getattr(self.tokenizer, "chat_template", None):
            return self._ask([{"role": "user", "content": prompt}])
        return list(self.tokenizer(prompt)["input_ids"])

    def _ask(self, messages: Messages) -> list[int]:
        """Token ids of a conversation that waits for an answer."""
        encoded: Any = self.tokenizer.apply_chat_template(
            self._with_system(messages), add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def _with_system(self, messages: Messages) -> Messages:
        if self.args.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.args.system}, *messages]

    def input_columns(self) -> tuple[str, ...]:
        """The conversation's, the prompt's, or the text's."""
        args = self.args
        columns = {"messages": args.messages_column, "prompt": args.prompt_column}
        return (columns.get(args.format, args.text_column),)

    def input_row(self, text: str) -> Row:
        """A prompt, or what a user says."""
        if self.args.format == "messages":
            return {self.args.messages_column: [{"role": "user", "content": text}]}
        return super().input_row(text)

    def metrics(self, items: Mapping[str, ndarray]) -> dict[str, float]:
        """Perplexity."""
        from lorapro.experiments.evaluation import weighted_loss

        loss = weighted_loss(items)
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    def final_metrics(
        self, model: PreTrainedModel, save_to: Path | None, samples: int
    ) -> dict[str, float]:
        """Answer ``samples`` test prompts into ``samples.jsonl``; run the tasks of lm-eval."""
        rows = self.test_rows[:samples]
        if rows and save_to is not None:
            self._write_samples(model, rows, save_to.with_name("samples.jsonl"))
        if not self.args.harness_tasks:
            return {}
        return harness.evaluate(
            model,
            self.tokenizer,
            self.args.harness_tasks,
            limit=self.args.harness_samples or None,
            batch_size=self.args.generation_batch_size,
            folder=self.args.harness_folder,
        )

    def _write_samples(self, model: PreTrainedModel, rows: list[Row], path: Path) -> None:
        from lorapro.experiments.generation import generate

        prompts = [self.prompt_ids(row) for row in rows]
        if self.args.format == "text":  # the beginning, to be gone on with
            most = self.args.max_length // 4
            prompts = [ids[: max(1, min(len(ids) // 2, most))] for ids in prompts]
        answers = generate(
            model,
            self.tokenizer,
            prompts,
            batch_size=self.args.generation_batch_size,
            max_new_tokens=self.args.max_new_tokens,
        )
        lines = [
            json.dumps({**self._shown(row, ids), "answer": answer}, ensure_ascii=False)
            for row, ids, answer in zip(rows, prompts, answers, strict=True)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _shown(self, row: Row, ids: list[int]) -> dict[str, Any]:
        if self.args.format == "text":
            rest = self.tokenizer(str(row[self.args.text_column]))["input_ids"][len(ids) :]
            shown = {"prompt": ids, "reference": rest[: self.args.max_new_tokens]}
            decode = self.tokenizer.decode
            return {k: decode(v, skip_special_tokens=True) for k, v in shown.items()}
        messages = self.messages(row, f"a row of {self.data_name}")
        if messages is None:
            return {
                "prompt": str(row[self.args.prompt_column]),
                "reference": str(row[self.args.completion_column]),
            }
        prompt, answer = prompt_and_answer(messages)
        return {"messages": prompt, "reference": answer}

    @property
    def final_samples(self) -> int:
        """``generation_samples``, or all that lm-eval needs."""
        return int(self.args.generation_samples) or int(bool(self.args.harness_tasks))


@dataclass(frozen=True)
class SftCollator:
    """Pads on the right. Rows of several examples get positions instead of a mask.

    transformers tells the examples of a row apart by positions that begin again, and attends within
    each only; that holds where there is neither an attention mask nor a cache.
    """

    pad_id: int

    def __call__(self, examples: Examples) -> dict[str, Any]:
        """Return ``input_ids``, ``labels`` and ``attention_mask`` or ``position_ids``."""
        import torch

        longest = max(len(e["input_ids"]) for e in examples)

        def padded(rows: list[list[int]], value: int) -> Any:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        ids = padded([list(e["input_ids"]) for e in examples], self.pad_id)
        labels = padded([list(e["labels"]) for e in examples], IGNORED)
        if "seq_lengths" not in examples[0]:
            mask = padded([[1] * len(e["input_ids"]) for e in examples], 0)
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        counted = [[i for n in e["seq_lengths"] for i in range(n)] for e in examples]
        positions = padded(counted, 0)
        labels[positions == 0] = IGNORED  # it would be predicted from the example before
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": labels,
            "use_cache": False,
        }
