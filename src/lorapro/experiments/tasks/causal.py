"""Causal language models: prompt and answer, or plain text in rows of fixed length."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import Examples, TextFamily, load_pretrained, shuffled, take

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Causal", "CausalOptions", "encode_pair", "fill", "token_scores"]

IGNORED = -100


@dataclass
class CausalOptions:
    """Keys of causal language models."""

    format: str = option(
        "prompt",
        "prompt: loss on the answer only; text: rows of max_length tokens, loss on every token",
        choices=("prompt", "text"),
    )
    prompt: str = option("{prompt}", "what goes before the answer, with {columns} of a row")
    answer: str = option("{answer}", "what is learned, with {columns} of a row")
    chat: bool = option(True, "put the prompt into the tokenizer's chat template, where it has one")
    text: str = option("{text}", "format text: the text of a row, with {columns} of it")
    max_length: int = option(
        128, "longest example in tokens (longer ones are left out), or the length of a row", least=2
    )
    max_train_tokens: int = option(
        0, "train on about so many tokens: sets max_steps; needs format text; 0: by epochs", least=0
    )
    batch_tokens: int = option(
        0,
        "tokens in a batch, of which per_device_train_batch_size rows at a time: sets "
        "gradient_accumulation_steps; needs format text; 0: by rows",
        least=0,
    )
    calculator_annotations: bool = option(False, "gsm8k: keep <<48/2=24>> in the answers")
    max_new_tokens: int = option(256, "longest generated answer", least=1)
    generation_samples: int = option(
        0, "test prompts answered after training; 0 is none", least=0, learned=False
    )
    generation_batch_size: int = option(16, "answers at a time", least=1, learned=False)


def fill(template: str, row: Row) -> str:
    """Put the row's columns into a template.

    >>> fill("Q: {question}\\nA: ", {"question": "1+1?"})
    'Q: 1+1?\\nA: '
    """
    return template.format_map({name: str(value) for name, value in row.items()})


def columns_of(template: str) -> tuple[str, ...]:
    """Columns that a template names.

    >>> columns_of("{premise} {hypothesis}")
    ('premise', 'hypothesis')
    """
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = True) -> list[int]:
    """Token ids of a prompt, as a user's turn of the chat template if there is one."""
    if chat and getattr(tokenizer, "chat_template", None):
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: str
) -> dict[str, list[int]]:
    """Prompt, answer and end token as one example; the loss is on answer and end token only."""
    target = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    target.append(int(tokenizer.eos_token_id))
    return {
        "input_ids": prompt + target,
        "attention_mask": [1] * (len(prompt) + len(target)),
        "labels": [IGNORED] * len(prompt) + target,
    }


def token_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean loss over the labels of each example, and how many labels it has.

    Args:
        logits: (batch, length, vocabulary), for the labels at the same positions.
        labels: (batch, length); -100 does not count.
    """
    import torch

    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    counted = labels != IGNORED
    weight = counted.sum(-1).float()
    return {"loss": losses.sum(-1) / weight.clamp(min=1), "weight": weight}


class Causal(TextFamily):
    """Train a causal language model.

    With ``format: prompt`` a row becomes ``prompt`` (maybe inside the chat template) and
    ``answer``; the loss is on the answer and the end token. With ``format: text`` all texts of a
    split, each with an end token, are strung together and cut into rows of ``max_length`` tokens;
    ``train_samples``, ``validation_samples`` and ``test_samples`` then count rows, and
    ``max_train_tokens`` makes the length of a run independent of the batch size. Either way the
    reported loss is the mean over labels, whatever the batches.
    """

    options: ClassVar[type] = CausalOptions
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"

    @classmethod
    def training_values(cls, options: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Batch and steps from ``batch_tokens`` and ``max_train_tokens``."""
        for key in ("batch_tokens", "max_train_tokens"):
            if getattr(options, key) and options.format != "text":
                raise UserError(f"{key} needs format text, whose rows have one length")
        rows = given.get("per_device_train_batch_size", 8)
        values = {}
        if options.batch_tokens:
            if "gradient_accumulation_steps" in given:
                raise UserError("give batch_tokens or gradient_accumulation_steps, not both")
            wanted, rest = divmod(options.batch_tokens, options.max_length)
            rows = max(1, min(rows, wanted))
            if rest or wanted % rows:
                raise UserError(
                    f"batch_tokens is {options.batch_tokens}, expected a multiple of max_length "
                    f"{options.max_length}, and beyond {rows} rows a multiple of those"
                )
            values["per_device_train_batch_size"] = rows
            values["gradient_accumulation_steps"] = wanted // rows
        if options.max_train_tokens:
            if given.get("max_steps", -1) > 0:
                raise UserError("give max_train_tokens or max_steps, not both")
            rows *= values.get(
                "gradient_accumulation_steps", given.get("gradient_accumulation_steps", 1)
            )
            values["max_steps"] = max(1, options.max_train_tokens // (rows * options.max_length))
        return values

    def columns_used(self) -> tuple[str, ...]:
        """Columns that the templates name, or the text's."""
        if self.args.format == "text":
            return columns_of(self.args.text)
        return tuple(dict.fromkeys(columns_of(self.args.prompt) + columns_of(self.args.answer)))

    def examples(self, limit: int) -> tuple[Examples, Examples, Examples]:
        """Cut texts into rows first, then split; or split, then encode."""
        if self.args.format == "prompt":
            return super().examples(limit)
        run, splits = self.run, self.rows()
        packed = {name: self._pack(shuffled(splits[name], run.split_seed)) for name in splits}
        train = packed["train"]
        rest: dict[str, Examples] = {}
        for name, count in (("test", run.test_samples), ("validation", run.validation_samples)):
            if name in packed:
                rest[name] = take(packed[name], count)
            else:
                count = count or len(train) // 5
                rest[name], train = train[:count], train[count:]
        self.test_rows = []
        return take(train, run.train_samples), rest["validation"], take(rest["test"], limit)

    def _pack(self, rows: list[Row]) -> Examples:
        """String texts together, an end token after each; cut into rows; drop the remainder."""
        length, ids = self.args.max_length, []
        for row in rows:
            text = fill(self.args.text, row)
            ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids.append(int(self.tokenizer.eos_token_id))
        starts = range(0, len(ids) - length + 1, length)
        return [{"input_ids": ids[i : i + length], "labels": ids[i : i + length]} for i in starts]

    def encode(self, rows: list[Row]) -> Examples:
        """Encode the pairs that fit into ``max_length``; longer ones are left out, not cut.

        A cut answer would lose its end, often the very thing it is scored by.
        """
        examples = []
        for row in rows:
            prompt = self.prompt_ids(row)
            example = encode_pair(self.tokenizer, prompt, fill(self.args.answer, row))
            if len(example["input_ids"]) <= self.args.max_length:
                examples.append(example)
        return examples

    def prompt_ids(self, row: Row) -> list[int]:
        """Token ids of a row's prompt."""
        return prompt_ids(self.tokenizer, fill(self.args.prompt, row), self.args.chat)

    def input_columns(self) -> tuple[str, ...]:
        """Columns that the prompt names."""
        return columns_of(self.args.prompt)

    def predict(self, model: PreTrainedModel, rows: list[Row], batch_size: int) -> list[Row]:
        """The answer that the model gives to each row's prompt."""
        from lorapro.experiments.generation import generate

        answers = generate(
            model,
            self.tokenizer,
            [self.prompt_ids(row) for row in rows],
            batch_size=batch_size,
            max_new_tokens=self.args.max_new_tokens,
            temperature=getattr(self.args, "temperature", 0.0),
        )
        return [{"prediction": answer} for answer in answers]

    def load_model(self) -> PreTrainedModel:
        """Load the language model."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        config = load_pretrained(AutoConfig, self.model_path, self.model_name)
        encodes = not (config.is_encoder_decoder or getattr(config, "is_decoder", False))
        if encodes and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise UserError(
                f"model {self.model_name!r} is an encoder ({config.model_type}), which reads a "
                "text from both sides and does not continue it; take a causal language model"
            )
        return load_pretrained(
            AutoModelForCausalLM, self.model_path, self.model_name, dtype=self.run.dtype
        )

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Pad to the longest example of the batch, labels with -100."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)

    def item_scores(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean loss a token of each example, and whether it would say the answer word for word.

        Each token of an answer that is the most probable one after the tokens before it: just then
        greedy decoding gives this answer.
        """
        logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
        scores = token_scores(logits, labels)
        if getattr(self.args, "format", "prompt") == "prompt":
            right = (logits.argmax(-1) == labels) | (labels == IGNORED)
            scores["correct"] = right.all(-1).float()
        return scores

    def metrics(self, items: Mapping[str, ndarray]) -> dict[str, float]:
        """Share of answers that greedy decoding would give word for word."""
        return {"answer_accuracy": float(items["correct"].mean())} if "correct" in items else {}

    @property
    def final_samples(self) -> int:
        """``generation_samples``."""
        return int(self.args.generation_samples)

    def final_metrics(
        self, model: PreTrainedModel, save_to: Path | None, samples: int
    ) -> dict[str, float]:
        """Exact match on the first ``samples`` test questions, for the metric ``exact_match``.

        As lm-eval counts it: ``exact_match`` by its filter ``flexible-extract``, with a 95 % Wilson
        interval, ``exact_match_strict`` by ``strict-match``.
        """
        if samples == 0 or self.entry.metric != "exact_match":
            return {}
        from lorapro.experiments.generation import generate, save_records
        from lorapro.experiments.scoring import gsm8k
        from lorapro.experiments.statistics import wilson_interval

        rows = self.test_rows[:samples]
        said = generate(
            model,
            self.tokenizer,
            [self.prompt_ids(row) for row in rows],
            batch_size=self.args.generation_batch_size,
            max_new_tokens=self.args.max_new_tokens,
        )
        records, shares = gsm8k.score(rows, said)
        save_records([{**r, "correct": r["flexible"]} for r in records], save_to)
        low, high = wilson_interval(sum(r["flexible"] for r in records), len(records))
        return {
            "exact_match": shares["flexible"],
            "exact_match_low": low,
            "exact_match_high": high,
            "exact_match_strict": shares["strict"],
            "exact_match_total": len(records),
        }
