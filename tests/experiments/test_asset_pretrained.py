"""A base model is pretrained from an asset's text files."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapro.experiments.assets.pretrained import Pretraining, pretrain, token_rows

SMALL = Pretraining(
    held_out=0.2, vocabulary=270, hidden=16, layers=1, heads=2, mlp=24, length=16, steps=60, batch=8
)


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(["red", "green", "blue"], k=40)) for _ in range(20)]


@pytest.fixture(scope="module")
def made(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, pretrain(texts, folder, SMALL)


def test_the_folder_loads_as_any_model_and_has_learned_its_text(made, texts):
    folder, loss = made
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = token_rows(texts, tokenizer, SMALL.length)
    with torch.no_grad():
        again = float(model(input_ids=rows, labels=rows).loss)
    assert again < 0.5 * math.log(SMALL.vocabulary)
    assert loss == pytest.approx(again, rel=0.1)
    written = json.loads((folder / "pretraining.json").read_text())
    assert written["held_out_loss"] == loss
    assert written["steps"] == SMALL.steps


def test_the_same_recipe_gives_the_same_weights_whatever_was_drawn_before(made, texts, tmp_path):
    folder, loss = made
    state = torch.random.get_rng_state()
    torch.rand(3)
    assert pretrain(texts, tmp_path / "again", SMALL) == loss
    torch.random.set_rng_state(state)
    other = pretrain(texts, tmp_path / "other", replace(SMALL, seed=1))
    assert other != loss
    assert torch.equal(torch.random.get_rng_state(), state)  # and leaves the caller's draws alone
    one, two = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "again"))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rows_hold_the_texts_with_an_end_after_each(made, texts):
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    rows = token_rows(texts[:2], tokenizer, 8)
    whole = tokenizer.decode(rows.flatten())
    end = tokenizer.eos_token
    assert rows.shape[1] == 8
    assert f"{texts[0]}{end}{texts[1]}{end}".startswith(whole)
    assert end in whole
