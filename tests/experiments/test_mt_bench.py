"""MT-Bench's first turn against a judge that answers over HTTP on this machine."""

from __future__ import annotations

import json
import re

import pytest

from lorapro.experiments.errors import UserError
from lorapro.experiments.scoring.mt_bench import Judge, MTBench, rating, summarize, temperature

PROMPTS = {
    "single-v1": "Judge.\n[Question]\n{question}\n[Answer]\n{answer}\n[End]",
    "single-math-v1": "Judge.\n[Q]\n{question}\n[Ref]\n{ref_answer_1}\n[Answer]\n{answer}\n[End]",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mt_bench" / "reference_answer").mkdir(parents=True)
    prompts = [
        {"name": name, "type": "single", "system_prompt": "Be fair.", "prompt_template": text}
        for name, text in PROMPTS.items()
    ]
    write(tmp_path / "judge_prompts.jsonl", prompts)
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write {a} line.", "Again."]},
        {"question_id": 111, "category": "math", "turns": ["What is 1+1?", "And 2+2?"]},
        {"question_id": 151, "category": "humanities", "turns": ["Who was Plato?", "When?"]},
    ]
    write(tmp_path / "mt_bench" / "question.jsonl", questions)
    answers = [{"question_id": 111, "choices": [{"index": 0, "turns": ["It is 2.", "It is 4."]}]}]
    write(tmp_path / "mt_bench" / "reference_answer" / "gpt-4.jsonl", answers)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def endpoint(judge_server):
    """A judge that rates an answer with its length."""

    def length(prompt):
        said = re.search(r"\[Answer\]\n(.*)\n\[End\]", prompt, re.DOTALL).group(1)
        return f"Well. Rating: [[{len(said)}]]"

    judge_server.says = length
    return judge_server


def test_answers_are_rated_and_the_judge_is_recorded(folder, endpoint):
    bench = MTBench(folder)
    judge = Judge("judge", endpoint.url, key="secret")
    records = judge.rate(bench, bench.questions, ["abc", "two", "seven l"], workers=1)
    assert [r["judgement"]["rating"] for r in records] == [3, 3, 7]
    result = summarize(records, judge)
    assert result["mt_bench"] == pytest.approx(13 / 3)
    assert result["mt_bench_by_category"] == {"humanities": 7, "math": 3, "writing": 3}
    assert (result["judge"], result["judge_answered_as"]) == ("judge", ["judge-2024-05-13"])
    assert result["judge_fingerprints"] == ["fp_1"]
    paths, headers, bodies = zip(*endpoint.asked, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    assert all(h["Authorization"] == "Bearer secret" for h in headers)
    assert all(b["model"] == "judge" and b["temperature"] == 0 for b in bodies)
    assert [b["messages"][0]["content"] for b in bodies] == ["Be fair."] * 3
    first, second, _ = (b["messages"][1]["content"] for b in bodies)
    assert first == "Judge.\n[Question]\nWrite {a} line.\n[Answer]\nabc\n[End]"
    assert second == "Judge.\n[Q]\nWhat is 1+1?\n[Ref]\nIt is 2.\n[Answer]\ntwo\n[End]"


def test_a_busy_judge_is_asked_again_and_a_refusal_is_not(folder, endpoint):
    bench = MTBench(folder)
    judge = Judge("judge", endpoint.url, pause=0.01, tries=3)
    messages = bench.messages(bench.questions[0], "abcd")
    endpoint.failures = [429, 503]
    assert judge.ask(messages).rating == 4
    assert len(endpoint.asked) == 3
    endpoint.failures = [401]
    with pytest.raises(UserError, match="HTTP 401: try later"):
        judge.ask(messages)
    assert len(endpoint.asked) == 4
    endpoint.failures = [500] * 3
    with pytest.raises(UserError, match="gave no answer"):
        judge.ask(messages)


def test_nobody_there_is_one_clear_line():
    judge = Judge("judge", "http://127.0.0.1:9/v1", tries=1)
    with pytest.raises(UserError, match="the judge 'judge' at http://127.0.0.1:9/v1") as caught:
        judge.ask([])
    assert "\n" not in str(caught.value)


def test_answers_without_a_rating_are_left_out_and_counted(folder, endpoint):
    bench = MTBench(folder)
    judge = Judge("judge", endpoint.url)
    records = judge.rate(bench, bench.questions[:1], ["abc"])
    endpoint.says = "I would rather not."
    records += judge.rate(bench, bench.questions[1:2], ["abc"])
    result = summarize(records, judge)
    assert (result["mt_bench"], result["mt_bench_unrated"]) == (3, 1)
    with pytest.raises(UserError, match="rated none"):
        summarize(records[1:], judge)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Rating: [[7]]", 7),
        ("[[6.5]] then [[8]]", 6.5),
        ("Rating: [9]", 9),
        ("Rating: 9", -1),
        ("[[rating]]", -1),
    ],
)
def test_rating(text, found):
    assert rating(text) == found


def test_temperatures_by_category():
    found = {c: temperature(c) for c in ("roleplay", "stem", "coding", "extraction", "reasoning")}
    assert found == {"roleplay": 0.7, "stem": 0.1, "coding": 0, "extraction": 0, "reasoning": 0}


def test_what_is_missing_is_named(folder):
    (folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl").write_text("")
    with pytest.raises(UserError, match="question 111"):
        MTBench(folder)
    write(folder / "judge_prompts.jsonl", [{"name": "single-v1"}])
    with pytest.raises(UserError, match="no prompt 'single-math-v1'"):
        MTBench(folder)
    with pytest.raises(UserError, match=r"no file .*judge_prompts\.jsonl"):
        MTBench(folder / "mt_bench")


def test_the_judge_from_the_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        Judge.from_environment("gpt-4")
    assert Judge.from_environment("m", "http://localhost:8000/v1/").key is None
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert Judge.from_environment("gpt-4").base_url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    assert Judge.from_environment("gpt-4").base_url == "http://localhost:1/v1"
    with pytest.raises(UserError, match="http://"):
        Judge.from_environment("gpt-4", "localhost:1")
