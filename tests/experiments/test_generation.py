from __future__ import annotations

import json

import pytest
import torch

from lorapro.experiments.config import build_config
from lorapro.experiments.generation import generate, left_pad
from lorapro.experiments.runner import make_task
from lorapro.experiments.tasks import load_tokenizer
from lorapro.experiments.tasks.causal import prompt_ids

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


def test_exact_match_counts_and_saves_in_the_order_of_the_rows(solve, tmp_path):
    family = make_task(build_config({**solve, "generation_batch_size": 2}))
    family.test_rows = [
        {"question": "a much longer question than all the others?", "answer": "x\n#### 1,000"},
        {"question": "short?", "answer": "#### 2"},
        {"question": "medium size?", "answer": "#### 3"},
    ]
    questions = [row["question"] for row in family.test_rows]
    said = dict(zip(questions, ["#### 1000.", "it is 2", "#### 4"], strict=True))
    path = tmp_path / "predictions.jsonl"
    found = family.final_metrics(Parrot(family.tokenizer, said), path, 3)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["exact_match_strict"] == pytest.approx(1 / 3)
    assert found["exact_match_total"] == 3
    assert 0 < found["exact_match_low"] < 2 / 3 < found["exact_match_high"] < 1
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["question"] for r in records] == questions
    assert [r["correct"] for r in records] == [True, True, False]
