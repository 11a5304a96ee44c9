"""Tasks on models and data out of PyPI packages: what two cores can carry."""

from __future__ import annotations

from typing import Any

from lorapro.experiments.tasks.base import TaskEntry
from lorapro.experiments.tasks.instruct import ALPACA

__all__ = ["LOCAL_TASKS"]


def _texts(name: str, about: str, length: int, **values: Any) -> TaskEntry:
    """An encoder and labelled texts."""
    pairs = "second_text_column" in values
    return TaskEntry(
        name,
        "text_classification",
        about,
        model="minilm-l6",
        data=name,
        values={"max_length": length, **values},
        metric="accuracy",
        toy=("bert", "labelled_pairs" if pairs else "labelled_texts"),
    )


def _rewriting(name: str, about: str) -> TaskEntry:
    """A language model and pairs of sentences, in the papers' format of instructions.

    The verb to apply is nowhere said: it is what the data teaches.
    """
    return TaskEntry(
        name,
        "causal",
        about,
        model="smollm2-135m-instruct",
        data=name,
        values={"prompt": ALPACA, "answer": " {output}", "chat": False, "max_length": 96},
        metric="answer_accuracy",
        toy=("llama", "rewritten_sentences"),
    )


LOCAL_TASKS = (
    _texts("rotten-tomatoes", "film reviews, negative or positive, as SST-2", 32),
    _texts(
        "vitaminc",
        "passage and claim: true, false or neither, as MNLI",
        64,
        text_column="premise",
        second_text_column="hypothesis",
    ),
    _texts("newsgroups", "messages of twenty newsgroups", 48),
    _texts("reuters-r8", "Reuters reports in eight topics", 48),
    _texts("bbc-news", "BBC news articles in five topics", 48),
    TaskEntry(
        "cifar10",
        "images",
        "the test images of CIFAR-10",
        model="vit-s14-focus",
        data="cifar10-test",
        metric="accuracy",
        toy=("dinov2", "named_images"),
    ),
    TaskEntry(
        "fashion-mnist",
        "images",
        "Fashion-MNIST, from Debian's package dataset-fashion-mnist",
        model="vit-s14-focus",
        data="/usr/share/datasets/fashion-mnist",
        metric="accuracy",
        toy=("dinov2", "idx_images"),
    ),
    _rewriting("question-formation", "a sentence becomes a question"),
    _rewriting("sentence-negation", "a sentence becomes its negation"),
    TaskEntry(
        "spoken-questions",
        "speech",
        "Whisper hears a sentence and writes the question made of it",
        model="whisper-tiny-en",
        data="spoken-questions",
        values={"answer_column": "output"},
        metric="accuracy",
        toy=("whisper", "tones"),
    ),
)
