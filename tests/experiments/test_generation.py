from __future__ import annotations

import json

import pytest
import torch

from lorapro.experiments.generation import exact_match, extract_answer, generate, left_pad
from lorapro.experiments.tasks import load_tokenizer
from lorapro.experiments.tasks.causal import prompt_ids


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("16 - 3 - 4 = 9 eggs.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### $1,234.00", "1234"),
        ("#### -5", "-5"),
        ("#### -$5.50", "-5.5"),
        ("#### +7.", "7"),
        ("####7 dollars", "7"),
        ("#### .5", "0.5"),
        ("#### 100", "100"),
        ("#### 3 apples and #### 4", "3"),
        ("#### 12\nSo 13 is wrong.", "12"),
        ("The answer is 72.", "72"),
        ("It costs $3.50.", "3.5"),
        ("between 2,000 and 3,000.", "3000"),
        ("10-4", "4"),
        ("it fell to -4 degrees", "-4"),
        ("#### none, about 6", "6"),
        ("1.10 and 1.1000", "1.1"),
        ("no number", None),
        ("", None),
        ("####", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


QUESTIONS = ["1+1?", "How many are three times four and two more, if one is lost?", "2 and 2", "0?"]


@pytest.fixture
def llama(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama), load_tokenizer(str(tiny_llama), "tiny")


def test_batched_answers_are_those_given_one_by_one(llama):
    model, tokenizer = llama
    prompts = [prompt_ids(tokenizer, q) for q in QUESTIONS]
    one_by_one = [generate(model, tokenizer, [p], max_new_tokens=20)[0] for p in prompts]
    assert len(set(one_by_one)) == len(QUESTIONS)  # the model's answers do depend on the prompt
    for batch_size in (2, 4):
        together = generate(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=20)
        assert together == one_by_one


def test_without_the_mask_the_answers_would_differ(llama):
    model, tokenizer = llama
    prompts = [prompt_ids(tokenizer, q) for q in QUESTIONS]
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    assert mask.sum(1).tolist() == [len(p) for p in prompts]
    assert ids[0, -len(prompts[0]) :].tolist() == prompts[0]
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        kept = model.generate(input_ids=ids, attention_mask=mask, **options)
        dropped = model.generate(input_ids=ids, attention_mask=torch.ones_like(mask), **options)
    assert not torch.equal(kept, dropped)


class Parrot:
    """Answers a question with the number it was told to give."""

    training, device = False, torch.device("cpu")

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, answers

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, attention_mask, **kwargs):
        said = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()])
            answer = next(a for q, a in self.answers.items() if q in text)
            said.append(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        tail, _ = left_pad(said, kwargs["eos_token_id"])
        return torch.cat([input_ids, tail], dim=1)


def test_exact_match_counts_and_saves_in_the_order_of_the_rows(tiny_llama, tmp_path):
    tokenizer = load_tokenizer(str(tiny_llama), "tiny")
    rows = [
        {"question": "a much longer question than all the others?", "answer": "x\n#### 1,000"},
        {"question": "short?", "answer": "#### 2"},
        {"question": "medium size?", "answer": "#### 3"},
    ]
    said = dict(
        zip([r["question"] for r in rows], ["#### 1000.", "it is 2", "#### 4"], strict=True)
    )
    path = tmp_path / "predictions.jsonl"
    prompts = [prompt_ids(tokenizer, row["question"]) for row in rows]
    score = exact_match(
        Parrot(tokenizer, said), tokenizer, rows, prompts=prompts, batch_size=2, save_to=path
    )
    assert (score.correct, score.total) == (2, 3)
    assert 0 < score.as_dict()["exact_match_low"] < 2 / 3 < score.as_dict()["exact_match_high"] < 1
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["question"] for r in records] == [r["question"] for r in rows]
    assert [r["correct"] for r in records] == [True, True, False]
    assert [r["truth"] for r in records] == ["1000", "2", "3"]
