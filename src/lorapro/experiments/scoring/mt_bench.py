"""MT-Bench, first turn: questions and judge prompts from FastChat's files, a judge over HTTP.

Nothing of MT-Bench is kept here: a folder in the layout of FastChat's ``llm_judge/data`` gives
questions, reference answers and the prompts ``single-v1`` and ``single-math-v1``.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorapro.experiments.errors import UserError

__all__ = ["Judge", "Judgement", "MTBench", "Question", "temperature"]

NEEDS_REFERENCE = ("math", "reasoning", "coding")
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_IN_ONE = re.compile(r"\[(\d+\.?\d*)\]")


def temperature(category: str) -> float:
    """Return FastChat's sampling temperature for a category of questions.

    >>> temperature("writing"), temperature("math")
    (0.7, 0.0)
    """
    return _TEMPERATURES.get(category, 0.0)


def rating(judgement: str) -> float:
    """Return the judge's rating, -1 if there is none.

    >>> rating("Good. Rating: [[7.5]]"), rating("Rating: 7")
    (7.5, -1.0)
    """
    found = _RATING.search(judgement) or _RATING_IN_ONE.search(judgement)
    return float(found.group(1)) if found else -1.0


@dataclass(frozen=True)
class Question:
    """The first turn of one question; ``reference`` where the category needs one."""

    number: int
    category: str
    text: str
    reference: str | None


@dataclass(frozen=True)
class Judgement:
    """What the judge said of one answer; ``rating`` is -1 if it gave none.

    ``model`` is the name that the endpoint answered with, which tells versions apart where the
    requested name does not.
    """

    rating: float
    text: str
    model: str
    fingerprint: str | None


class MTBench:
    """Questions and judge prompts of a folder.

    Args:
        folder: holds ``judge_prompts.jsonl``, ``mt_bench/question.jsonl`` and
            ``mt_bench/reference_answer/gpt-4.jsonl``, as FastChat's ``llm_judge/data`` does.

    Raises:
        UserError: a file or a prompt is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        root = Path(folder)
        prompts = {row["name"]: row for row in _lines(root / "judge_prompts.jsonl")}
        for name in ("single-v1", "single-math-v1"):
            if name not in prompts:
                raise UserError(f"{root / 'judge_prompts.jsonl'} has no prompt {name!r}")
        self._prompts = prompts
        answers = _lines(root / "mt_bench" / "reference_answer" / "gpt-4.jsonl")
        references = {row["question_id"]: row["choices"][0]["turns"][0] for row in answers}
        self.questions: list[Question] = []
        for row in _lines(root / "mt_bench" / "question.jsonl"):
            number, category = row["question_id"], row["category"]
            needed = category in NEEDS_REFERENCE
            if needed and number not in references:
                raise UserError(f"question {number} ({category}) has no reference answer in {root}")
            reference = references[number] if needed else None
            self.questions.append(Question(number, category, row["turns"][0], reference))

    def messages(self, question: Question, answer: str) -> list[dict[str, str]]:
        """Return the conversation that asks the judge for a rating of ``answer``."""
        prompt = self._prompts["single-v1" if question.reference is None else "single-math-v1"]
        values = {"question": question.text, "answer": answer}
        if question.reference is not None:
            values["ref_answer_1"] = question.reference
        return [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**values)},
        ]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"no file {path}; MT-Bench needs a folder laid out as FastChat's llm_judge/data "
            "(the asset mt-bench is one)"
        )
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error


@dataclass(frozen=True)
class Judge:
    """A model behind an endpoint that speaks OpenAI's chat completions.

    Attributes:
        model: its name there.
        base_url: up to and without ``/chat/completions``.
        key: sent as bearer token, if there is one.
        tries: how often to ask when the endpoint is busy or fails.
        timeout: seconds to wait for an answer.
        pause: seconds before the second try; doubled each time.
    """

    model: str
    base_url: str
    key: str | None = None
    tries: int = 6
    timeout: float = 120.0
    pause: float = 1.0

    @classmethod
    def from_environment(cls, model: str, base_url: str | None = None) -> Judge:
        """Take the key from ``OPENAI_API_KEY``, the address from ``OPENAI_BASE_URL`` if not given.

        Raises:
            UserError: OpenAI's own endpoint without a key.
        """
        url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        key = os.environ.get("OPENAI_API_KEY")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"judge_url must begin with http:// or https://, found {url!r}")
        if key is None and url.startswith("https://api.openai.com"):
            raise UserError(
                "the judge at api.openai.com needs a key in the variable OPENAI_API_KEY; for "
                "another endpoint give --judge_url, or --generation_samples 0 to leave it out"
            )
        return cls(model, url.rstrip("/"), key)

    def ask(self, messages: Sequence[dict[str, str]]) -> Judgement:
        """Return the judge's answer.

        Raises:
            UserError: no usable answer after every try.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": 0}
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions",
            data=json.dumps({**body, "max_tokens": 2048}).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
        )
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    answer = json.load(response)
                text = str(answer["choices"][0]["message"]["content"] or "")
                model = str(answer.get("model", self.model))
                return Judgement(rating(text), text, model, answer.get("system_fingerprint"))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(200).decode('utf-8', 'replace').strip()}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())
        raise UserError(f"the judge {self.model!r} at {self.base_url} gave no answer ({reason})")

    def rate(
        self,
        bench: MTBench,
        questions: Sequence[Question],
        answers: Sequence[str],
        on_done: Callable[[], None] | None = None,
        workers: int = 4,
    ) -> list[dict[str, Any]]:
        """Rate each answer; return one record a question, in order."""

        def one(pair: tuple[Question, str]) -> dict[str, Any]:
            question, answer = pair
            judgement = self.ask(bench.messages(question, answer))
            if on_done is not None:
                on_done()
            return {**asdict(question), "answer": answer, "judgement": asdict(judgement)}

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, zip(questions, answers, strict=True)))


def summarize(records: Sequence[dict[str, Any]], judge: Judge) -> dict[str, Any]:
    """Return the mean rating (of rated answers, as FastChat does), by category too, and the judge.

    Raises:
        UserError: not one answer was rated.
    """
    rated = [r for r in records if r["judgement"]["rating"] >= 0]
    if not rated:
        raise UserError(f"the judge {judge.model!r} rated none of {len(records)} answers")
    categories: dict[str, list[float]] = {}
    for record in rated:
        categories.setdefault(record["category"], []).append(record["judgement"]["rating"])
    ratings = [r["judgement"]["rating"] for r in rated]
    return {
        "mt_bench": sum(ratings) / len(ratings),
        "mt_bench_rated": len(rated),
        "mt_bench_unrated": len(records) - len(rated),
        "mt_bench_by_category": {k: sum(v) / len(v) for k, v in sorted(categories.items())},
        "judge": judge.model,
        "judge_url": judge.base_url,
        "judge_answered_as": sorted({r["judgement"]["model"] for r in records}),
        "judge_fingerprints": sorted({str(r["judgement"]["fingerprint"]) for r in records}),
    }
