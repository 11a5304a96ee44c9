"""What a trained model is asked: GSM8K, HumanEval, MT-Bench's first turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.assets import asset_path
from lorapro.experiments.data import Row, load_rows, require_columns
from lorapro.experiments.errors import UserError
from lorapro.experiments.generation import generate, save_records
from lorapro.experiments.scoring import gsm8k, humaneval, mt_bench, sandbox

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BENCHMARKS", "GSM8K", "Benchmark", "HumanEval", "MTBenchFirstTurn"]

Ask = Callable[[str], str]
"""Instruction -> the prompt that the model was trained with; one more space follows it."""


class Benchmark(ABC):
    """Items, how they are put to the model, and how its answers are scored.

    Args:
        options: :class:`~lorapro.experiments.tasks.instruct.InstructOptions`.
        source: asset, file, folder or hub id.
        allowed: whether programs that the model writes may run.

    Raises:
        UserError: what is needed for the score is not there.
    """

    default_data: ClassVar[str]
    data_config: ClassVar[str | None] = None
    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any, source: str, allowed: bool = False) -> None:
        self.options, self.source, self.allowed = options, source, allowed
        self.items = self.load()

    @classmethod
    def check(cls, options: Any, allowed: bool) -> None:
        """Raise :class:`UserError` for options that this benchmark cannot run with."""
        return

    def load(self) -> list[Any]:
        """Return the items."""
        config = self.data_config if self.source == self.default_data else None
        file = Path(self.source) / "test.jsonl"
        splits = load_rows(str(file) if file.is_file() else self.source, config)
        rows = splits.get("test") or (next(iter(splits.values())) if len(splits) == 1 else None)
        if rows is None:
            raise UserError(f"{self.source} has no split 'test'; it has: {', '.join(splits)}")
        require_columns(rows, self.columns, self.source, "")
        return rows

    @abstractmethod
    def score(
        self,
        ask: Ask,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        save_to: Path | None,
    ) -> dict[str, float]:
        """Answer the first ``samples`` items; save records; return the metrics."""

    def answer(
        self,
        texts: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
    ) -> list[str]:
        """Let the model continue each text."""
        longest = self.options.max_prompt_tokens
        prompts = [
            tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts
        ]
        return generate(
            model,
            tokenizer,
            prompts,
            batch_size=self.options.generation_batch_size,
            max_new_tokens=self.options.max_new_tokens,
            temperature=temperature,
            top_p=self.options.top_p,
        )


class GSM8K(Benchmark):
    """GSM8K's test questions, zero-shot, in four readings; the papers' is the main one."""

    default_data = "openai/gsm8k"
    data_config = "main"
    columns = ("question", "answer")

    def score(
        self,
        ask: Ask,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        save_to: Path | None,
    ) -> dict[str, float]:
        """Share of right numbers, as ``gsm8k_<reading>``."""
        rows: list[Row] = self.items[:samples]
        texts = [f"{ask(str(row['question']))} " for row in rows]
        said = self.answer(texts, model, tokenizer, self.options.temperature)
        records, shares = gsm8k.score(rows, said)
        save_records([{**r, "correct": r["paper"]} for r in records], save_to)
        return {f"gsm8k_{reading}": share for reading, share in shares.items()}


class HumanEval(Benchmark):
    """HumanEval's problems in the papers' instruction; pass@1 of the cleaned answers."""

    default_data = "openai/openai_humaneval"
    columns = ("task_id", "prompt", "entry_point", "test")

    @classmethod
    def check(cls, options: Any, allowed: bool) -> None:
        """Programs must be allowed to run; several samples need a temperature."""
        sandbox.check_allowed(allowed, "HumanEval")
        if options.answers_per_item > 1 and options.temperature == 0:
            raise UserError(
                f"answers_per_item is {options.answers_per_item}, but at temperature 0 all answers "
                "are the same; set a temperature (LoRA-GA's code: 0.8)"
            )

    def score(
        self,
        ask: Ask,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        save_to: Path | None,
    ) -> dict[str, float]:
        """``humaneval``: pass@1; ``humaneval_continued`` likewise, if it is asked for.

        Why each program failed and who kept it in is saved with it.
        """
        count = self.options.answers_per_item
        problems = [row for row in self.items[:samples] for _ in range(count)]
        heat = self.options.temperature
        texts = [f"{humaneval.paper_prompt(row)} " for row in problems]
        said = self.answer(texts, model, tokenizer, heat)
        records, score = self._run(problems, said, humaneval.clean_completion)
        metrics = {"humaneval": score}
        if self.options.humaneval_continued:
            said = self.answer([str(row["prompt"]) for row in problems], model, tokenizer, heat)
            continued, score = self._run(problems, said, humaneval.until_stop)
            metrics["humaneval_continued"] = score
            for record, other in zip(records, continued, strict=True):
                record["continued"] = other
        save_records(records, save_to)
        return metrics

    def _run(
        self, problems: Sequence[Row], said: Sequence[str], complete: Callable[[str], str]
    ) -> tuple[list[dict[str, Any]], float]:
        """Make programs of what was said, run them; return records and pass@1."""
        completions = [complete(text) for text in said]
        outcomes = sandbox.run_programs(
            [
                humaneval.complete_program(row, completion)
                for row, completion in zip(problems, completions, strict=True)
            ],
            allowed=self.allowed,
            limits=sandbox.Limits(seconds=self.options.code_seconds),
        )
        records = [
            {
                "task_id": row["task_id"],
                "generated": text,
                "completion": completion,
                "correct": outcome.passed,
                "reason": outcome.reason,
                "isolation": outcome.isolation,
            }
            for row, text, completion, outcome in zip(
                problems, said, completions, outcomes, strict=True
            )
        ]
        passed = [outcome.passed for outcome in outcomes]
        count = self.options.answers_per_item
        groups = [passed[i : i + count] for i in range(0, len(passed), count)]
        return records, humaneval.pass_at_1(groups)


class MTBenchFirstTurn(Benchmark):
    """MT-Bench's first questions, rated by a judge; without ``judge_model`` only answered."""

    default_data = "mt-bench"

    def load(self) -> list[Any]:
        """Return the questions; find out whether the judge has what it needs."""
        self.judge = (
            None
            if self.options.judge_model is None
            else mt_bench.Judge.from_environment(self.options.judge_model, self.options.judge_url)
        )
        self.bench = mt_bench.MTBench(asset_path(self.source))
        return self.bench.questions

    def score(
        self,
        ask: Ask,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        save_to: Path | None,
    ) -> dict[str, float]:
        """``mt_bench``: mean rating; the judge and its answers are saved with each record."""
        questions = self.bench.questions[:samples]
        said = [""] * len(questions)
        for heat in sorted({mt_bench.temperature(q.category) for q in questions}):
            chosen = [
                i for i, q in enumerate(questions) if mt_bench.temperature(q.category) == heat
            ]
            texts = [f"{ask(questions[i].text)} " for i in chosen]
            for i, text in zip(chosen, self.answer(texts, model, tokenizer, heat), strict=True):
                said[i] = text.strip()
        plain = [
            {"question_id": q.number, "category": q.category, "question": q.text, "generated": text}
            for q, text in zip(questions, said, strict=True)
        ]
        save_records(plain, save_to)  # before the judge is asked: its failure must not cost them
        if self.judge is None:
            return {}
        records = self.judge.rate(self.bench, questions, said)
        summary = mt_bench.summarize(records, self.judge)
        save_records(
            [
                {
                    **answer,
                    **record["judgement"],
                    "judge": summary["judge"],
                    "judge_url": summary["judge_url"],
                }
                for answer, record in zip(plain, records, strict=True)
            ],
            save_to,
        )
        return {name: float(summary[name]) for name in ("mt_bench", "mt_bench_unrated")}


BENCHMARKS: dict[str, type[Benchmark]] = {
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "mt_bench": MTBenchFirstTurn,
}
