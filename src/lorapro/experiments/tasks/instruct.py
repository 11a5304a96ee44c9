"""Instruction tuning as the papers do it: first rows that pass a filter, then a benchmark.

Training text is ``x + " " + y + eos``, the loss on what follows the tokens of ``x``. The model is
asked ``x + " "`` of the benchmark's items. Rows are taken in the order of the file: the papers'
shuffle has no effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.assets import asset_path
from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import option
from lorapro.experiments.scoring import harness
from lorapro.experiments.tasks.base import Examples, TaskEntry
from lorapro.experiments.tasks.benchmarks import BENCHMARKS, Benchmark
from lorapro.experiments.tasks.causal import IGNORED, Causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ALPACA", "INSTRUCT_TASKS", "QUESTION", "Instruct", "InstructOptions"]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
QUESTION = "Q: {instruction}\nA: "


@dataclass
class InstructOptions:
    """Keys of instruction tuning with a benchmark."""

    prompt: str = option(ALPACA, "x: what goes before the answer, with {instruction}")
    instruction_column: str = option("instruction", "column that becomes {instruction}")
    answer_column: str = option("output", "column of the answer")
    filter_length: int = option(
        1024, "rows of this many tokens or more are left out, before the end token", least=2
    )
    max_length: int = option(1024, "longest example in tokens; cut beyond it", least=2)
    benchmark: str = option(
        "gsm8k", "what the trained model is asked", choices=("gsm8k", "humaneval", "mt_bench")
    )
    benchmark_data: str | None = option(
        None,
        "asset, file, folder or hub id of the benchmark; default: the folder 'benchmark' in a "
        "local folder of data, else the benchmark's own",
    )
    generation_samples: int = option(
        0, "items of the benchmark answered after training; 0 is none", least=0, learned=False
    )
    generation_batch_size: int = option(8, "answers at a time", least=1, learned=False)
    max_prompt_tokens: int = option(768, "longest prompt of the benchmark; cut beyond it", least=1)
    max_new_tokens: int = option(512, "longest generated answer", least=1)
    temperature: float = option(0.0, "of generated answers; 0 is greedy", least=0)
    top_p: float = option(0.95, "nucleus of sampled answers", above=0)
    answers_per_item: int = option(1, "humaneval: samples of each problem", least=1)
    code_seconds: float = option(3.0, "humaneval: wall time of one program", above=0)
    humaneval_continued: bool = option(
        False, "humaneval: ask as lm-eval does too: continue the bare prompt up to a stop word"
    )
    harness_tasks: list[str] | None = option(
        None, "tasks of lm-eval to score beside the benchmark, on generation_samples items each"
    )
    harness_folder: str | None = option(None, "folder of further tasks for lm-eval")
    judge_model: str | None = option(None, "mt_bench: name of the judge at its endpoint")
    judge_url: str | None = option(
        None, "mt_bench: endpoint; default OPENAI_BASE_URL, else OpenAI's", learned=False
    )


class Instruct(Causal):
    """Train on instructions, then answer a benchmark's items."""

    options: ClassVar[type] = InstructOptions

    @classmethod
    def training_values(cls, options: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing; but what the benchmark is not allowed to do is found out here, at once."""
        if options.generation_samples:
            allowed = bool(given.get("allow_code_execution"))
            BENCHMARKS[options.benchmark].check(options, allowed)
        return {}

    @classmethod
    def toy(cls, values: dict[str, Any]) -> dict[str, Any]:
        """No judge unless its endpoint was given, no model-written code unless that was allowed."""
        small = dict(values)
        if not small.get("judge_url"):
            small.pop("judge_model", None)
        if small.get("benchmark") == "humaneval" and not small.get("allow_code_execution"):
            small["generation_samples"] = 0
        return small

    def columns_used(self) -> tuple[str, ...]:
        """Columns of instruction and answer."""
        return (self.args.instruction_column, self.args.answer_column)

    def prepare(self, log: Callable[[str], None] | None = None, limit: int | None = None) -> None:
        """See :meth:`Family.prepare`; the benchmark is opened first, so that it can object."""
        self.benchmark: Benchmark | None = None
        if self.args.generation_samples:
            kind = BENCHMARKS[self.args.benchmark]
            source = self.args.benchmark_data or self._beside() or kind.default_data
            asset_path(source, log)
            if self.args.harness_tasks:
                harness.check_tasks(self.args.harness_tasks, self.args.harness_folder)
            self.benchmark = kind(self.args, source, self.run.allow_code_execution)
        super().prepare(log, limit)

    def _beside(self) -> str | None:
        """The folder ``benchmark`` in a local folder of data."""
        folder = Path(self.data_name).expanduser() / "benchmark"
        return str(folder) if folder.is_dir() else None

    def examples(self, limit: int) -> tuple[Examples, Examples, Examples]:
        """First ``train_samples`` rows that fit, then validation's, then the test's."""
        run = self.run
        found = self._encoded(self.rows()["train"])
        counts = (run.train_samples, run.validation_samples, run.test_samples)
        if run.train_samples == 0:
            whole = list(found)
            counts = (len(whole) - sum(counts[1:]), *counts[1:])
            found = iter(whole)
        parts = [list(itertools.islice(found, max(0, n))) for n in counts]
        if [len(part) for part in parts] != list(counts) or not parts[0]:
            raise UserError(
                f"{self.data_name} has {sum(map(len, parts))} rows that fit: too few for "
                f"train_samples, validation_samples and test_samples, {sum(counts)} in all"
            )
        self.test_rows = []
        train, validation, test = parts
        return train, validation, test[:limit] if limit else test

    def _encoded(self, rows: list[Row]) -> Iterator[dict[str, list[int]]]:
        """Examples of the rows that are short enough, in order."""
        end = self.tokenizer.eos_token
        for row in rows:
            prompt = self.ask(str(row[self.args.instruction_column]))
            text = f"{prompt} {row[self.args.answer_column]}"
            if len(self.tokenizer(text)["input_ids"]) >= self.args.filter_length:
                continue
            ids = list(
                self.tokenizer(f"{text}{end}", truncation=True, max_length=self.args.max_length)[
                    "input_ids"
                ]
            )
            hidden = len(self.tokenizer(prompt)["input_ids"])
            labels = [IGNORED] * min(hidden, len(ids)) + ids[hidden:]
            yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def encode(self, rows: list[Row]) -> Examples:
        """Encode the rows that are short enough."""
        return list(self._encoded(rows))

    def ask(self, instruction: str) -> str:
        """Return x for an instruction."""
        return str(self.args.prompt).replace("{instruction}", instruction)

    def evaluation_samples(self, limit: int | None) -> int:
        """``generation_samples``, or fewer."""
        return min(self.final_samples, limit or self.final_samples)

    def final_metrics(
        self, model: PreTrainedModel, save_to: Path | None, samples: int
    ) -> dict[str, float]:
        """Answer the benchmark's first ``samples`` items and score them."""
        if not samples or self.benchmark is None:
            return {}
        metrics = self.benchmark.score(self.ask, model, self.tokenizer, samples, save_to)
        if self.args.harness_tasks:
            metrics |= harness.evaluate(
                model,
                self.tokenizer,
                self.args.harness_tasks,
                limit=samples,
                batch_size=self.args.generation_batch_size,
                folder=self.args.harness_folder,
            )
        return metrics


def gsm_rows(row: Row, options: Any) -> Row | None:
    """MetaMathQA: rows that were made from GSM8K."""
    return row if "GSM" in str(row["type"]) else None


def gsm_rows_cut(row: Row, options: Any) -> Row | None:
    """The same, each answer up to its second statement of the result, as in LoRA-GA's code."""
    if "GSM" not in str(row["type"]):
        return None
    return {**row, "response": str(row["response"]).split("\nThe answer is:")[0]}


def first_code_block(row: Row, options: Any) -> Row | None:
    """CodeFeedback: answers with code, up to the end of their first block."""
    parts = str(row["answer"]).split("```")
    return {**row, "answer": "```".join(parts[:2]) + "```"} if len(parts) > 1 else None


def no_refusals(row: Row, options: Any) -> Row | None:
    """WizardLM: answers that neither apologise nor speak of being a model."""
    answer = str(row["output"]).lower()
    return None if "sorry" in answer or "as an ai" in answer else row


_LLAMA = "meta-llama/Llama-2-7b-hf"


def _metamath(name: str, about: str, prompt: str, row: Any) -> TaskEntry:
    return TaskEntry(
        name,
        "instruct",
        about,
        model=_LLAMA,
        data="meta-math/MetaMathQA",
        values={
            "prompt": prompt,
            "instruction_column": "query",
            "answer_column": "response",
            "filter_length": 512,
            "train_samples": 100_000,
            "validation_samples": 1_000,
            "test_samples": 1_000,
            "benchmark": "gsm8k",
        },
        metric="gsm8k_paper",
        row=row,
        toy=("llama_base", "metamath"),
    )


INSTRUCT_TASKS = (
    _metamath("metamath", "MetaMathQA as in LoRA-Pro's code, then GSM8K", ALPACA, gsm_rows),
    _metamath("metamath-qa", "MetaMathQA as in LoRA-GA's code, then GSM8K", QUESTION, gsm_rows_cut),
    TaskEntry(
        "codefeedback",
        "instruct",
        "CodeFeedback, then HumanEval",
        model=_LLAMA,
        data="m-a-p/CodeFeedback-Filtered-Instruction",
        values={
            "instruction_column": "query",
            "answer_column": "answer",
            "train_samples": 100_000,
            "validation_samples": 1_000,
            "test_samples": 1_000,
            "benchmark": "humaneval",
        },
        metric="humaneval",
        row=first_code_block,
        toy=("llama_base", "codefeedback"),
    ),
    TaskEntry(
        "wizardlm",
        "instruct",
        "WizardLM, then MT-Bench's first turn",
        model=_LLAMA,
        data="silk-road/Wizard-LM-Chinese-instruct-evol",
        values={
            "train_samples": 52_000,
            "validation_samples": 1_000,
            "test_samples": 1_000,
            "benchmark": "mt_bench",
            "max_new_tokens": 1024,
        },
        metric="mt_bench",
        row=no_refusals,
        toy=("llama_base", "wizardlm"),
    ),
)
