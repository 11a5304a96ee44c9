"""Writers of small files in the schema of the papers' data sets; all text is made up here."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapro.experiments.tasks.glue import GLUE_TASKS
from lorapro.experiments.tasks.instruct import ALPACA, QUESTION
from lorapro.experiments.toys.data import sentences, write_jsonl

__all__ = ["PAPER_DATA"]

Writer = Callable[[Path], tuple[Path, list[str]]]
Rows = list[dict[str, Any]]

TRAIN, TEST = 150, 12


def _benchmark(folder: Path) -> Path:
    (folder / "benchmark").mkdir()
    return folder / "benchmark"


def _asked(rows: Rows, instruction: str, answer: str, prompts: tuple[str, ...]) -> list[str]:
    """Return rows as the model will read them, for its tokenizer."""
    return [p.format(instruction=row[instruction]) + row[answer] for row in rows for p in prompts]


def metamath(folder: Path) -> tuple[Path, list[str]]:
    """MetaMathQA's columns; every third row is of MATH. Beside it GSM8K's test questions."""
    rng = random.Random(0)
    rows: Rows = []
    for number in range(TRAIN):
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        question = f"Ann has {a} cups and finds {b}. How many?"
        working = f"{a}+{b}={a + b}" if number % 2 else f"{a + b}"
        response = f"{working}\n#### {a + b}\nThe answer is: {a + b}"
        kind = "MATH_AnsAug" if number % 3 == 2 else "GSM_Rephrased"
        rows.append(
            {
                "query": question,
                "response": response,
                "original_question": question,
                "type": kind,
            }
        )
    write_jsonl(folder / "train.jsonl", rows)
    test = [
        {"question": f"Bob has {n} pens and buys 3. How many?", "answer": f"sum\n#### {n + 3}"}
        for n in range(TEST)
    ]
    write_jsonl(_benchmark(folder) / "test.jsonl", test)
    return folder, _asked(rows, "query", "response", (ALPACA, QUESTION))


def codefeedback(folder: Path) -> tuple[Path, list[str]]:
    """CodeFeedback's columns; every fifth answer has no code. Beside it HumanEval's columns."""
    rows: Rows = []
    for number in range(TRAIN):
        code = f"```python\ndef add_{number}(x):\n    return x + {number}\n```"
        answer = "Just add." if number % 5 == 4 else f"So:\n{code}\nAnd {code}"
        rows.append(
            {
                "query": f"Write add_{number}.",
                "answer": answer,
                "resource": "evolinstruct",
                "lang": "python",
            }
        )
    write_jsonl(folder / "train.jsonl", rows)
    test = [
        {
            "task_id": f"Toy/{n}",
            "prompt": f'def add_{n}(x):\n    """Add {n} to x."""\n',
            "entry_point": f"add_{n}",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        }
        for n in range(TEST)
    ]
    write_jsonl(_benchmark(folder) / "test.jsonl", test)
    return folder, _asked(rows, "query", "answer", (ALPACA,))


def wizardlm(folder: Path) -> tuple[Path, list[str]]:
    """WizardLM's columns; every sixth answer is a refusal. Beside it FastChat's files."""
    rows: Rows = []
    for number, (text, label) in enumerate(sentences(TRAIN)):
        output = "Sorry, no." if number % 6 == 5 else f"It sounds {label}."
        rows.append({"instruction": f"How is {text}?", "output": output})
    write_jsonl(folder / "train.jsonl", rows)
    bench = _benchmark(folder)
    (bench / "mt_bench" / "reference_answer").mkdir(parents=True)
    prompt = "Rate the answer as [[number]].\nQuestion: {question}\n"
    prompts = {"single-v1": "", "single-math-v1": "Reference: {ref_answer_1}\n"}
    write_jsonl(
        bench / "judge_prompts.jsonl",
        (
            {
                "name": name,
                "type": "single",
                "system_prompt": "You rate answers.",
                "prompt_template": f"{prompt}{extra}Answer: {{answer}}",
            }
            for name, extra in prompts.items()
        ),
    )
    categories = ["writing", "math", "stem"]
    questions = [
        {
            "question_id": 81 + n,
            "category": categories[n % 3],
            "turns": [f"What is {n} and {n}?", "Why?"],
        }
        for n in range(TEST)
    ]
    write_jsonl(bench / "mt_bench" / "question.jsonl", questions)
    references = [
        {"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["Twice.", "So."]}]}
        for q in questions
        if q["category"] == "math"
    ]
    write_jsonl(bench / "mt_bench" / "reference_answer" / "gpt-4.jsonl", references)
    return folder, _asked(rows, "instruction", "output", (ALPACA,))


def _glue(name: str) -> Writer:
    """GLUE's columns and integer labels; the test split is unlabelled, as the hub's is."""
    columns = {
        "mnli": ("premise", "hypothesis"),
        "qnli": ("question", "sentence"),
        "mrpc": ("sentence1", "sentence2"),
    }.get(name, ("sentence",))
    labels = 3 if name == "mnli" else 2
    split = "validation_matched" if name == "mnli" else "validation"

    def write(folder: Path) -> tuple[Path, list[str]]:
        """Write ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``."""
        seen: list[str] = []
        for part, count in (("train", TRAIN), (split, TEST), ("test", TEST)):
            texts = [text for text, _ in sentences(3 * count, seed=len(part))]
            rows: Rows = []
            for number in range(count):
                label = number % labels
                row: dict[str, Any] = {
                    column: texts[3 * number + (label if at == 0 else 0)]
                    for at, column in enumerate(columns)
                }
                rows.append({**row, "label": -1 if part == "test" else label, "idx": number})
            write_jsonl(folder / f"{part}.jsonl", rows)
            seen += [str(row[column]) for row in rows for column in columns]
        words = [w for entry in GLUE_TASKS for w in entry.values["label_words"]]
        sources = [entry.values["source"] for entry in GLUE_TASKS]
        return folder, [*seen, *(10 * [*words, *sources])]

    return write


PAPER_DATA: dict[str, Writer] = {
    "metamath": metamath,
    "codefeedback": codefeedback,
    "wizardlm": wizardlm,
    **{f"glue_{name}": _glue(name) for name in ("mnli", "sst2", "cola", "qnli", "mrpc")},
}
