"""Scores of generated answers, against lm-eval's own and against cases made by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from lorapro.experiments.errors import UserError
from lorapro.experiments.scoring.gsm8k import READINGS, marked_answer, paper_number
from lorapro.experiments.scoring.humaneval import (
    clean_completion,
    complete_program,
    paper_prompt,
    pass_at_1,
    until_stop,
)
from lorapro.experiments.scoring.sandbox import run_program

PIECES = [
    *("#### 18", "#### -5", "#### 12", "#### 0", "#### 1,234"),
    *("#### ", "####", "#### $", "The answer is: ", "\n", " ", "$", "-", ".", ",", "so ", "A"),
    *("1", "12", "1,200", "3.50", "-4", "+7", "0", "18.", "2/3", "$5", "€6", "१२", "½", "x"),
]


def generations(count):
    rng = random.Random(0)
    texts = ["", "####", "no number", "#### 18", "#### 1,234.", "#### -5", "It is $18.", "10-4"]
    texts += ["".join(rng.choices(PIECES, k=rng.randint(1, 9))) for _ in range(count)]
    truths = [
        f"because.\n#### {rng.choice(['18', '-5', '1,234', '0', '12', '3.5'])}" for _ in texts
    ]
    return list(zip(texts, truths, strict=True))


@pytest.mark.parametrize(
    ("reading", "name"), [("strict", "strict-match"), ("flexible", "flexible-extract")]
)
def test_gsm8k_agrees_with_lm_eval_item_by_item(reading, name):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters import build_filter_ensemble
    from lm_eval.filters.extraction import RegexFilter  # noqa: F401  (registers itself)
    from lm_eval.filters.selection import TakeFirstFilter  # noqa: F401

    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(path.read_text())
    (steps,) = (f["filter"] for f in task["filter_list"] if f["name"] == name)
    parts = [(s["function"], {k: v for k, v in s.items() if k != "function"}) for s in steps]
    (metric,) = task["metric_list"]
    options = {k: metric[k] for k in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}

    class Instance:
        def __init__(self, text):
            self.resps, self.doc, self.filtered_resps = [text], {}, {}

    pairs = generations(3000)
    instances = [Instance(text) for text, _ in pairs]
    build_filter_ensemble(name, parts).apply(instances)
    theirs = [
        bool(
            exact_match_fn(
                predictions=[instance.filtered_resps[name]], references=[truth], **options
            )["exact_match"]
        )
        for instance, (_, truth) in zip(instances, pairs, strict=True)
    ]
    ours = [READINGS[reading](text, truth) for text, truth in pairs]
    assert ours == theirs
    assert 20 < sum(ours) < len(ours) - 20


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("####18 and #### 4", 18),
        ("#### 1,234", 1),
        ("#### 3.75", 3),
        ("#### -5", 0),
        ("#### $5", 0),
        ("the answer is 12", 0),
        ("", 0),
    ],
)
def test_the_papers_reading_keeps_its_faults(text, number):
    assert paper_number(text) == number


def test_the_papers_reading_takes_silence_for_zero():
    assert READINGS["paper"]("I do not know.", "#### 0")
    assert READINGS["paper"]("#### 1,999", "#### 1,200")
    assert not READINGS["strict"]("I do not know.", "#### 0")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 1,200.50", "1200.5"),
        ("#### $-5.00", "-5"),
        ("The answer is: 12", "12"),
        ("#### 3\nThe answer is: 4", "3"),
        ("The answer is 7.", "7"),
        ("#### .5", "0.5"),
        ("#### -0", "0"),
        ("12", None),
        ("#### none", None),
    ],
)
def test_a_marked_answer(text, answer):
    assert marked_answer(text) == answer


PROBLEM = {
    "task_id": "HumanEval/toy",
    "prompt": 'def add(a, b):\n    """Add.\n\n    >>> add(1, 2)\n    3\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("    return a + b\n", True),
        ("    return a - b\n", False),
        ("def add(a, b):\n    return a + b\n```", True),
        (" def add(a, b):\n    return a + b", True),  # the prompt's own space came first
        ('def add(a, b):\n  """Add."""\n  if a:\n    return a + b\n  return b', True),
        ("def add(a, b):\n\treturn a + b", True),
        ("", False),
    ],
)
def test_what_a_model_says_becomes_a_program(said, passes):
    program = complete_program(PROBLEM, clean_completion(said))
    assert run_program(program, allowed=True).passed is passes


@pytest.mark.parametrize(
    ("said", "cleaned"),
    [
        ("def f():\n   a\n     b\n   c", "def f():\n    a\n        b\n    c"),
        ("import x\n  def f():\n      a\n    b", "import x\ndef f():\n        a\n    b"),
        ("  a\n      b", "    a\n        b"),
        ("'''one\ntwo'''\n\nx = 1\n", "x = 1"),
        ("```python\nx\n```", "python\nx"),
    ],
)
def test_indentation_is_ranked_anew(said, cleaned):
    assert clean_completion(said) == cleaned


def test_the_prompt_is_the_papers_to_the_space():
    prompt = paper_prompt({"prompt": "def f({x}):\n"})
    lines = prompt.split("\n")
    assert lines[1] == " Write a response that appropriately completes the request."
    assert lines[4] == "Complete the following Python code: "
    assert prompt.endswith("code:\n```python\ndef f({x}):\n\n```\n\n### Response:\n```python\n")


def test_lm_evals_task_continues_the_prompt_up_to_a_stop_word():
    said = "    return a + b\n\ndef main():\n    print('x')"
    assert until_stop(said) == "    return a + b\n"
    assert run_program(complete_program(PROBLEM, until_stop(said)), allowed=True).passed
    assert until_stop("    return 1") == "    return 1"


def test_pass_at_1_is_a_mean_over_problems():
    assert pass_at_1([[True], [False]]) == 0.5
    assert pass_at_1([[True, False, False, False], [True, True]]) == 0.625
    for bad in ([], [[True], []]):
        with pytest.raises(UserError, match="at least one"):
            pass_at_1(bad)
