"""GSM8K: grade-school word problems, answered step by step by a chat model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row, load_rows, require_columns
from lorapro.experiments.errors import UserError
from lorapro.experiments.tasks.base import Examples, TextTask, load_pretrained, shuffled, take

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GSM8K", "encode_pair", "prompt_ids", "strip_annotations"]

_ANNOTATION = re.compile(r"<<[^<>]*>>")
IGNORED = -100


def strip_annotations(answer: str) -> str:
    """Remove GSM8K's calculator annotations.

    >>> strip_annotations("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    """
    return _ANNOTATION.sub("", answer)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of the prompt: the chat template, or a plain one where the tokenizer has none."""
    if getattr(tokenizer, "chat_template", None):
        encoded: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])
    return list(tokenizer(f"Question: {question}\nAnswer:\n")["input_ids"])


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> dict[str, list[int]]:
    """Prompt, answer and end token as one example; the loss is on answer and end token only."""
    prompt = prompt_ids(tokenizer, question)
    target = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    target.append(int(tokenizer.eos_token_id))
    return {
        "input_ids": prompt + target,
        "attention_mask": [1] * (len(prompt) + len(target)),
        "labels": [IGNORED] * len(prompt) + target,
    }


class GSM8K(TextTask):
    """Answer GSM8K's questions; the loss is per answer token, the metric exact match.

    Data: the hub's ``openai/gsm8k``, or a local JSONL file or folder (``train.jsonl``,
    ``test.jsonl``) with the columns ``question`` and ``answer``.
    """

    default_model: ClassVar[str] = "smollm2-135m-instruct"
    default_data: ClassVar[str | None] = "openai/gsm8k"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    metric: ClassVar[str | None] = "exact_match"

    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Cut validation (and test, if the data has none) from the shuffled training rows."""
        args = self.arguments
        config = args.data_config
        if config is None and self.data_name == self.default_data:
            config = "main"
        splits = load_rows(self.data_name, config)
        for name, rows in splits.items():
            where = self.data_name if len(splits) == 1 else f"{self.data_name} ({name})"
            require_columns(rows, ("question", "answer"), where, "")
        if "train" not in splits:
            raise UserError(f"{self.data_name} has no split 'train'; it has: {', '.join(splits)}")
        train = shuffled(splits["train"], args.split_seed)
        if "test" in splits:
            count = 0 if self.whole_test else args.test_samples
            test = take(shuffled(splits["test"], args.split_seed), count)
        else:
            count = args.test_samples or len(train) // 5
            train, test = train[count:], train[:count]
        if "validation" in splits:
            validation = take(splits["validation"], args.validation_samples)
        else:
            validation, train = train[: args.validation_samples], train[args.validation_samples :]
        if not train:
            raise UserError(
                f"{self.data_name} has {len(splits['train'])} training rows: too few to cut "
                "validation_samples and test_samples from"
            )
        return take(train, args.train_samples), validation, test

    def encode(self, rows: list[Row]) -> Examples:
        """Encode the pairs that fit into ``max_length``; longer ones are left out, not cut.

        A cut answer would lose the very number it is scored by.
        """
        keep = self.arguments.calculator_annotations
        examples = []
        for row in rows:
            answer = str(row["answer"])
            answer = answer if keep else strip_annotations(answer)
            example = encode_pair(self.tokenizer, str(row["question"]), answer)
            if len(example["input_ids"]) <= self.arguments.max_length:
                examples.append(example)
        return examples

    def load_model(self) -> PreTrainedModel:
        """Load the language model."""
        from transformers import AutoModelForCausalLM

        dtype = self.arguments.dtype
        return load_pretrained(AutoModelForCausalLM, self.model_path, self.model_name, dtype=dtype)

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Pad to the longest pair of the batch, labels with -100."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)

    def final_metrics(
        self, model: PreTrainedModel, save_to: Path | None, samples: int
    ) -> dict[str, float]:
        """Exact match on the first ``samples`` test questions."""
        if samples == 0:
            return {}
        from lorapro.experiments.evaluation import exact_match

        score = exact_match(
            model,
            self.tokenizer,
            self.test_rows[:samples],
            batch_size=self.arguments.generation_batch_size,
            max_new_tokens=self.arguments.max_new_tokens,
            save_to=save_to,
        )
        return score.as_dict()
